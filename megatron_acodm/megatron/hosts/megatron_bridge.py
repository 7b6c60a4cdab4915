"""Drives Megatron-Bridge (NeMo): its ``pretrain`` under a policy, after one call before it."""

from __future__ import annotations

import importlib
import inspect
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_acodm.megatron import patches
from megatron_acodm.megatron.compat import UnsupportedHostError, host_symbol
from megatron_acodm.megatron.groups import set_timeout
from megatron_acodm.megatron.hosts.checkpoints import CheckpointLifeCycle
from megatron_acodm.megatron.hosts.loop import Function, HostLoop, LaunchOptions, Replacement
from megatron_acodm.megatron.hosts.refusals import refuse_all, unsupported
from megatron_acodm.megatron.run import RunShape

_LOADERS = "megatron.bridge.data.loaders.build_train_valid_test_data_loaders"
_TRAINING = "megatron.bridge.training"
_CHECKPOINTING = f"{_TRAINING}.checkpointing"
_DATASET_CONFIG = f"{_TRAINING}.config.GPTDatasetConfig"
_FIM_DATASET_CONFIG = f"{_TRAINING}.config.GPTFIMDatasetConfig"

_PATHS = {
    "checkpoint": (
        "async_save", "ckpt_convert_format", "ckpt_format", "finetune", "load",
        "non_persistent_save_interval", "save", "save_interval",
    ),
    "dataset": ("dataloader_type",),
    "ddp": ("fp8_param_gather", "overlap_param_gather", "use_megatron_fsdp"),
    "dist": ("distributed_timeout_minutes", "use_torch_fsdp2"),
    "logger": ("tensorboard_dir", "tensorboard_log_interval"),
    "model": (
        "cuda_graph_impl", "cuda_graph_scope", "delay_wgrad_compute", "enable_cuda_graph",
        "expert_model_parallel_size", "external_cuda_graph", "hidden_size",
        "hybrid_context_parallel", "num_attention_heads", "num_layers",
        "overlap_moe_expert_parallel_comm", "seq_length", "tensor_model_parallel_size",
    ),
    "optimizer": ("lr",),
    "train": (
        "decrease_batch_size_if_needed", "global_batch_size", "micro_batch_size",
        "rampup_batch_size", "skip_train", "train_iters",
    ),
}  # fmt: skip
"""Where the container has what Megatron-LM has as arguments of the same names."""

_RENAMED = {
    "mock_data": "dataset.mock",
    "data_path": "dataset.blend",
    "seed": "dataset.random_seed",
}


