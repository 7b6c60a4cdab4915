"""What of a host's settings an online policy does not work with: refused at the start."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_acodm.config import AcodmConfig
from megatron_acodm.mixing import POLICIES

_Problem = tuple[str, Callable[[Any], bool], str, str]
"""A Megatron-LM argument, which of its values are refused, why, and the remedy.

Other arguments appear in a remedy in braces; each host names them in its own way.
"""


def _is_set(value: Any) -> bool:
    return bool(value)


def _above_1(value: Any) -> bool:
    return (value or 1) > 1


def _none(value: Any) -> bool:
    return value not in (None, "none")


_ALWAYS: tuple[_Problem, ...] = (
    (
        "dataloader_type", lambda value: value not in (None, "single"),
        "samples are decided as training goes, so they must be drawn in order",
        "use {dataloader_type} single",
    ),
    ("mock_data", _is_set, "mock data has no domains", "give {data_path}"),
    ("fim_data", _is_set, "fill-in-the-middle data is not supported yet", "remove it"),
    ("sft", _is_set, "packed fine-tuning data is not supported yet", "remove it"),
    (
        "dataloader_inter_document_masking", _is_set,
        "packed sequences are not supported yet", "remove it",
    ),
    ("skip_train", _is_set, "nothing is trained, so nothing is mixed", "use policy 'none'"),
    ("perform_rl_step", _is_set, "reinforcement learning makes its own batches", "remove it"),
    ("phase_transition_iterations", _is_set, "one run has one order of samples", "remove it"),
    ("step_batch_size_schedule", _is_set, "it is not supported yet", "use {global_batch_size}"),
    ("freeze_all_layers", _is_set, "nothing is trained", "use policy 'none'"),
    ("decrease_batch_size_if_needed", _is_set, "batch sizes must be known ahead", "remove it"),
    ("hybrid_context_parallel", _is_set, "it deals samples to ranks in its own order", "remove it"),
    ("expert_model_parallel_size", _above_1, "ranks hold different experts", "set it to 1"),
    ("gtp_weight_remat_size", _above_1, "it deals samples to ranks in its own order", "remove it"),
    ("use_megatron_fsdp", _is_set, "gradients are sharded before they are whole", "remove it"),
    ("use_torch_fsdp2", _is_set, "gradients are sharded before they are whole", "remove it"),
    (
        "ckpt_format", lambda value: value not in (None, "torch", "torch_dist"),
        "its checkpoints are not supported yet", "use {ckpt_format} torch_dist",
    ),
    (
        "non_persistent_save_interval", _is_set,
        "the policy is saved with persistent checkpoints only", "use {save_interval}",
    ),
    ("ckpt_convert_format", _is_set, "nothing is trained", "convert without a policy"),
    ("inprocess_restart", _is_set, "the policy cannot restart within a process", "remove it"),
    ("adlr_autoresume", _is_set, "it is not supported yet", "remove it"),
    ("enable_full_sharding_in_hsdp", _is_set, "gradients are sharded", "remove it"),
)  # fmt: skip

_OF_GRADIENTS: tuple[_Problem, ...] = (
    ("cuda_graph_impl", _none, "its replays hide gradients", "use {cuda_graph_impl} none"),
    ("enable_cuda_graph", _is_set, "its replays hide gradients", "remove it"),
    ("external_cuda_graph", _is_set, "its replays hide gradients", "remove it"),
    ("overlap_moe_expert_parallel_comm", _is_set, "it reorders backward passes", "remove it"),
    ("delay_wgrad_compute", _is_set, "it reorders backward passes", "remove it"),
)
"""Under policies that compare gradients."""


_WEIGHTS_ELSEWHERE = ("fp8_param_gather", "fp4_param_gather", "fp4_param")
"""Under these what is gathered are not the weights themselves."""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Names(dict[str, str]):
    """Names that are asked for, as a host has them."""

    def __init__(self, name_of: Callable[[str], str]) -> None:
        self._name_of = name_of

    def __missing__(self, name: str) -> str:
        return self._name_of(name)


def unsupported(
    args: Any, config: AcodmConfig | None, name_of: Callable[[str], str] = _flag
) -> list[str]:
    """What of a run's arguments an online policy would not work with: a line each, with a remedy.

    Args:
        args: the host's, by Megatron-LM's names, validated. Those that a version does not have are
            passed over.
        config: of the policy; None: what no policy works with.
        name_of: what the host's user calls an argument.
    """
    policy = None if config is None else POLICIES[config.mixing.policy]
    compares = (
        config is not None and policy is not None and policy.compares_gradients(config.mixing)
    )
    names = _Names(name_of)
    found = [
        f"{name_of(name)} is {getattr(args, name)!r}: {reason}; {remedy.format_map(names)}"
        for name, is_refused, reason, remedy in _ALWAYS + (_OF_GRADIENTS if compares else ())
        if hasattr(args, name) and is_refused(getattr(args, name))
    ]
    if "full_iteration" in str(getattr(args, "cuda_graph_scope", "")):
        found.append(
            f"{name_of('cuda_graph_scope')} full_iteration hides every step; use another scope"
        )
    looks_at_weights = policy is not None and policy.needs_probes
    if looks_at_weights and getattr(args, "overlap_param_gather", False):
        found += [
            f"{name_of('overlap_param_gather')} with {name_of(name)}: which rank has which of a "
            "step's new weights is not known then; remove one of them"
            for name in _WEIGHTS_ELSEWHERE
            if getattr(args, name, False)
        ]
    if (
        config is not None
        and config.blending.granule == "sequence"
        and _above_1(getattr(args, "micro_batch_size", 1))
    ):
        found.append(
            "blending.granule is 'sequence', but the host does not tell a micro-batch's sequences "
            f"apart in its losses; use 'micro-batch', or {name_of('micro_batch_size')} 1"
        )
    for name in ("save", "load"):
        if "://" in str(getattr(args, name, None)):
            found.append(f"{name_of(name)} must be a folder, so that the policy is saved in it")
    return found


def refuse_unsupported(args: Namespace, config: AcodmConfig) -> None:
    """Refuse arguments under which an online policy would not work, all at once.

    Args:
        args: Megatron-LM's, validated.
        config: of the policy.

    Raises:
        ValueError: naming each, why, and what to do.
    """
    refuse_all(unsupported(args, config), config)


def refuse_all(found: list[str], config: AcodmConfig) -> None:
    """Refuse what was found not to work, if anything was.

    Raises:
        ValueError: with a line each.
    """
    if found:
        raise ValueError(
            f"policy {config.mixing.policy!r} does not work with these settings:\n  "
            + "\n  ".join(found)
        )


def refuse_unshared_data(provider: Any, tensor_parallel_size: int) -> None:
    """Refuse a script whose datasets are built on one tensor-parallel rank alone.

    Raises:
        ValueError: naming the attribute that the script must set.
    """
    if tensor_parallel_size > 1 and not getattr(provider, "is_distributed", False):
        raise ValueError(
            "the script builds its datasets on the first tensor-parallel rank alone, but every "
            "rank needs the domains; let it set is_distributed = True on its dataset provider, as "
            "pretrain_gpt.py does"
        )
