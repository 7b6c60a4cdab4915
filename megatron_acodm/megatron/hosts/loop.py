"""Puts the mixer into a host's own training loop, by patches: what all such hosts share.

A host's loop calls its parts by their names in its modules, which are resolved at each call. Those
names are replaced before it runs. docs/hosts.md says why each is the one.
"""

from __future__ import annotations

import functools
import inspect
import time
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_acodm.blending import DataExhausted
from megatron_acodm.config import AcodmConfig
from megatron_acodm.door import fail, rank
from megatron_acodm.megatron import patches
from megatron_acodm.megatron.compat import UnsupportedHostError, check_host_version, host_symbol
from megatron_acodm.megatron.failures import (
    SaveFailed,
    explain_lost_rank,
    lost_rank,
    naming_failed_save,
)
from megatron_acodm.megatron.helpers import helpers_in_hand
from megatron_acodm.megatron.hosts.checkpoints import CheckpointLifeCycle
from megatron_acodm.megatron.hosts.records import HostRecorder, default_run_dir
from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.megatron.policy_file import save_learned_policy
from megatron_acodm.megatron.records import FinishedStep, log

Function = Callable[..., Any]
Replacement = tuple[Callable[[Function], Function], tuple[str, ...]]
"""What makes the function that takes a symbol's place, and the parameters that it goes by."""

_SHOULD_EXIT = 3
_GRAD_NORM = 5
"""Positions in what a host's ``train_step`` returns."""


@dataclass(frozen=True)
class LaunchOptions:
    """What is added to a run."""

    config: AcodmConfig
    run_dir: Path | None = None  # of metrics.jsonl; None: beside the host's output
    adopt: bool = False  # resume although domains came, went or changed
    save_policy: str | None = None  # file for what the agent has learned


class _NoUpdate(Exception):
    """The host left its step without an update, to be taken again by a later run."""


