"""The page of a comparison: one HTML file with curves as inline SVG, which needs no network."""

import html
import math
from collections.abc import Iterator, Sequence

from muomni.evaluation.comparison import Curve, Row, StageComparison

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_WIDTH, _HEIGHT = 820, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 44
_MAX_POINTS = 1000  # per curve
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; overflow-wrap: anywhere; }
td:first-child, th:first-child { text-align: left; }
svg { max-width: 100%; height: auto; } svg text { font-size: 12px; fill: #555; }
.key { display: inline-block; margin-right: 1.5em; } .key i { display: inline-block; width: 1.5em;
  height: 3px; margin-right: .4em; vertical-align: middle; }
"""


def page(stages: Sequence[StageComparison]) -> str:
    """The HTML text of a comparison."""
    sections = "\n".join(_section(stage) for stage in stages)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison of runs</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>Comparison of runs</h1>\n{sections}\n</body></html>\n"
    )


def _section(stage: StageComparison) -> str:
    keys = "".join(
        f'<span class="key"><i style="background:{_color(number)}"></i>{html.escape(run)}</span>'
        for number, run in enumerate(stage.runs)
    )
    settings = _table("setting", stage.runs, stage.settings) if stage.settings else "<p>None.</p>"
    return (
        f"<h2>{stage.stage}</h2>\n<p>{keys}<br>Line: training loss. Dots: validation loss.</p>\n"
        f"{_chart(stage.train, stage.val)}\n{_table('metric', stage.runs, stage.metrics)}\n"
        f"<h3>Differences of the configs</h3>\n{settings}"
    )


def _table(first: str, runs: list[str], rows: list[Row]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (first, *runs))
    body = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in (name, *values))}</tr>"
        for name, values in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _chart(train: list[Curve], val: list[Curve]) -> str:
    """Curves over steps, with labeled axes; empty without points."""
    points = [point for curve in (*train, *val) for point in curve]
    if not points:
        return "<p>No losses were logged.</p>"
    steps, values = zip(*points, strict=True)
    x_ticks, y_ticks = _ticks(0, max(steps)), _ticks(min(values), max(values))
    (x0, x1), (y0, y1) = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (value - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    marks = [*_axes(x_ticks, y_ticks, place)]
    for number, curve in enumerate(train):
        path = " ".join("{},{}".format(*place(*point)) for point in _thinned(curve))
        marks.append(
            f'<polyline points="{path}" fill="none" stroke="{_color(number)}" stroke-width="1.5"/>'
        )
    for number, curve in enumerate(val):
        for point in _thinned(curve):
            x, y = place(*point)
            marks.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{_color(number)}"/>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="Loss over steps">\n'
        + "\n".join(marks)
        + "\n</svg>"
    )


def _axes(x_ticks: list[float], y_ticks: list[float], place) -> Iterator[str]:
    bottom = _HEIGHT - _BOTTOM
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="#e5e5e5"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        yield f'<line x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 5}" stroke="#999"/>'
        yield f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick:,g}</text>'
    yield f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>'
    middle = (_TOP + bottom) / 2
    yield f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">loss</text>'


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers that enclose a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _thinned(curve: Curve) -> Curve:
    """At most about `_MAX_POINTS` points, with the last one."""
    stride = -(-len(curve) // _MAX_POINTS) or 1
    return curve[::stride] + ([curve[-1]] if (len(curve) - 1) % stride else [])
