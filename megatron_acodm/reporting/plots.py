"""The report's plots, as inline SVG: lines a domain with direct labels, told apart in print too."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

# Okabe and Ito's palette (safe for colour-blind readers) without its yellow, too pale on white.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#6A51A3",
    "#636363",
)
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.3, 1.3))
_INK = "#1f2328"
_MAX_POINTS = 800
_MAX_LABELS = 30
_LABEL_HEIGHT_IN = 0.175
_LETTER_IN = 0.082
_WIDTH_IN = 10.0

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar in a domain's name is a dollar
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#afb8c1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
}


def look(k: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dash pattern (empty: solid) of domain ``k``; 24 of them differ."""
    return _COLOURS[k % len(_COLOURS)], _DASHES[k // len(_COLOURS) % len(_DASHES)]


def swatch(k: int) -> str:
    """A short sample of domain ``k``'s line, as SVG."""
    colour, dashes = look(k)
    pattern = " ".join(f"{2 * dash:g}" for dash in dashes)
    return (
        f'<svg viewBox="0 0 26 10" aria-hidden="true"><line x1="0" x2="26" y1="5" y2="5" '
        f'stroke="{colour}" stroke-width="3" stroke-dasharray="{pattern}"/></svg>'
    )


def domain_lines(
    name: str,
    domains: list[str],
    values: np.ndarray,
    *,
    x: np.ndarray,
    smooth: bool = False,
    percent: bool = False,
    scale: str = "linear",
    markers: bool = False,
    overall: np.ndarray | None = None,
) -> str:
    """Plot one line a domain over steps.

    Args:
        name: prefix of the ids in the SVG; each domain's elements end in ``-domain-<k>``.
        domains: [K] names.
        values: [T, K]; nan where a domain has no value, and there the line passes over.
        x: [T] iterations.
        smooth: draw the smoothed values, with the values themselves faint behind them.
        percent: values are shares.
        scale: ``linear``, ``log``, or ``asinh``: linear around zero, logarithmic beyond.
        markers: mark each value.
        overall: [T] a line over all domains, drawn in black.

    Returns:
        An ``<svg>`` element.
    """
    height = max(3.6, _LABEL_HEIGHT_IN * min(len(domains), _MAX_LABELS) + 0.7)
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = _axes(height, x, max(map(len, domains)))
        ends: list[tuple[float, str, str, dict[str, Any]]] = []  # value, label, id, style
        for k, domain in enumerate(domains):
            colour, dashes = look(k)
            gid = f"domain-{k}"
            style = {"color": colour, "dashes": dashes} if dashes else {"color": colour}
            end = _line(axes, x, values[:, k], gid, smooth=smooth, markers=markers, **style)
            if end is not None:
                ends.append((end, f"{domain}  {_format(end, percent)}", gid, style))
        if overall is not None:
            _line(axes, x, overall, "overall", smooth=smooth, color=_INK, linewidth=2.2)
        _scale(axes, scale, values, percent=percent)
        _label_ends(axes, ends, height)
        return _svg(figure, name)


def series(
    name: str,
    x: np.ndarray,
    values: dict[str, np.ndarray],
    *,
    ylabel: str | None = None,
    unit: str = "",
    percent: bool = False,
    scale: str = "linear",
    height: float = 3.2,
) -> str:
    """Plot a few lines that are not of domains.

    Args:
        name: prefix of the ids in the SVG.
        x: [T] iterations.
        values: [T] of each line, by its label; nan where it has no value.
        ylabel: of the axis.
        unit: behind each line's last value.
        percent: values are shares.
        scale: ``linear``, ``log`` (what is not positive is left out), or ``asinh``.
        height: inches.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, axes = _axes(height, x, max(map(len, values)))
        ends = []
        for k, (label, line) in enumerate(values.items()):
            style: dict[str, Any] = {"color": _COLOURS[k], "linewidth": 1.2}
            shown = np.where(line > 0, line, np.nan) if scale == "log" else line
            gid = label.replace(" ", "-")
            end = _line(axes, x, shown, gid, smooth=False, **style)
            if end is not None:
                ends.append((end, f"{label}  {_format(end, percent)}{unit}", gid, style))
        if ylabel is not None:
            axes.set_ylabel(ylabel)
        _scale(axes, scale, np.stack(list(values.values()), axis=1), percent=percent)
        _label_ends(axes, ends, height)
        return _svg(figure, name)


def gram_figure(domains: list[str], gram: np.ndarray) -> Figure:
    """A heat map of the cosines between the domains' mean gradients.

    Args:
        domains: [K] names.
        gram: [K, K] products of the mean gradients; nan in the rows and columns of domains that
            were not drawn, which stay white.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.sqrt(np.diag(gram))
        cosines = gram / norms[:, None] / norms
    count = len(domains)
    longest = _LETTER_IN * max(map(len, domains)) + 0.2  # inches of the longest name
    side = min(0.55 * max(count, 4), _WIDTH_IN - longest - 1.6)
    height = side + longest + 0.2
    figure = Figure(figsize=(_WIDTH_IN, height))
    axes = figure.add_axes((longest / _WIDTH_IN, longest / height, side / _WIDTH_IN, side / height))
    image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(count), domains, rotation=90, fontsize=9)
    axes.set_yticks(range(count), domains, fontsize=9)
    size = min(9.0, 72 * side / count / 3.2)
    for i, j in zip(*np.nonzero(np.isfinite(cosines)), strict=True):
        ink = "white" if abs(cosines[i, j]) > 0.6 else _INK
        written = f"{cosines[i, j]:.2f}".replace("0.", ".").replace("-", "\u2212")
        axes.text(j, i, written, ha="center", va="center", fontsize=size, color=ink)
    bar = figure.add_axes(
        ((longest + side + 0.2) / _WIDTH_IN, longest / height, 0.14 / _WIDTH_IN, side / height)
    )
    figure.colorbar(image, cax=bar, ticks=[-1, -0.5, 0, 0.5, 1]).outline.set_visible(False)
    return figure


