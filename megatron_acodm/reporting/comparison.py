"""Compares policies over seeds: final values, paired differences, steps to a target, with noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_acodm.reporting.run import Run
from megatron_acodm.reporting.table import number, percent

CONFIDENCE = 0.95

METRICS = ("mean perplexity", "mean loss", "natural perplexity", "worst perplexity")
"""Of a validation: the domains' perplexities and losses averaged with every domain alike, their
perplexities averaged by natural weight, and the highest of them."""


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds, its 95% t-interval (nan for one seed), and the seeds' spread."""

    mean: float
    low: float
    high: float
    sd: float
    by_seed: dict[int, float]

    @classmethod
    def of(cls, by_seed: Mapping[int, float]) -> Estimate:
        """Estimate from one value a seed."""
        values = np.array(list(by_seed.values()), dtype=np.float64)
        mean, n = float(values.mean()), len(values)
        if n < 2:
            return cls(mean, math.nan, math.nan, math.nan, dict(by_seed))
        sd = float(values.std(ddof=1))
        half = t_quantile(n - 1) * sd / math.sqrt(n)
        return cls(mean, mean - half, mean + half, sd, dict(by_seed))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is unknown is None."""
        known = {
            name: value if math.isfinite(value) else None
            for name, value in (
                ("mean", self.mean),
                ("low", self.low),
                ("high", self.high),
                ("sd", self.sd),
            )
        }
        return {**known, "by_seed": self.by_seed}


def t_quantile(degrees: int) -> float:
    """The t that Student's distribution with so many degrees of freedom has 95% within [-t, t].

    By bisection of the closed form for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    odd = degrees % 2 == 1
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        sine, cosine = math.sin(angle), math.cos(angle)
        term = sine * cosine if odd else sine
        within = angle + (term if degrees > 1 else 0.0) if odd else term
        for k in range(3 if odd else 2, degrees - 1, 2):
            term *= cosine**2 * ((k - 1) / k)
            within += term
        if (2 / math.pi if odd else 1.0) * within < CONFIDENCE:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan(low)


def steps_to(iteration: np.ndarray, perplexity: np.ndarray, target: float) -> float:
    """Steps after which validations first reach a perplexity; inf if they never do.

    Between validations the logarithm of the perplexity is taken to be linear in steps; after one
    that is not finite, the perplexity is reached at the next validation.

    Args:
        iteration: [V] steps before each validation.
        perplexity: [V]; inf or nan where it is beyond floats.
        target: the perplexity to reach.
    """
    reached = np.flatnonzero(perplexity <= target)
    if len(reached) == 0:
        return math.inf
    after = int(reached[0])
    if after == 0 or not np.isfinite(perplexity[after - 1]):
        return float(iteration[after])
    high, low = np.log(perplexity[after - 1]), np.log(perplexity[after])
    share = float((high - np.log(target)) / (high - low))
    return float(iteration[after - 1] + share * (iteration[after] - iteration[after - 1]))


