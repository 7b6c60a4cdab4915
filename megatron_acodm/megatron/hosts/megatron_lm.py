"""Drives an unedited Megatron-LM, whose scripts the launcher runs.

What is patched are names in ``megatron.training.training``, never what the script or other modules
have imported by name.
"""

from __future__ import annotations

import importlib
import inspect
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_acodm.megatron import patches
from megatron_acodm.megatron.compat import UnsupportedHostError, host_symbol
from megatron_acodm.megatron.groups import set_timeout
from megatron_acodm.megatron.hosts.checkpoints import CheckpointLifeCycle
from megatron_acodm.megatron.hosts.loop import Function, HostLoop, LaunchOptions, Replacement
from megatron_acodm.megatron.hosts.refusals import refuse_unshared_data, refuse_unsupported
from megatron_acodm.megatron.run import RunShape

__all__ = ["LaunchOptions", "MegatronLM", "checkpoint_folder", "run_shape"]

_TRAINING = "megatron.training.training"
_CHECKPOINTING = "megatron.training.checkpointing"
_PROVIDER = "build_train_valid_test_datasets_provider"


class MegatronLM(HostLoop):
    """The patches, and the run that they drive."""

    host = "Megatron-LM"

    used = (
        f"{_TRAINING}.get_args",
        f"{_TRAINING}.get_tensorboard_writer",
        f"{_TRAINING}.get_wandb_writer",
        f"{_CHECKPOINTING}.get_checkpoint_name",
    )

    @property
    def replacements(self) -> dict[str, Replacement]:
        """What takes the place of each host symbol."""
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

    def install(self) -> None:
        """Patch the host; does nothing the second time.

        Raises:
            UnsupportedHostError: naming the symbol, or its parameter, that is not there.
        """
        try:
            importlib.import_module(_TRAINING)
        except ImportError as error:
            raise UnsupportedHostError(
                f"Megatron-LM's {_TRAINING} cannot be imported ({error}); name a script of a "
                "Megatron-LM checkout, or put the checkout on PYTHONPATH"
            ) from error
        super().install()

    @property
    def _args(self) -> Namespace:
        return host_symbol(f"{_TRAINING}.get_args")[2]()

    def _writers(self) -> tuple[Any, Any]:
        return (
            host_symbol(f"{_TRAINING}.get_tensorboard_writer")[2](),
            host_symbol(f"{_TRAINING}.get_wandb_writer")[2](),
        )

    def _stop_after(self, iteration: int) -> None:
        self._args.train_iters = iteration

    def _iteration_of_save(self, arguments: dict[str, Any]) -> int | None:
        return None if arguments.get("release") else arguments["iteration"]

    def _initialize(self, original: Function) -> Function:
        def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            refuse_unsupported(self._args, self.options.config)
            set_timeout(self._args.distributed_timeout_minutes)
            return result

        return initialize_megatron

    def _set_up_model(self, original: Function) -> Function:
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
            self._checkpoints = CheckpointLifeCycle(self.host, checkpoint_folder)
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


def checkpoint_folder(root: Path, iteration: int) -> Path:
    """The folder of an iteration's checkpoint in the host's ``--save`` or ``--load`` folder."""
    name = host_symbol(f"{_CHECKPOINTING}.get_checkpoint_name")[2]
    return Path(name(str(root), iteration, return_base_dir=True))


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
