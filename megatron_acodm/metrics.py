"""The record of a run: writes and reads ``metrics.jsonl`` and ``run.json`` in its directory."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_acodm.files import write_atomically
from megatron_acodm.mirrors import open_mirrors

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
_REPORTED_VERSIONS = ("megatron-acodm", "megatron-core", "torch", "transformer-engine", "numpy")


# --- What was run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RunInfo:
    """What was run, on what, and since when; one ``run.json`` a run directory."""

    domains: list[str]
    """Domain names, in the order of every per-domain array of the run."""

    sequence_length: int
    """Tokens per sample."""

    global_batch_size: int
    """Samples per step."""

    train_iters: int
    """Steps that the run is meant to take."""

    policy: str
    """Name of the mixing policy."""

    config: dict[str, Any] = field(default_factory=dict)
    """Everything else that was set: model, optimizer, parallel layout, mixing."""

    command: str = field(default_factory=lambda: " ".join(sys.orig_argv))
    """The command line."""

    versions: dict[str, str] = field(default_factory=lambda: installed_versions())
    """Version by package, Python included."""

    hardware: str = field(default_factory=lambda: describe_hardware())
    """The device that rank 0 ran on."""

    started: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    """When the run, or its latest resumption, started (ISO 8601, UTC)."""


def installed_versions() -> dict[str, str]:
    """Version of Python and of each package that shapes a run's numbers, where installed."""
    versions = {"python": platform.python_version()}
    for package in _REPORTED_VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> str:
    """The GPU's name and memory, or the machine's processor architecture and core count."""
    import torch  # here, so that reading a record does not take seconds

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU ({platform.machine()}), {os.cpu_count()} cores"


