"""The command line of ``tools/evaluate.py``, in the trainer's names where it has them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_acodm.evaluation.harness import TaskOptions, check_options
from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.megatron.tokenizer import TOKENIZER_TYPES


def build_parser() -> argparse.ArgumentParser:
    """The parser; abbreviations of flags are refused, as in the trainer."""
    parser = argparse.ArgumentParser(
        prog="tools/evaluate.py",
        description="Evaluate a checkpoint of our trainer or of Megatron-LM: perplexity on each "
        "domain of --data-path or --valid-data-path, and --tasks of lm-evaluation-harness.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--load", required=True, metavar="FOLDER",
                        help="a run's --save folder, or one checkpoint in it")  # fmt: skip
    parser.add_argument("--ckpt-step", type=int, help="iteration; default: the latest")
    parser.add_argument("--averages", action="store_true",
                        help="the averaged weights of a run with --eval-ema-decay")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    _add_run(parser.add_argument_group("run"))
    _add_perplexity(parser.add_argument_group("perplexity by domain"))
    _add_tasks(parser.add_argument_group("tasks of lm-evaluation-harness"))
    _add_model(parser.add_argument_group("model, where the checkpoint does not say"))
    return parser


def _add_run(group: Any) -> None:
    group.add_argument("--tensor-model-parallel-size", type=int, default=1,
                       help="need not be that of training; other ranks are data "
                       "parallel")  # fmt: skip
    group.add_argument("--micro-batch-size", type=int, default=8,
                       help="sequences in one forward pass (default: %(default)s)")  # fmt: skip
    group.add_argument("--seq-length", type=int,
                       help="tokens that the model sees at most; default: as in "
                       "training")  # fmt: skip
    group.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                       help="default: on with CUDA, off without")  # fmt: skip
    group.add_argument("--transformer-impl", choices=("local", "transformer_engine"),
                       help="default: transformer_engine where installed")  # fmt: skip
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES,
                       help="default: the manifest's, else the checkpoint's")  # fmt: skip
    group.add_argument("--tokenizer-model", help="the tokenizer's file")
    group.add_argument("--vocab-size", type=int, help="for NullTokenizer")


def _add_perplexity(group: Any) -> None:
    group.add_argument("--valid-data-path", nargs="+",
                       help="text to evaluate on as a whole: a manifest.json, or dataset "
                       "prefixes, each optionally after its weight")  # fmt: skip
    group.add_argument("--data-path", nargs="+",
                       help="training text, likewise: evaluated on is its validation share by "
                       "--split; with --valid-data-path only its natural weights "
                       "count")  # fmt: skip
    group.add_argument("--split", default="98,2,0",
                       help="as in training (default: %(default)s)")  # fmt: skip
    group.add_argument("--seed", type=int, default=1234,
                       help="of the order of a domain's documents, as in training (default: "
                       "%(default)s)")  # fmt: skip
    group.add_argument("--max-sequences", type=int, metavar="N",
                       help="of each domain, its first N; default: all")  # fmt: skip
    group.add_argument("--data-cache-path", help="where dataset indices are kept; default: beside "
                       "the data")  # fmt: skip


def _add_tasks(group: Any) -> None:
    group.add_argument("--tasks", nargs="+", default=[], metavar="TASK",
                       help="such as mmlu, or a task file")  # fmt: skip
    group.add_argument("--include-path", type=Path, metavar="FOLDER",
                       help="task files of your own")  # fmt: skip
    group.add_argument("--datasets", type=Path, metavar="FOLDER",
                       help="datasets on this machine, each under its repository's name, such as "
                       "FOLDER/cais/mmlu")  # fmt: skip
    group.add_argument("--num-fewshot", type=int, help="default: each task's own")
    group.add_argument("--limit", type=int, metavar="N", help="questions of each task")
    group.add_argument("--gen-kwargs", metavar="KEY=VALUE,…",
                       help="in place of the tasks' generation settings, such as "
                       "max_gen_toks=256")  # fmt: skip
    group.add_argument("--allow-code-execution", action="store_true",
                       help="let humaneval run what the model writes")  # fmt: skip


def _add_model(group: Any) -> None:
    for flag in ("--num-layers", "--hidden-size", "--num-attention-heads", "--ffn-hidden-size",
                 "--max-position-embeddings"):  # fmt: skip
        group.add_argument(flag, type=int)
    group.add_argument("--position-embedding-type", choices=("learned_absolute", "rope"))
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be evaluated.

    Raises:
        ValueError: with the value, the limit and the remedy.
    """
    positive = ("tensor_model_parallel_size", "micro_batch_size", "seq_length", "max_sequences",
                "limit", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size",
                "max_position_embeddings")  # fmt: skip
    for name in positive:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not (args.data_path or args.valid_data_path or args.tasks):
        raise ValueError("nothing to evaluate: give --data-path or --valid-data-path, or --tasks")
    if args.tasks:
        check_options(task_options(args))


def task_options(args: argparse.Namespace) -> TaskOptions:
    """What the flags say of tasks."""
    return TaskOptions(
        tasks=args.tasks,
        include_path=args.include_path,
        datasets=args.datasets,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        gen_kwargs=args.gen_kwargs,
        run_code=args.allow_code_execution,
    )
