"""Photographs the page of a stored run, 1280 and 390 pixels wide, from top to bottom.

`nox -s study -- screenshots results/examples/smollm2-135m-2-cores` writes report-1280.png and report-390.png into that
folder, beside the report.html that `kvbench report` has made there.
"""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

from tests.chromium import chromium, opened, why_no_chromium

WIDTHS = (1280, 390)


def main() -> None:
    """Write the pictures; exit with the reason where there is no browser, or where the page reports an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that has its report.html")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    arguments = parser.parse_args()
    if reason := why_no_chromium():
        sys.exit(reason)
    file = arguments.run.resolve() / "report.html"
    with chromium() as browser:
        for width in WIDTHS:
            with opened(browser, file, width=width, scheme=arguments.scheme) as (page, wrong):
                taken = Image.open(io.BytesIO(page.screenshot(full_page=True)))
                if wrong:
                    sys.exit("; ".join(wrong))
            # The page has few colours: the file becomes a third.
            taken.convert("RGB").quantize(256).save(file.with_name(f"report-{width}.png"), optimize=True)


if __name__ == "__main__":
    main()