@dataclass(frozen=True)
class Comparison:
    """Finished runs of each policy with the same seeds, which share weights and data order.

    Args:
        runs: by policy, then by seed; the same seeds for all.
        references: the policies that the others are compared with.

    Raises:
        ValueError: when the runs of a seed did not start from the same weights, or one ended before
            its last step.
    """

    runs: Mapping[str, Mapping[int, Run]]
    references: Sequence[str]

    def __post_init__(self) -> None:
        for seed in self.seeds:
            first = {name: runs[seed].validation_losses[0] for name, runs in self.runs.items()}
            start = next(iter(first.values()))
            for name, losses in first.items():
                if not np.allclose(losses, start, rtol=1e-4, equal_nan=True):
                    raise ValueError(
                        f"with seed {seed}, {name} did not start from the weights of "
                        f"{next(iter(first))}: before training the domains' losses are {losses} "
                        f"against {start}; run both with the same code on the same device"
                    )
            for name, runs in self.runs.items():
                last, wanted = runs[seed].validation_iteration[-1], runs[seed].info.train_iters
                if last != wanted:
                    raise ValueError(
                        f"{name} with seed {seed} ended after step {last:.0f} of {wanted}; train "
                        "it to its end"
                    )

    @property
    def seeds(self) -> list[int]:
        """The seeds of every policy."""
        return list(next(iter(self.runs.values())))

    @property
    def domains(self) -> list[str]:
        """[K] domain names."""
        return self._any_run.domains

    @property
    def _any_run(self) -> Run:
        return next(iter(next(iter(self.runs.values())).values()))

    def final(self, policy: str, metric: str) -> Estimate:
        """A metric of the last validation."""
        return Estimate.of({s: _metric(run, metric) for s, run in self.runs[policy].items()})

    def difference(
        self, policy: str, reference: str, metric: str, relative: bool = False
    ) -> Estimate:
        """The metric's difference to a reference's with the same seed; or as a share of it."""
        differences = {}
        for seed in self.seeds:
            own = _metric(self.runs[policy][seed], metric)
            other = _metric(self.runs[reference][seed], metric)
            differences[seed] = (own - other) / (other if relative else 1.0)
        return Estimate.of(differences)

    def steps_to_reference(self, policy: str, reference: str) -> dict[int, float]:
        """By seed: steps until the mean perplexity is the final one of a reference's run."""
        return {
            seed: steps_to(
                run.validation_iteration,
                run.mean_perplexity[:, 0],
                _metric(self.runs[reference][seed], "mean perplexity"),
            )
            for seed, run in self.runs[policy].items()
        }

    def mean(self, policy: str, values: str) -> np.ndarray:
        """The mean over seeds of an array that each run has, such as ``weights``."""
        return np.mean([getattr(run, values) for run in self.runs[policy].values()], axis=0)

    def to_dict(self) -> dict[str, Any]:
        """All figures, by policy, as plain values."""
        return {
            "seeds": self.seeds,
            "train_iters": self._any_run.info.train_iters,
            "references": list(self.references),
            "policies": {name: self._policy_figures(name) for name in self.runs},
            "hardware": self._any_run.info.hardware,
            "versions": self._any_run.info.versions,
        }

    def _policy_figures(self, name: str) -> dict[str, Any]:
        runs = self.runs[name]
        per_domain = {"tokens": self.mean(name, "tokens")}
        per_domain["perplexity"] = self.mean(name, "perplexity")[-1]
        return {
            "final": {metric: self.final(name, metric).to_dict() for metric in METRICS},
            "differences": {
                reference: {
                    metric: self.difference(name, reference, metric).to_dict() for metric in METRICS
                }
                for reference in self.references
                if reference != name
            },
            "steps_to": {
                reference: {
                    seed: steps if math.isfinite(steps) else None
                    for seed, steps in self.steps_to_reference(name, reference).items()
                }
                for reference in self.references
            },
            "steps_s": {seed: float(run.step_time_s.sum()) for seed, run in runs.items()},
            "mixing_s": {seed: float(run.mixing_time_s.sum()) for seed, run in runs.items()},
            "domains": {
                domain: {key: float(values[k]) for key, values in per_domain.items()}
                for k, domain in enumerate(self.domains)
            },
            "validations": {
                seed: dict(
                    zip(
                        run.validation_iteration.astype(int).tolist(),
                        run.mean_perplexity[:, 0].tolist(),
                        strict=True,
                    )
                )
                for seed, run in runs.items()
            },
        }


def _metric(run: Run, metric: str) -> float:
    if metric == "mean perplexity":
        return float(run.mean_perplexity[-1, 0])
    if metric == "natural perplexity":
        return float(run.mean_perplexity[-1, 1])
    if metric == "mean loss":
        return float(np.nanmean(run.validation_losses[-1]))
    assert metric == "worst perplexity"
    return float(np.nanmax(run.perplexity[-1]))


# --- As text ----------------------------------------------------------------------------------


