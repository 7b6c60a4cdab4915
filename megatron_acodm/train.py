"""Door: ``torchrun … -m megatron_acodm.train``, the compact trainer."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_acodm.arguments import acodm_config, build_parser, check_arguments, check_batch
from megatron_acodm.door import fail, rank, speak_once
from megatron_acodm.job_file import ARGUMENTS, config_file, read_arguments

if TYPE_CHECKING:
    from megatron_acodm.megatron.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says; exits non-zero with one message when it cannot."""
    args = _parse(build_parser(), sys.argv[1:] if arguments is None else arguments)
    level = logging.INFO if rank() == 0 else logging.ERROR
    logging.basicConfig(level=max(level, logging.WARNING), format="%(levelname)s: %(message)s")
    logging.getLogger("megatron_acodm").setLevel(level)
    # Megatron warns on import of everything that is not installed, on every rank.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron_acodm.blending import DataExhausted
    from megatron_acodm.megatron.compat import UnsupportedHostError

    trainer, ended_early = None, ""
    try:
        try:
            trainer = _set_up(args)
        except (ValueError, UnsupportedHostError) as error:
            fail(f"error: rank {rank()}: {error}")
        trainer.train()
    except DataExhausted as error:  # on every rank, after the last checkpoint
        ended_early = f"error: {error}"
    except OSError as error:
        fail(f"error: rank {rank()}: {error}", error)
    except BaseException as error:
        _end_if_a_rank_is_lost(error, args, trainer)
        raise
    if rank() == 0:
        from megatron_acodm.report import closing_table

        print(closing_table(args.run_dir), flush=True)
        print(ended_early, file=sys.stderr, end="\n" if ended_early else "", flush=True)
    import torch

    torch.distributed.barrier()  # so that no early exit makes torchrun end who still prints
    torch.distributed.destroy_process_group()
    sys.exit(bool(ended_early))


def _end_if_a_rank_is_lost(error: BaseException, args: Namespace, trainer: Trainer | None) -> None:
    from megatron_acodm.megatron.failures import explain_lost_rank, lost_rank

    if (said := lost_rank(error)) is None:
        return
    minutes, iteration = args.distributed_timeout_minutes, trainer.iteration if trainer else 0
    fail(f"error: rank {rank()}: {explain_lost_rank(said, minutes, args.save, iteration)}", error)


def _set_up(args: Namespace) -> Trainer:
    check_arguments(args)
    check_batch(args, int(os.environ.get("WORLD_SIZE", "1")))
    config = acodm_config(args)

    from megatron_acodm.megatron.compat import check_host_version
    from megatron_acodm.megatron.groups import initialize_distributed

    check_host_version()
    initialize_distributed(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.seed,
        args.distributed_timeout_minutes,
    )
    from megatron_acodm.megatron.model import check_installation
    from megatron_acodm.megatron.sources import resolve_sources
    from megatron_acodm.megatron.trainer import Trainer

    check_installation(args)
    return Trainer(args, config, resolve_sources(args))


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The arguments of the job file, which those of the command line come after and override."""
    speak_once(parser)
    file = config_file(arguments)
    try:
        in_file = read_arguments(file, [ARGUMENTS]) if file else []
    except ValueError as error:
        fail(f"error: rank {rank()}: {error}")
    return parser.parse_args([*in_file, *arguments])


if __name__ == "__main__":
    main()
