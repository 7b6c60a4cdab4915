"""One evaluation: a checkpoint, its model, and what is asked of it."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import torch.distributed as dist

from megatron_acodm.evaluation.arguments import task_options
from megatron_acodm.evaluation.checkpoint import open_checkpoint
from megatron_acodm.evaluation.harness import run_tasks, tasks_table
from megatron_acodm.evaluation.model import build_evaluation_model, settle_shape
from megatron_acodm.evaluation.perplexity import domain_perplexities, perplexity_table
from megatron_acodm.evaluation.scoring import Scorer
from megatron_acodm.files import write_atomically
from megatron_acodm.megatron.model import check_transformer_impl
from megatron_acodm.megatron.sources import resolve_sources
from megatron_acodm.megatron.tokenizer import build_tokenizer


def evaluate(args: Namespace) -> None:
    """Evaluate as the command line says, under Megatron's parallel state; collective.

    Rank 0 prints tables and writes ``--output``.

    Raises:
        ValueError: for what does not fit together.
    """
    check_transformer_impl(args)
    checkpoint = open_checkpoint(args.load, args.ckpt_step, args.tensor_model_parallel_size)
    model = settle_shape(args, checkpoint)
    args.seq_length = model.seq_length
    _adopt_tokenizer(args, checkpoint.args)
    sources = None
    if args.data_path or args.valid_data_path:
        args.data_path = args.data_path or args.valid_data_path
        sources = resolve_sources(args)
        tokenizer = sources.tokenizer
    else:
        tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.vocab_size)
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, and the model of {checkpoint.folder} "
            f"knows {model.padded_vocab_size}; give the tokenizer that it was trained with"
        )
    module = build_evaluation_model(model)
    checkpoint.load_into(module, averages=args.averages)
    results: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "iteration": checkpoint.iteration,
        "seq_length": model.seq_length,
        "averages": args.averages,
    }
    if sources is not None:
        results["perplexity"] = domain_perplexities(module, sources, args)
        _say(perplexity_table(results["perplexity"]))
    if args.tasks:
        scorer = Scorer(module, tokenizer, model.seq_length, args.micro_batch_size)
        if dist.get_rank() == 0:
            results["tasks"] = run_tasks(scorer, tokenizer, task_options(args))
            scorer.dismiss()
            _say(tasks_table(results["tasks"]))
        else:
            scorer.follow()
    if args.output is not None and dist.get_rank() == 0:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        _say(f"written: {args.output}")


def _adopt_tokenizer(args: Namespace, trained: Namespace | None) -> None:
    """Take the tokenizer of training where no flag and no manifest names one."""
    data = args.data_path or args.valid_data_path
    from_manifest = data is not None and len(data) == 1 and data[0].endswith(".json")
    if args.tokenizer_type is not None or from_manifest:
        return
    args.tokenizer_type = getattr(trained, "tokenizer_type", None)
    if args.tokenizer_type is None:
        raise ValueError(
            "the checkpoint does not name its tokenizer; give --tokenizer-type (and "
            "--tokenizer-model), or data with a manifest.json"
        )
    args.tokenizer_model = args.tokenizer_model or getattr(trained, "tokenizer_model", None)
    if args.tokenizer_type == "NullTokenizer":
        args.vocab_size = args.vocab_size or getattr(trained, "vocab_size", None)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
