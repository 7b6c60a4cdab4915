"""The trainer's command line: Megatron-LM's names where it has them, ``--acodm-*`` for ours."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from megatron_acodm.config import ESTIMATORS, GRANULES, POLICIES, AcodmConfig
from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.megatron.run import RunShape
from megatron_acodm.megatron.tokenizer import TOKENIZER_TYPES
from megatron_acodm.policy_config import OBJECTIVES


def build_parser() -> argparse.ArgumentParser:
    """The parser; abbreviations of flags are refused, as a typo must not become another flag."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_acodm.train",
        description="Train a GPT on Megatron-Core with its data mixture decided online.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_parallel(parser.add_argument_group("parallelism"))
    _add_data(parser.add_argument_group("data"))
    _add_output(parser.add_argument_group("output"))
    mixing = parser.add_argument_group("data mixing")
    add_mixing_arguments(mixing, default_policy="the config's, else acodm")
    return parser


def _add_model(group: Any) -> None:
    group.add_argument("--num-layers", type=int, required=True)
    group.add_argument("--hidden-size", type=int, required=True)
    group.add_argument("--num-attention-heads", type=int, required=True)
    group.add_argument("--ffn-hidden-size", type=int, help="default: 4 x hidden size")
    group.add_argument("--seq-length", type=int, required=True, help="tokens a sequence")
    group.add_argument("--max-position-embeddings", type=int, help="default: the sequence length")
    group.add_argument("--position-embedding-type", choices=("learned_absolute", "rope"),
                       default="learned_absolute")  # fmt: skip
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    group.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    group.add_argument("--init-method-std", type=float, default=0.02)
    group.add_argument("--transformer-impl", choices=("local", "transformer_engine"),
                       help="default: transformer_engine where installed")  # fmt: skip


def _add_training(group: Any) -> None:
    group.add_argument("--micro-batch-size", type=int, required=True,
                       help="sequences a micro-batch")  # fmt: skip
    group.add_argument("--global-batch-size", type=int, required=True, help="sequences a step")
    group.add_argument("--rampup-batch-size", type=int, nargs=3,
                       metavar=("START", "INCREMENT", "SAMPLES"),
                       help="begin with START sequences a step and reach the global batch size "
                       "in steps of INCREMENT over this many samples")  # fmt: skip
    length = group.add_mutually_exclusive_group(required=True)
    length.add_argument("--train-iters", type=int, help="steps of the run")
    length.add_argument("--train-samples", type=int, help="or its sequences")
    group.add_argument("--lr", type=float, default=3e-4)
    group.add_argument("--min-lr", type=float, default=3e-5)
    group.add_argument("--lr-decay-style", choices=("constant", "linear", "cosine"),
                       default="cosine")  # fmt: skip
    group.add_argument("--lr-warmup-fraction", type=float, default=0.01)
    group.add_argument("--weight-decay", type=float, default=0.1)
    group.add_argument("--adam-beta1", type=float, default=0.9)
    group.add_argument("--adam-beta2", type=float, default=0.95)
    group.add_argument("--adam-eps", type=float, default=1e-8)
    group.add_argument("--clip-grad", type=float, default=1.0)
    group.add_argument("--seed", type=int, default=1234)
    group.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                       help="default: on with CUDA, off without")  # fmt: skip
    group.add_argument("--recompute-activations", action="store_true",
                       help="recompute each layer's activations in the backward pass")  # fmt: skip


def _add_parallel(group: Any) -> None:
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--use-distributed-optimizer", action="store_true")
    group.add_argument("--overlap-grad-reduce", action="store_true")
    group.add_argument("--use-cpu-initialization", action="store_true",
                       help="initial weights that do not depend on the tensor-parallel size; "
                       "always so on CPU")  # fmt: skip
    group.add_argument("--distributed-timeout-minutes", type=float, default=10)


