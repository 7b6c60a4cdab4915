"""Evaluates a checkpoint: perplexity by domain, and tasks of lm-evaluation-harness.

python tools/evaluate.py --load ckpt --valid-data-path valid/manifest.json --tasks mmlu
"""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace

from megatron_acodm.door import fail, rank, speak_once
from megatron_acodm.evaluation.arguments import build_parser, check_arguments


def main() -> None:
    """Parse the command line and evaluate; exits non-zero with one message when it cannot."""
    parser = build_parser()
    speak_once(parser)
    args = parser.parse_args()
    level = logging.WARNING if rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    # Megatron warns on import of everything that is not installed, on every rank.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    from megatron_acodm.megatron.compat import UnsupportedHostError

    try:
        _evaluate(args)
    except (ValueError, OSError, UnsupportedHostError) as error:
        fail(f"error: rank {rank()}: {error}")


def _evaluate(args: Namespace) -> None:
    check_arguments(args)
    from megatron_acodm.megatron.compat import check_host_version
    from megatron_acodm.megatron.groups import initialize_distributed

    check_host_version()
    initialize_distributed(args.tensor_model_parallel_size, 1, seed=1234, timeout_minutes=60)
    import torch

    from megatron_acodm.evaluation.run import evaluate

    evaluate(args)
    torch.distributed.barrier()  # so that no early exit makes torchrun end who still prints
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
