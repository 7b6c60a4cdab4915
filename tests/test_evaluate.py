"""Evaluation without optional packages: scores are the model's, in every layout; errors say why."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Corpus, Run, Train
from evaluation import Evaluated, evaluate, launcher, open_scorer, run, save_reference
from questions import CONTINUATIONS, PROMPTS
from reference_gpt import SEQUENCE, VOCABULARY, ReferenceGPT

from megatron_acodm.evaluation.scoring import Continuation, Prompt, Scorer
from megatron_acodm.megatron.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference") / "checkpoint"


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> ReferenceGPT:
    return save_reference(checkpoint)


@pytest.fixture(scope="module")
def scorer(checkpoint: Path, reference: ReferenceGPT) -> Scorer:
    return open_scorer(checkpoint, build_tokenizer("NullTokenizer", None, VOCABULARY - 1))


def _losses(reference: ReferenceGPT, text: list[int]) -> torch.Tensor:
    """Loss of each token but the first, float64."""
    tokens, labels = torch.tensor([text[:-1]]), torch.tensor([text[1:]])
    with torch.no_grad():
        return reference.token_losses(tokens, labels)[0]


def _next_losses(reference: ReferenceGPT, text: list[int]) -> torch.Tensor:
    """Loss of each id after a text."""
    return torch.stack([_losses(reference, [*text, i])[-1] for i in range(VOCABULARY)])


def test_log_likelihoods_are_those_of_the_float64_reference(
    scorer: Scorer, reference: ReferenceGPT
) -> None:
    for request, (score, _) in zip(
        CONTINUATIONS, scorer.loglikelihoods(CONTINUATIONS), strict=True
    ):
        text = (request.context + request.tokens)[-(SEQUENCE + 1) :]
        expected = -float(_losses(reference, text)[-len(request.tokens) :].sum())
        assert score == pytest.approx(expected, abs=1e-4)


def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_likeliest(
    scorer: Scorer, reference: ReferenceGPT
) -> None:
    text = [7, 9, 11]
    for _ in range(3):
        text.append(int(_next_losses(reference, text).argmin()))
    likely, other = text[3:], [*text[3:5], (text[5] + 1) % VOCABULARY]
    answers = scorer.loglikelihoods([Continuation(text[:3], x) for x in (likely, other)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_batches_change_no_score(scorer: Scorer) -> None:
    together = scorer.loglikelihoods(CONTINUATIONS)
    alone = [scorer.loglikelihoods([request])[0] for request in CONTINUATIONS]
    for (one, one_greedy), (other, other_greedy) in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5) and one_greedy == other_greedy


def test_ids_beyond_the_tokenizer_are_impossible(checkpoint: Path, reference: ReferenceGPT) -> None:
    narrow = open_scorer(checkpoint, build_tokenizer("NullTokenizer", None, 19))
    losses = _next_losses(reference, [7, 9])
    within = torch.log_softmax(-losses[:20], dim=0)
    scores = narrow.loglikelihoods([Continuation([7, 9], [token]) for token in range(20)])
    assert [score for score, _ in scores] == pytest.approx(within.tolist(), abs=1e-4)
    assert sum(greedy for _, greedy in scores) == 1


def test_generated_text_is_the_likeliest_and_ends_before_a_stop(
    scorer: Scorer, reference: ReferenceGPT
) -> None:
    for prompt, answer in zip(PROMPTS, scorer.generate(PROMPTS), strict=True):
        text = prompt.tokens[-(SEQUENCE - prompt.max_new_tokens) :]
        new: list[int] = []
        while len(new) < prompt.max_new_tokens:
            token = int(_next_losses(reference, text + new).argmin())
            if token == VOCABULARY - 1:  # end of document
                break
            new.append(token)
        assert [int(word) for word in answer.split()] == new
        if len(new) > 2:
            stop = f" {new[1]}"
            (cut,) = scorer.generate([Prompt(prompt.tokens, prompt.max_new_tokens, ("x", stop))])
            assert cut == answer[: answer.index(stop)]


@pytest.mark.parametrize("fused_norms", [False, True])
def test_the_format_torch_gives_the_same_scores(
    scorer: Scorer, checkpoint: Path, tmp_path: Path, fused_norms: bool
) -> None:
    from megatron_acodm.evaluation.checkpoint import open_checkpoint

    names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    weights = {}
    for name, value in scorer._module.state_dict().items():
        for separate, fused in names.items() if fused_norms else ():
            name = name.replace(separate, fused)
        weights[name] = value
    folder = tmp_path / "release" / "mp_rank_00"
    folder.mkdir(parents=True)
    state = {"model": weights, "args": open_checkpoint(checkpoint, None, 1).args}
    torch.save(state, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release", encoding="utf-8")
    tokenizer = build_tokenizer("NullTokenizer", None, VOCABULARY - 1)
    same = open_scorer(tmp_path, tokenizer).loglikelihoods(CONTINUATIONS)
    assert same == scorer.loglikelihoods(CONTINUATIONS)
    with pytest.raises(ValueError, match="its parts are mp_rank_00"):
        open_checkpoint(tmp_path, None, 2)


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_two_ranks_answer_as_one_does(
    scorer: Scorer, checkpoint: Path, tmp_path: Path, tensor_parallel_size: int
) -> None:
    worker = str(Path(__file__).parent / "scoring_worker.py")
    command = [*launcher(2), worker, str(checkpoint), str(tensor_parallel_size)]
    code, output = run(command, tmp_path)
    assert code == 0, output
    (line,) = re.findall(r"^answers (.*)$", output, re.MULTILINE)
    scores, texts = json.loads(line)
    expected = scorer.loglikelihoods(CONTINUATIONS)
    for (score, greedy), (alone, alone_greedy) in zip(scores, expected, strict=True):
        assert score == pytest.approx(alone, abs=1e-5) and greedy == alone_greedy
    assert texts == scorer.generate(PROMPTS)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Continuation([1], []), "0 tokens after 1"),
        (Continuation([1], [2] * (SEQUENCE + 1)), "17 tokens"),
        (Continuation([], [2]), "after 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    scorer: Scorer, request_: Continuation, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.loglikelihoods([request_])


def test_a_prompt_without_room_is_refused(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="max_gen_toks"):
        scorer.generate([Prompt([1], SEQUENCE, ())])


# Perplexity ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run that validates the averages of its weights at its end, and its checkpoints."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    run = train(
        *("--train-iters", "4", "--acodm-policy", "static", "--save", str(folder)),
        *("--eval-interval", "4", "--eval-iters", "100", "--save-interval", "2"),
        *("--tensor-model-parallel-size", "2", "--eval-ema-decay", "0.5"),
        processes=2,
    )
    assert run.code == 0, run.output
    return run, folder


@pytest.fixture(scope="module")
def measured(
    trained: tuple[Run, Path], corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> Evaluated:
    folder = tmp_path_factory.mktemp("measured")
    result = evaluate(folder, *_on(trained[1], corpus, folder))
    assert result.code == 0, result.output
    return result


def _on(checkpoints: Path, corpus: Corpus, folder: Path) -> list[str]:
    return [*("--load", str(checkpoints), "--data-path", str(corpus.manifest)),
            *("--data-cache-path", str(folder / "cache"))]  # fmt: skip


def test_perplexity_is_what_training_measures(
    trained: tuple[Run, Path], corpus: Corpus, tmp_path: Path
) -> None:
    result = evaluate(tmp_path, *_on(trained[1], corpus, tmp_path), "--averages")
    assert result.code == 0, result.output
    validation = trained[0].validations[-1]
    perplexity = result.results["perplexity"]
    losses = {name: entry["loss"] for name, entry in perplexity["domains"].items()}
    assert losses == pytest.approx(validation["validation"], rel=1e-5)
    assert perplexity["mean_perplexity"] == pytest.approx(validation["mean_perplexity"], rel=1e-5)
    assert result.results["iteration"] == 4
    for name in losses:
        assert name in result.output


@pytest.mark.parametrize("layout", [["--tensor-model-parallel-size", "2"], []])
def test_perplexity_does_not_depend_on_the_layout_nor_on_batches(
    trained: tuple[Run, Path],
    corpus: Corpus,
    measured: Evaluated,
    tmp_path: Path,
    layout: list[str],
) -> None:
    arguments = [*_on(trained[1], corpus, tmp_path), *layout, "--micro-batch-size", "3"]
    result = evaluate(tmp_path, *arguments, processes=2)
    assert result.code == 0, result.output
    for name, entry in measured.results["perplexity"]["domains"].items():
        other = result.results["perplexity"]["domains"][name]
        assert other["loss"] == pytest.approx(entry["loss"], rel=1e-5)
        assert other["tokens"] == entry["tokens"]


def test_a_limit_leaves_text_out(
    trained: tuple[Run, Path], corpus: Corpus, measured: Evaluated, tmp_path: Path
) -> None:
    result = evaluate(tmp_path, *_on(trained[1], corpus, tmp_path), "--max-sequences", "1")
    assert result.code == 0, result.output
    domains = result.results["perplexity"]["domains"]
    assert domains.keys() == measured.results["perplexity"]["domains"].keys()
    assert all(1 <= entry["tokens"] <= 64 for entry in domains.values())


def test_an_earlier_step_has_a_higher_perplexity(
    trained: tuple[Run, Path], corpus: Corpus, measured: Evaluated, tmp_path: Path
) -> None:
    result = evaluate(tmp_path, *_on(trained[1], corpus, tmp_path), "--ckpt-step", "2")
    assert result.code == 0, result.output
    assert result.results["iteration"] == 2
    for name, entry in measured.results["perplexity"]["domains"].items():
        assert result.results["perplexity"]["domains"][name]["loss"] > entry["loss"]


def test_validation_files_are_evaluated_as_a_whole(
    trained: tuple[Run, Path], corpus: Corpus, tmp_path: Path
) -> None:
    data = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"][0]
    prefix = str(corpus.manifest.parent / data["prefix"])
    arguments = ["--load", str(trained[1]), "--valid-data-path", prefix]
    arguments += ["--data-cache-path", str(tmp_path / "cache")]
    arguments += ["--tokenizer-type", "ByteLevelTokenizer"]
    result = evaluate(tmp_path, *arguments)
    assert result.code == 0, result.output
    (entry,) = result.results["perplexity"]["domains"].values()
    assert entry["tokens"] == data["tokens"] - 1 and entry["weight"] == 1.0


def test_a_checkpoint_without_arguments_takes_its_shape_from_flags(
    trained: tuple[Run, Path], corpus: Corpus, measured: Evaluated, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(trained[1], bare)
    common = bare / "iter_0000004" / "common.pt"
    state = torch.load(common, weights_only=False)
    del state["args"]
    torch.save(state, common)
    refused = evaluate(tmp_path, *_on(bare, corpus, tmp_path), "--num-layers", "4")
    assert refused.code != 0
    assert "give --hidden-size --num-attention-heads --seq-length" in refused.output
    arguments = ["--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4"]
    result = evaluate(tmp_path, *_on(bare, corpus, tmp_path), *arguments, "--seq-length", "64")
    assert result.code == 0, result.output
    assert result.results["perplexity"] == measured.results["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--data-path", "{data}", "--ckpt-step", "3"], "iter_0000003 does not exist"),
        (["--data-path", "{data}", "--num-layers", "5"], "was trained with 4"),
        (["--data-path", "{data}", "--seq-length", "65"], "the model has 64 positions"),
        (["--data-path", "{data}", "--split", "1"], "leaves no document"),
        (["--data-path", "{data}", "--tensor-model-parallel-size", "3"], "3"),
        (["--data-path", "{data}", "--max-sequences", "0"], "at least 1"),
    ],
)
def test_errors_are_one_message(
    trained: tuple[Run, Path],
    corpus: Corpus,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    words = [word.format(data=corpus.manifest) for word in arguments]
    words += ["--data-cache-path", str(tmp_path / "cache")]
    result = evaluate(tmp_path, "--load", str(trained[1]), *words)
    assert result.code != 0 and message in result.output
    assert "Traceback" not in result.output and result.output.count("error: ") == 1


def test_a_model_of_another_kind_is_refused(checkpoint: Path, reference: ReferenceGPT) -> None:
    from megatron_acodm.evaluation.arguments import build_parser
    from megatron_acodm.evaluation.checkpoint import open_checkpoint
    from megatron_acodm.evaluation.model import settle_shape

    found = open_checkpoint(checkpoint, None, 1)
    assert found.args is not None
    found.args.num_experts = 8
    with pytest.raises(ValueError, match="num_experts = 8"):
        settle_shape(build_parser().parse_args(["--load", "x"]), found)


def test_averages_that_were_not_saved_are_refused(scorer: Scorer, checkpoint: Path) -> None:
    from megatron_acodm.evaluation.checkpoint import open_checkpoint

    with pytest.raises(ValueError, match="--averages needs a run with --eval-ema-decay"):
        open_checkpoint(checkpoint, None, 1).load_into(scorer._module, averages=True)


def test_objects_that_are_not_known_to_be_safe_are_not_loaded(
    checkpoint: Path, reference: ReferenceGPT, tmp_path: Path
) -> None:
    from megatron_acodm.evaluation.checkpoint import open_checkpoint

    shutil.copytree(checkpoint, tmp_path / "strange")
    common = tmp_path / "strange" / "iter_0000003" / "common.pt"
    torch.save({"args": pytest.MonkeyPatch}, common)
    with pytest.raises(ValueError, match="cannot be read safely"):
        open_checkpoint(tmp_path / "strange", None, 1)


class _Touch:
    """Runs a command where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_a_list_of_tensors_that_runs_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from megatron_acodm.evaluation.checkpoint import open_checkpoint

    shutil.copytree(checkpoint, tmp_path / "strange")
    listed = tmp_path / "strange" / "iter_0000003" / ".metadata"
    listed.write_bytes(pickle.dumps(_Touch(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"cannot be read safely.*it names posix\.system"):
        open_checkpoint(tmp_path / "strange", None, 1)
    assert not (tmp_path / "ran").exists()


def test_tasks_without_the_harness_name_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megatron_acodm.evaluation.harness import TaskOptions, check_options

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-acodm\[evaluate\]'"):
        check_options(TaskOptions(["mmlu"]))
