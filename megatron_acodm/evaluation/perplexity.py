"""Perplexity of a model on each domain's text, by the pass that training validates with."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch

from megatron_acodm.megatron.data import build_validation_datasets
from megatron_acodm.megatron.losses import validation_sums
from megatron_acodm.megatron.sources import DataSources, natural_weights
from megatron_acodm.metrics import mean_perplexities, perplexity
from megatron_acodm.reporting.table import MEANS, number, percent


def domain_perplexities(
    module: torch.nn.Module, sources: DataSources, args: Namespace
) -> dict[str, Any]:
    """Measure every domain; collective, the same on every rank and at every parallel size.

    Args:
        module: The GPT; it is left in evaluation mode.
        sources: The data.
        args: ``seq_length``, ``micro_batch_size``, ``max_sequences`` (of each domain; None: all),
            and what ``build_validation_datasets`` reads.

    Returns:
        ``domains``: for each, mean token ``loss`` in nats, ``perplexity``, ``tokens`` and natural
        ``weight`` (None where only validation text is known of it); ``mean_perplexity``: as in
        ``metrics.jsonl``.

    Raises:
        ValueError: when there is no text.
    """
    data = build_validation_datasets(
        args, sources.tokenizer, sources.valid_names, sources.valid_prefixes
    )
    sums = validation_sums(
        [module],
        data,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        max_sequences=args.max_sequences or max(data.sizes, default=0),
    )
    if not sums:
        raise ValueError(
            f"no domain has text to evaluate on: --split {args.split} leaves no document; give "
            "--valid-data-path, or another --split"
        )
    weights = dict(zip(sources.names, natural_weights(sources.prefixes), strict=True))
    losses = {name: loss / tokens for name, (loss, tokens) in sums.items()}
    return {
        "domains": {
            name: {
                "loss": losses[name],
                "perplexity": perplexity(losses[name]),
                "tokens": tokens,
                "weight": weights.get(name),
            }
            for name, (_, tokens) in sums.items()
        },
        "mean_perplexity": mean_perplexities(losses, weights),
    }


def perplexity_table(results: Mapping[str, Any]) -> str:
    """The result of ``domain_perplexities`` as plain text for a terminal."""
    domains, means = results["domains"], results["mean_perplexity"]
    width = max(len("domain"), *map(len, MEANS), *map(len, domains))
    row = f"{{:<{width}}}  {{:>13}} {{:>8}} {{:>8}} {{:>11}}".format
    lines = [row("domain", "tokens", "weight", "loss", "perplexity")]
    for name, entry in domains.items():
        weight = "–" if entry["weight"] is None else percent(entry["weight"])
        figures = (f"{entry['loss']:.4f}", number(entry["perplexity"]))
        lines.append(row(name, f"{entry['tokens']:,}", weight, *figures))
    for label, key in zip(MEANS, ("unweighted", "natural"), strict=True):
        if key in means:
            lines.append(row(label, "", "", "", number(means[key])))
    return "\n".join(line.rstrip() for line in lines)
