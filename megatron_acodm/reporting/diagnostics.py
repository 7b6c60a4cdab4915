"""What a run's diagnostics say: the guard rails that acted, in words, and the policy's figures."""

from __future__ import annotations

import numpy as np

from megatron_acodm.reporting import plots
from megatron_acodm.reporting.run import Run

_SHARES = {
    "distance_from_natural": "from natural",
    "distance_from_uniform": "from uniform",
    "floor_share": "at the floor",
    "clipped_share": "clipped",
}


def notices(run: Run) -> list[str]:
    """A sentence for each guard rail that acted in the run; none in a run without faults."""
    texts = []
    if (count := _last(run, "dropped_steps")) > 0:
        texts.append(
            f"{_steps(count)} dropped from mixing, as a loss or gradient was not finite: "
            f"{_where(run, 'dropped_steps')}."
        )
    if (count := _last(run, "policy_failures")) > 0:
        texts.append(
            f"The policy failed {count:.0f} time{'s' if count > 1 else ''}, and training went on "
            f"with the last good weights: {_where(run, 'policy_failures')}."
        )
    for domain, end, length in _collapses(run):
        texts.append(
            f"The policy collapsed onto {domain}, which had nearly all the weight for "
            f"{_steps(length)} up to step {end}."
        )
    return texts


def sections(run: Run) -> list[tuple[str, str, str]]:
    """(heading, what it shows, SVG) of each plot of diagnostics that the run has figures for."""
    figures = run.diagnostics
    plotted = []
    shares = {label: figures[name] for name, label in _SHARES.items() if name in figures}
    weighted = int((run.weights[0] > 0).sum())  # an empty domain has no part in the entropy
    if "policy_entropy" in figures and weighted > 1:
        shares = {"entropy": figures["policy_entropy"] / np.log(weighted)} | shares
    if shares:
        caption = (
            "Entropy of the weights, of what uniform weights have; total variation from natural "
            "and uniform weights; share of the weights at their floor"
        )
        caption += ", and cut by a bound after noise." if "clipped" in shares else "."
        plot = plots.series("policy", run.iteration, shares, percent=True)
        plotted.append(("Policy", caption, plot))
    if "critic_loss" in figures:
        loss = plots.series(
            "critic-loss", run.iteration, {"Q loss": figures["critic_loss"]}, scale="log",
            height=2.4,
        )  # fmt: skip
        value = plots.series("value", run.iteration, {"mean Q": figures["value"]}, height=2.4)
        caption = (
            "The critic’s loss, and the mean value of the actor’s mixtures, both on standardised "
            f"rewards. Replay holds {_last(run, 'replay_size'):,.0f} transitions."
        )
        plotted.append(("Agent", caption, loss + value))
    if run.gram is not None:
        iteration, gram = run.gram
        caption = f"Cosines between the domains’ mean gradients in step {iteration:,}."
        plotted.append(("Gradients", caption, plots.gram_map(run.domains, gram)))
    return plotted


def _last(run: Run, name: str) -> float:
    """The last value of a figure; 0 where the run has none."""
    values = run.diagnostics.get(name, np.zeros(0))
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else 0.0


def _where(run: Run, name: str) -> str:
    """The steps in which a count rose: the first few."""
    values = np.nan_to_num(run.diagnostics[name])
    rose = run.iteration[np.diff(values, prepend=0.0) > 0]
    named = ", ".join(f"{step:.0f}" for step in rose[:5])
    return f"step{'s' if len(rose) > 1 else ''} {named}{', …' if len(rose) > 5 else ''}"


def _collapses(run: Run) -> list[tuple[str, int, int]]:
    """(domain, last step, length) of each collapse."""
    lengths = np.nan_to_num(run.diagnostics.get("collapsed_steps", np.zeros(0)))
    following = np.append(lengths[1:], 0.0)
    found = []
    for t in np.nonzero((lengths > 0) & (following < lengths))[0]:
        weights = np.nan_to_num(run.weights[t])
        domain = run.domains[int(np.argmax(weights))]
        found.append((domain, int(run.iteration[t]), int(lengths[t])))
    return found


def _steps(count: float) -> str:
    return f"{count:.0f} step{'s' if count > 1 else ''}"