def gram_map(domains: list[str], gram: np.ndarray) -> str:
    """``gram_figure`` as an ``<svg>`` element."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "gram"}):
        return _svg(gram_figure(domains, gram), "gram")


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential moving average of [T] values over about ``span``, unbiased at the start."""
    decay = 1 - 1 / max(span, 1)
    average = weight = 0.0
    result = np.empty(len(values))
    for i, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result[i] = average / weight
    return result


def spread(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Place labels at least ``gap`` apart, within [0, 1], as near to where they belong as possible.

    Args:
        wanted: [N] positions in ascending order.
        gap: least distance of neighbours; (N - 1) gaps must fit into [0, 1].

    Returns:
        [N] positions of least squared distance: isotonic regression after taking out the gaps.
    """
    offsets = gap * np.arange(len(wanted))
    blocks: list[tuple[float, int]] = []  # (mean, size), means ascending
    for value in wanted - offsets:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] > mean:
            last_mean, last_size = blocks.pop()
            mean = (mean * size + last_mean * last_size) / (size + last_size)
            size += last_size
        blocks.append((mean, size))
    placed = np.array([mean for mean, size in blocks for _ in range(size)])
    return np.clip(placed, 0, 1 - offsets[-1]) + offsets


def _axes(height: float, x: np.ndarray, longest: int) -> tuple[Figure, Axes]:
    """Axes with room beside them for labels of ``longest`` letters and a value."""
    figure = Figure(figsize=(_WIDTH_IN, height))
    room = min(max(2.2, 1.3 + _LETTER_IN * longest), 0.5 * _WIDTH_IN)
    axes = figure.add_axes((0.065, 0.45 / height, 0.935 - room / _WIDTH_IN, 1 - 0.6 / height))
    low, high = float(x[0]), float(x[-1])
    axes.set_xlim(low, high if high > low else low + 1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", loc="right", labelpad=2)
    return figure, axes


def _line(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    gid: str,
    *,
    smooth: bool,
    markers: bool = False,
    **style: Any,
) -> float | None:
    """Draw the finite part of one line and return its last value, or None if there is none."""
    finite = np.isfinite(y)
    if not finite.any():
        return None
    x, y = x[finite], y[finite]
    drawn = smoothed(y, max(len(y) // 25, 1)) if smooth else y
    kept = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).round().astype(int))
    if smooth and len(x) > 2:
        faint = {"color": style["color"], "linewidth": 0.7, "alpha": 0.18}
        axes.plot(x[kept], y[kept], gid=f"raw-{gid}", **faint)
    marker = "o" if markers or len(x) == 1 else None
    axes.plot(x[kept], drawn[kept], gid=gid, marker=marker, markersize=4, clip_on=False, **style)
    return float(drawn[-1])


def _scale(axes: Axes, scale: str, values: np.ndarray, *, percent: bool = False) -> None:
    if scale == "asinh":
        axes.axhline(0, color="#57606a", linewidth=0.8, zorder=1)
        sizes = np.abs(values[np.isfinite(values) & (values != 0)])
        if sizes.size:
            # Alignments fall by orders of magnitude as a model learns: large ones are squeezed.
            middle = float(np.median(sizes))
            axes.set_yscale("asinh", linear_width=middle)
            powers = np.arange(np.floor(np.log10(middle)) - 1, np.ceil(np.log10(sizes.max())) + 1)
            ticks = np.outer(10.0**powers, (1, 2, 5)).ravel()
            ticks = ticks[ticks > middle / 2]
            axes.yaxis.set_major_locator(FixedLocator([*-ticks, 0, *ticks]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if percent:
        axes.set_ylim(bottom=0)
        decimals = 0 if axes.get_ylim()[1] > 0.05 else 1
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=decimals))


def _label_ends(
    axes: Axes, ends: list[tuple[float, str, str, dict[str, Any]]], height: float
) -> None:
    """Write each line's name and last value beside its end, moved apart where they collide."""
    ends = sorted(ends, key=lambda end: end[0])[-_MAX_LABELS:]
    if not ends:
        return
    axes.get_ylim()  # settles the limits, which the transforms below depend on
    at = axes.transAxes.inverted()
    belongs = [at.transform(axes.transData.transform((0, value)))[1] for value, *_ in ends]
    gap = _LABEL_HEIGHT_IN / (height * axes.get_position().height)
    outside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    placed = spread(np.array(belongs), gap)
    for y, label_y, (_, label, gid, style) in zip(belongs, placed, ends, strict=True):
        leader: dict[str, Any] = {"color": "#afb8c1", "linewidth": 0.6, **outside}
        axes.plot((1.002, 1.026), (y, label_y), gid=f"leader-{gid}", **leader)
        axes.plot((1.028, 1.053), (label_y, label_y), gid=f"sample-{gid}", **style, **outside)
        text: dict[str, Any] = {"va": "center_baseline", "fontsize": 9, "gid": f"label-{gid}"}
        axes.text(1.06, label_y, label, **text, **outside)


def _format(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3g}"


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # Only the element, without the XML preamble, and with a size that the page's style decides.
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text[text.index("<svg") :], count=2)
    # Several plots share a page: each one's ids are its own.
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
