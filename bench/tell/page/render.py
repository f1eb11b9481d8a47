"""Values -> one HTML document by a template beside this file. What is not markup of this package is escaped."""

import base64
import hashlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

_HERE = Path(__file__).parent
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_AT_A_DEPTH = re.compile(r"(\d+) @ (\d+)")
_CODE = re.compile(r"`([^`]*)`|(?<![\w-])(--[a-z][a-z-]*)")
_WITH_INTERVAL = re.compile(r"(-?\d[\d.,e+-]*) \[([^\]]+)\]")


def document(template: str, **values: Any) -> str:
    """Fill `template` (a file beside this one) with `values`; style sheet and script stand in the document itself."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "point": point, "prose": prose, "code": code, "figures": figures}
    css, js = ((_HERE / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    own = {"css": Markup(css), "js": Markup(js), "script_hash": f"sha256-{digest}", "version": version("kvbench")}  # noqa: S704
    return environment.get_template(template).render(**own, **values)


def point(text: str) -> str:
    """Return the number that a cell begins with, by which a table is sorted; nothing if it begins with none.

    Prompts of one length are sorted by what is cached before them, in billionths.

    >>> [point(cell) for cell in ("39.9 [39.1-41.0]", "-1.00 [-2.00 to 0.500]", "2e-05", "12 of 16", "-", "true")]
    ['39.9', '-1.00', '2e-05', '12', '', '']
    >>> point("128 @ 2048")
    '128.000002048'
    """
    if "@" in text and (found := _AT_A_DEPTH.fullmatch(text)):
        return f"{found[1]}.{int(found[2]):09}"
    found = _NUMBER.match(text)
    return found[0] if found else ""


def cell(text: str, *, room: bool = False) -> Markup:
    """Write a table's cell: an interval is smaller than its figure, and below it where the page is narrow.

    With `room` there is room for an interval where there is none, so that the figures of a column stand in line.

    >>> str(cell("39.9 [39.1-41.0]")), str(cell("<b>")), str(cell("1", room=True))
    ('39.9<i>[39.1-41.0]</i>', '&lt;b&gt;', '1<i></i>')
    """
    figure, bracket, interval = text.partition(" [")
    if bracket and point(text):
        return Markup("{}<i>[{}</i>").format(figure, interval)
    return Markup("{}<i></i>").format(text) if room else escape(text)


def code(text: str) -> Markup:
    """Write a line in which backticks enclose code; a flag of the command line is code, too.

    >>> str(code("`a<b` & --c-d"))
    '<code>a&lt;b</code> &amp; <code>--c-d</code>'
    """
    written = _CODE.sub(lambda found: f"<code>{found[1] if found[2] is None else found[2]}</code>", str(escape(text)))
    return Markup(written)  # noqa: S704 - escaped before


def figures(text: Markup) -> Markup:
    """Set the figures of a sentence off from their intervals.

    >>> str(figures(Markup("<p>2.00 [1.84-2.38] at prompt 32</p>")))
    '<p><b>2.00</b> <i>[1.84-2.38]</i> at prompt 32</p>'
    """
    return Markup(_WITH_INTERVAL.sub(r"<b>\1</b> <i>[\2]</i>", str(text)))  # noqa: S704 - is markup already


def prose(text: str) -> Markup:
    r"""Write the Markdown of `bench.tell.notes`: paragraphs of a line each, and lists.

    >>> str(prose("Two:\n\n- `a`\n- b\n"))
    '<p>Two:</p><ul><li><code>a</code></li><li>b</li></ul>'
    """
    lines = [line for line in text.splitlines() if line]
    written = [
        Markup("<li>{}</li>").format(code(line[2:]))
        if line.startswith("- ")
        else Markup("<p>{}</p>").format(code(line))
        for line in lines
    ]
    return Markup(re.sub(r"((?:<li>.*?</li>)+)", r"<ul>\1</ul>", "".join(written)))  # noqa: S704 - escaped before