class MegatronBridge(HostLoop):
    """The patches, and the run that they drive."""

    host = "Megatron-Bridge"

    used = (f"{_CHECKPOINTING}.get_checkpoint_name", _DATASET_CONFIG)

    def __init__(self, options: LaunchOptions) -> None:
        super().__init__(options)
        self._state: Any = None  # the host's GlobalState

    @property
    def replacements(self) -> dict[str, Replacement]:
        """What takes the place of each host symbol."""
        return {
            f"{_TRAINING}.pretrain._pretrain": (self._pretrain, ()),
            f"{_TRAINING}.pretrain.setup": (self._set_up, ("state",)),
            f"{_TRAINING}.pretrain._finish_train": (self._finish_train, ()),
            f"{_TRAINING}.setup.setup_optimizer": (self._take_model, ("model",)),
            _LOADERS: (self._build_data, ()),
            f"{_TRAINING}.train.train_step": (self._train_step, ("optimizer",)),
            f"{_TRAINING}.train._dummy_train_step": (self._skip_step, ()),
            f"{_TRAINING}.train.training_log": (self._training_log, ()),
            f"{_TRAINING}.utils.train_utils.print_rank_last": (self._print, ("message",)),
            **dict.fromkeys(_names_of_save(), (self._save, ("state",))),
            f"{_CHECKPOINTING}._load_base_checkpoint": (self._load_base, ()),
            f"{_CHECKPOINTING}.get_checkpoint_tracker_filename": (self._announce, ()),
        }

    def install(self) -> None:
        """Patch the host; does nothing the second time.

        Raises:
            UnsupportedHostError: naming the symbol, or its parameter, that is not there.
        """
        try:
            importlib.import_module(f"{_TRAINING}.pretrain")
        except ImportError as error:
            raise UnsupportedHostError(
                f"{_TRAINING}.pretrain cannot be imported ({error}); install megatron-bridge and "
                "what it needs"
            ) from error
        super().install()

    @property
    def _args(self) -> Namespace:
        return arguments(self._state.cfg, self._state.train_state)

    def _writers(self) -> tuple[Any, Any]:
        return self._state.tensorboard_logger, self._state.wandb_logger

    def _stop_after(self, iteration: int) -> None:
        self._state.cfg.train.train_iters = iteration

    def _iteration_of_save(self, arguments: dict[str, Any]) -> int | None:
        return None if arguments.get("non_persistent_ckpt") else arguments["state"].train_state.step

    def _pretrain(self, original: Function) -> Function:
        def _pretrain(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return original(*args, **kwargs)

        return _pretrain

    def _set_up(self, original: Function) -> Function:
        signature = inspect.signature(original)

        def setup(*args: Any, **kwargs: Any) -> Any:
            self._state = signature.bind(*args, **kwargs).arguments["state"]
            config = self.options.config
            refuse_all(
                _unsupported(self._state.cfg)
                + unsupported(arguments(self._state.cfg, None), config, _name),
                config,
            )
            self._checkpoints = CheckpointLifeCycle(self.host, checkpoint_folder)
            set_timeout(self._state.cfg.dist.distributed_timeout_minutes)
            return original(*args, **kwargs)

        return setup

    def _take_model(self, original: Function) -> Function:
        signature = inspect.signature(original)

        def setup_optimizer(*args: Any, **kwargs: Any) -> Any:
            model = signature.bind(*args, **kwargs).arguments["model"]
            self._model = model if isinstance(model, list) else [model]
            return original(*args, **kwargs)

        return setup_optimizer

    def _build_data(self, original: Function) -> Function:
        def build_train_valid_test_data_loaders(*args: Any, **kwargs: Any) -> Any:
            if self._recorder is not None:  # of another model chunk
                return original(*args, **kwargs)
            self.mixer = patches.patch(self.options.config, run_shape(self._args))
            loaders = original(*args, **kwargs)
            # Before the host makes iterators: their workers must find the restored ledger.
            self._start()
            return loaders

        return build_train_valid_test_data_loaders

    def _finish_train(self, original: Function) -> Function:
        def _finish_train(*args: Any, **kwargs: Any) -> Any:
            self._finish()
            self._close()  # after this the host destroys its process groups
            return original(*args, **kwargs)

        return _finish_train


def _names_of_save() -> list[str]:
    """Where ``save_checkpoint`` is called by name: versions before 0.4 import it by that name."""
    importers = (importlib.import_module(f"{_TRAINING}.{name}") for name in ("train", "pretrain"))
    modules = [module.__name__ for module in importers if hasattr(module, "save_checkpoint")]
    return [f"{module}.save_checkpoint" for module in (_CHECKPOINTING, *modules)]


def checkpoint_folder(root: Path, iteration: int) -> Path:
    """The folder of an iteration's checkpoint in the host's folder of checkpoints."""
    return Path(host_symbol(f"{_CHECKPOINTING}.get_checkpoint_name")[2](str(root), iteration))


def arguments(cfg: Any, progress: Any) -> Namespace:
    """What a ``ConfigContainer`` and a ``TrainState`` say, by Megatron-LM's names."""
    found = {}
    for name, path in _every_path():
        section, _, attribute = path.partition(".")
        if hasattr(getattr(cfg, section, None), attribute):
            found[name] = getattr(getattr(cfg, section), attribute)
    if progress is not None:
        found["iteration"] = found["curr_iteration"] = progress.step
        found["consumed_train_samples"] = progress.consumed_train_samples
    return Namespace(**found)


def _every_path() -> list[tuple[str, str]]:
    direct = [(name, f"{section}.{name}") for section, names in _PATHS.items() for name in names]
    return direct + list(_RENAMED.items())


def _name(name: str) -> str:
    return dict(_every_path()).get(name, name)


_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "dataset", lambda cfg: not isinstance(cfg.dataset, host_symbol(_DATASET_CONFIG)[2]),
        "must be a GPTDatasetConfig, whose blend are the domains",
    ),
    (
        "dataset", lambda cfg: type(cfg.dataset).__name__ == "GPTFIMDatasetConfig",
        "must not be fill-in-the-middle data, which is not supported yet",
    ),
    (
        "inprocess_restart", lambda cfg: getattr(cfg.inprocess_restart, "enabled", False),
        "must not be enabled: the policy cannot restart within a process",
    ),
    (
        "peft", lambda cfg: cfg.peft is not None,
        "must be None: with adapters the weights whose gradients are compared are frozen",
    ),
    (
        "dist.use_decentralized_pg", lambda cfg: getattr(cfg.dist, "use_decentralized_pg", False),
        "must be False: ranks are found in Megatron's parallel state, which it does not set up",
    ),
)  # fmt: skip


def _unsupported(cfg: Any) -> list[str]:
    return [f"{name} {what}" for name, is_refused, what in _REFUSED if is_refused(cfg)]


def run_shape(args: Namespace) -> RunShape:
    """The sizes of a run."""
    ramp_up = getattr(args, "rampup_batch_size", None)
    return RunShape(
        args.train_iters,
        args.global_batch_size,
        args.micro_batch_size,
        args.seed,
        tuple(int(value) for value in ramp_up) if ramp_up else None,  # type: ignore[arg-type]
    )
