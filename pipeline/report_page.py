"""HTML for the report: elements that escape what they hold, two drawings, and the page around them.

    el("td", response) -> Html      text is escaped, Html is not: what a model wrote cannot become markup

Owns: markup, drawing, style. Does not own: what is shown (report). One file, no scripts, nothing fetched: the
page forbids both by its own Content-Security-Policy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

MAX_POINTS = 400  # of a curve; beyond it, the smallest and the largest of each stretch are drawn
CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


class Html(str):
    """Markup; any other text is escaped where it enters an element."""

    __slots__ = ()


def el(tag: str, *children: str | None, **attributes: object) -> Html:
    """One element. In attribute names a trailing `_` is dropped and others become `-`; None is left out.

    Example: el("td", "a < b", class_="text") -> <td class="text">a &lt; b</td>
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    written = "".join(
        f' {names[name]}="{text(str(value))}"' for name, value in attributes.items() if value is not None
    )
    return Html(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: str | None) -> Html:
    """Elements and texts one after the other."""
    return Html("".join(child if isinstance(child, Html) else text(child) for child in children if child))


def text(value: str) -> Html:
    """Text that stays text: markup is escaped, control characters and half surrogates are made visible."""
    return Html(escape(value.translate(CONTROL_PICTURES).encode("utf-8", "replace").decode(), quote=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, class_: str | None = None) -> Html:
    """A table that scrolls by itself when it is wider than the page."""
    head = el("thead", el("tr", *(el("th", cell, scope="col") for cell in header)))
    body = el("tbody", *(el("tr", *(el("td", cell, dir="auto") for cell in row)) for row in rows))
    return el("div", el("table", head, body, class_=class_), class_="scroll")


def number(value: object) -> str:
    """Four significant digits; what is no number as it is, a dash for nothing."""
    if value is None:
        return "\u2013"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


# --- drawings


BOX_WIDTH, BOX_HEIGHT, GAP, ROW = 132, 62, 40, 88
"""Of the graph, in pixels: a box, the space beside it, and from one row to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One stage in the graph."""

    name: str
    status: str  # "ran" or "skipped"
    detail: str  # second line
    hint: str  # shown on hovering
    needs: tuple[str, ...]  # names of other boxes
    row: int = 0  # 0 is the main line; 1, below it, is for what the main line goes past


def graph(boxes: Sequence[Box]) -> Html:
    """The stages from left to right with every edge: a line to the next in a row, curves between rows, arcs
    over boxes in between.
    """
    index = {box.name: i for i, box in enumerate(boxes)}
    edges = [(index[need], index[box.name]) for box in boxes for need in box.needs if need in index]
    rows = [box.row for box in boxes]
    arcs = sorted((edge for edge in edges if _is_arc(edge, rows)), key=lambda edge: (edge[1] - edge[0], edge))
    top = 12 + 15 * max((end - start for start, end in arcs), default=0) if arcs else 4
    left = [i * (BOX_WIDTH + GAP) for i in range(len(boxes))]
    drawn = [_arc(edge, arcs, left, top) if edge in arcs else _line(edge, rows, left, top) for edge in edges]
    for x, box in zip(left, boxes, strict=True):
        middle, y = x + BOX_WIDTH / 2, top + ROW * box.row
        frame = {"x": x + 1, "y": y, "width": BOX_WIDTH - 2, "height": BOX_HEIGHT, "rx": 8}
        drawn.append(
            el(
                "g",
                el("title", box.hint),
                el("rect", **frame, class_=f"box {box.status}"),
                el("text", box.name, x=middle, y=y + 27, class_="name"),
                el("text", box.detail, x=middle, y=y + 46, class_="detail"),
            )
        )
    tip = el("path", d="M0,0L8,4L0,8Z", class_="tip")
    size = {"viewBox": "0 0 8 8", "markerWidth": 7, "markerHeight": 7, "refX": 6, "refY": 4}
    arrow = el("marker", tip, id="arrow", orient="auto", **size)
    full = len(boxes) * (BOX_WIDTH + GAP) - GAP
    view = f"0 0 {full} {top + ROW * max(rows, default=0) + BOX_HEIGHT + 4}"
    svg = el(
        "svg", el("defs", arrow), *drawn, viewBox=view, width=full, role="img", aria_label="graph of stages"
    )
    return el("div", svg, class_="scroll graph")


def _is_arc(edge: tuple[int, int], rows: Sequence[int]) -> bool:
    """Whether other boxes of its row lie in between."""
    start, end = edge
    return rows[start] == rows[end] and rows[start] in rows[start + 1 : end]


def _line(edge: tuple[int, int], rows: Sequence[int], left: Sequence[int], top: float) -> Html:
    """Straight on in its row; else to the next box, or below those in between and into its bottom."""
    start, end = edge
    x1, x2 = left[start] + BOX_WIDTH, left[end] - 6
    y1, y2 = (top + ROW * rows[i] + BOX_HEIGHT / 2 for i in edge)
    if y1 == y2:
        return _edge(f"M{x1},{y1}H{x2}")
    if end - start == 1 or y1 < y2:
        middle = (x1 + x2) / 2
        y2 += 14 if y2 < y1 else 0  # below the line that arrives in the row itself
        return _edge(f"M{x1},{y1}C{middle},{y1} {middle},{y2} {x2},{y2}")
    under, bottom = left[end] + BOX_WIDTH / 2, y2 + BOX_HEIGHT / 2 + 6
    return _edge(f"M{x1},{y1}H{under - 20}Q{under},{y1} {under},{bottom}")


def _arc(arc: tuple[int, int], arcs: Sequence[tuple[int, int]], left: Sequence[int], top: float) -> Html:
    """Over the boxes in between; those that leave or arrive together, side by side."""
    start, end = arc
    leaving = [other for other in arcs if other[0] == start]
    arriving = [other for other in arcs if other[1] == end]
    x1 = left[start] + BOX_WIDTH / 2 + 16 * ((len(leaving) - 1) / 2 - leaving.index(arc))
    x2 = left[end] + BOX_WIDTH / 2 + 16 * (arriving.index(arc) - (len(arriving) - 1) / 2)
    y = top - 20 * (end - start)
    return _edge(f"M{x1},{top}C{x1},{y} {x2},{y} {x2},{top - 6}")


def _edge(path: str) -> Html:
    return el("path", d=path, class_="edge", marker_end="url(#arrow)")


def curve(name: str, points: Sequence[tuple[float, float | None]], *, description: str = "") -> Html | None:
    """One metric over steps, with its extremes and its last value. None is a value that is no number.

    Nothing is drawn, and None returned, if there is no number at all.
    """
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return None
    width, height, pad, top, bottom = 260, 118, 6, 16, 16
    low, high = min(y for _, y in known), max(y for _, y in known)
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> str:
        across = (x - first) / (last - first) if last > first else 0.5
        up = 0.5 if high == low else _share(y, low, high)
        return f"{pad + across * (width - 2 * pad):.1f},{top + (1 - up) * (height - top - bottom):.1f}"

    lines, stretch = [], list[str]()
    for x, y in [*_thinned(points), (last, None)]:
        if y is not None and math.isfinite(y):
            stretch.append(place(x, y))
        elif stretch:
            lines.append(el("polyline", points=" ".join(stretch), class_="line"))
            lines.append(_dot(stretch[0], radius=2))
            stretch = []
    facts = f"min {number(low)}, max {number(high)}, last {number(known[-1][1])}"
    if len(known) < len(points):
        facts += f", {len(points) - len(known)} not finite"
    svg = el(
        "svg",
        el("title", f"{name}: {facts}"),
        el("path", d=f"M{pad},{height - bottom}H{width - pad}", class_="axis"),
        *lines,
        _dot(place(*known[-1]), radius=3),
        el("text", number(high), x=pad, y=top - 6, class_="tick"),
        el("text", number(low), x=pad, y=height - bottom - 4, class_="tick"),
        el("text", number(first), x=pad, y=height - 4, class_="tick"),
        el("text", f"step {number(last)}", x=width - pad, y=height - 4, class_="tick end"),
        viewBox=f"0 0 {width} {height}",
        role="img",
    )
    caption = el("figcaption", el("b", name), el("span", number(known[-1][1]), class_="last"))
    note = el("p", description, el("span", facts, class_="facts"), class_="note")
    return el("figure", caption, svg, note)


def _dot(place: str, *, radius: float) -> Html:
    x, y = place.split(",")
    return el("circle", cx=x, cy=y, r=radius, class_="dot")


def _share(y: float, low: float, high: float) -> float:
    """Where y lies from low to high, in [0, 1]. Halved: the difference of two floats may overflow."""
    return (y / 2 - low / 2) / (high / 2 - low / 2)


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        known = [(x, y) for x, y in stretch if y is not None and math.isfinite(y)]
        if known:
            kept += sorted({min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])})
        else:
            kept.append(stretch[0])
    return kept


