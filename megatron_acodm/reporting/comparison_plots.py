"""The plots of a comparison of policies, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from megatron_acodm.reporting.comparison import Comparison, Estimate
from megatron_acodm.reporting.plots import STYLE, look

_DPI = 150
_BAND_ALPHA = 0.15
_GREY = "#8c959f"


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw curves.png, differences.png and weights.png into a folder; returns their paths."""
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in (
            ("curves", _curves),
            ("differences", _differences),
            ("weights", _weights),
        ):
            path = folder / f"{name}.png"
            draw(comparison).savefig(path, dpi=_DPI, metadata={"Software": None})
            paths.append(path)
    return paths


def _curves(comparison: Comparison) -> Figure:
    """Mean perplexity over steps, and its paired difference to the first reference."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference = comparison.references[0]
    for k, name in enumerate(comparison.runs):
        steps, curves = (
            comparison.mean(name, "validation_iteration"),
            _validations(comparison, name),
        )
        _with_band(left, steps, curves, (curves.min(axis=0), curves.max(axis=0)), k, name)
        if name != reference:
            shares = curves / _validations(comparison, reference) - 1
            at_steps = [Estimate.of(dict(enumerate(values))) for values in shares.T]
            band = [e.low for e in at_steps], [e.high for e in at_steps]
            _with_band(right, steps, shares, band, k, name)
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_title("mean perplexity over domains; band: all seeds", fontsize=10, loc="left")
    right.axhline(0, color=look(list(comparison.runs).index(reference))[0], linewidth=1.2)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    title = f"against {reference} with the same seed; band: 95% interval"
    right.set_title(title, fontsize=10, loc="left")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
    handles, labels = left.get_legend_handles_labels()
    legend: dict[str, Any] = {"loc": "outside lower center", "ncols": min(len(labels), 8)}
    figure.legend(handles, labels, frameon=False, **legend)
    return figure


def _validations(comparison: Comparison, name: str) -> np.ndarray:
    """``[seeds, V]`` mean perplexities."""
    return np.array([run.mean_perplexity[:, 0] for run in comparison.runs[name].values()])


def _with_band(
    axes: Axes, steps: np.ndarray, curves: np.ndarray, band: tuple[Any, Any], k: int, name: str
) -> None:
    """Draw the mean of ``[seeds, V]`` curves over a band, its lower and upper edge ``[V]``."""
    colour, dashes = look(k)
    style: dict[str, Any] = {"dashes": dashes} if dashes else {}
    axes.plot(
        steps, curves.mean(axis=0), color=colour, marker="o", markersize=3, label=name, **style
    )
    axes.fill_between(steps, *band, color=colour, alpha=_BAND_ALPHA, linewidth=0)


def _differences(comparison: Comparison) -> Figure:
    """A panel a reference: every policy's paired difference in mean perplexity, as its share."""
    names, count = list(comparison.runs), len(comparison.references)
    figure = Figure(figsize=(2.2 + 4.2 * count, 1.5 + 0.42 * len(names)), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, reference in zip(panels, comparison.references, strict=True):
        axes.axvline(0, color="#57606a", linewidth=1)
        for row, name in enumerate(names):
            if name == reference:
                axes.text(0, row, " reference", va="center", fontsize=8, color=_GREY)
                continue
            share = comparison.difference(name, reference, "mean perplexity", relative=True)
            _interval(axes, row, share, look(row)[0])
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(f"mean perplexity against {reference}", fontsize=10, loc="left")
        axes.set_xlabel("← better · worse →", color=_GREY)
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(
        f"paired over {len(comparison.seeds)} seeds (small dots); lines: 95% intervals of the mean",
        fontsize=9,
        color=_GREY,
    )
    return figure


def _interval(axes: Axes, row: int, estimate: Estimate, colour: str) -> None:
    values = list(estimate.by_seed.values())
    axes.plot(values, [row] * len(values), "o", markersize=3.5, color=colour, alpha=0.35)
    if math.isfinite(estimate.low):
        axes.plot((estimate.low, estimate.high), (row, row), color=colour, linewidth=2)
    axes.plot(estimate.mean, row, "D", markersize=6, color=colour, markeredgecolor="white")


def _weights(comparison: Comparison) -> Figure:
    """A panel a policy: each domain's weight over steps, the mean over seeds."""
    names = list(comparison.runs)
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    legend_columns = min(2 * columns, 4)
    legend_rows = math.ceil(len(comparison.domains) / legend_columns)
    size = (1 + 3.4 * columns, 0.9 + 2.3 * rows + 0.2 * legend_rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        weights = comparison.mean(name, "weights")
        for k, domain in enumerate(comparison.domains):
            colour, dashes = look(k)
            style: dict[str, Any] = {"dashes": dashes} if dashes else {}
            x = comparison.mean(name, "iteration")
            axes.plot(x, weights[:, k], color=colour, linewidth=1.3, label=domain, **style)
        axes.set_title(name, fontsize=10, loc="left")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].set_ylim(bottom=0)  # of all panels, once every line is in
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
    handles, labels = panels[0].get_legend_handles_labels()
    legend: dict[str, Any] = {"loc": "outside lower center", "ncols": legend_columns}
    figure.legend(handles, labels, frameon=False, fontsize=8, **legend)
    figure.suptitle("weights, mean over seeds", fontsize=10)
    return figure
