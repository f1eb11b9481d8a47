"""Measures the KV caches that others publish as drop-in, each through `cache:module:factory` (10 min, pip's downloads).

Each is measured, or refused with the true reason; a round whose tokens differ from those that were checked fails.
Packages are pinned in foreign_caches.py and installed into folders of their own: the environment stays as it is.
Writes results/examples/foreign.csv and .md.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from bench.analysis.cautions import of_caches
from bench.analysis.summary import summarize
from bench.analysis.tidy import Tidy
from bench.record import Run
from bench.store.run_folder import read_run
from bench.tell.layout import markdown_table
from bench.tell.words import NOTHING, missing, number
from tests.studies.foreign_caches import FOLDERS, PACKAGES, Package

TREE = Path(__file__).resolve().parents[2]
RESULTS = TREE / "results" / "examples"
INSTALLED = TREE / ".nox" / "foreign" / platform.python_version()
GRID = ["--preset", "smoke", "-m", "smollm2-135m", "-p", "128", "-n", "16", "-d", "0,384", "-t", "1"]
GRID += ["--timeout", "7200"]
"""`smoke` is the preset without a budget, so no case is left out to save time; the other flags replace its grid.

The timeout is long: with other work on the machine a slow cache took more than the usual 900 s."""
QUICK = ["--preset", "smoke", "-m", "random:tiny", "-p", "24", "-n", "6", "-d", "0,12"]
BESIDE = 8
"""Caches in a run, which writes the text that they are judged over once: each has a process with the model."""
A_CASE_FAILED = 5
SAID = {"ok", "failed"}
"""Statuses that the heading of a list says already."""
MODULE = "cache:foreign_caches:"
OWN = "transformers' DynamicCache"
COLUMNS = {
    "n_depth": "n_depth",
    "n_prompt": "n_prompt",
    "status": "status",
    "samples": "equal_rounds",
    "kv_bytes_allocated": "bytes",
    "kv_bytes_vs_exact": "bytes_vs_dynamic",
    "logit_kl": "logit_kl",
    "logit_kl_floor": "logit_kl_floor",
    "top1_agreement": "top1_agreement",
    "recall_agreement": "recall_agreement",
    "matching_tokens": "matching_tokens",
    "error": "error",
    "caution": "caution",
}
"""Columns of the summary, and their names in foreign.csv; those of times come beside them."""
FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bytes_vs_dynamic": ("bytes / dynamic", number),
    "logit_kl": ("KL, nats", "{:.0e}".format),
    "logit_kl_floor": ("floor", "{:.0e}".format),
    "top1_agreement": ("same top 1", number),
    "recall_agreement": ("recall", number),
    "matching_tokens": ("equal tokens", "{:.0f}".format),
}
"""Columns of foreign.csv that the page shows, their headers and how they are written."""
TIMES = {"step_vs_dynamic": "step / dynamic", "prefill_vs_dynamic": "prefill / dynamic"}


def install(name: str, package: Package) -> str:
    """Install a package into its folder, unless it is there; return pip's reason where that fails."""
    folder = INSTALLED / name
    if folder.exists():
        return ""
    part = folder.with_name(f"{name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target"]
    done = subprocess.run([*pip, str(part), *package.pins], capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    part.rename(folder)
    return ""


def measure(names: Sequence[str], arguments: list[str], scratch: Path) -> pd.DataFrame:
    """Run the caches, BESIDE at a time, each time with `dynamic`; return the summaries, `dynamic` of the first only."""
    runs = [names[first : first + BESIDE] for first in range(0, len(names), BESIDE)]
    frames = [run(some, arguments, scratch / str(place)) for place, some in enumerate(runs)]
    own = [frame[frame["strategy"] != "dynamic"] for frame in frames[1:]]
    return pd.concat([*frames[:1], *own], ignore_index=True)


def run(names: Sequence[str], arguments: list[str], out: Path) -> pd.DataFrame:
    """Run some caches and `dynamic` beside each other; return the summary."""
    strategies = ",".join(["dynamic", *(MODULE + name for name in names)])
    command = [sys.executable, "-P", "-m", "bench.cli", "run", *arguments, "--strategies", strategies]
    done = subprocess.run(
        [*command, "--no-ceilings", "--out", str(out), "--name", "foreign", "-o", "csv"],
        cwd=Path(__file__).parent,  # where the factories are
        env=os.environ | {"PYTHONPATH": str(TREE), FOLDERS: str(INSTALLED)},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode not in {0, A_CASE_FAILED}:
        raise SystemExit(done.returncode)
    (folder,) = out.glob("[!.]*")
    return with_cautions(read_run(folder))


def with_cautions(run: Run) -> pd.DataFrame:
    """Return a run's summary with a column `caution`: what weakens a cache's bytes or quality."""
    summary = summarize(Tidy.of(run))
    found = pd.DataFrame([(each.case, each.text) for each in of_caches(run)], columns=["case", "caution"])
    return summary.assign(caution=summary["case"].map(found.groupby("case")["caution"].agg("; ".join)))


def table(summary: pd.DataFrame, *, times: bool) -> pd.DataFrame:
    """Make a row for each package and depth: bytes at the end of decode, quality, and the reason where it failed."""
    cases = ["strategy", "n_depth"]
    rows = summary.drop_duplicates(cases, keep="last").set_index(cases)  # decode, which is the later phase
    prefill = summary.drop_duplicates(cases).set_index(cases)
    found = rows.reset_index()[["strategy", *COLUMNS]].rename(columns=COLUMNS)
    if times:
        for name, phase in zip(TIMES, (rows, prefill), strict=True):
            found[name] = phase["latency_vs_exact"].to_numpy()
    found["error"] = found["error"].str.replace(f"{INSTALLED}{os.sep}", "").str.replace(f"{TREE}{os.sep}", "")
    found["error"] = found["error"].str.replace(rf"^{MODULE}\w+:? ", "", regex=True)  # the row names the package
    names = found["strategy"].str.removeprefix(MODULE)
    found.insert(0, "package", [PACKAGES[name].title if name in PACKAGES else OWN for name in names])
    found.insert(1, "settings", [PACKAGES[name].settings if name in PACKAGES else "-" for name in names])
    return found.assign(strategy=names)


def with_missing(found: pd.DataFrame, reasons: Mapping[str, str]) -> pd.DataFrame:
    """Add a row for each package that pip does not install, by the name of its factory, with pip's reason."""
    rows = [
        {
            "package": PACKAGES[name].title,
            "settings": PACKAGES[name].settings,
            "strategy": name,
            "status": "not installed",
            "error": reason,
        }
        for name, reason in reasons.items()
    ]
    whole = {"n_depth": "Int64", "n_prompt": "Int64"}
    return pd.concat([found, pd.DataFrame(rows, columns=found.columns)], ignore_index=True).astype(whole)


def markdown(found: pd.DataFrame, arguments: list[str], versions: str) -> str:
    """Write the rows as a page: what ran, and what was refused with its reason."""
    ran, refused = found[found["status"] == "ok"], found[found["status"] != "ok"]
    figures = FIGURES | {name: (header, number) for name, header in TIMES.items() if name in found}
    lines = [
        [row["package"], row["settings"], str(row["n_depth"])]
        + [NOTHING if missing(row[name]) else write(row[name]) for name, (_, write) in figures.items()]
        for row in ran.to_dict("records")
    ]
    headers = ["cache", "settings", "context", *(header for header, _ in figures.values())]
    align = ["left", "left", *["right"] * (len(headers) - 2)]
    return "\n".join(
        [
            "# Caches that others publish\n",
            f"`nox -s study -- foreign` measured them, {BESIDE} at a time beside `dynamic`, by",
            f"`kvbench run {' '.join(arguments)}`",
            f"({versions}, whatever versions a package asks for).",
            "Settings are those that a package's own documentation recommends. The context is fed before the prompt.",
            "Bytes are those held after the last token. KL, the same top 1 and recall are means over text that the",
            "model writes; the floor is what bfloat16 alone does. Equal tokens are the first generated ones that the",
            "exact cache emits too. Each case had at least",
            f"{ran['equal_rounds'].min():.0f} rounds, each with a new cache, and all emitted the same tokens: one that",
            "emits others in a later round is refused.",
            *([] if TIMES.keys() <= set(found) else ["Times are left out: other work ran on this machine."]),
            "",
            markdown_table(lines, headers, align),
            "\nRefused, with the reason that the run stored:\n",
            *_reasons(refused, "error"),
            "\nMeasured with a caution:\n",
            *_reasons(ran.dropna(subset="caution"), "caution"),
            "",
        ]
    )


def _reasons(rows: pd.DataFrame, column: str) -> list[str]:
    """Write a line for each cache and text of `column`, which names the contexts that have it."""
    groups = rows.groupby(["package", "settings", "status", column], sort=False, dropna=False)
    return [
        f"- {name}, {settings}{_after(group['n_depth'])}: {'' if status in SAID else f'{status}: '}`{text}`"
        for (name, settings, status, text), group in groups
    ] or ["- none"]


def _after(depths: pd.Series) -> str:
    """Name the contexts of some cases; nothing for a package that was not installed."""
    known = [str(depth) for depth in depths.dropna()]
    return f", context {' and '.join(known)}" if known else ""


def versions() -> str:
    """Name the packages that decide what runs, and the number of cores."""
    found = [f"{name} {version(name)}" for name in ("transformers", "torch", "numpy")]
    return f"{', '.join(found)}, {os.cpu_count()} CPU cores"


def main() -> None:
    """Install and measure all packages, or those of --only, and write the table."""
    parser = argparse.ArgumentParser(prog="nox -s study -- foreign", description=__doc__)
    parser.add_argument("--only", action="append", choices=PACKAGES, help="This cache only (repeatable).")
    parser.add_argument("--quick", action="store_true", help="On random:tiny, to see what runs; writes no table.")
    parser.add_argument("--no-times", action="store_true", help="Leave times out: this machine is not quiet.")
    parser.add_argument("--repetitions", type=int, default=6, help="Rounds.")
    asked = parser.parse_args()
    names = asked.only or list(PACKAGES)
    lacking = {name: reason for name in names if (reason := install(name, PACKAGES[name]))}
    installed = [name for name in names if name not in lacking]
    if not installed:
        raise SystemExit(f"nothing can be installed: {lacking}")
    arguments = [*(QUICK if asked.quick else GRID), "-r", str(asked.repetitions)]
    with tempfile.TemporaryDirectory() as scratch:
        summary = measure(installed, arguments, Path(scratch))
    found = with_missing(table(summary, times=not asked.no_times), lacking)
    page = markdown(found, arguments, versions())
    print(page)
    if not asked.quick and asked.only is None:
        found.to_csv(RESULTS / "foreign.csv", index=False, lineterminator="\n")
        (RESULTS / "foreign.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