# --- the page


def page(title: str, subtitle: str, sections: Mapping[str, Html]) -> str:
    """The whole file; a section's id is its heading in lower case."""
    ids = {heading: heading.lower().replace(" ", "-") for heading in sections}
    links = el("nav", *(el("a", heading, href=f"#{anchor}") for heading, anchor in ids.items()))
    body = [el("section", el("h2", name), content, id=ids[name]) for name, content in sections.items()]
    head = Html(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="color-scheme" content="light dark"><title>{text(title)}</title><style>{CSS}</style>'
    )
    header = el("header", el("h1", title), el("p", subtitle, class_="muted"), links)
    html = el("html", el("head", head), el("body", header, el("main", *body)), lang="en")
    return f"<!doctype html>\n{html}\n"


POLICY = "default-src 'none'; style-src 'unsafe-inline'"

CSS = """
:root { --bg: #fbfbfa; --card: #fff; --text: #1d2125; --muted: #626b75; --rule: #e2e5e9;
  --accent: #1f6feb; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --card: #1c2025; --text: #e4e7ea;
  --muted: #98a2ad; --rule: #31373e; --accent: #6ea8fe; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 32px; }
h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 24px 0 8px; }
p { margin: 4px 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 12px 0; border-bottom: 1px solid var(--rule); }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.muted, .note, .tick { color: var(--muted); fill: var(--muted); }
.scroll { overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px; }
.card, figure, details, .panel { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.card { padding: 12px 14px; }
.card .label { color: var(--muted); font-size: 13px; }
.card .value { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card .more { color: var(--muted); font-size: 13px; }
.sentence { font-size: 20px; font-weight: 600; margin: 0 0 12px; }
.graph { padding: 8px 0; }
.graph svg { max-width: 100%; min-width: 640px; height: auto; }
.box { fill: var(--card); stroke: var(--accent); stroke-width: 1.5; }
.box.skipped { stroke: var(--muted); stroke-dasharray: 5 4; }
.edge { fill: none; stroke: var(--muted); stroke-width: 1.2; opacity: 0.75; }
.tip { fill: var(--muted); }
.name { font-weight: 600; font-size: 15px; text-anchor: middle; fill: var(--text); }
.detail { font-size: 12px; text-anchor: middle; fill: var(--muted); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 12px; }
figure { margin: 0; padding: 10px 12px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: 13px; }
.last { font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round; }
.dot { fill: var(--accent); }
.axis { stroke: var(--rule); }
.tick { font-size: 10px; }
.tick.end { text-anchor: end; }
.note { font-size: 12px; line-height: 1.35; }
.facts { display: block; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px; border-bottom: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 600; font-size: 13px; }
td { unicode-bidi: isolate; overflow-wrap: anywhere; }
table.numbers td:not(:first-child), table.numbers th:not(:first-child) {
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
table.samples td { min-width: 190px; white-space: pre-wrap; }
table.samples .note { display: block; margin-top: 4px; white-space: normal; }
details { padding: 10px 14px; margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; margin: 8px 0 0; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
footer { color: var(--muted); padding: 32px 0; font-size: 13px; }
@media print { nav { display: none; } details { break-inside: avoid; } }
"""
