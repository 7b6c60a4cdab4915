"""Policies are compared by sound statistics, on runs that share what is random, and resumably."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ENVIRONMENT, REPOSITORY, Corpus, Train
from host import tiny_model

from megatron_acodm.config import AgentConfig
from megatron_acodm.metrics import MetricsWriter, RunInfo, domain_metrics, write_run_info
from megatron_acodm.mixing.transfer import load_policy
from megatron_acodm.reporting import comparison_plots
from megatron_acodm.reporting.comparison import (
    METRICS,
    Comparison,
    Estimate,
    steps_to,
    t_quantile,
    tables,
)
from megatron_acodm.reporting.comparison_plots import write_plots
from megatron_acodm.reporting.run import Run

TOOL = REPOSITORY / "tools" / "benchmark_policies.py"
CONFIGS = REPOSITORY / "examples" / "configs"
SEEDS = (1, 2)


@functools.cache
def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_policies", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


# --- Statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)]
)
def test_t_quantiles_are_those_of_published_tables(degrees: int, t: float) -> None:
    assert t_quantile(degrees) == pytest.approx(t, abs=5e-4)


def test_an_interval_is_the_textbooks() -> None:
    estimate = Estimate.of({1: 10.0, 2: 12.0, 3: 17.0})
    half = 4.3027 * math.sqrt(13) / math.sqrt(3)
    assert (estimate.mean, estimate.sd) == (13, pytest.approx(math.sqrt(13)))
    assert (estimate.low, estimate.high) == pytest.approx((13 - half, 13 + half), rel=1e-4)


def test_one_seed_has_no_interval() -> None:
    estimate = Estimate.of({7: 3.0})
    assert estimate.mean == 3 and math.isnan(estimate.low) and math.isnan(estimate.sd)
    assert estimate.to_dict()["low"] is None


def test_steps_to_a_perplexity_are_interpolated_in_its_logarithm() -> None:
    iteration, perplexity = np.array([0.0, 100, 200, 300]), np.array([1000.0, 100, 10, 20])
    assert steps_to(iteration, perplexity, math.sqrt(100 * 10)) == pytest.approx(150)
    assert steps_to(iteration, perplexity, 10) == 200  # the first time, though it rises again
    assert steps_to(iteration, perplexity, 2000) == 0
    assert steps_to(iteration, perplexity, 9.9) == math.inf


def test_a_perplexity_is_reached_at_the_validation_after_an_infinite_one(tmp_path: Path) -> None:
    run = record(tmp_path, [[7, 7], [700, 7], [3, 3]], [0.5, 0.5])
    assert steps_to(run.validation_iteration, run.mean_perplexity[:, 0], math.exp(4)) == 2
    assert steps_to(np.array([0.0, 5]), np.array([math.inf, 10]), 20) == 5


def record(folder: Path, losses: list[list[float]], weights: list[float]) -> Run:
    """A recorded run of one step, 10 s of it, between validations with these losses of a and b."""
    info = RunInfo(["a", "b"], 4, 8, len(losses) - 1, "made up")
    write_run_info(folder, info)
    natural = {"a": 0.25, "b": 0.75}
    with MetricsWriter(folder, tensorboard=False) as writer:
        for iteration, (a, b) in enumerate(losses):
            if iteration:
                writer.step(
                    iteration, consumed_samples=8 * iteration, lm_loss=(a + b) / 2, step_time_s=10,
                    mixing_time_s=1,
                    domains=domain_metrics(["a", "b"], weights, [round(8 * w) for w in weights],
                                           [a, b]),
                )  # fmt: skip
            writer.validation(iteration, {"a": a, "b": b}, natural)
    return Run.load(folder)


@pytest.fixture
def made_up(tmp_path: Path) -> Comparison:
    """Seed 2 is harder for both policies; `skewed` ends a little better with either seed."""
    log = math.log
    runs = {
        "uniform": {
            1: record(tmp_path / "u1", [[7, 7], [log(20), log(40)]], [0.5, 0.5]),
            2: record(tmp_path / "u2", [[6, 7], [log(40), log(60)]], [0.5, 0.5]),
        },
        "skewed": {
            1: record(tmp_path / "s1", [[7, 7], [log(16), log(42)]], [0.75, 0.25]),
            2: record(tmp_path / "s2", [[6, 7], [log(34), log(62)]], [0.75, 0.25]),
        },
    }
    return Comparison(runs, ["uniform"])


def test_final_values_are_means_over_domains_of_the_last_validation(made_up: Comparison) -> None:
    final = {metric: made_up.final("skewed", metric).by_seed[1] for metric in METRICS}
    assert final["mean perplexity"] == pytest.approx((16 + 42) / 2)
    assert final["mean loss"] == pytest.approx((math.log(16) + math.log(42)) / 2)
    assert final["natural perplexity"] == pytest.approx(0.25 * 16 + 0.75 * 42)
    assert final["worst perplexity"] == pytest.approx(42)


def test_differences_are_taken_within_a_seed(made_up: Comparison) -> None:
    difference = made_up.difference("skewed", "uniform", "mean perplexity")
    assert difference.by_seed == {1: pytest.approx(-1), 2: pytest.approx(-2)}
    # Between seeds the perplexity varies by 14; within pairs by less than 1.
    assert difference.sd == pytest.approx(math.sqrt(0.5))
    share = made_up.difference("skewed", "uniform", "mean perplexity", relative=True)
    assert share.by_seed == {1: pytest.approx(-1 / 30), 2: pytest.approx(-2 / 50)}


def test_steps_are_to_the_reference_with_the_same_seed(made_up: Comparison) -> None:
    assert all(
        0.9 < steps < 1 for steps in made_up.steps_to_reference("skewed", "uniform").values()
    )
    assert made_up.steps_to_reference("uniform", "uniform") == {1: 1, 2: 1}


def test_figures_are_plain_and_the_tables_show_them(made_up: Comparison, tmp_path: Path) -> None:
    figures = json.loads(json.dumps(made_up.to_dict(), allow_nan=False))
    skewed = figures["policies"]["skewed"]
    assert skewed["final"]["mean perplexity"]["by_seed"] == pytest.approx({"1": 29, "2": 48})
    assert skewed["domains"]["a"]["tokens"] == 6 * 4
    text = tables(made_up)
    assert "75.0%" in text and "-1.50 [" in text and "10.00%" in text
    for path in write_plots(made_up, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_seconds_are_those_of_all_steps_and_named_so(tmp_path: Path) -> None:
    run = record(tmp_path, [[7, 7], [5, 5], [3, 3]], [0.5, 0.5])
    comparison = Comparison({"a": {1: run}}, ["a"])
    figures = comparison.to_dict()["policies"]["a"]
    assert (figures["steps_s"], figures["mixing_s"]) == ({1: 20}, {1: 2})
    head, _, row = tables(comparison).splitlines()[4:7]
    cells = dict(zip(head.split("|"), row.split("|"), strict=True))
    assert {name.strip(): cell.strip() for name, cell in cells.items()}["steps took, s"] == "20"


def test_the_legend_of_a_single_policys_weights_lies_within_the_figure(tmp_path: Path) -> None:
    names = [f"a domain of name {k}" for k in range(11)]
    write_run_info(tmp_path, RunInfo(names, 4, 22, 1, "made up"))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.validation(0, dict.fromkeys(names, 7.0), dict.fromkeys(names, 1 / 11))
        writer.step(
            1, consumed_samples=22, lm_loss=3, step_time_s=10, mixing_time_s=1,
            domains=domain_metrics(names, [1 / 11] * 11, [2] * 11, [3.0] * 11),
        )  # fmt: skip
        writer.validation(1, dict.fromkeys(names, 3.0), dict.fromkeys(names, 1 / 11))
    figure = comparison_plots._weights(Comparison({"a": {1: Run.load(tmp_path)}}, ["a"]))
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= legend.y0 and legend.y1 <= figure.axes[0].bbox.y0


def test_runs_that_did_not_start_alike_are_not_compared(tmp_path: Path) -> None:
    runs = {
        "a": {1: record(tmp_path / "a", [[7, 7], [3, 3]], [0.5, 0.5])},
        "b": {1: record(tmp_path / "b", [[7, 7.1], [3, 3]], [0.5, 0.5])},
    }
    with pytest.raises(ValueError, match="seed 1, b did not start from the weights of a"):
        Comparison(runs, ["a"])


def test_a_run_that_ended_early_is_not_compared(tmp_path: Path) -> None:
    run = record(tmp_path, [[7, 7], [3, 3]], [0.5, 0.5])
    early = dataclasses.replace(run, info=dataclasses.replace(run.info, train_iters=3))
    with pytest.raises(ValueError, match="a with seed 1 ended after step 1 of 3; train it to its"):
        Comparison({"a": {1: early}}, ["a"])


# --- The config ---------------------------------------------------------------------------------


def write_config(path: Path, **changes: Any) -> Path:
    content = yaml.safe_load((CONFIGS / "policies_smoke.yaml").read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name",
    [
        "policies_smoke.yaml",
        "policies_minipile.yaml",
        "sensitivity_minipile.yaml",
        "transfer_minipile.yaml",
    ],
)
def test_shipped_configs_are_sound_and_validate_the_whole_split(corpus: Corpus, name: str) -> None:
    manifest = str(corpus.manifest)
    plan = load_tool().read_plan(CONFIGS / name, manifest, manifest)
    flags = dict(zip(plan.flags, plan.flags[1:], strict=False))
    batch = int(flags["--global-batch-size"]) * int(flags["--seq-length"])
    domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
    most = max(domain["tokens"] for domain in domains)
    batches = int(flags["--eval-iters"])
    assert (batches - 1) * batch < most <= batches * batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "unknown key seed"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
        ({"references": ["doremi"]}, "name some of uniform, natural, odm"),
        ({"policies": {"a": {"mixing": {"policy": "adm"}}}, "references": ["a"]},
         "policy a: mixing.policy is 'adm'"),
        ({"policies": {"a/b": {}}, "references": ["a/b"]}, "names a folder"),
        ({"trainer": {"seed": 3}}, "trainer.seed is set by the benchmark"),
        ({"policies": {"a": {"trainer": {"lr": 1.0}}}, "references": ["a"]},
         "policy a: .*unknown .*trainer"),
        ({"proxies": {"odm": {}}}, "two runs of the name odm"),
        ({"proxies": {"a": {"trainer": {"eval-interval": 0}}}}, "proxy a: these intervals"),
        ({"proxies": {"a": {"mixing": None}}}, "policy a: mixing is None; give it settings"),
        ({"proxies": {"small": {"trainer": {"hidden-size": 31}}}},
         "--hidden-size 31 is not a multiple"),
        ({"policies": {"a": {"mixing": {"policy": "frozen"}, "learned_from": "b"}},
          "references": ["a"]}, "learned_from names 'b', which is not in the file"),
        ({"policies": {"a": {"mixing": {"policy": "frozen"}, "learned_from": "b"},
                       "b": {"mixing": {"policy": "odm"}}}, "references": ["b"]},
         "learned_from names 'b', which is no policy acodm"),
        ({"policies": {"a": {"learned_from": "b"}, "b": {}}, "references": ["b"]},
         "learned_from is for policy 'frozen'"),
    ],
)  # fmt: skip
def test_a_bad_config_is_refused_before_anything_runs(
    tmp_path: Path, corpus: Corpus, changes: dict[str, Any], message: str
) -> None:
    config = write_config(tmp_path / "config.yaml", **changes)
    with pytest.raises(ValueError, match=message):
        load_tool().read_plan(config, str(corpus.manifest), str(corpus.manifest))


# --- The runs -----------------------------------------------------------------------------------

POLICIES = {
    "uniform": {"mixing": {"policy": "uniform"}},
    "skewed": {
        "mixing": {
            "policy": "static",
            "weights": {"Python Code": 2, "Documentation (topics)": 1, "Package Metadata": 1},
        }
    },
}


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    """The manifest of a little validation text of each domain."""
    folder = tmp_path_factory.mktemp("validation")
    lines = [
        json.dumps({"text": text[:1500], "meta": {"pile_set_name": name}})
        for name, texts in corpus.texts.items()
        for text in texts[:3]
    ]
    (folder / "valid.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_pile.py"), "--workers", "1"]
    command += ["--input", str(folder / "valid.jsonl"), "--output-dir", str(folder / "data")]
    command += ["--tokenizer-type", "ByteLevelTokenizer"]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True)
    return folder / "data" / "manifest.json"


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, corpus: Corpus, validation: Path
) -> tuple[list[str], Path]:
    """A finished comparison of two policies over two seeds: its command and its folder."""
    folder = tmp_path_factory.mktemp("comparison")
    config = write_config(
        folder / "config.yaml", seeds=list(SEEDS), policies=POLICIES, references=["uniform"]
    )
    command = [sys.executable, str(TOOL), str(config), "--output", str(folder), "--jobs", "2"]
    command += ["--data-path", str(corpus.manifest), "--valid-data-path", str(validation)]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, timeout=400)
    return command, folder


def test_a_comparison_leaves_figures_tables_and_plots(compared: tuple[list[str], Path]) -> None:
    _, folder = compared
    figures = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert set(figures["policies"]) == set(POLICIES)
    for name, policy in figures["policies"].items():
        assert set(policy["final"]["mean perplexity"]["by_seed"]) == {"1", "2"}
        assert all(list(steps) == ["0", "4", "8", "12"] for steps in policy["validations"].values())
        assert name in (folder / "table.md").read_text(encoding="utf-8")
    for plot in ("curves", "differences", "weights"):
        assert (folder / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_policies_share_initial_weights_and_seeds_do_not(compared: tuple[list[str], Path]) -> None:
    _, folder = compared
    first = {
        (policy, seed): Run.load(folder / "runs" / policy / f"seed_{seed}").validation_losses[0]
        for policy in POLICIES
        for seed in SEEDS
    }
    for seed in SEEDS:
        assert np.array_equal(first["uniform", seed], first["skewed", seed])
    assert not np.array_equal(first["uniform", 1], first["uniform", 2])


def test_a_finished_run_is_not_repeated_and_one_that_is_not_is(
    compared: tuple[list[str], Path],
) -> None:
    command, folder = compared
    kept, lost = (folder / "runs" / "uniform" / f"seed_{seed}" for seed in SEEDS)
    before = (kept / "metrics.jsonl").stat().st_mtime_ns
    figures = Run.load(lost).validation_losses
    (lost / "finished.json").unlink()  # as when the benchmark was killed in the middle of it
    result = subprocess.run(
        command, check=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert "3 of 4 runs are finished already" in result.stdout
    assert "[4/4] uniform, seed 2" in result.stdout
    assert (kept / "metrics.jsonl").stat().st_mtime_ns == before
    assert (lost / "metrics.jsonl.previous").exists()
    assert np.array_equal(Run.load(lost).validation_losses, figures)


def test_other_settings_do_not_mix_with_finished_runs(
    compared: tuple[list[str], Path], tmp_path: Path, corpus: Corpus, validation: Path
) -> None:
    _, folder = compared
    content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    content["trainer"]["lr"] = 0.001
    config = write_config(tmp_path / "config.yaml", **content)
    plan = load_tool().read_plan(config, str(corpus.manifest), str(validation))
    with pytest.raises(ValueError, match=r"other settings \(trainer.lr was 0.005, is 0.001\)"):
        load_tool().plan_runs(plan, folder)


def test_other_defaults_do_not_mix_with_finished_runs(
    tmp_path: Path, corpus: Corpus, validation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_tool()
    config = write_config(
        tmp_path / "config.yaml",
        policies={
            "learning": {"mixing": {"policy": "acodm"}},
            "driven": {"mixing": {"policy": "frozen"}, "learned_from": "learning"},
        },
        references=["driven"],
    )
    plan = tool.read_plan(config, str(corpus.manifest), str(validation))
    tool.plan_runs(plan, tmp_path)
    tool.plan_runs(plan, tmp_path)

    build_parser = tool.build_parser

    def with_other_defaults() -> Any:
        parser = build_parser()
        parser.set_defaults(adam_beta2=0.99, of_a_later_version=None)
        return parser

    with monkeypatch.context() as patched:
        patched.setattr(tool, "build_parser", with_other_defaults)
        with pytest.raises(ValueError, match=r"settings \(trainer.adam_beta2 was 0.95, is 0.99\)"):
            tool.plan_runs(plan, tmp_path)
    names = [field.name for field in dataclasses.fields(AgentConfig)]
    before = dict(zip(names, AgentConfig.__init__.__defaults__ or (), strict=True))
    after = (*{**before, "gamma": 0.95}.values(),)
    monkeypatch.setattr(AgentConfig.__init__, "__defaults__", after)
    with pytest.raises(
        ValueError, match=r"settings \(policy.mixing.agent.gamma was 0.5, is 0.95\)"
    ):
        tool.plan_runs(plan, tmp_path)
    shutil.rmtree(tmp_path / "runs" / "learning")
    with pytest.raises(
        ValueError, match="driven.*source.policy.mixing.agent.gamma was 0.5, is 0.95"
    ):
        tool.plan_runs(plan, tmp_path)


def test_a_policy_is_driven_by_what_a_proxy_of_its_seed_learned(
    tmp_path: Path, corpus: Corpus, validation: Path
) -> None:
    mixing = {"policy": "acodm", "agent": {"replay_batch_size": 4}}
    file = write_config(
        tmp_path / "config.yaml",
        seeds=[1, 2],
        proxies={"small": {"trainer": {"num-layers": 1}, "mixing": mixing}},
        # The driven run comes first in the file, and must wait for the proxy's.
        policies={
            "driven": {"mixing": {"policy": "frozen"}, "learned_from": "small"},
            "uniform": {"mixing": {"policy": "uniform"}},
        },
        references=["uniform"],
    )
    command = [sys.executable, str(TOOL), str(file), "--output", str(tmp_path), "--jobs", "2"]
    command += ["--data-path", str(corpus.manifest), "--valid-data-path", str(validation)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.index("small, seed 1") < result.stdout.index("driven, seed 1")
    figures = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(figures["policies"]) == {"driven", "uniform"}
    for seed in (1, 2):
        info = tmp_path / "runs" / "driven" / f"seed_{seed}" / "run.json"
        config = json.loads(info.read_text(encoding="utf-8"))["config"]["acodm"]
        source = tmp_path / "runs" / "small" / f"seed_{seed}" / "policy"
        assert config["mixing"]["policy_file"] == str(source)
        assert load_policy(source).provenance["num_layers"] == 1
    # A proxy that is to be repeated, or that has left nothing to learn from, holds others up.
    tool = load_tool()
    plan = tool.read_plan(file, str(corpus.manifest), str(validation))
    runs = {str(run): run for run in tool.plan_runs(plan, tmp_path)}
    assert all(run.finished and run.startable for run in runs.values())
    source.with_suffix(".safetensors").unlink()
    assert not runs["small, seed 2"].finished and not runs["driven, seed 2"].startable
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["proxies"]["small"]["trainer"]["num-layers"] = 2
    shutil.rmtree(tmp_path / "runs" / "small")
    plan = tool.read_plan(
        write_config(tmp_path / "other.yaml", **content), str(corpus.manifest), str(validation)
    )
    with pytest.raises(ValueError, match=r"source.trainer.num_layers was 1, is 2"):
        tool.plan_runs(plan, tmp_path)


TERMINATED = """
import os, signal
from megatron_acodm.megatron.trainer import Trainer
step = Trainer._step
def ask_to_end(self, *arguments):
    step(self, *arguments)
    if self.iteration == 5:
        os.kill(os.getpid(), signal.SIGTERM)
