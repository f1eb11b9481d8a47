"""A figure -> SVG inside a page: its words as text, its colours by the page's variables, its ids its own."""

import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree as ET

from matplotlib.figure import Figure

from bench.tell.page.narrow import Part, legend, panels
from bench.tell.plots.style import TITLE, drawn_as_svg, own_settings

_LINK = "{http://www.w3.org/1999/xlink}href"
_NUMBERS = re.compile(r"-?\d+\.\d{3,}")
_URL = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"(?:(?P<weight>bold|[1-9]00)\s+)?(?P<size>[\d.]+px)\s")
_DRAWN = ("d", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "width", "height", "points", "transform")
"""Attributes that hold coordinates in points; a hundredth of one is finer than any screen."""


ROOT = "figure_1"
"""The id that matplotlib gives to the figure; the picture's name goes before it."""


class Picture(NamedTuple):
    """A figure as a page shows it."""

    title: str
    """What is shown, and after it for which setting: each a line."""
    svg: str
    """An `<svg>` element to stand in HTML, all of it in the element `ROOT`."""
    panels: Sequence[Sequence[Part]] = ()
    """Its panels, for a page that is too narrow for all of them side by side; none where there is one alone."""
    legend: Sequence[Part] = ()
    """The entries of its legend, which then stand below."""


@own_settings()
def picture(figure: Figure, name: str, svg: str | None = None) -> Picture:
    """Write a figure as an `<svg>` element without its title, which the page writes; `name` is unique in the page.

    Its colours become `var(--c-RRGGBB, #RRGGBB)`, black the colour of the text around it. Where it is drawn already,
    `svg` is that of `bench.tell.plots.style.drawn`.
    """
    written = drawn_as_svg(figure) if svg is None else svg
    titles = [text for text in figure.texts if text.get_gid() == TITLE]
    heights = [text.get_window_extent().y0 for text in titles]
    below = min(heights, default=figure.bbox.height) / figure.bbox.height
    shown = in_page(written, name, below)
    words = str(figure.get_label()) or figure.get_suptitle()
    return Picture(title=words, svg=shown, panels=panels(figure), legend=legend(figure))


def in_page(svg: str, name: str, below: float = 1.0) -> str:
    """Turn a document of matplotlib's into an element of a page; `name` goes before each id.

    Of its height the part `below` is shown, from the bottom up.
    """
    root = ET.fromstring(svg)  # noqa: S314 - matplotlib wrote it just now
    _, _, width, height = root.attrib["viewBox"].split()
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style is for `*`, which would be the whole page
            if _tag(child) in ("metadata", "style") or child.get("id") == TITLE:
                parent.remove(child)
    linked = {ROOT} | {link for element in root.iter() for link in _links(element)}
    for element in root.iter():
        _adapt(element, name, linked)
    root.attrib.clear()
    top, shown = (1 - below) * float(height), below * float(height)
    box = f"0 {top:.1f} {width} {shown:.1f}"
    root.attrib.update({"viewBox": box, "role": "img", "aria-labelledby": f"{name}-title"})
    return ET.tostring(root, encoding="unicode")


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _links(element: ET.Element) -> list[str]:
    """List the ids that an element refers to."""
    own = [element.attrib[_LINK][1:]] if element.attrib.get(_LINK, "").startswith("#") else []
    return own + [found for value in element.attrib.values() for found in _URL.findall(value)]


def _adapt(element: ET.Element, name: str, linked: set[str]) -> None:
    """Strip the namespace, make ids unique, shorten numbers, and give the colours to the page."""
    element.tag = _tag(element)
    attributes = dict(element.attrib)
    element.attrib.clear()
    for key, value in attributes.items():
        if key == "id":
            if value in linked:
                element.set("id", f"{name}-{value}")
        elif key == _LINK:
            element.set("href", f"#{name}-{value[1:]}" if value.startswith("#") else value)
        elif key == "style":
            element.set("style", _style(value))
        elif key in _DRAWN:
            element.set(key, _NUMBERS.sub(lambda number: f"{float(number[0]):.2f}", value))
        else:
            element.set(key, _URL.sub(rf"url(#{name}-\1)", value))


def _style(style: str) -> str:
    """Write a style in the page's font and colours."""
    declarations = []
    for declaration in filter(None, (part.strip() for part in style.split(";"))):
        prop, _, value = (part.strip() for part in declaration.partition(":"))
        if prop == "font":  # matplotlib 3.10: size and family in one
            found = _FONT.match(value)
            declarations += [f"font-size:{found['size']}"] if found else []
            declarations += [f"font-weight:{found['weight']}"] if found and found["weight"] else []
        elif value == "#000000":
            declarations.append(f"{prop}:currentColor")
        elif value.startswith("#"):
            declarations.append(f"{prop}:var(--c-{value[1:].lower()},{value.lower()})")
        elif prop != "font-family":
            declarations.append(f"{prop}:{value}")
    return ";".join(declarations)
