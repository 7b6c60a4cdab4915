"""Drives an unedited Megatron-LM: puts the mixer into its training loop, by patches.

Megatron-LM's loop calls its parts by their names in ``megatron.training.training``, which are
resolved at each call. Those names are replaced before the script runs; what the script or other
modules have imported by name is never what is patched. docs/hosts.md says why each is the one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_acodm.blending import DataExhausted
from megatron_acodm.config import AcodmConfig
from megatron_acodm.megatron import patches
from megatron_acodm.megatron.compat import (
    UnsupportedHostError,
    check_host_version,
    host_symbol,
)
from megatron_acodm.megatron.failures import explain_lost_rank, lost_rank, naming_failed_save
from megatron_acodm.megatron.groups import set_timeout
from megatron_acodm.megatron.hosts.checkpoints import CheckpointLifeCycle
from megatron_acodm.megatron.hosts.records import HostRecorder, default_run_dir
from megatron_acodm.megatron.hosts.refusals import refuse_unshared_data, refuse_unsupported
from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.megatron.policy_file import save_learned_policy
from megatron_acodm.megatron.records import FinishedStep, log
from megatron_acodm.megatron.run import RunShape

logger = logging.getLogger(__name__)

Function = Callable[..., Any]

_TRAINING = "megatron.training.training"
_CHECKPOINTING = "megatron.training.checkpointing"
_PROVIDER = "build_train_valid_test_datasets_provider"
_SHOULD_EXIT = 3
"""Position in what ``train_step`` returns."""


@dataclass(frozen=True)
class LaunchOptions:
    """What the launcher's flags add to a run."""

    config: AcodmConfig
    run_dir: Path | None = None  # of metrics.jsonl; None: beside the host's output
    adopt: bool = False  # resume although domains came, went or changed
    save_policy: str | None = None  # file for what the agent has learned


class _NoUpdate(Exception):
    """The host left its step without an update, to be taken again by a later run."""


