"""lm-evaluation-harness over a Megatron-Core checkpoint, offline: the package is optional."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import Train
from evaluation import evaluate, open_scorer

from megatron_acodm.evaluation.scoring import Continuation, Prompt, Scorer
from megatron_acodm.megatron.tokenizer import build_tokenizer

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed (pip install lm_eval)"
)

EOD = 256
QUESTIONS = [
    {"question": "import os, sy", "choices": ["s", "zebra", "Q"], "answer": 0},
    {"question": "def __init__(self", "choices": ["~~", "):", "{}"], "answer": 1},
    {"question": "return Fals", "choices": ["X", "1", "e"], "answer": 2},
    {"question": "for i in rang", "choices": ["e", "o"], "answer": 0},
    {"question": "a" * 200, "choices": ["a", " " * 30], "answer": 0},
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
HUMANEVAL = [
    {
        "task_id": f"Test/{number}",
        "prompt": "def f(x):\n    ",
        "canonical_solution": "return x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 2\n",
        "entry_point": "f",
    }
    for number in range(2)
]


@pytest.fixture(scope="module")
def checkpoint(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model that has seen a few batches."""
    folder = tmp_path_factory.mktemp("harness") / "checkpoints"
    run = train(
        *("--train-iters", "20", "--acodm-policy", "static", "--save", str(folder)),
        *("--eval-interval", "0", "--position-embedding-type", "rope"),
    )
    assert run.code == 0, run.output
    return folder


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> Scorer:
    from host import start_megatron

    start_megatron()
    return open_scorer(checkpoint, build_tokenizer("ByteLevelTokenizer"))


class _Request:
    """As much of the harness's ``Instance`` as a model sees."""

    def __init__(self, *args: object) -> None:
        self.args = args


