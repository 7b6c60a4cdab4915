"""Process groups: who sums what with whom, and the start-up of a distributed run."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_acodm.megatron.shim import install_cpu_shim


@dataclass(frozen=True)
class ParallelGroups:
    """The groups that a step's statistics are reduced over, and this rank's place in them."""

    data: dist.ProcessGroup
    """Data and context parallel ranks: they hold different parts of the batch."""

    model: dist.ProcessGroup
    """Tensor and pipeline parallel ranks: they hold different parts of the model."""

    control: dist.ProcessGroup
    """All ranks, over gloo: K weights a step travel here without touching the device.

    A group of its own, as they travel while the host uses the others.
    """

    data_rank: int
    data_size: int

    model_sizes: tuple[int, int, int]
    """Tensor, pipeline and virtual pipeline parallel sizes."""

    owns_loss: bool
    """Whether this rank contributes the losses of its model replica: one rank of each does."""

    @classmethod
    def from_parallel_state(cls) -> ParallelGroups:
        """Take Megatron's initialised groups; collective (creates the control group)."""
        from megatron.core import parallel_state

        return cls(
            data=parallel_state.get_data_parallel_group(with_context_parallel=True),
            model=parallel_state.get_model_parallel_group(),
            control=_control_group(dist.group.WORLD),
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            model_sizes=(
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_pipeline_model_parallel_world_size(),
                parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
            ),
            owns_loss=parallel_state.is_pipeline_last_stage()
            and parallel_state.get_tensor_model_parallel_rank() == 0,
        )


_timeout: timedelta | None = None


def timeout() -> timedelta | None:
    """How long a collective of ours waits for a rank; None: torch's own, half an hour on gloo."""
    return _timeout


def set_timeout(minutes: float) -> None:
    """Let collectives of the groups that are made from now on wait as long as the host's."""
    global _timeout
    _timeout = timedelta(minutes=minutes)


@functools.cache
def _control_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    del world  # one for each time that torch.distributed was started
    return dist.new_group(backend="gloo", timeout=timeout())


def abandon_control_group(group: dist.ProcessGroup) -> None:
    """Make whoever waits for other ranks in the control group fail; the run is over."""
    _control_group.cache_clear()
    dist.destroy_process_group(group)


def check_layout(model_chunks: Sequence[torch.nn.Module]) -> None:
    """Refuse the layouts in which gradients or weights cannot be measured yet.

    Raises:
        ValueError: naming the layout.
    """
    from megatron.core import parallel_state

    experts = parallel_state.get_expert_model_parallel_world_size()
    if experts > 1:
        raise ValueError(
            f"expert parallelism of size {experts} is not supported with an online policy: ranks "
            "hold different experts, which see different tokens; set it to 1"
        )
    for chunk in model_chunks:
        config = getattr(chunk, "ddp_config", None)
        if config is None or config.use_megatron_fsdp:
            raise ValueError(
                f"the model is wrapped in {type(chunk).__name__}; an online policy measures "
                "gradients under Megatron's DistributedDataParallel only (no FSDP)"
            )


def initialize_distributed(
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    seed: int,
    timeout_minutes: float,
) -> None:
    """Start torch.distributed and Megatron's parallel state under torchrun.

    Raises:
        ValueError: when the number of processes does not fit the parallel sizes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model_parallel_size = tensor_model_parallel_size * pipeline_model_parallel_size
    if world_size % model_parallel_size != 0:
        raise ValueError(
            f"{world_size} processes cannot be split into model replicas of "
            f"{model_parallel_size} (tensor {tensor_model_parallel_size} x pipeline "
            f"{pipeline_model_parallel_size}); start a multiple of {model_parallel_size} "
            "with torchrun --nproc-per-node"
        )
    install_cpu_shim()
    from megatron.core import parallel_state, tensor_parallel

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    else:
        backend = "gloo"
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        os.environ.setdefault(name, value)  # a single process needs no torchrun
    set_timeout(timeout_minutes)
    dist.init_process_group(backend, timeout=timeout())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    # Pipeline stages hold different layers: give each its own stream of initial weights, as
    # Megatron-LM does; data-parallel replicas share it.
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)