def _add_data(group: Any) -> None:
    group.add_argument("--data-path", nargs="+", required=True,
                       help="a manifest.json, or dataset prefixes, each optionally after its "
                       "weight")  # fmt: skip
    group.add_argument("--valid-data-path", nargs="+",
                       help="validation files, likewise; default: a share of the training files "
                       "by --split")  # fmt: skip
    group.add_argument("--split", default="98,2,0", help="train,validation,test shares of the "
                       "documents of --data-path, used without --valid-data-path")  # fmt: skip
    group.add_argument("--data-cache-path", help="where dataset indices are kept; "
                       "default: beside the run's output")  # fmt: skip
    group.add_argument("--num-workers", type=int, default=2, help="data-loading processes a rank")
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES,
                       help="default: the manifest's tokenizer")  # fmt: skip
    group.add_argument("--tokenizer-model", help="the tokenizer's file")
    group.add_argument("--vocab-size", type=int, help="for NullTokenizer")


def _add_output(group: Any) -> None:
    group.add_argument("--run-dir", required=True, help="metrics, TensorBoard and report go here")
    group.add_argument("--save", help="checkpoint folder; default: no checkpoints")
    group.add_argument("--save-interval", type=int, help="steps; default: at the end only")
    group.add_argument("--load", help="checkpoint folder to resume from, if it holds one")
    group.add_argument("--eval-interval", type=int, default=100,
                       help="steps between validations; 0: none")  # fmt: skip
    group.add_argument("--eval-iters", type=int, default=10,
                       help="global batches of a domain's validation text, at most")  # fmt: skip
    group.add_argument("--eval-ema-decay", type=float, metavar="DECAY",
                       help="validate the exponential moving average of the weights over steps, "
                       "in float32, such as 0.99; default: the weights themselves")  # fmt: skip
    group.add_argument("--log-interval", type=int, default=10)
    group.add_argument("--exit-interval", type=int,
                       help="save and stop after a step that is a multiple of this")  # fmt: skip
    group.add_argument("--wandb-project", help="log to Weights & Biases as well")


def add_mixing_arguments(group: Any, default_policy: str) -> None:
    """Add the flags of ``acodm_config``, and those of what it saves and adopts."""
    group.add_argument("--acodm-config", help="YAML file with mixing, blending and alignment; the "
                       "flags below override it; and the script's arguments")  # fmt: skip
    group.add_argument("--acodm-policy", choices=(*POLICIES, "none"),
                       help=f"default: {default_policy}; none: Megatron's static "
                       "blend")  # fmt: skip
    group.add_argument("--acodm-weights", metavar="FILE",
                       help="policy static: JSON or YAML file with the weights, as a mapping from "
                       "domain to weight or as DoReMi, DoGE or RegMix publish theirs; default: "
                       "natural weights")  # fmt: skip
    group.add_argument("--acodm-save-policy", metavar="FILE",
                       help="policy acodm: write what it learned to FILE.safetensors and .json, "
                       "at every checkpoint and at the end")  # fmt: skip
    group.add_argument("--acodm-load-policy", metavar="FILE",
                       help="policy frozen: what another run learned")  # fmt: skip
    group.add_argument("--acodm-objective", choices=OBJECTIVES,
                       help="policy acodm: what the mixture is to lower, the mean over domains of "
                       "perplexity or loss; batch: the paper's reward")  # fmt: skip
    group.add_argument("--acodm-decision-lag", type=int,
                       help="steps from a measurement to the batch that it decides, beyond the "
                       "next")  # fmt: skip
    group.add_argument("--acodm-granule", choices=GRANULES,
                       help="what is of one domain as a whole")  # fmt: skip
    group.add_argument("--acodm-minimum-quota", type=int,
                       help="least granules of every domain in a step")  # fmt: skip
    group.add_argument("--acodm-repetition", metavar="{repeat,cap N,error}",
                       help="what happens when a domain's sequences are used up")  # fmt: skip
    group.add_argument("--acodm-adopt", action="store_true",
                       help="resume although domains came, went or have other data; those "
                       "that stayed go on where they were")  # fmt: skip
    group.add_argument("--acodm-estimator", choices=ESTIMATORS,
                       help="how gradients are compared; exact: in full; sketch: by a random "
                       "projection; captured: from layer inputs, for micro-batches of several "
                       "domains")  # fmt: skip
    group.add_argument("--acodm-sketch-size", type=int,
                       help="numbers a domain of the projection, a multiple of 64")  # fmt: skip
    group.add_argument("--acodm-coordinates", type=float, metavar="SHARE",
                       help="random share of the coordinates that estimator exact compares; "
                       "default: all")  # fmt: skip
    group.add_argument("--acodm-parameters", nargs="+", metavar="PATTERN",
                       help="names of the parameters whose gradients count, such as "
                       "'decoder.layers.*.linear_fc1.weight', in place of depths and "
                       "kind")  # fmt: skip
    group.add_argument("--acodm-depths", type=float, nargs="+",
                       help="relative depths of the layers whose gradients count")  # fmt: skip
    group.add_argument("--acodm-kind", help="their weight: fc1, fc2, qkv or proj")
    group.add_argument("--acodm-gram-interval", type=int,
                       help="steps between records of all products of the domains' "
                       "gradients")  # fmt: skip
    group.add_argument("--acodm-initial-weights", choices=("natural", "uniform"),
                       help="first mixture: natural (by size, or the weights given with "
                       "--data-path) or uniform")  # fmt: skip
    group.add_argument("--acodm-min-weight", type=float,
                       help="lowest share that an online policy may give to a "
                       "domain")  # fmt: skip
    group.add_argument("--acodm-max-weight", type=float,
                       help="highest share that an online policy may give to a "
                       "domain")  # fmt: skip