def tables(comparison: Comparison) -> str:
    """The comparison as tables in Markdown, which read well on a terminal too."""
    seeds, run = comparison.seeds, comparison._any_run
    parts = [
        f"{len(comparison.runs)} policies, seeds {', '.join(map(str, seeds))}, "
        f"{run.info.train_iters} steps of {run.info.global_batch_size} sequences of "
        f"{run.info.sequence_length} tokens, {len(comparison.domains)} domains; "
        f"{run.info.hardware}. Brackets: 95% t-intervals over seeds, each for one figure by "
        "itself.",
        "## Final validation\n\n" + _final_table(comparison),
    ]
    for reference in comparison.references:
        parts.append(
            f"## Difference to {reference} with the same seed\n\n"
            f"sd: of the difference over seeds; unpaired: what it would be between different "
            f"seeds.\n\n{_difference_table(comparison, reference)}"
        )
    parts += [
        "## Steps to the final mean perplexity of\n\nMedian over seeds of the run with the same "
        "seed; in brackets how many seeds reached it.\n\n" + _steps_table(comparison),
        "## Tokens drawn, share\n\n" + _domain_table(comparison, "tokens"),
        "## Final perplexity by domain\n\n" + _domain_table(comparison, "perplexity"),
    ]
    return "\n\n".join(parts) + "\n"


def _final_table(comparison: Comparison) -> str:
    rows = [["policy", *METRICS, "sd over seeds", "steps took, s", "mixing"]]
    for name, runs in comparison.runs.items():
        seconds = [run.step_time_s.sum() for run in runs.values()]
        rows.append(
            [
                name,
                *(_with_interval(comparison.final(name, metric)) for metric in METRICS),
                number(comparison.final(name, "mean perplexity").sd),
                number(float(np.mean(seconds))),
                f"{np.mean([run.mixing_share for run in runs.values()]):.2%}",
            ]
        )
    return _markdown(rows)


def _difference_table(comparison: Comparison, reference: str) -> str:
    rows = [
        ["policy", "mean perplexity", "in %", "mean loss", "worst perplexity", "sd", "unpaired"]
    ]
    spread = comparison.final(reference, "mean perplexity").sd
    for name in comparison.runs:
        if name == reference:
            continue
        difference = comparison.difference(name, reference, "mean perplexity")
        share = comparison.difference(name, reference, "mean perplexity", relative=True)
        unpaired = math.hypot(spread, comparison.final(name, "mean perplexity").sd)
        rows.append(
            [
                name,
                _with_interval(difference, "+.2f"),
                _with_interval(share, "+.2%"),
                _with_interval(comparison.difference(name, reference, "mean loss"), "+.4f"),
                _with_interval(comparison.difference(name, reference, "worst perplexity"), "+.2f"),
                number(difference.sd),
                number(unpaired),
            ]
        )
    return _markdown(rows)


def _steps_table(comparison: Comparison) -> str:
    rows = [["policy", *comparison.references]]
    for name in comparison.runs:
        cells = []
        for reference in comparison.references:
            steps = list(comparison.steps_to_reference(name, reference).values())
            median, reached = float(np.median(steps)), int(np.isfinite(steps).sum())
            shown = f"{median:,.0f}" if math.isfinite(median) else "not reached"
            cells.append(f"{shown} ({reached}/{len(steps)})")
        rows.append([name, *cells])
    return _markdown(rows)


def _domain_table(comparison: Comparison, values: str) -> str:
    columns = []
    for name in comparison.runs:
        column = comparison.mean(name, values)
        if values == "tokens":
            columns.append([percent(share) for share in column / column.sum()])
        else:
            columns.append([number(value) for value in column[-1]])
    rows = [["domain", *comparison.runs]]
    rows += [list(row) for row in zip(comparison.domains, *columns, strict=True)]
    return _markdown(rows)


def _with_interval(estimate: Estimate, form: str = "") -> str:
    def written(value: float) -> str:
        return format(value, form) if form else number(value)

    if not math.isfinite(estimate.low):
        return written(estimate.mean)
    return f"{written(estimate.mean)} [{written(estimate.low)}, {written(estimate.high)}]"


def _markdown(rows: list[list[str]]) -> str:
    """A Markdown table of rows, the first of them its head, in columns of even width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])
