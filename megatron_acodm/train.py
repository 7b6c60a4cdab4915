"""Door: ``torchrun … -m megatron_acodm.train``, the compact trainer."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megatron_acodm.arguments import build_parser, check_arguments, check_batch


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says; exits non-zero with one message when it cannot."""
    parser = build_parser()
    if _rank() != 0:
        parser.print_usage = lambda file=None: None  # type: ignore[method-assign]
        parser.exit = _exit_quietly  # type: ignore[method-assign]
    args = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING if _rank() == 0 else logging.ERROR,
        format="%(levelname)s: %(message)s",
    )
    # Megatron warns on import of everything that is not installed, on every rank.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron_acodm").setLevel(logging.INFO if _rank() == 0 else logging.ERROR)
    try:
        _run(args)
    except (ValueError, OSError, _host_error()) as error:
        _fail(error)


def _run(args) -> None:  # type: ignore[no-untyped-def]
    check_arguments(args)
    check_batch(args, int(os.environ.get("WORLD_SIZE", "1")))
    _check_mixing(args)
    args.data_cache_path = args.data_cache_path or os.path.join(args.run_dir, "cache")

    from megatron_acodm.megatron.compat import check_host_version
    from megatron_acodm.megatron.groups import initialize_distributed

    check_host_version()
    import torch

    if args.bf16 is None:
        args.bf16 = torch.cuda.is_available()
    initialize_distributed(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.seed,
        args.distributed_timeout_minutes,
    )
    from megatron_acodm.megatron.model import default_transformer_impl
    from megatron_acodm.megatron.sources import resolve_sources
    from megatron_acodm.megatron.trainer import Trainer

    args.transformer_impl = args.transformer_impl or default_transformer_impl()
    Trainer(args, resolve_sources(args)).train()
    if _rank() == 0:
        from megatron_acodm.report import closing_table

        print(closing_table(args.run_dir))
    torch.distributed.destroy_process_group()


def _check_mixing(args) -> None:  # type: ignore[no-untyped-def]
    from megatron_acodm.arguments import acodm_config

    acodm_config(args)  # raises for a bad value before anything is started


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _exit_quietly(status: int = 0, message: str | None = None) -> NoReturn:
    del message
    sys.exit(status)


def _host_error() -> type[Exception]:
    from megatron_acodm.megatron.compat import UnsupportedHostError

    return UnsupportedHostError


def _fail(error: Exception) -> NoReturn:
    """Print the error once for all ranks and leave at once, whatever peers are waiting for."""
    if _rank() != 0:
        time.sleep(2)  # when rank 0 fails alike, its message is enough: torchrun ends this rank
    print(f"error: rank {_rank()}: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