Trainer._step = ask_to_end
from megatron_acodm.train import main
main()
"""


def plan_one_run(folder: Path, corpus: Corpus, validation: Path, **blending: Any) -> Any:
    """The plan of one run that keeps checkpoints, and the run."""
    trainer = yaml.safe_load((CONFIGS / "policies_smoke.yaml").read_text(encoding="utf-8"))
    config = write_config(
        folder / "config.yaml",
        trainer={**trainer["trainer"], "save-interval": 100},
        seeds=[1],
        policies={"uniform": {"mixing": {"policy": "uniform"}, "blending": blending}},
        references=["uniform"],
    )
    plan = load_tool().read_plan(config, str(corpus.manifest), str(validation))
    (run,) = load_tool().plan_runs(plan, folder)
    return plan, run


def test_a_run_that_was_told_to_end_is_not_finished_and_goes_on(
    tmp_path: Path, corpus: Corpus, validation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_tool()
    plan, run = plan_one_run(tmp_path, corpus, validation)
    words = tool.command(plan, run)
    with monkeypatch.context() as patched:
        patched.setattr(tool, "command", lambda *_: [words[0], "-c", TERMINATED, *words[3:]])
        message = "uniform, seed 1 ended after step 6 of 12; the same command goes on from there"
        with pytest.raises(RuntimeError, match=message):
            tool.run_all(plan, [run], 1)
    assert not run.finished and any((run.folder / "checkpoints").iterdir())
    tool.run_all(plan, [run], 1)
    assert run.finished and not (run.folder / "checkpoints").exists()
    assert "resuming after step 6" in (run.folder / "output.txt").read_text(encoding="utf-8")
    assert Run.load(run.folder).validation_iteration.tolist() == [0, 4, 8, 12]


def test_a_run_whose_data_did_not_last_is_not_finished_and_says_so(
    tmp_path: Path, corpus: Corpus, validation: Path
) -> None:
    plan, run = plan_one_run(tmp_path, corpus, validation, repetition="cap 0.02")
    message = r"training ended after step \d+: .* 0.02 times, its cap.*; lower train-iters, or let"
    with pytest.raises(RuntimeError, match=message):
        load_tool().run_all(plan, [run], 1)
    assert not run.finished and any((run.folder / "checkpoints").iterdir())


RECORDING = """
import json, sys, zlib
from megatron_acodm.megatron import trainer
get_batch, file = trainer.get_batch, open(sys.argv.pop(1), "w")
def recording(iterator, micro_batch_size, seq_length, domains):
    batch = get_batch(iterator, micro_batch_size, seq_length, domains)
    for domain, tokens in zip(domains or [], batch["tokens"]):
        print(json.dumps([domain, zlib.crc32(tokens.numpy().tobytes())]), file=file, flush=True)
    return batch