class MegatronLM:
    """The patches, and the run that they drive."""

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

    # Patches ----------------------------------------------------------------------------------

    @property
    def replacements(self) -> dict[str, tuple[Callable[[Function], Function], tuple[str, ...]]]:
        """What takes the place of each host symbol, and the parameters that it goes by."""
        return {
            f"{_TRAINING}.initialize_megatron": (self._initialize, ()),
            f"{_TRAINING}.setup_model_and_optimizer": (self._set_up_model, ()),
            f"{_TRAINING}.build_train_valid_test_data_loaders": (self._build_data, (_PROVIDER,)),
            f"{_TRAINING}.train_step": (self._train_step, ("optimizer",)),
            f"{_TRAINING}.dummy_train_step": (self._skip_step, ()),
            f"{_TRAINING}.training_log": (self._training_log, ()),
            f"{_TRAINING}.print_rank_last": (self._print, ("message",)),
            f"{_TRAINING}.save_checkpoint": (self._save, ("iteration",)),
            f"{_CHECKPOINTING}.save_checkpoint": (self._save, ("iteration",)),
            f"{_CHECKPOINTING}._load_base_checkpoint": (self._load_base, ()),
            f"{_CHECKPOINTING}.get_checkpoint_tracker_filename": (self._announce, ()),
        }

    used = (
        f"{_TRAINING}.get_args",
        f"{_TRAINING}.get_tensorboard_writer",
        f"{_TRAINING}.get_wandb_writer",
        f"{_CHECKPOINTING}.get_checkpoint_name",
    )
    """Host symbols that are called as they are."""

    def install(self) -> None:
        """Patch the host; does nothing the second time.

        Raises:
            UnsupportedHostError: naming the symbol, or its parameter, that is not there.
        """
        if self._originals:
            return
        try:
            importlib.import_module(_TRAINING)
        except ImportError as error:
            raise UnsupportedHostError(
                f"Megatron-LM's {_TRAINING} cannot be imported ({error}); name a script of a "
                "Megatron-LM checkout, or put the checkout on PYTHONPATH"
            ) from error
        check_host_version()
        for path in self.used:
            host_symbol(path)
        found = []
        for path, (make, parameters) in self.replacements.items():
            owner, name, original = host_symbol(path)
            missing = set(parameters) - set(inspect.signature(original).parameters)
            if missing:
                raise UnsupportedHostError(
                    f"{path} of this Megatron-LM has no parameter {', '.join(sorted(missing))!r}; "
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

    @property
    def _args(self) -> Namespace:
        return host_symbol(f"{_TRAINING}.get_args")[2]()

    def _initialize(self, original: Function) -> Function:
        def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            refuse_unsupported(self._args, self.options.config)
            set_timeout(self._args.distributed_timeout_minutes)
            return result

        return initialize_megatron

    def _set_up_model(self, original: Function) -> Function:
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
            self._checkpoints = CheckpointLifeCycle(self._args)
            result = original(*args, **kwargs)
            self._model = result[0]
            # Not before: the host has just made the number of steps of that of samples.
            self.mixer = patches.patch(self.options.config, run_shape(self._args))
            return result

        return setup_model_and_optimizer

    def _build_data(self, original: Function) -> Function:
        def build_train_valid_test_data_loaders(*args: Any, **kwargs: Any) -> Any:
            provider = inspect.signature(original).bind(*args, **kwargs).arguments[_PROVIDER]
            refuse_unshared_data(provider, self._args.tensor_model_parallel_size)
            loaders = original(*args, **kwargs)
            # Before the host makes iterators: their workers must find the restored ledger.
            if self._recorder is None:
                self._start()
            return loaders

        return build_train_valid_test_data_loaders

    def _start(self) -> None:
        """Hook the model and go on where the checkpoint was saved; collective."""
        args, mixer = self._args, self.mixer
        assert mixer is not None and self._checkpoints is not None
        if not mixer.is_bound:
            raise ValueError(
                "the script built no training data with BlendedMegatronDatasetBuilder, so there "
                "is nothing to mix; give --data-path, or use --acodm-policy none"
            )
        mixer.attach(self._model)
        self._last_iteration = args.iteration
        if args.iteration > 0:
            self._checkpoints.restore(mixer, adopt=self.options.adopt)
        run_dir = self.options.run_dir or default_run_dir(args)
        self._recorder = HostRecorder(
            args,
            mixer,
            run_dir,
            host_symbol(f"{_TRAINING}.get_tensorboard_writer")[2](),
            host_symbol(f"{_TRAINING}.get_wandb_writer")[2](),
            resume_from=args.iteration,
        )
        log(
            f"megatron-acodm: policy {mixer.config.mixing.policy} mixes {len(mixer.domains)} "
            f"domains ({', '.join(mixer.domains)}) from step {args.iteration + 1} on; "
            + (f"metrics go to {run_dir}" if run_dir else "no metrics file without --acodm-run-dir")
        )
        self._end_where_data_ends(args.iteration, args.consumed_train_samples)

    # Training ---------------------------------------------------------------------------------

    def _train_step(self, original: Function) -> Function:
        signature = inspect.signature(original)

        def train_step(*args: Any, **kwargs: Any) -> Any:
            mixer, recorder, host = self.mixer, self._recorder, self._args
            if mixer is None or recorder is None:
                raise UnsupportedHostError(
                    f"{_TRAINING}.train_step was called before the data was built; this order of "
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
            norm = float(result[_SHOULD_EXIT + 2] or 0.0)
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
            args.train_iters = iteration
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
            mixer, iteration = self.mixer, bound["iteration"]
            is_ours = mixer is not None and self._recorder is not None and self._args.save
            if not is_ours or bound.get("release"):
                return original(*args, **kwargs)
            assert mixer and self._recorder and self._checkpoints
            self._recorder.flush()  # a resumed run keeps the lines up to here
            if self.options.save_policy:
                save_learned_policy(mixer, self.options.save_policy, self._args, iteration)
            with (
                naming_failed_save(self._args.save, iteration),
                self._checkpoints.saving(mixer, iteration),
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
        """Around the script: patches the host, and closes what was opened.

        Raises:
            DataExhausted: when the data did not last, and the user wants that to be an error.
            UnsupportedHostError: when the script never trained, or the host is not known.
        """
        self.install()
        try:
            yield
            self._finish()
        except SystemExit:  # the host's way to end at a time, a step or a signal
            self._finish()
            raise
        finally:
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

    def explain_lost_rank(self, error: BaseException) -> str | None:
        """The message on a rank that is gone, if that is why the script ended."""
        if self.mixer is None or (said := lost_rank(error)) is None:
            return None
        args = self._args
        minutes = args.distributed_timeout_minutes
        return explain_lost_rank(said, minutes, args.save, self._last_iteration)

    @property
    def has_trained(self) -> bool:
        """Whether the script has reached its training loop."""
        return self._recorder is not None


def run_shape(args: Namespace) -> RunShape:
    """The sizes of a run of Megatron-LM, from its arguments after the model was set up."""
    # Versions that have a schedule by tokens, which is refused, ignore the ramp-up.
    ramp_up = None if hasattr(args, "step_batch_size_schedule") else args.rampup_batch_size
    return RunShape(
        args.train_iters,
        args.global_batch_size,
        args.micro_batch_size,
        args.seed,
        tuple(int(value) for value in ramp_up) if ramp_up else None,  # type: ignore[arg-type]
    )