class HostLoop(ABC):
    """The patches of a host's loop, and the run that they drive."""

    host: str
    """The host's name, for messages."""

    used: tuple[str, ...] = ()
    """Host symbols that are called as they are."""

    def __init__(self, options: LaunchOptions) -> None:
        self.options = options
        self.mixer: Mixer | None = None
        self._model: Any = None
        self._recorder: HostRecorder | None = None
        self._checkpoints: CheckpointLifeCycle | None = None
        self._originals: list[tuple[Any, str, Any]] = []
        self._logs_step = False
        self._last_iteration = 0
        self._data_has_ended = False

    # What a host says -------------------------------------------------------------------------

    @property
    @abstractmethod
    def replacements(self) -> dict[str, Replacement]:
        """What takes the place of each host symbol."""

    @property
    @abstractmethod
    def _args(self) -> Namespace:
        """The host's arguments and progress, by Megatron-LM's names."""

    @abstractmethod
    def _iteration_of_save(self, arguments: dict[str, Any]) -> int | None:
        """Which step a call of ``save_checkpoint`` saves; None: no checkpoint of a run."""

    @abstractmethod
    def _stop_after(self, iteration: int) -> None:
        """Let the host's loop end with this step."""

    @abstractmethod
    def _writers(self) -> tuple[Any, Any]:
        """The host's TensorBoard and Weights & Biases writers; None where it has none."""

    # Patches ----------------------------------------------------------------------------------

    def install(self) -> None:
        """Patch the host; does nothing the second time.

        Raises:
            UnsupportedHostError: naming the symbol, or its parameter, that is not there.
        """
        if self._originals:
            return
        check_host_version()
        for path in self.used:
            host_symbol(path)
        found = []
        for path, (make, parameters) in self.replacements.items():
            owner, name, original = host_symbol(path)
            missing = set(parameters) - set(inspect.signature(original).parameters)
            if missing:
                raise UnsupportedHostError(
                    f"{path} of this {self.host} has no parameter {', '.join(sorted(missing))!r}; "
                    "docs/hosts.md lists the versions that are supported"
                )
            found.append((owner, name, original, make))
        for owner, name, original, make in found:
            setattr(owner, name, functools.wraps(original)(make(original)))
            self._originals.append((owner, name, original))

    def uninstall(self) -> None:
        """Put the host's functions back."""
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    # Set-up -----------------------------------------------------------------------------------

    def _start(self) -> None:
        """Hook the model and go on where the checkpoint was saved; collective."""
        args, mixer = self._args, self.mixer
        assert mixer is not None and self._checkpoints is not None
        if not mixer.is_bound:
            raise ValueError(
                "no training data was built with BlendedMegatronDatasetBuilder, so there is "
                "nothing to mix; give data paths, or use policy 'none'"
            )
        mixer.attach(self._model)
        self._last_iteration = args.iteration
        if args.iteration > 0:
            self._checkpoints.restore(
                mixer, args.iteration, args.consumed_train_samples, adopt=self.options.adopt
            )
        run_dir = self.options.run_dir or default_run_dir(args)
        tensorboard, wandb = self._writers()
        self._recorder = HostRecorder(
            args, mixer, run_dir, tensorboard, wandb, resume_from=args.iteration
        )
        log(
            f"megatron-acodm: policy {mixer.config.mixing.policy} mixes {len(mixer.domains)} "
            f"domains ({', '.join(mixer.domains)}) from step {args.iteration + 1} on; "
            + (f"metrics go to {run_dir}" if run_dir else "no metrics file without a run directory")
        )
        self._end_where_data_ends(args.iteration, args.consumed_train_samples)

    # Training ---------------------------------------------------------------------------------

    def _train_step(self, original: Function) -> Function:
        signature = inspect.signature(original)

        def train_step(*args: Any, **kwargs: Any) -> Any:
            mixer, recorder, host = self.mixer, self._recorder, self._args
            if mixer is None or recorder is None:
                raise UnsupportedHostError(
                    f"{self.host} called train_step before the data was built; this order of "
                    "calls is not known (docs/hosts.md lists the versions that are supported)"
                )
            iteration, consumed = host.curr_iteration + 1, host.consumed_train_samples
            count = mixer.num_samples(consumed)
            start = time.perf_counter()
            try:
                with mixer.step(iteration, consumed) as step:
                    result = original(*args, **kwargs)
                    if result[_SHOULD_EXIT]:
                        raise _NoUpdate
            except _NoUpdate:
                return result
            seconds = time.perf_counter() - start
            groups = signature.bind(*args, **kwargs).arguments["optimizer"].param_groups
            rate = float(groups[0]["lr"]) if groups else 0.0
            norm = float(result[_GRAD_NORM] or 0.0)
            recorder.step(
                FinishedStep(iteration, count, float("nan"), norm, rate, seconds, {}, step)
            )
            self._last_iteration = iteration
            self._end_where_data_ends(iteration, consumed + count)
            return result

        return train_step

    def _end_where_data_ends(self, iteration: int, consumed: int) -> None:
        """Let the host's loop end, and save, after this step if no sample is left."""
        args, mixer = self._args, self.mixer
        assert mixer is not None
        if iteration < args.train_iters and mixer.num_samples(consumed) == 0:
            log(f"megatron-acodm: training ends after step {iteration}: {mixer.exhausted}")
            self._stop_after(iteration)
            self._data_has_ended = True

    def _skip_step(self, original: Function) -> Function:
        def dummy_train_step(*args: Any, **kwargs: Any) -> Any:
            consumed = self._args.consumed_train_samples
            result = original(*args, **kwargs)
            if self.mixer is not None:
                count = self.mixer.num_samples(consumed)
                self.mixer.skip_step(consumed)
                self._last_iteration += 1
                self._end_where_data_ends(self._last_iteration, consumed + count)
            return result

        return dummy_train_step

    def _training_log(self, original: Function) -> Function:
        def training_log(*args: Any, **kwargs: Any) -> Any:
            self._logs_step = True
            try:
                return original(*args, **kwargs)
            finally:
                self._logs_step = False

        return training_log

    def _print(self, original: Function) -> Function:
        def print_rank_last(message: str) -> None:
            if self._logs_step and self._recorder is not None:
                message += self._recorder.columns()
            original(message)

        return print_rank_last

    # Checkpoints ------------------------------------------------------------------------------

    def _save(self, original: Function) -> Function:
        signature = inspect.signature(original)

        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            mixer, iteration = self.mixer, self._iteration_of_save(bound)
            is_ours = mixer is not None and self._recorder is not None and self._args.save
            if not is_ours or iteration is None:
                return original(*args, **kwargs)
            assert mixer and self._recorder and self._checkpoints
            self._recorder.flush()  # a resumed run keeps the lines up to here
            if self.options.save_policy:
                save_learned_policy(mixer, self.options.save_policy, self._args, iteration)
            root = Path(self._args.save)
            # The helpers of an asynchronous save are ended by SIGTERM when the host exits.
            with (
                helpers_in_hand(heed_sigterm=self._args.async_save),
                naming_failed_save(root, iteration),
                self._checkpoints.saving(mixer, root, iteration),
            ):
                return original(*args, **kwargs)

        return save_checkpoint

    def _load_base(self, original: Function) -> Function:
        def _load_base_checkpoint(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._checkpoints is not None:
                self._checkpoints.loaded_from = result[1]
            return result

        return _load_base_checkpoint

    def _announce(self, original: Function) -> Function:
        def get_checkpoint_tracker_filename(*args: Any, **kwargs: Any) -> Any:
            # While it saves, the host asks for this file when all else is on the disk.
            if self._checkpoints is not None:
                self._checkpoints.put_in_place()
            return original(*args, **kwargs)

        return get_checkpoint_tracker_filename

    # The end ----------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the host's run: patches the host, and closes what was opened.

        A save that fails, or a rank that is gone, ends this rank: its peers may wait for it.

        Raises:
            DataExhausted: when the data did not last, and the user wants that to be an error.
            UnsupportedHostError: when the host is not known.
        """
        self.install()
        try:
            yield
            self._finish()
        except SystemExit:  # the host's way to end at a time, a step or a signal
            self._finish()
            raise
        except SaveFailed as error:
            fail(f"error: rank {rank()}: {error}", error)
        except BaseException as error:
            if message := self._explain_lost_rank(error):
                fail(f"error: rank {rank()}: {message}", error)
            raise
        finally:
            self._close()

    def _close(self) -> None:
        """Close what was opened, and leave the host as it was; does nothing the second time."""
        if self._recorder is not None:
            self._recorder.close()
        self.uninstall()
        patches.unpatch()

    def _finish(self) -> None:
        mixer = self.mixer
        if mixer is None or self._recorder is None:
            return
        self._recorder.flush()
        if self.options.save_policy:
            save_learned_policy(mixer, self.options.save_policy, self._args, self._last_iteration)
        if mixer.config.blending.repetition == "error" and self._data_has_ended:
            raise DataExhausted(
                f"training ended after step {self._last_iteration} of {mixer.run.train_iters}: "
                f"{mixer.exhausted}"
            )

    def _explain_lost_rank(self, error: BaseException) -> str | None:
        """The message on a rank that is gone, if that is why the run ended."""
        if self.mixer is None or (said := lost_rank(error)) is None:
            return None
        args = self._args
        minutes = args.distributed_timeout_minutes
        return explain_lost_rank(said, minutes, args.save, self._last_iteration)

    @property
    def has_trained(self) -> bool:
        """Whether the script has reached its training loop."""
        return self._recorder is not None
