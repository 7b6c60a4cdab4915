"""A run's metrics as arrays, read from its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_acodm.metrics import RunInfo, read_metrics, read_run_info

LAST_STEPS = 10
"""Steps over which the closing training loss is averaged."""


@dataclass(frozen=True)
class Run:
    """A run's metrics as arrays over T steps, V validations and K domains; nan where unknown.

    Without a mixing policy the steps say nothing of domains: weights and samples are all nan.
    """

    info: RunInfo
    iteration: np.ndarray  # [T]
    consumed_samples: np.ndarray  # [T] sequences, summed over domains and steps
    lm_loss: np.ndarray  # [T] mean token loss
    step_time_s: np.ndarray  # [T]
    mixing_time_s: np.ndarray  # [T]
    weights: np.ndarray  # [T, K]
    samples: np.ndarray  # [T, K] sequences
    losses: np.ndarray  # [T, K] mean token loss of each domain
    rewards: np.ndarray  # [T, K]
    epochs: np.ndarray  # [T, K] how often each domain has been gone through
    validation_iteration: np.ndarray  # [V]
    validation_losses: np.ndarray  # [V, K]
    mean_perplexity: np.ndarray  # [V, 2] over the domains: every one alike, by natural weights
    diagnostics: dict[str, np.ndarray]  # [T] each: figures of the policy and its guard rails
    gram: tuple[int, np.ndarray] | None  # the last [K, K] of mean gradients' products, and its step

    @classmethod
    def load(cls, run_dir: str | Path) -> Run:
        """Read a run directory.

        Raises:
            ValueError: if a file is missing or damaged, or holds no step yet.
        """
        info = read_run_info(run_dir)
        steps, validations = read_metrics(run_dir)
        if not steps:
            raise ValueError(f"{run_dir} records no training step yet; wait for the first one")
        try:
            return cls(
                info=info,
                iteration=_column(steps, "iteration"),
                consumed_samples=_column(steps, "consumed_samples"),
                lm_loss=_column(steps, "lm_loss"),
                step_time_s=_column(steps, "step_time_s"),
                mixing_time_s=_column(steps, "mixing_time_s"),
                weights=_table(steps, info.domains, "weight"),
                samples=_table(steps, info.domains, "samples"),
                losses=_table(steps, info.domains, "loss"),
                rewards=_table(steps, info.domains, "reward"),
                epochs=_table(steps, info.domains, "epochs"),
                validation_iteration=_column(validations, "iteration"),
                validation_losses=np.array(
                    [
                        [line["validation"].get(name) for name in info.domains]
                        for line in validations
                    ],
                    dtype=np.float64,
                ).reshape(len(validations), len(info.domains)),
                mean_perplexity=np.array(
                    [
                        [means.get("unweighted"), means.get("natural")]
                        for means in (line.get("mean_perplexity", {}) for line in validations)
                    ],
                    dtype=np.float64,
                ).reshape(len(validations), 2),
                diagnostics=_diagnostics(steps),
                gram=_last_gram(steps, len(info.domains)),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{run_dir}: metrics.jsonl and run.json do not fit together ({error!r}); they must "
                "come from the same run"
            ) from error

    @property
    def domains(self) -> list[str]:
        """[K] domain names."""
        return self.info.domains

    @property
    def tokens(self) -> np.ndarray:
        """[K] tokens drawn from each domain; nan without a mixing policy."""
        return self.samples.sum(axis=0) * self.info.sequence_length

    @property
    def perplexity(self) -> np.ndarray:
        """[V, K] validation perplexity."""
        return np.exp(self.validation_losses)

    @property
    def mixing_share(self) -> float:
        """Share of the steps' time that they waited for mixing."""
        return float(np.nansum(self.mixing_time_s) / np.nansum(self.step_time_s))

    @property
    def last_loss(self) -> float:
        """Training loss, averaged over the last few steps."""
        recent = self.lm_loss[-LAST_STEPS:]
        return float(np.nanmean(recent)) if np.isfinite(recent).any() else np.nan


def _column(lines: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([line[key] for line in lines], dtype=np.float64)


def _table(lines: list[dict[str, Any]], domains: list[str], key: str) -> np.ndarray:
    rows = [
        [line["domains"][name][key] for name in domains]
        if line["domains"]
        else [None] * len(domains)
        for line in lines
    ]
    return np.array(rows, dtype=np.float64)


def _diagnostics(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    figures = [line.get("diagnostics", {}) for line in lines]
    names = dict.fromkeys(name for entry in figures for name in entry)
    return {
        name: np.array([entry.get(name) for entry in figures], dtype=np.float64) for name in names
    }


def _last_gram(lines: list[dict[str, Any]], num_domains: int) -> tuple[int, np.ndarray] | None:
    for line in reversed(lines):
        if line.get("gram") is not None:
            gram = np.array(line["gram"], dtype=np.float64)
            return line["iteration"], gram.reshape(num_domains, num_domains)
    return None