def acodm_config(args: argparse.Namespace) -> AcodmConfig | None:
    """The configuration that the YAML file and the flags add up to; None for policy ``none``.

    Raises:
        ValueError: for a bad value, with its limit and remedy.
    """
    if args.acodm_policy == "none":
        _refuse_to_save_policy(args, "none")
        return None
    config = AcodmConfig.from_yaml(args.acodm_config) if args.acodm_config else AcodmConfig()
    if args.acodm_weights is not None:  # in place of those of the YAML file
        unweighted = dataclasses.replace(config.mixing, weights=None, weights_file=None)
        config = dataclasses.replace(config, mixing=unweighted)
    overrides: dict[str, dict[str, Any]] = {
        "mixing": {
            "policy": args.acodm_policy,
            "weights_file": args.acodm_weights,
            "policy_file": args.acodm_load_policy,
            "initial_weights": args.acodm_initial_weights,
            "min_weight": args.acodm_min_weight,
            "max_weight": args.acodm_max_weight,
        },
        "blending": {
            "decision_lag": args.acodm_decision_lag,
            "granule": args.acodm_granule,
            "minimum_quota": args.acodm_minimum_quota,
            "repetition": args.acodm_repetition,
        },
        "alignment": {
            "estimator": args.acodm_estimator,
            "sketch_size": args.acodm_sketch_size,
            "coordinates": args.acodm_coordinates,
            "parameters": None if args.acodm_parameters is None else tuple(args.acodm_parameters),
            "kind": args.acodm_kind,
            "gram_interval": args.acodm_gram_interval,
            "depths": None if args.acodm_depths is None else tuple(args.acodm_depths),
        },
    }
    for section, values in overrides.items():
        given = {key: value for key, value in values.items() if value is not None}
        changed = dataclasses.replace(getattr(config, section), **given)
        config = dataclasses.replace(config, **{section: changed})
    if args.acodm_objective is not None:
        agent = dataclasses.replace(config.mixing.agent, objective=args.acodm_objective)
        config = dataclasses.replace(config, mixing=dataclasses.replace(config.mixing, agent=agent))
    _refuse_to_save_policy(args, config.mixing.policy)
    return config


