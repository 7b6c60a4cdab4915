"""Scores and text are those of HuggingFace's models with the same weights."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Corpus
from evaluation import evaluate, open_scorer, save_like_megatron_lm

from megatron_acodm.evaluation.scoring import Continuation, Prompt
from megatron_acodm.megatron.tokenizer import build_tokenizer

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install transformers)"
)

LAYERS, HIDDEN, HEADS, GROUPS, LENGTH = 2, 32, 4, 2, 24
VOCABULARY, PADDED = 258, 384  # of the byte-level tokenizer; as Megatron pads it
TEXTS = ["import os, sys", "def f(x):\n    return x", "The quick brown fox", "ab" * 40]


def _arguments(**differing: Any) -> Namespace:
    """What Megatron-LM keeps in a checkpoint of its run, as far as it matters here."""
    usual = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 4 * HIDDEN,
        "num_attention_heads": HEADS,
        "seq_length": LENGTH,
        "max_position_embeddings": LENGTH,
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
        "layernorm_epsilon": 1e-5,
        "padded_vocab_size": PADDED,
        "transformer_impl": "local",
        "tensor_model_parallel_size": 1,
        "bf16": False,
        "tokenizer_type": "ByteLevelTokenizer",
        "tokenizer_model": None,
    }
    return Namespace(**(usual | differing))


def _pad(weight: torch.Tensor) -> torch.Tensor:
    """Rows beyond the tokenizer's, of a size that would show in any score they entered."""
    return torch.cat([weight, 3 * torch.ones(PADDED - VOCABULARY, weight.shape[1])])


def _gpt2(fused: bool) -> tuple[Any, Namespace, dict[str, torch.Tensor]]:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            # Megatron's fused GELU is the approximation.
            activation_function="gelu_pytorch_tanh" if fused else "gelu",
            initializer_range=0.2,
        )
    )
    weights = {
        "embedding.word_embeddings.weight": _pad(model.transformer.wte.weight),
        "embedding.position_embeddings.weight": model.transformer.wpe.weight,
        "decoder.final_layernorm.weight": model.transformer.ln_f.weight,
        "decoder.final_layernorm.bias": model.transformer.ln_f.bias,
    }
    size = HIDDEN // HEADS
    for i, layer in enumerate(model.transformer.h):
        name = f"decoder.layers.{i}"
        qkv = {"weight": layer.attn.c_attn.weight.T, "bias": layer.attn.c_attn.bias}
        for kind, value in qkv.items():
            # HuggingFace keeps all queries, all keys, all values; Megatron a head's three.
            by_head = value.reshape(3, HEADS, size, -1).transpose(0, 1)
            weights[f"{name}.self_attention.linear_qkv.{kind}"] = by_head.reshape(value.shape)
        linear = {
            "self_attention.linear_proj": layer.attn.c_proj,
            "mlp.linear_fc1": layer.mlp.c_fc,
            "mlp.linear_fc2": layer.mlp.c_proj,
        }
        for part, module in linear.items():
            weights[f"{name}.{part}.weight"] = module.weight.T
            weights[f"{name}.{part}.bias"] = module.bias
        for part, norm in (("input_layernorm", layer.ln_1), ("pre_mlp_layernorm", layer.ln_2)):
            weights[f"{name}.{part}.weight"] = norm.weight
            weights[f"{name}.{part}.bias"] = norm.bias
    return model, _arguments(bias_gelu_fusion=fused), weights