def write_run_info(run_dir: str | Path, info: RunInfo) -> None:
    """Write ``run.json``, in one piece; an earlier one is replaced."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(dataclasses.asdict(info)), indent=2, ensure_ascii=False, default=str)
    write_atomically(Path(run_dir) / RUN_FILE, text + "\n")


def read_run_info(run_dir: str | Path) -> RunInfo:
    """Read ``run.json``.

    Raises:
        ValueError: if it is missing or was not written by ``write_run_info``.
    """
    path = Path(run_dir) / RUN_FILE
    try:
        return RunInfo(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}; give the directory that the training run "
            "wrote (--run-dir)"
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; restore it or train again") from error


# --- What happened ---------------------------------------------------------------------------


def domain_metrics(
    names: Sequence[str],
    weights: Sequence[float],
    samples: Sequence[int],
    losses: Sequence[float],
    rewards: Sequence[float] | None = None,
    epochs: Sequence[float] | None = None,
) -> dict[str, dict[str, float | int | None]]:
    """Arrange K-sized arrays as the ``domains`` entry of a step's line.

    Args:
        names: [K] domain names.
        weights: [K] weights that drew the step's batch.
        samples: [K] sequences of each domain in the batch.
        losses: [K] mean token loss of each domain; nan where it was not drawn.
        rewards: [K] smoothed rewards, nan where unknown; None if the policy has none.
        epochs: [K] how often each domain has been gone through, this batch included.
    """
    unknown = [None] * len(names)
    columns = (
        names,
        weights,
        samples,
        losses,
        unknown if rewards is None else rewards,
        unknown if epochs is None else epochs,
    )
    return {
        name: {
            "weight": weight,
            "samples": int(count),
            "loss": loss,
            "reward": reward,
            "epochs": epoch,
        }
        for name, weight, count, loss, reward, epoch in zip(*columns, strict=True)
    }


def perplexity(loss: float) -> float:
    """Perplexity of a mean token loss in nats; inf where it is beyond floats."""
    return math.inf if loss >= 700 else math.exp(loss)


def mean_perplexities(
    losses: Mapping[str, float], natural_weights: Mapping[str, float]
) -> dict[str, float]:
    """Means of the domains' perplexities.

    Args:
        losses: mean token loss of each validated domain.
        natural_weights: share of each training domain in all training tokens.

    Returns:
        ``unweighted``: every domain alike. ``natural``: by the natural weights of the domains that
        were validated, left out when none of them is a training domain.
    """
    values = {name: perplexity(loss) for name, loss in losses.items()}
    means = {"unweighted": sum(values.values()) / len(values)}
    weights = {name: natural_weights[name] for name in values if name in natural_weights}
    if total := sum(weights.values()):
        means["natural"] = sum(values[name] * weights[name] for name in weights) / total
    return means


class MetricsWriter:
    """Appends a run's metrics to ``metrics.jsonl`` and mirrors them to TensorBoard.

    One process a run writes. Each line is handed to the system as it is written, so that a killed
    run loses at most the line it was writing.

    Args:
        run_dir: directory of the run; made if missing.
        tensorboard: also write TensorBoard scalars to ``run_dir/tensorboard``.
        wandb_project: also log to this Weights & Biases project.
        resume_from: the last iteration that the run keeps: later lines are dropped, a torn last
            line with them. None or 0 starts over; a file that is there is kept beside it under
            the name ``metrics.jsonl.previous``.

    Raises:
        ValueError: if the file to resume is damaged before its last line.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        resume_from: int | None = None,
    ) -> None:
        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        kept: list[dict[str, Any]] = []
        if path.exists() and resume_from:
            kept = [line for line in _read_lines(path) if line["iteration"] <= resume_from]
            write_atomically(path, "".join(_encode(line) for line in kept))
        elif path.exists():
            os.replace(path, path.with_name(f"{METRICS_FILE}.previous"))
        self._last_step = max((x["iteration"] for x in kept if "validation" not in x), default=0)
        self._last_validation = max((x["iteration"] for x in kept if "validation" in x), default=-1)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        first_step = resume_from + 1 if resume_from else 0
        self._mirrors = open_mirrors(directory, tensorboard, wandb_project, first_step)

    def step(
        self,
        iteration: int,
        *,
        consumed_samples: int,
        lm_loss: float,
        step_time_s: float,
        mixing_time_s: float,
        domains: Mapping[str, Mapping[str, Any]],
        **extra: Any,
    ) -> None:
        """Record a training step.

        Args:
            iteration: the step, counted from 1.
            consumed_samples: sequences consumed by the run, this step's included.
            lm_loss: mean token loss of the step.
            step_time_s: wall-clock seconds of the whole step.
            mixing_time_s: seconds of it that the step waited for mixing.
            domains: per-domain values, as ``domain_metrics`` arranges them.
            **extra: further numbers or nested mappings of numbers, e.g. ``grad_norm``; ``gram``,
                [K, K] products of the domains' mean gradients, is mirrored as a heat map.

        Raises:
            ValueError: if the step does not come after the last one recorded.
        """
        if iteration <= self._last_step:
            raise ValueError(
                f"step {iteration} is already recorded (the last one is {self._last_step}); open "
                "the writer with resume_from set to the iteration that the run resumes from"
            )
        self._last_step = iteration
        values = {
            "consumed_samples": consumed_samples,
            "lm_loss": lm_loss,
            "step_time_s": step_time_s,
            "mixing_time_s": mixing_time_s,
            **extra,
            "domains": {name: dict(entry) for name, entry in domains.items()},
        }
        self._write(iteration, values)

    def validation(
        self, iteration: int, losses: Mapping[str, float], natural_weights: Mapping[str, float]
    ) -> None:
        """Record the validation of each domain after ``iteration`` steps.

        A validation that the file already holds, as after a resume, is not recorded again.

        Args:
            iteration: steps before it.
            losses: mean token loss of each domain.
            natural_weights: share of each training domain in all training tokens.
        """
        if iteration <= self._last_validation:
            return
        self._last_validation = iteration
        self._write(
            iteration,
            {
                "validation": dict(losses),
                "perplexity": {name: perplexity(loss) for name, loss in losses.items()},
                "mean_perplexity": mean_perplexities(losses, natural_weights),
            },
        )

    def close(self) -> None:
        """Flush and close every output."""
        self._file.close()
        for mirror in self._mirrors:
            mirror.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, iteration: int, values: dict[str, Any]) -> None:
        values = _plain(values)
        self._file.write(_encode({"iteration": iteration, **values}))
        self._file.flush()
        for mirror in self._mirrors:
            mirror.log(iteration, values)


def read_metrics(run_dir: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Read ``metrics.jsonl``; a torn last line, as a killed run leaves it, is passed over.

    Returns:
        The lines of the steps and the lines of the validations, each in order of iteration.

    Raises:
        ValueError: if the file is missing, or a line other than a torn last one is damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    try:
        lines = list(_read_lines(path))
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}; give the directory that the training run "
            "wrote (--run-dir)"
        ) from error
    validations = [line for line in lines if "validation" in line]
    return [line for line in lines if "validation" not in line], validations


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line)
                if not isinstance(value, dict) or not isinstance(value.get("iteration"), int):
                    raise ValueError("not an object with an iteration")
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}); remove the line, or restore the "
                    "file"
                ) from error
            yield value


def _encode(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Nested values as JSON has them: numbers of numpy or torch unwrapped, nan and inf as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