trainer.get_batch = recording
from megatron_acodm.train import main
main()
"""


def drawn_by_step(record_file: Path) -> list[list[set[int]]]:
    """For each domain: which of its sequences were drawn by the end of each step."""
    lines = [json.loads(line) for line in record_file.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 12 * 16
    return [
        [{crc for d, crc in lines[:end] if d == domain} for end in range(16, 12 * 16 + 1, 16)]
        for domain in range(3)
    ]


def test_policies_draw_each_domains_sequences_in_the_same_order(
    compared: tuple[list[str], Path], tmp_path: Path, corpus: Corpus, validation: Path
) -> None:
    """Up to the order within a step, in which its gradients are summed."""
    _, folder = compared
    tool = load_tool()
    plan = tool.read_plan(folder / "config.yaml", str(corpus.manifest), str(validation))
    drawn = {}
    for run in tool.plan_runs(plan, tmp_path):
        if run.seed == SEEDS[0]:
            words = tool.command(plan, run)
            assert words[1:3] == ["-m", "megatron_acodm.train"]
            record_file = tmp_path / f"{run.policy}.jsonl"
            words[1:3] = ["-c", RECORDING, str(record_file)]
            subprocess.run(words, check=True, env=ENVIRONMENT, capture_output=True, timeout=200)
            drawn[run.policy] = drawn_by_step(record_file)
    for uniform, skewed in zip(drawn["uniform"], drawn["skewed"], strict=True):
        assert len(uniform[-1]) != len(skewed[-1])  # the policies do differ
        for one in uniform:
            for other in skewed:
                assert one <= other or other <= one


# --- Averaged weights ---------------------------------------------------------------------------


def test_the_average_weighs_step_s_by_decay_to_the_power_of_its_age() -> None:
    model = tiny_model("--eval-ema-decay", "0.5")
    assert model.averages is not None
    weight = model.averages.parameters[0]
    for iteration, value in enumerate((1.0, 2.0, 6.0), start=1):
        with torch.no_grad():
            weight.fill_(value)
        model.averages.update(iteration)
    expected = (0.25 * 1 + 0.5 * 2 + 1 * 6) / 1.75
    assert model.averages.averages[0].allclose(torch.tensor(expected))
    with model.averages.in_place():
        assert weight.allclose(torch.tensor(expected))
    assert torch.equal(weight, torch.full_like(weight, 6.0))


def test_evaluating_the_average_leaves_training_bit_for_bit_and_resumes(
    train: Train, learning: str, tmp_path: Path
) -> None:
    arguments = ("--train-iters", "6", "--eval-interval", "3", "--eval-iters", "1")
    arguments += ("--acodm-config", learning)
    plain = train(*arguments)
    averaged = train(*arguments, "--eval-ema-decay", "0.9")
    assert plain.code == 0 and averaged.code == 0, plain.output + averaged.output
    for one, other in zip(plain.steps, averaged.steps, strict=True):
        assert (one["lm_loss"], one["domains"]) == (other["lm_loss"], other["domains"])
    assert plain.validations[0] == averaged.validations[0]  # before the first step
    for one, other in zip(plain.validations[1:], averaged.validations[1:], strict=True):
        for domain, loss in one["validation"].items():
            assert other["validation"][domain] > loss  # early on, the average lags behind

    keep = ("--save", str(tmp_path / "checkpoints"), "--load", str(tmp_path / "checkpoints"))
    for further in (("--exit-interval", "4"), ()):
        resumed = train(*arguments, "--eval-ema-decay", "0.9", *keep, *further, directory=tmp_path)
        assert resumed.code == 0, resumed.output
    assert resumed.validations[-1] == averaged.validations[-1]


def test_a_decay_beyond_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--eval-ema-decay is 1.0; it must lie in \[0, 1\)"):
        tiny_model("--eval-ema-decay", "1")
