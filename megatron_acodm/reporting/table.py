"""The closing table of a run, and the way its figures are written."""

from __future__ import annotations

import numpy as np

from megatron_acodm.reporting.diagnostics import notices
from megatron_acodm.reporting.run import Run

MEANS = ("mean of domains", "by natural weight")
"""The two means of the domains' perplexities."""


def closing_table(run: Run) -> str:
    """What happened to each domain, and what mixing cost, as plain text for a terminal."""
    width = max(len("domain"), *map(len, run.domains))
    width = max(width, len(MEANS[0]), len(MEANS[1]))
    row = f"{{:<{width}}}  {{:>13}} {{:>7}}  {{:>8}} {{:>8}}  {{:>10}} {{:>10}}".format
    lines = [
        row("", "", "", "weight", "", "perplexity", ""),
        row("domain", "tokens", "epochs", "first", "last", "first", "last"),
    ]
    for k, name in enumerate(run.domains):
        lines.append(row(name, *domain_row(run, k)))
    if len(run.mean_perplexity):
        for name, values in zip(MEANS, run.mean_perplexity[[0, -1]].T, strict=True):
            lines.append(row(name, "", "", "", "", *map(number, values)))
    lines.append(
        f"mixing took {run.mixing_share:.2%} of the step time "
        f"({1e3 * np.nanmean(run.mixing_time_s):.1f} of {1e3 * np.nanmean(run.step_time_s):.0f} ms "
        "a step)"
    )
    lines += [f"note: {text}" for text in notices(run)]
    return "\n".join(line.rstrip() for line in lines)


def domain_row(run: Run, k: int) -> tuple[str, str, str, str, str, str]:
    """Tokens, epochs, first and last weight, first and last validation perplexity of a domain."""
    perplexity = run.perplexity[:, k] if len(run.perplexity) else np.array([np.nan])
    return (
        f"{run.tokens[k]:,.0f}" if np.isfinite(run.tokens[k]) else "–",
        number(run.epochs[-1, k]),
        percent(run.weights[0, k]),
        percent(run.weights[-1, k]),
        number(perplexity[0]),
        number(perplexity[-1]),
    )


def percent(value: float) -> str:
    """A share: 4.2%, or a dash where unknown."""
    return f"{value:.1%}" if np.isfinite(value) else "–"


def number(value: float) -> str:
    """Four digits, or all before the point where there are more; a dash where unknown."""
    if not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def short(value: float) -> str:
    """A count with a unit: 3.3 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time with a fitting unit: 5.3 min."""
    for limit, unit in ((7200, "h"), (120, "min")):
        if seconds >= limit:
            return f"{seconds / (3600 if unit == 'h' else 60):.1f} {unit}"
    return f"{seconds:.0f} s"