@pytest.fixture(scope="module")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS), encoding="utf-8")
    (folder / "local_choice.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return folder


def _tokens(text: str) -> list[int]:
    return list(text.encode())


def _language_model(scorer: Scorer):
    from megatron_acodm.evaluation.language_model import MegatronLM

    return MegatronLM(scorer, build_tokenizer("ByteLevelTokenizer"))


def test_a_continuation_is_scored_after_its_context_or_the_end_of_a_document(
    scorer: Scorer,
) -> None:
    model = _language_model(scorer)
    answers = model.loglikelihood([_Request("import ", "os"), _Request("", "os")])
    # The space at the end of a context is part of what is scored, as the harness has it.
    expected = [Continuation(_tokens("import"), _tokens(" os")), Continuation([EOD], _tokens("os"))]
    assert answers == scorer.loglikelihoods(expected)


def test_a_text_beyond_the_context_is_scored_in_windows_each_token_once(scorer: Scorer) -> None:
    text = "def f(x):\n    return x + 1\n" * 6
    tokens = _tokens(text)
    assert 2 * 64 < len(tokens) < 3 * 64
    windows = [
        Continuation([EOD], tokens[:64]),
        Continuation(tokens[63:64], tokens[64:128]),
        Continuation(tokens[-65 : -(len(tokens) - 128)], tokens[128:]),
    ]
    expected = sum(score for score, _ in scorer.loglikelihoods(windows))
    (answer, empty) = _language_model(scorer).loglikelihood_rolling([_Request(text), _Request("")])
    assert answer == pytest.approx(expected, rel=1e-6) and empty == 0


def test_generation_is_greedy_and_ends_where_the_task_says(scorer: Scorer) -> None:
    prompts = [_tokens(text) for text in ("import ", "def f", "a", "zz", "e")]
    texts = scorer.generate([Prompt(prompt, 20, ()) for prompt in prompts])
    prompt, whole = max(zip(prompts, texts, strict=True), key=lambda pair: len(pair[1]))
    assert len(whole) > 5, "a prompt that the model has an answer to"
    context = bytes(prompt).decode()
    short = _Request(context, {"until": "\0", "max_gen_toks": 5})
    stopped = _Request(context, {"until": [whole[4]], "max_gen_toks": 20, "do_sample": False})
    answers = _language_model(scorer).generate_until([short, stopped])
    assert answers == [whole[:5], whole[: whole.index(whole[4])]]


def test_a_task_that_draws_samples_is_refused(scorer: Scorer) -> None:
    options = {"until": [], "do_sample": True, "temperature": 0.8}
    with pytest.raises(ValueError, match="evaluation is greedy"):
        _language_model(scorer).generate_until([_Request("x", options)])


def test_a_local_task_runs_through_the_harness_as_its_scores_say(
    scorer: Scorer, task_files: Path
) -> None:
    from megatron_acodm.evaluation.harness import TaskOptions, run_tasks

    hits = []
    for question in QUESTIONS:
        scores = scorer.loglikelihoods(
            [Continuation(_tokens(question["question"]), _tokens(c)) for c in question["choices"]]
        )
        best = max(range(len(scores)), key=lambda i: scores[i][0])
        hits.append(best == question["answer"])
    assert 0 < sum(hits) < len(hits), "questions that tell models apart"
    options = TaskOptions(["local_choice"], include_path=task_files)
    results = run_tasks(scorer, build_tokenizer("ByteLevelTokenizer"), options)
    assert results["results"]["local_choice"]["acc,none"] == pytest.approx(sum(hits) / len(hits))
    assert results["n-samples"]["local_choice"]["effective"] == len(QUESTIONS)


def test_the_tool_runs_a_task_file_over_two_ranks_as_over_one(
    checkpoint: Path, scorer: Scorer, task_files: Path, tmp_path: Path
) -> None:
    from megatron_acodm.evaluation.harness import TaskOptions, run_tasks

    file = str(task_files / "local_choice.yaml")
    alone = run_tasks(scorer, build_tokenizer("ByteLevelTokenizer"), TaskOptions([file]))
    arguments = ["--load", str(checkpoint), "--tasks", file, "--micro-batch-size", "2"]
    arguments += ["--tokenizer-type", "ByteLevelTokenizer", "--tensor-model-parallel-size", "2"]
    split = evaluate(tmp_path, *arguments, processes=2)
    assert split.code == 0, split.output
    assert split.results["tasks"] == alone
    assert "local_choice" in split.output


def test_mmlu_is_read_from_the_folder_of_datasets(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "cais" / "mmlu"
    folder.mkdir(parents=True)
    for split, count in (("dev", 2), ("test", 4)):
        lines = [
            {"question": f"What is {i} + 1?", "choices": list("0123"), "answer": (i + 1) % 4}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: abstract_algebra\n  data_files:\n"
        "  - {split: test, path: test.jsonl}\n  - {split: dev, path: dev.jsonl}\n---\n"
    )
    arguments = ["--load", str(checkpoint), "--tokenizer-type", "ByteLevelTokenizer"]
    arguments += ["--tasks", "mmlu_abstract_algebra", "--num-fewshot", "1"]
    absent = evaluate(tmp_path, *arguments)
    assert absent.code != 0 and "--datasets" in absent.output
    assert "Traceback" not in absent.output
    result = evaluate(tmp_path, *arguments, "--datasets", str(tmp_path / "datasets"))
    assert result.code == 0, result.output
    accuracy = result.results["tasks"]["results"]["mmlu_abstract_algebra"]["acc,none"]
    assert math.isfinite(accuracy)
    assert result.results["tasks"]["n-samples"]["mmlu_abstract_algebra"]["effective"] == 4


def test_an_unknown_task_is_named(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--load", str(checkpoint), "--tokenizer-type", "ByteLevelTokenizer"]
    result = evaluate(tmp_path, *arguments, "--tasks", "no_such_task")
    assert result.code != 0 and "no_such_task is no task" in result.output


def test_humaneval_needs_leave_to_run_code(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--load", str(checkpoint), "--tokenizer-type", "ByteLevelTokenizer"]
    result = evaluate(tmp_path, *arguments, "--tasks", "humaneval")
    assert result.code != 0 and "--allow-code-execution" in result.output


def test_humaneval_runs_what_the_model_writes(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_acodm.evaluation.harness import TaskOptions, run_tasks

    folder = tmp_path / "openai" / "openai_humaneval"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in HUMANEVAL))
    written = iter(["return x\n", "return x + 1\n"])
    monkeypatch.setattr(Scorer, "generate", lambda self, prompts: [next(written) for _ in prompts])
    options = TaskOptions(["humaneval"], datasets=tmp_path, run_code=True)
    results = run_tasks(scorer, build_tokenizer("ByteLevelTokenizer"), options)
    assert results["results"]["humaneval"]["pass@1,none"] == 0.5


def test_other_tasks_that_run_code_are_refused(scorer: Scorer, task_files: Path) -> None:
    from megatron_acodm.evaluation.harness import TaskOptions, run_tasks

    text = (task_files / "local_choice.yaml").read_text(encoding="utf-8")
    file = task_files / "local_code.yaml"
    file.write_text(text.replace("local_choice", "local_code") + "unsafe_code: true\n")
    with pytest.raises(ValueError, match="local_code would run code"):
        run_tasks(scorer, build_tokenizer("ByteLevelTokenizer"), TaskOptions([str(file)]))
