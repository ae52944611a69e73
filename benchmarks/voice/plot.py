"""The latency distributions as a picture: one line a mode, the share of queries answered within a time."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Final

from benchmarks.ratios import median

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_WIDTH: Final = 900
_HEIGHT: Final = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 610, 56, 380
# Okabe and Ito's colours, which colour-blind readers can tell apart; peers are dashed.
_COLOURS: Final = ("#000000", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#7f6a00", "#56b4e9")
_STEPS: Final = (1, 2, 5)


def distribution_svg(title: str, latencies_ms: Mapping[str, Sequence[float]]) -> str:
    """An SVG picture of empirical distributions over a logarithmic axis.

    Args:
        title: stands above it.
        latencies_ms: mode → times; a mode without any is left out. Names that hold "llama" are dashed.

    Raises:
        ValueError: there is no time at all.
    """
    series = {name: sorted(values) for name, values in latencies_ms.items() if values}
    if not series:
        raise ValueError("no values")
    low, high = _bounds([value for values in series.values() for value in values])

    def x_of(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return round(_LEFT + share * (_RIGHT - _LEFT), 1)

    def y_of(share: float) -> float:
        return round(_BOTTOM - share * (_BOTTOM - _TOP), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="sans-serif" font-size="13" fill="#222">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{_LEFT}" y="28" font-size="16" font-weight="bold">{escape(title)}</text>',
    ]
    for value in _ticks(low, high):
        x = x_of(value)
        parts.append(f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{_BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{_BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for percent in (0, 25, 50, 75, 95, 100):
        y = y_of(percent / 100)
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_RIGHT}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{percent} %</text>')
    parts.append(
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_BOTTOM + 42}" text-anchor="middle">'
        "milliseconds from the end of speech to the first text</text>"
    )
    parts.append(f'<text x="{_RIGHT + 66}" y="{_TOP + 4}" fill="#555">median</text>')
    for index, (name, values) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        dashes = ' stroke-dasharray="6 4"' if "llama" in name else ""
        parts.append(f'<path d="{_steps(values, x_of, y_of)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        y = _TOP + 28 + 24 * index
        parts.append(
            f'<line x1="{_RIGHT + 16}" y1="{y - 4}" x2="{_RIGHT + 52}" y2="{y - 4}" stroke="{colour}" '
            f'stroke-width="3"{dashes}/>'
        )
        parts.append(f'<text x="{_RIGHT + 66}" y="{y}">{median(values):.1f} ms  {escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _steps(values: Sequence[float], x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    """The path of a distribution: up by one share at each value."""
    commands = [f"M{x_of(values[0])} {y_of(0)}"]
    for index, value in enumerate(values):
        commands += [f"H{x_of(value)}", f"V{y_of((index + 1) / len(values))}"]
    return "".join([*commands, f"H{_RIGHT}"])


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """The ticks around all values."""
    lowest, highest = max(min(values), 0.01), max(*values, 0.02)
    below = [value for value in _ticks(lowest / 10, lowest) if value <= lowest]
    above = [value for value in _ticks(highest, highest * 10) if value >= highest]
    return below[-1], next(value for value in above if value > below[-1])


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, … between two values, both included."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**exponent for exponent in exponents for step in _STEPS]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