def _llama() -> tuple[Any, Namespace, dict[str, torch.Tensor]]:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            max_position_embeddings=LENGTH,
            rms_norm_eps=1e-6,
            rope_theta=500.0,
            initializer_range=0.2,
        )
    )
    weights = {
        "embedding.word_embeddings.weight": _pad(model.model.embed_tokens.weight),
        "decoder.final_layernorm.weight": model.model.norm.weight,
        "output_layer.weight": _pad(model.lm_head.weight),
    }
    for i, layer in enumerate(model.model.layers):
        name, attention = f"decoder.layers.{i}", layer.self_attn
        # Megatron keeps a group's queries, key and value together.
        parts = [
            projection.weight.reshape(GROUPS, -1, HIDDEN)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        qkv = torch.cat(parts, dim=1).reshape(-1, HIDDEN)
        weights |= {
            f"{name}.input_layernorm.weight": layer.input_layernorm.weight,
            f"{name}.self_attention.linear_qkv.weight": qkv,
            f"{name}.self_attention.linear_proj.weight": attention.o_proj.weight,
            f"{name}.pre_mlp_layernorm.weight": layer.post_attention_layernorm.weight,
            f"{name}.mlp.linear_fc1.weight": torch.cat(
                [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]
            ),
            f"{name}.mlp.linear_fc2.weight": layer.mlp.down_proj.weight,
        }
    args = _arguments(
        ffn_hidden_size=48,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        position_embedding_type="rope",
        rotary_base=500,
        rotary_percent=1.0,
        swiglu=True,
        bias_swiglu_fusion=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        group_query_attention=True,
        num_query_groups=GROUPS,
        untie_embeddings_and_output_weights=True,
    )
    return model, args, weights


MODELS = {"gpt2": lambda: _gpt2(False), "gpt2, fused": lambda: _gpt2(True), "llama": _llama}


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """A model of HuggingFace's and a checkpoint with its weights."""
    torch.manual_seed(3)
    model, args, weights = MODELS[request.param]()
    root = tmp_path_factory.mktemp("converted") / "checkpoint"
    save_like_megatron_lm(root, args, {name: value.detach() for name, value in weights.items()})
    return model.eval(), root


def _token_scores(model: Any, text: list[int]) -> torch.Tensor:
    """Log-probability of each token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([text[:-1]])).logits[0]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(text[1:]).unsqueeze(1))[:, 0]


def test_log_likelihoods_are_equal(pair: tuple[Any, Path]) -> None:
    model, root = pair
    scorer = open_scorer(root, build_tokenizer("ByteLevelTokenizer"))
    requests = [
        Continuation(list(text.encode())[:cut], list(text.encode())[cut : cut + LENGTH - 1])
        for text in TEXTS
        for cut in (1, 5, len(text) - 1)
    ]
    for request, (score, _) in zip(requests, scorer.loglikelihoods(requests), strict=True):
        text = (request.context + request.tokens)[-(LENGTH + 1) :]
        expected = _token_scores(model, text)[-len(request.tokens) :].sum()
        assert score == pytest.approx(float(expected), abs=1e-4)


def test_generated_text_is_equal(pair: tuple[Any, Path]) -> None:
    model, root = pair
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    prompts = [list(text.encode())[:10] for text in TEXTS[:3]]
    answers = open_scorer(root, tokenizer).generate([Prompt(p, LENGTH - 10, ()) for p in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=LENGTH - 10,
            do_sample=False,
            eos_token_id=tokenizer.eod,
            pad_token_id=tokenizer.eod,
        )[0].tolist()
        new = [token for token in whole[10:] if token != tokenizer.eod]
        assert answer == tokenizer.detokenize(prompt + new)[len(tokenizer.detokenize(prompt)) :]


def test_the_tool_evaluates_the_checkpoint_at_another_tensor_parallel_size(
    pair: tuple[Any, Path], corpus: Corpus, tmp_path: Path
) -> None:
    arguments = ["--load", str(pair[1]), "--data-path", str(corpus.manifest)]
    arguments += ["--max-sequences", "8", "--data-cache-path", str(tmp_path / "cache")]
    alone = evaluate(tmp_path, *arguments)
    assert alone.code == 0, alone.output
    expected = alone.results["perplexity"]["domains"]
    split = evaluate(tmp_path, *arguments, "--tensor-model-parallel-size", "2", processes=2)
    assert split.code == 0, split.output
    for name, entry in split.results["perplexity"]["domains"].items():
        assert entry["loss"] == pytest.approx(expected[name]["loss"], rel=1e-5)
