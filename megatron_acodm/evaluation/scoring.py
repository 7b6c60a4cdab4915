"""Scores and continues token sequences with a Megatron-Core GPT, over all ranks.

Rank 0 asks; every other rank waits in ``Scorer.follow`` and does its part. Sequences are padded on
the right: under causal attention no token sees what comes after it, so the padding changes nothing
and each sequence's result is the one it has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

_PATIENCE = timedelta(days=7)
"""How long ranks wait for rank 0, which reads tasks and runs code between its questions."""


@dataclass(frozen=True)
class Continuation:
    """Tokens whose probability is asked for, and the tokens before them (at least one)."""

    context: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from (at least one), and where to stop."""

    tokens: list[int]
    max_new_tokens: int
    stops: tuple[str, ...]


class Scorer:
    """A model that answers questions about token sequences.

    Args:
        module: This rank's part of a GPT, as wide as tensor parallelism and as deep as the model.
        tokenizer: Megatron's. Ids beyond it, which pad the embeddings, count as impossible, as
            they do in a model that was exported without them.
        max_length: Tokens that the model sees at most.
        batch_size: Sequences in one forward pass.
    """

    def __init__(
        self, module: torch.nn.Module, tokenizer: Any, max_length: int, batch_size: int
    ) -> None:
        """Join all ranks; collective."""
        self._module = module.eval()
        self._tokenizer = tokenizer
        self.max_length = max_length
        self._batch_size = batch_size
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    # Questions, on rank 0 ---------------------------------------------------------------------

    def loglikelihoods(self, requests: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether each token of it is the likeliest.

        What is too long loses tokens at its beginning, as lm-evaluation-harness has it.

        Raises:
            ValueError: for a continuation that is empty or longer than the model's context.
        """
        for request in requests:
            if not request.context or not 1 <= len(request.tokens) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(request.tokens)} tokens after "
                    f"{len(request.context)}; it must have 1 to {self.max_length}, after at "
                    "least 1"
                )
        return self._ask("_loglikelihoods", list(requests))

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The likeliest text after each prompt, up to a stop string, end of document or limit.

        A prompt that leaves no room for its new tokens loses tokens at its beginning.

        Raises:
            ValueError: when the new tokens alone fill the model's context.
        """
        for prompt in prompts:
            if not 1 <= prompt.max_new_tokens < self.max_length or not prompt.tokens:
                raise ValueError(
                    f"{prompt.max_new_tokens} new tokens are asked for, after "
                    f"{len(prompt.tokens)}; the model's context of {self.max_length} needs room "
                    "for a prompt: lower them, such as with --gen-kwargs max_gen_toks=256"
                )
        return self._ask("_generate", list(prompts))

    def dismiss(self) -> None:
        """Let the other ranks leave ``follow``."""
        dist.broadcast_object_list([None], src=0, group=self._group)

    def follow(self) -> None:
        """Do this rank's part of every question, until rank 0 has no more."""
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0, group=self._group)
            if message[0] is None:
                return
            self._answer(*message[0])

    # Every rank -------------------------------------------------------------------------------

    def _ask(self, method: str, items: list[Any]) -> list[Any]:
        dist.broadcast_object_list([(method, items)], src=0, group=self._group)
        return self._answer(method, items)

    def _answer(self, method: str, items: list[Any]) -> list[Any]:
        """This data-parallel rank's batches, all of similar length; on rank 0, all answers."""
        from megatron.core import parallel_state

        answer: Callable[[list[Any]], list[Any]] = getattr(self, method)
        order = sorted(range(len(items)), key=lambda i: -_length(items[i]))
        size = self._batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        first = parallel_state.get_data_parallel_rank()
        own = batches[first :: parallel_state.get_data_parallel_world_size()]
        answers: dict[int, Any] = {}
        for batch in tqdm(own, unit="batch", disable=dist.get_rank() != 0 or len(own) < 2):
            answers.update(zip(batch, answer([items[i] for i in batch]), strict=True))
        leads = dist.get_rank() == 0
        gathered: list[Any] | None = [None] * dist.get_world_size() if leads else None
        dist.gather_object(answers, gathered, dst=0, group=self._group)
        for others in gathered or ():
            answers.update(others)
        return [answers[i] for i in range(len(items))] if leads else []

    def _loglikelihoods(self, requests: list[Continuation]) -> list[tuple[float, bool]]:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        texts = [[*r.context, *r.tokens][-(self.max_length + 1) :] for r in requests]
        logits = self._logits([text[:-1] for text in texts])
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        counts = [len(request.tokens) for request in requests]
        for row, (request, text) in enumerate(zip(requests, texts, strict=True)):
            count = len(request.tokens)
            rows += [row] * count
            columns += range(len(text) - 1 - count, len(text) - 1)
            targets += request.tokens
        of_targets = logits[rows, columns].float()  # [tokens, part of the vocabulary]
        target = torch.tensor(targets, device=of_targets.device)
        likeliest = (self._likeliest(of_targets) == target).split(counts)
        losses = vocab_parallel_cross_entropy(of_targets, target).double().split(counts)
        return [
            (-float(loss.sum()), bool(hits.all()))
            for loss, hits in zip(losses, likeliest, strict=True)
        ]

    def _generate(self, prompts: list[Prompt]) -> list[str]:
        contexts = [p.tokens[-(self.max_length - p.max_new_tokens) :] for p in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        going = list(range(len(prompts)))
        while going:
            sequences = [contexts[i] + new[i] for i in going]
            logits = self._logits(sequences)
            last = [len(sequence) - 1 for sequence in sequences]
            tokens = self._likeliest(logits[range(len(going)), last].float()).tolist()
            still = []
            for i, token in zip(going, tokens, strict=True):
                if token == self._tokenizer.eod:
                    continue
                new[i].append(token)
                texts[i] = self._text(contexts[i], new[i])
                ends = [texts[i].find(stop) for stop in prompts[i].stops if stop in texts[i]]
                if ends:
                    texts[i] = texts[i][: min(ends)]
                elif len(new[i]) < prompts[i].max_new_tokens:
                    still.append(i)
            going = still
        return texts

    def _text(self, context: list[int], new: list[int]) -> str:
        """The text of the new tokens; where they begin a word, with the space before it."""
        before, whole = (self._tokenizer.detokenize(ids) for ids in (context, context + new))
        if whole.startswith(before):
            return str(whole[len(before) :])
        return str(self._tokenizer.detokenize(new))

    @torch.no_grad()
    def _logits(self, sequences: list[list[int]]) -> torch.Tensor:
        """``[batch, longest, part of the vocabulary]``, -inf where an id is only padding."""
        from megatron.core import parallel_state

        longest = max(map(len, sequences))
        tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        tokens = tokens.cuda()
        positions = torch.arange(longest, device=tokens.device).expand_as(tokens)
        logits = self._module(tokens, positions, None)
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        logits[..., max(0, self._tokenizer.vocab_size - first) :] = float("-inf")
        return logits

    def _likeliest(self, logits: torch.Tensor) -> torch.Tensor:
        """``[n]`` ids of the highest of ``[n, part of the vocabulary]``, over the whole of it."""
        from megatron.core import parallel_state

        values, ids = logits.max(dim=-1)
        ids += parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        size = parallel_state.get_tensor_model_parallel_world_size()
        if size == 1:
            return ids
        group = parallel_state.get_tensor_model_parallel_group()
        all_values = [torch.empty_like(values) for _ in range(size)]
        all_ids = [torch.empty_like(ids) for _ in range(size)]
        dist.all_gather(all_values, values, group=group)
        dist.all_gather(all_ids, ids, group=group)
        best = torch.stack(all_values).argmax(dim=0)
        return torch.stack(all_ids).gather(0, best.unsqueeze(0)).squeeze(0)


def _length(item: Continuation | Prompt) -> int:
    before = item.context if isinstance(item, Continuation) else ()
    return len(before) + len(item.tokens)
