"""A user's script for Megatron-Bridge, and what its ``pretrain`` needs on a machine without CUDA.

``python bridge_pretrain.py`` names what cannot be imported, if so. With arguments it trains a tiny
model on data by three domains, under the policy of ``ACODM_CONFIG`` if that is set;
``section.name=value`` sets the configuration. ``RECORD_TO`` names a file for the tokens of every
training micro-batch; ``CRASH_AT_SAVE`` an iteration whose checkpoint is complete but for its
announcement when the process dies.
"""

import contextlib
import functools
import importlib.machinery
import importlib.util
import inspect
import json
import os
import shutil
import sys
import types
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch  # noqa: E402
from host_doubles import crash, record_batches  # noqa: E402

from megatron_acodm.megatron.hosts import cpu  # noqa: E402
from megatron_acodm.megatron.shim import install_cpu_shim  # noqa: E402

GPU_ONLY = ("transformer_engine", "datasets")
"""Packages that Megatron-Bridge imports whether or not it uses them; nothing here does."""

IMPORTED_BEFORE = (
    "megatron.core.extensions.transformer_engine",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.mamba",
    "megatron.core.optimizer",
    "megatron.core.post_training.modelopt.gpt.model_specs",
    "megatron.core.transformer.cuda_graphs",
    "modelopt.torch.distill.plugins.megatron",
    "modelopt.torch.nas",
    "modelopt.torch.opt.plugins",
    "modelopt.torch.quantization",
)
"""What asks whether those are installed, and must be told no."""


class _Meta(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing


class Missing(metaclass=_Meta):
    """Whatever a module takes from a package that is not installed while it is imported."""


class _Module(types.ModuleType):
    __path__ = ()
    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing


class _Finder:
    def __init__(self, names):
        self._names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module): ...


@contextlib.contextmanager
def _without(packages):
    """Let modules be imported that import packages which are not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    finder = _Finder(missing)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
            del sys.modules[name]


def prepare_bridge():
    """Import ``megatron.bridge`` without CUDA, and replace what in it asks for CUDA."""
    with cpu._without_triton():
        install_cpu_shim()
        for name in IMPORTED_BEFORE:
            importlib.import_module(name)
        with _without(GPU_ONLY):
            importlib.import_module("megatron.bridge.training.gpt_step")
            importlib.import_module("megatron.bridge.training.pretrain")
        from megatron.bridge.training import initialize, setup
    torch.cuda.device_count = lambda: 1
    initialize.compile_helpers = lambda: None  # megatron-core's wheel has them
    signature = inspect.signature(setup.initialize_megatron)
    assert "allow_no_cuda" in signature.parameters
    setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
    cpu._keep_script_out_of_helpers()
    cpu._send_copies()


def configuration(prefixes, cache):
    """A run of six steps."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.bridge.training import config as bridge

    length = 64
    model = GPTModelProvider(
        num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=128,
        seq_length=length, transformer_layer_spec=local_layer_spec, persist_layer_norm=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False,
        cross_entropy_loss_fusion=False, attention_dropout=0.0, hidden_dropout=0.0,
        pipeline_dtype=torch.float32, use_cpu_initialization=True,
    )  # fmt: skip
    decay = {"start_weight_decay": 0.01, "end_weight_decay": 0.01}
    return bridge.ConfigContainer(
        model=model,
        train=bridge.TrainingConfig(
            micro_batch_size=2, global_batch_size=16, train_iters=6, eval_iters=1, eval_interval=99
        ),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-4, weight_decay=0.01, clip_grad=1.0
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style="cosine", lr_decay_iters=6, weight_decay_incr_style="constant", **decay
        ),
        dataset=bridge.GPTDatasetConfig(
            seq_length=length, random_seed=7, blend=(prefixes, [5.0, 3.0, 2.0]), split="90,10,0",
            path_to_cache=cache, reset_position_ids=False, reset_attention_mask=False,
            eod_mask_loss=False, dataloader_type="single", num_workers=1, pin_memory=False,
        ),
        ddp=bridge.DistributedDataParallelConfig(),
        logger=bridge.LoggerConfig(log_interval=1),
        tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=257),
        checkpoint=bridge.CheckpointConfig(save_interval=1000),
        rng=bridge.RNGConfig(seed=7),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
    )  # fmt: skip


def _crash_at(iteration):
    copy = shutil.copy

    def crashing(source, target, **kwargs):
        if f"iter_{int(iteration):07d}" in str(source) and str(target).endswith("train_state.pt"):
            crash()
        return copy(source, target, **kwargs)

    shutil.copy = crashing


def _save_asynchronously(config):
    """Without the worker that Megatron-Bridge insists on, which is for CUDA devices alone."""
    from megatron.bridge.training.config import CheckpointConfig

    CheckpointConfig.finalize = lambda self: None
    config.checkpoint.async_save, config.checkpoint.use_persistent_ckpt_worker = True, False


def main(cache, *words):
    """Train: prefixes first, then what is set of the configuration."""
    prefixes = [word for word in words if "=" not in word]
    config = configuration(prefixes, cache)
    for name, value in (word.split("=", 1) for word in words if "=" in word):
        section, attribute = name.split(".")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        setattr(getattr(config, section), attribute, value)
    if os.environ.get("ASYNC"):
        _save_asynchronously(config)
    if path := os.environ.get("RECORD_TO"):
        record_batches(path)
    if iteration := os.environ.get("CRASH_AT_SAVE"):
        _crash_at(iteration)
    if path := os.environ.get("ACODM_CONFIG"):
        from megatron_acodm import bridge

        bridge.prepare(path, run_dir=os.environ["RUN_DIR"])
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    pretrain(config, forward_step)


if __name__ == "__main__":
    prepare_bridge()
    if sys.argv[1:]:
        main(*sys.argv[1:])