def _refuse_to_save_policy(args: argparse.Namespace, policy: str) -> None:
    if args.acodm_save_policy is not None and policy != "acodm":
        raise ValueError(
            f"--acodm-save-policy is for policy 'acodm', not {policy!r}, which has learned nothing "
            "to save; remove the flag"
        )


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in dependent defaults and refuse what cannot be trained.

    Raises:
        ValueError: with the value, the limit and the remedy.
    """
    positive = ("num_layers", "hidden_size", "num_attention_heads", "seq_length",
                "micro_batch_size", "global_batch_size", "log_interval",
                "make_vocab_size_divisible_by",
                "tensor_model_parallel_size", "pipeline_model_parallel_size")  # fmt: skip
    for name in positive:
        if getattr(args, name) < 1:
            raise ValueError(f"{_flag(name)} is {getattr(args, name)}; it must be at least 1")
    args.data_cache_path = args.data_cache_path or os.path.join(args.run_dir, "cache")
    for name in ("num_workers", "seed", "eval_interval", "eval_iters"):
        if getattr(args, name) < 0:
            raise ValueError(f"{_flag(name)} is {getattr(args, name)}; it must not be negative")
    for name in ("save_interval", "exit_interval"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{_flag(name)} is {getattr(args, name)}; it must be at least 1")
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    _check_multiple(
        "hidden_size", args.hidden_size, "num_attention_heads", args.num_attention_heads
    )
    _check_multiple("num_attention_heads", args.num_attention_heads,
                    "tensor_model_parallel_size", tp)  # fmt: skip
    _check_multiple("num_layers", args.num_layers, "pipeline_model_parallel_size", pp)
    _settle_length(args)
    if args.sequence_parallel and tp == 1:
        raise ValueError("--sequence-parallel needs --tensor-model-parallel-size above 1")
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    _check_multiple("ffn_hidden_size", args.ffn_hidden_size, "tensor_model_parallel_size", tp)
    if not 0 <= args.lr_warmup_fraction < 1:
        raise ValueError(
            f"--lr-warmup-fraction is {args.lr_warmup_fraction}; it must lie in [0, 1)"
        )
    if args.eval_ema_decay is not None and not 0 <= args.eval_ema_decay < 1:
        raise ValueError(
            f"--eval-ema-decay is {args.eval_ema_decay}; it must lie in [0, 1), or be left out"
        )
    _check_split(args.split)
    if args.acodm_adopt and not args.load:
        raise ValueError("--acodm-adopt accepts what differs on a resume; give --load as well")
    if args.acodm_adopt and args.acodm_policy == "none":
        raise ValueError(
            "--acodm-adopt needs a policy: Megatron's own blend, --acodm-policy none, cannot go on "
            "with other domains"
        )
    if args.exit_interval and not args.save:
        raise ValueError("--exit-interval saves before it stops; give a folder with --save")
    if args.min_lr > args.lr:
        raise ValueError(f"--min-lr is {args.min_lr}, above --lr {args.lr}; lower it")
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    if args.max_position_embeddings < args.seq_length:
        raise ValueError(
            f"--max-position-embeddings is {args.max_position_embeddings}, below --seq-length "
            f"{args.seq_length}; raise it"
        )


def check_batch(args: argparse.Namespace, world_size: int) -> None:
    """Refuse a global batch that does not divide over the data-parallel ranks.

    Raises:
        ValueError: with the numbers.
    """
    data_size = world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size)
    run_shape(args).check_divisible(
        args.micro_batch_size * max(1, data_size),
        f"--micro-batch-size x data-parallel size = {args.micro_batch_size} x {data_size}",
    )


def run_shape(args: argparse.Namespace) -> RunShape:
    """The sizes of the run that the flags describe."""
    return RunShape(
        args.train_iters,
        args.global_batch_size,
        args.micro_batch_size,
        args.seed,
        tuple(args.rampup_batch_size) if args.rampup_batch_size else None,
    )


def _settle_length(args: argparse.Namespace) -> None:
    """Fill in --train-iters and --train-samples from each other."""
    for name in ("train_iters", "train_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{_flag(name)} is {getattr(args, name)}; it must be at least 1")
    if args.train_samples is not None:
        args.train_iters = 1
        args.train_iters = run_shape(args).steps_within(args.train_samples)
        if args.train_iters == 0:
            raise ValueError(
                f"--train-samples is {args.train_samples}, less than a first step needs; raise it "
                "to at least the (ramped-up) global batch size"
            )
    args.train_samples = run_shape(args).train_samples


def _check_split(split: str) -> None:
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or shares[0] == 0:
        raise ValueError(
            f"--split is {split!r}; give up to three shares such as 98,2,0 (train, validation, "
            "test), none negative and some for training"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_multiple(name: str, value: int, of_name: str, of: int) -> None:
    if value % of != 0:
        raise ValueError(f"{_flag(name)} {value} is not a multiple of {_flag(of_name)} {of}")
