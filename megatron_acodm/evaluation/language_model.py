"""The ``LM`` interface of EleutherAI's lm-evaluation-harness over a Megatron-Core GPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_acodm.evaluation.scoring import Continuation, Prompt, Scorer


class MegatronLM(TemplateLM):
    """A base model: no chat template, greedy generation.

    The harness sees one process, rank 0's; the scorer spreads its requests over all ranks.

    Args:
        scorer: The model.
        tokenizer: Megatron's, the one that the model was trained with.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any) -> None:
        super().__init__()
        self._scorer = scorer
        self._megatron_tokenizer = tokenizer

    @property
    def eot_token_id(self) -> int:
        """The id that ended documents in training; also what stands before a text's first."""
        return int(self._megatron_tokenizer.eod)

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at most."""
        return self._scorer.max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; Megatron's tokenizers add no special tokens."""
        del add_special_tokens, kwargs
        return [int(token) for token in self._megatron_tokenizer.tokenize(string)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        return self._scorer.loglikelihoods(
            [Continuation(context, tokens) for _, context, tokens in requests]
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, each token predicted once, in the harness's windows."""
        del disable_tqdm
        windows: list[Continuation] = []
        counts = []
        for (text,) in (request.args for request in requests):
            own = [
                Continuation(*make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += own
            counts.append(len(own))
        scores = iter(self._scorer.loglikelihoods(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first of their stop strings.

        Raises:
            ValueError: for a task that wants samples drawn.
        """
        del disable_tqdm
        prompts = []
        for context, options in (request.args for request in requests):
            settings = normalize_gen_kwargs(options)
            if settings["do_sample"]:
                raise ValueError(
                    f"a task asks for sampled text ({options}); evaluation is greedy: give "
                    "--gen-kwargs do_sample=False,temperature=0"
                )
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            stops = tuple(stop for stop in settings["until"] if stop)
            prompts.append(Prompt(tokens, settings["max_gen_toks"], stops))
        return self._scorer.generate(prompts)
