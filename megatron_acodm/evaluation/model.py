"""Builds the model of a checkpoint for evaluation: a bare GPT at the parallel sizes of this run."""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any

import torch

from megatron_acodm.evaluation.checkpoint import Checkpoint
from megatron_acodm.megatron.model import build_gpt

SHAPE = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size",
         "max_position_embeddings", "position_embedding_type",
         "untie_embeddings_and_output_weights")  # fmt: skip
"""The model's settings that have flags, for checkpoints that keep no arguments."""

_CONFIG = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
           "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma",
           "add_bias_linear", "add_qkv_bias", "qk_layernorm", "rotary_interleaved",
           "apply_residual_connection_post_layernorm", "apply_query_key_layer_scaling",
           "attention_softmax_in_fp32", "fp32_residual_connection", "window_size",
           "window_attn_skip_freq", "activation_func_clamp_value",
           "glu_linear_offset")  # fmt: skip
"""Fields of TransformerConfig that say what a model computes, by their names in the arguments."""

_UNSUPPORTED = {
    "num_experts": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "spec": None,
    "is_hybrid_model": False,
    "hybrid_override_pattern": None,
    "use_legacy_models": False,
    "mtp_num_layers": None,
    "attention_output_gate": False,
    "qk_l2_norm": False,
    "no_rope_freq": None,
    "softmax_type": "vanilla",
}
"""Arguments that make a model of another kind, and the value with which they do not."""


def settle_shape(args: Namespace, checkpoint: Checkpoint) -> Namespace:
    """The arguments of the checkpoint's model: its own, or where it has none, the flags'.

    Raises:
        ValueError: when neither says enough, both differ, or the model is not supported.
    """
    given = {name: getattr(args, name) for name in SHAPE if getattr(args, name)}
    if checkpoint.args is None:
        needed = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
        missing = [_flag(name) for name in needed if not getattr(args, name)]
        if missing:
            raise ValueError(
                f"{checkpoint.folder} does not keep its run's arguments; give {' '.join(missing)}"
            )
        model = Namespace(**{name: getattr(args, name) for name in SHAPE})
        model.bias_gelu_fusion = torch.cuda.is_available()  # as in our trainer
    else:
        model = Namespace(**vars(checkpoint.args))
        for name, value in given.items():
            if getattr(model, name, value) != value:
                raise ValueError(
                    f"{_flag(name)} is {value}, and {checkpoint.folder} was trained with "
                    f"{getattr(model, name)}; leave the flag out"
                )
    for name, usual in _UNSUPPORTED.items():
        if getattr(model, name, None) not in (None, usual):
            raise ValueError(
                f"{checkpoint.folder} was trained with {name} = {getattr(model, name)}, which "
                "evaluation does not support; use Megatron-LM's own tools for it"
            )
    model.seq_length = args.seq_length or model.seq_length
    model.ffn_hidden_size = model.ffn_hidden_size or 4 * model.hidden_size
    model.max_position_embeddings = model.max_position_embeddings or model.seq_length
    model.position_embedding_type = model.position_embedding_type or "learned_absolute"
    if model.position_embedding_type not in ("learned_absolute", "rope", "none"):
        raise ValueError(
            f"{checkpoint.folder} has {model.position_embedding_type} position embeddings; "
            "evaluation supports learned_absolute, rope and none"
        )
    longest = model.max_position_embeddings
    if model.position_embedding_type == "learned_absolute" and model.seq_length > longest:
        raise ValueError(f"--seq-length is {model.seq_length}; the model has {longest} positions")
    model.padded_vocab_size = checkpoint.padded_vocab_size
    model.transformer_impl = args.transformer_impl
    model.tensor_model_parallel_size = args.tensor_model_parallel_size
    model.bf16 = args.bf16
    _check_divisible(model)
    return model


def build_evaluation_model(model: Namespace) -> torch.nn.Module:
    """This rank's part of the model that ``settle_shape`` describes, in evaluation mode."""
    rotary: dict[str, Any] = {}
    if model.position_embedding_type == "rope":
        names = {
            "rotary_percent": "rotary_percent",
            "rotary_base": "rotary_base",
            "use_rope_scaling": "rope_scaling",
            "rope_scaling_factor": "rope_scaling_factor",
            "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
        }
        given = {ours: getattr(model, name, None) for name, ours in names.items()}
        rotary = {name: value for name, value in given.items() if value is not None}
    module = build_gpt(model, _config(model), **rotary)
    if torch.cuda.is_available():
        module.cuda(torch.cuda.current_device())
    return (module.bfloat16() if model.bf16 else module.float()).eval()


def _config(model: Namespace) -> Any:
    from megatron.core.activations import quick_gelu, squared_relu
    from megatron.core.transformer import TransformerConfig

    fields = {name: getattr(model, name) for name in _CONFIG if hasattr(model, name)}
    # Older versions of Megatron-LM name two of them otherwise.
    if hasattr(model, "norm_epsilon"):
        fields.setdefault("layernorm_epsilon", model.norm_epsilon)
    if hasattr(model, "apply_layernorm_1p"):
        fields.setdefault("layernorm_zero_centered_gamma", model.apply_layernorm_1p)
    if getattr(model, "group_query_attention", False):
        fields["num_query_groups"] = model.num_query_groups
    if getattr(model, "swiglu", False):
        fields["activation_func"] = torch.nn.functional.silu
        fields["gated_linear_unit"] = True
    elif getattr(model, "squared_relu", False):
        fields["activation_func"] = squared_relu
    elif getattr(model, "quick_geglu", False):
        fields["activation_func"] = quick_gelu
        fields["gated_linear_unit"] = True
    elif getattr(model, "bias_gelu_fusion", False):
        # What Megatron's fused GELU computes. Its kernel is compiled when first called, on CPUs
        # for minutes.
        fields["activation_func"] = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    return TransformerConfig(
        **fields,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=model.bf16,
    )


def _check_divisible(model: Namespace) -> None:
    size = model.tensor_model_parallel_size
    parts = {"attention heads": model.num_attention_heads, "rows of the vocabulary":
             model.padded_vocab_size, "feed-forward units": model.ffn_hidden_size}  # fmt: skip
    if getattr(model, "group_query_attention", False):
        parts["query groups"] = model.num_query_groups
    for name, count in parts.items():
        if count % size != 0:
            raise ValueError(
                f"--tensor-model-parallel-size is {size}, which does not divide the model's "
                f"{count} {name}; give a size that does"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
