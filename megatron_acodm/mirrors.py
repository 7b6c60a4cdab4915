"""Where a run's metrics are shown as well, while it trains: TensorBoard and Weights & Biases."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

logger = logging.getLogger(__name__)


class Mirror(Protocol):
    """Shows what ``metrics.jsonl`` records."""

    def log(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Take the values of a line, as JSON has them."""

    def close(self) -> None:
        """Flush and close."""


def open_mirrors(
    directory: Path, tensorboard: bool, wandb_project: str | None, first_step: int
) -> list[Mirror]:
    """The mirrors that are asked for.

    Args:
        directory: of the run.
        tensorboard: whether to write to ``directory/tensorboard``.
        wandb_project: of Weights & Biases, or None.
        first_step: events of an earlier attempt at this step and later are hidden.

    Raises:
        ValueError: if Weights & Biases is asked for and not installed.
    """
    mirrors: list[Mirror] = []
    if tensorboard:
        try:
            mirrors.append(_TensorBoard(directory, first_step))
        except ImportError:
            logger.warning("tensorboard is not installed: scalars go to metrics.jsonl only")
    if wandb_project:
        mirrors.append(_Wandb(directory, wandb_project))
    return mirrors


class _TensorBoard:
    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def log(self, iteration: int, values: Mapping[str, Any]) -> None:
        for tag, value in _scalars(values):
            self._writer.add_scalar(tag, value, iteration)
        if values.get("gram") is not None:
            from megatron_acodm.reporting.plots import gram_figure  # here: few runs have any

            gram = np.array(values["gram"], dtype=np.float64)
            self._writer.add_figure("gram", gram_figure(list(values["domains"]), gram), iteration)
        if "validation" in values:
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"wandb_project is {project!r}, but wandb is not installed; install it "
                "(pip install wandb) or leave the project out"
            ) from error
        self._run = wandb.init(project=project, dir=str(directory), name=directory.name)

    def log(self, iteration: int, values: Mapping[str, Any]) -> None:
        self._run.log({"iteration": iteration, **dict(_scalars(values))})

    def close(self) -> None:
        self._run.finish()


def _scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield (tag, number); a domain's values are grouped by quantity, so that a chart compares."""
    for key, value in values.items():
        if key == "domains":
            for domain, entry in value.items():
                for quantity, number in entry.items():
                    if number is not None:
                        yield f"{quantity}/{domain}", number
        elif isinstance(value, Mapping):
            yield from ((f"{key}/{name}", x) for name, x in value.items() if _is_number(x))
        elif _is_number(value):
            yield f"train/{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))
