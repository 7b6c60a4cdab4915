"""A plain GPT in float64 and, from its definition, what a step's scores are: the reference."""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LAYERS, HIDDEN, HEADS, SEQUENCE, VOCABULARY, DOMAINS = 4, 16, 2, 16, 64, 4
MICRO_BATCH_SIZE = 2


def initial_weight(name: str, shape: Sequence[int]) -> Tensor:
    """The whole parameter of this Megatron name, float64; no two names have the same numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if len(shape) == 1:
        return 0.2 * values + ("layernorm.weight" in name)
    return values / (2 if "embedding" in name else shape[1] ** 0.5)


def sample(index: int, domain: int, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask, each ``[SEQUENCE]``, of a sample of the run.

    A domain has its own part of the vocabulary, so that gradients of domains differ.
    """
    generator = torch.Generator().manual_seed(index)
    text = torch.rand(SEQUENCE + 1, generator=generator).square().mul(24).long()
    text = (text + 16 * domain) % VOCABULARY
    mask = torch.ones(SEQUENCE)
    if masked:
        kept, *draws = torch.rand(SEQUENCE + 1, generator=generator).tolist()
        mask = torch.tensor([float(draw < 0.2 + 0.7 * kept) for draw in draws])
        if index in (2, 3):  # the second micro-batch, whole
            mask.zero_()
    return text[:-1], text[1:], mask


class ReferenceGPT:
    """Pre-norm GPT with learned positions, biases and GELU, in Megatron's names and layout.

    Args:
        tied: whether the output layer is the word embedding.
        biases: whether the linear layers have biases.
        dtype: that the host holds its weights in; they are rounded to it.
    """

    def __init__(self, tied: bool, biases: bool, dtype: torch.dtype) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
            "embedding.position_embeddings.weight": (SEQUENCE, HIDDEN),
            "decoder.final_layernorm.weight": (HIDDEN,),
            "decoder.final_layernorm.bias": (HIDDEN,),
            "output_layer.weight": (VOCABULARY, HIDDEN),
        }
        linear = {
            "self_attention.linear_qkv": (3 * HIDDEN, HIDDEN),
            "self_attention.linear_proj": (HIDDEN, HIDDEN),
            "mlp.linear_fc1": (4 * HIDDEN, HIDDEN),
            "mlp.linear_fc2": (HIDDEN, 4 * HIDDEN),
            "input_layernorm": (HIDDEN,),
            "pre_mlp_layernorm": (HIDDEN,),
        }
        for layer in range(LAYERS):
            for name, shape in linear.items():
                shapes[f"decoder.layers.{layer}.{name}.weight"] = shape
                shapes[f"decoder.layers.{layer}.{name}.bias"] = shape[:1]
        self.parameters = {
            name: initial_weight(name, shape).to(dtype).double().requires_grad_()
            for name, shape in shapes.items()
        }
        if not biases:
            for name in self.parameters:
                if "linear" in name and name.endswith("bias"):
                    self.parameters[name] = torch.zeros(*shapes[name], dtype=torch.float64)
        if tied:
            word_embeddings = self.parameters["embedding.word_embeddings.weight"]
            self.parameters["output_layer.weight"] = word_embeddings

    def token_losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross entropies ``[batch, sequence]``."""
        p = self.parameters
        x = p["embedding.word_embeddings.weight"][tokens]
        x = x + p["embedding.position_embeddings.weight"][: tokens.shape[1]]
        for layer in range(LAYERS):
            name = f"decoder.layers.{layer}"
            x = x + self._attention(name, self._norm(f"{name}.input_layernorm", x))
            hidden = self._linear(
                f"{name}.mlp.linear_fc1", self._norm(f"{name}.pre_mlp_layernorm", x)
            )
            x = x + self._linear(f"{name}.mlp.linear_fc2", functional.gelu(hidden))
        logits = self._norm("decoder.final_layernorm", x) @ p["output_layer.weight"].T
        return functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        return functional.layer_norm(x, (HIDDEN,), weight, bias)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(
            x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        )

    def _attention(self, name: str, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        # Megatron keeps query, key and value of a head together.
        heads = self._linear(f"{name}.self_attention.linear_qkv", x)
        heads = heads.view(batch, length, HEADS, 3 * HIDDEN // HEADS).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, length, HIDDEN)
        return self._linear(f"{name}.self_attention.linear_proj", mixed)


@dataclass(frozen=True)
class Scores:
    """What a step should report, ``[DOMAINS]`` each; nan for a domain that was not drawn."""

    alignment: np.ndarray  # w_i = <g_i, sum_{j != i} a_j g_j>
    grad_sq_norm: np.ndarray
    gram: np.ndarray  # [DOMAINS, DOMAINS] products of mean gradients
    loss: np.ndarray
    tokens: np.ndarray


def reference_scores(
    domains: Sequence[int],
    patterns: Sequence[str],
    *,
    context: int = 1,
    masked: bool = False,
    per_token: bool = False,
    tied: bool = True,
    biases: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """The scores of a step over samples 0, 1, ... of the given domains, by plain autograd.

    Args:
        domains: domain of each sample; ``MICRO_BATCH_SIZE`` consecutive ones are a micro-batch.
        patterns: of the names of the parameters that are compared.
        context: parts that a sequence is cut into, each a sequence of its own.
        masked: whether tokens are masked.
        per_token: the step's loss is the mean over all its tokens; otherwise each micro-batch (and
            each part of it) counts alike, whatever its number of tokens.
        tied: see ``ReferenceGPT``.
        biases: see ``ReferenceGPT``.
        dtype: see ``ReferenceGPT``.
    """
    model = ReferenceGPT(tied, biases, dtype)
    selected = [
        parameter
        for name, parameter in model.parameters.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    texts = [sample(index, domain, masked) for index, domain in enumerate(domains)]
    of_sample = torch.tensor(domains)
    total_tokens = sum(float(mask.sum()) for _, _, mask in texts)
    micro_batches = len(domains) // MICRO_BATCH_SIZE
    # contributions[i] = a_i g_i: what the domain's tokens add to the gradient of the step's loss.
    contributions = torch.zeros(DOMAINS, sum(p.numel() for p in selected), dtype=torch.float64)
    loss_sums, tokens, shares = (torch.zeros(DOMAINS, dtype=torch.float64) for _ in range(3))
    for start in range(0, len(domains), MICRO_BATCH_SIZE):
        batch = range(start, start + MICRO_BATCH_SIZE)
        whole = [torch.stack([texts[i][field] for i in batch]) for field in range(3)]
        for inputs, labels, mask in zip(*(x.chunk(context, dim=1) for x in whole), strict=True):
            losses = model.token_losses(inputs, labels) * mask
            count = max(float(mask.sum()), 1.0)  # as the host counts
            weight = total_tokens if per_token else count * micro_batches * context
            for domain in sorted({domains[i] for i in batch}):
                rows = of_sample[start : start + MICRO_BATCH_SIZE] == domain
                loss = losses[rows].sum()
                parts = torch.autograd.grad(loss / weight, selected, retain_graph=True)
                contributions[domain] += torch.cat([part.flatten() for part in parts])
                loss_sums[domain] += loss.detach()
                tokens[domain] += mask[rows].sum()
                shares[domain] += mask[rows].sum() / weight
    gram = (contributions @ contributions.T).numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(shares > 0, shares, np.nan)
        alignment = (gram.sum(axis=1) - np.diag(gram)) / share
        means = gram / share[:, None] / share
        return Scores(
            alignment, np.diag(means), means, (loss_sums / tokens).numpy(), tokens.numpy()
        )
