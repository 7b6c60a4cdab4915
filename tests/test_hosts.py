"""Driving Megatron-LM: what is patched, when, and what is saved, against a stub of its loop.

The stub calls its parts by the names and in the order of the real one, over the installed
Megatron-Core; ``test_launch.py`` runs the real one.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Corpus
from host import start_megatron, tiny_model

from megatron_acodm import AcodmConfig, launch
from megatron_acodm.blending import DataExhausted
from megatron_acodm.config import AgentConfig, BlendingConfig, MixingConfig
from megatron_acodm.megatron import compat, patches
from megatron_acodm.megatron.hosts import cpu, megatron_lm
from megatron_acodm.megatron.hosts.megatron_lm import LaunchOptions, MegatronLM
from megatron_acodm.megatron.hosts.refusals import refuse_unshared_data, refuse_unsupported
from megatron_acodm.megatron.tokenizer import build_tokenizer
from megatron_acodm.metrics import read_metrics

UNIFORM = AcodmConfig(mixing=MixingConfig(policy="uniform"))
SEQUENCE = 16


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stub's module ``megatron.training.training``."""
    start_megatron()
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stub_megatron_lm"))
    import megatron.training.training as training

    yield training
    for name in [name for name in sys.modules if name.startswith("megatron.training")]:
        del sys.modules[name]
    del sys.modules["megatron"].training  # type: ignore[attr-defined]
    patches.unpatch()


def _forward_step(iterator: Iterator[Any], model: Any) -> Any:
    from megatron_acodm.megatron.losses import loss_func

    batch = next(iterator)
    positions = torch.arange(SEQUENCE).expand_as(batch["tokens"])
    output = model(batch["tokens"], positions, None, labels=batch["labels"])
    return output, functools.partial(loss_func, batch["loss_mask"])


class Script:
    """What a user's script does: arguments, a dataset provider, ``pretrain``."""

    def __init__(self, host: Any, corpus: Corpus, cache: Path) -> None:
        self.host, self.cache = host, cache
        domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
        self.prefixes = [str(corpus.manifest.parent / domain["prefix"]) for domain in domains]

    def provider(self, sizes: list[int]) -> list[Any]:
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=SEQUENCE,
            path_to_cache=str(self.cache),
            tokenizer=build_tokenizer("ByteLevelTokenizer"),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            blend=(self.prefixes, None),
            split="80,10,10",
        )
        return BlendedMegatronDatasetBuilder(
            GPTDataset, sizes, lambda: True, config
        ).build()  # fmt: skip

    def pretrain(self, **arguments: Any) -> None:
        """The body of the script."""
        args = {
            "train_iters": 4, "train_samples": None, "global_batch_size": 8,
            "micro_batch_size": 2, "seq_length": SEQUENCE, "seed": 1234,
            "rampup_batch_size": None, "tensor_model_parallel_size": 1, "iteration": 0,
            "consumed_train_samples": 0, "dataloader_type": "single", "save": None, "load": None,
            "save_interval": 2, "async_save": False, "exit_interval": None,
            "iterations_to_skip": [],
            "rejected_iteration": None, "distributed_timeout_minutes": 10,
            "tensorboard_dir": None, "tensorboard_writer": None,
            "overwrites": False, "num_layers": 4, "hidden_size": 16, "num_attention_heads": 2,
            "lr": 1e-2, "world_size": 1, "data_parallel_size": 1, **arguments,
        }  # fmt: skip
        self.host.pretrain(
            Namespace(**args), self.provider, tiny_model(vocabulary=257), _forward_step
        )

    def __call__(self, options: LaunchOptions, **arguments: Any) -> MegatronLM:
        """Run it under the launcher's patches; returns what drove it."""
        driver = MegatronLM(options)
        with driver.running():
            self.pretrain(**arguments)
        return driver


@pytest.fixture
def script(host: Any, corpus: Corpus, tmp_path: Path) -> Script:
    return Script(host, corpus, tmp_path / "cache")


def _steps(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir)[0]


def _drawn(run_dir: Path) -> list[list[int]]:
    return [[e["samples"] for e in step["domains"].values()] for step in _steps(run_dir)]


# Patches --------------------------------------------------------------------------------------


def test_every_step_is_mixed_recorded_and_shown(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    script(LaunchOptions(UNIFORM, run_dir))
    steps = _steps(run_dir)
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4]
    assert [step["consumed_samples"] for step in steps] == [8, 16, 24, 32]
    assert list(steps[0]["domains"]) == [
        "Documentation (topics)", "Package Metadata", "Python Code",
    ]  # fmt: skip
    assert all(sum(drawn) == 8 for drawn in _drawn(run_dir))
    lines = [line for line in capsys.readouterr().out.splitlines() if " iteration " in line]
    assert len(lines) == 4 and all("| mixing (ms): " in line for line in lines)


def test_the_hosts_tensorboard_has_each_domain(script: Script, tmp_path: Path) -> None:
    class Writer:
        scalars: list[tuple[str, float, int]] = []  # noqa: RUF012

        def add_scalar(self, *scalar: Any) -> None:
            self.scalars.append(scalar)

    script(LaunchOptions(UNIFORM), tensorboard_writer=Writer(), tensorboard_dir=str(tmp_path))
    weights = [(step, value) for tag, value, step in Writer.scalars
               if tag == "acodm/weight/Python Code"]  # fmt: skip
    assert weights == [(step, pytest.approx(1 / 3)) for step in (1, 2, 3, 4)]
    assert len(_steps(tmp_path / "acodm")) == 4


def test_patching_twice_patches_once_and_is_undone(host: Any) -> None:
    driver = MegatronLM(LaunchOptions(UNIFORM))
    paths = list(driver.replacements)
    before = [compat.host_symbol(path)[2] for path in paths]
    driver.install()
    patched = [compat.host_symbol(path)[2] for path in paths]
    driver.install()
    assert [compat.host_symbol(path)[2] for path in paths] == patched
    assert all(new is not old for new, old in zip(patched, before, strict=True))
    driver.uninstall()
    assert [compat.host_symbol(path)[2] for path in paths] == before


@pytest.mark.parametrize("path", list(MegatronLM(LaunchOptions(UNIFORM)).replacements))
def test_a_symbol_that_moved_is_named_and_nothing_is_patched(
    host: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    driver = MegatronLM(LaunchOptions(UNIFORM))
    others = [other for other in driver.replacements if other != path]
    before = [compat.host_symbol(other)[2] for other in others]
    owner, name, _ = compat.host_symbol(path)
    monkeypatch.delattr(owner, name)
    with pytest.raises(compat.UnsupportedHostError, match=path):
        driver.install()
    assert [compat.host_symbol(other)[2] for other in others] == before


def test_a_parameter_that_is_gone_is_named(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "train_step", lambda step: None)
    with pytest.raises(compat.UnsupportedHostError, match=r"train_step .*no parameter 'optimizer'"):
        MegatronLM(LaunchOptions(UNIFORM)).install()


def test_a_script_without_a_checkout_is_told_so() -> None:
    with pytest.raises(compat.UnsupportedHostError, match="put the checkout on PYTHONPATH"):
        MegatronLM(LaunchOptions(UNIFORM)).install()


def test_the_installed_megatron_core_has_what_the_launcher_uses() -> None:
    start_megatron()
    for path in patches._REPLACEMENTS:
        compat.host_symbol(path)
    forward_step = compat.host_symbol("megatron.core.pipeline_parallel.schedules.forward_step")[2]
    assert {"forward_data_store", "num_microbatches"} <= set(
        inspect.signature(forward_step).parameters
    )
    machine = compat.host_symbol("megatron.core.rerun_state_machine.RerunStateMachine")[2]
    assert hasattr(machine, "should_checkpoint_and_exit")


# Steps ----------------------------------------------------------------------------------------


def test_a_step_that_the_host_will_take_again_leaves_no_trace(
    script: Script, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script(LaunchOptions(UNIFORM, whole))
    save = {"save": str(tmp_path / "c"), "load": str(tmp_path / "c"), "overwrites": True}
    with pytest.raises(SystemExit, match="16"):
        script(LaunchOptions(UNIFORM, broken), rejected_iteration=2, **save)
    assert [step["iteration"] for step in _steps(broken)] == [1, 2]
    script(LaunchOptions(UNIFORM, broken), **save)
    assert _drawn(broken) == _drawn(whole)


def test_a_skipped_iteration_passes_over_its_samples(script: Script, tmp_path: Path) -> None:
    whole, skipping = tmp_path / "whole", tmp_path / "skipping"
    script(LaunchOptions(UNIFORM, whole))
    script(LaunchOptions(UNIFORM, skipping), iterations_to_skip=[1, 2])
    assert [step["iteration"] for step in _steps(skipping)] == [1, 4]
    assert _drawn(skipping) == [_drawn(whole)[0], _drawn(whole)[3]]


@pytest.mark.parametrize("repetition", ["cap 0.002", "error"])
def test_training_ends_with_a_checkpoint_when_the_data_does(
    script: Script, tmp_path: Path, repetition: str
) -> None:
    config = AcodmConfig(
        mixing=MixingConfig(policy="uniform"), blending=BlendingConfig(repetition=repetition)
    )
    iterations, save = 10_000 if repetition == "error" else 100, str(tmp_path / "c")
    arguments = {"train_iters": iterations, "save": save, "save_interval": 100_000}
    if repetition == "error":
        script.prefixes = script.prefixes[:2]
        script.provider = functools.partial(_few, script.provider)  # type: ignore[method-assign]
        with pytest.raises(DataExhausted, match=r"training ended after step \d+ of 10000"):
            script(LaunchOptions(config, tmp_path / "run"), **arguments)
    else:
        script(LaunchOptions(config, tmp_path / "run"), **arguments)
    last = _steps(tmp_path / "run")[-1]["iteration"]
    assert last < iterations
    assert (tmp_path / "c" / f"iter_{last:07d}" / "acodm").is_dir()


@pytest.mark.parametrize("skipped", [[], [7]], ids=["trained", "skipped"])
def test_only_data_that_is_used_up_is_an_error(
    script: Script, tmp_path: Path, skipped: list[int]
) -> None:
    config = AcodmConfig(
        mixing=MixingConfig(policy="uniform"), blending=BlendingConfig(repetition="error")
    )
    script.prefixes = script.prefixes[:2]  # 64 sequences: 8 steps
    script.provider = functools.partial(_few, script.provider)  # type: ignore[method-assign]
    arguments = {"train_iters": 20, "save": str(tmp_path / "c"), "save_interval": 100}
    arguments |= {"iterations_to_skip": skipped}
    # One step before the end the ledger knows already that no other stage fits; it is no fault.
    with pytest.raises(SystemExit) as ended:
        script(LaunchOptions(config, tmp_path / "early"), **arguments, exit_interval=7)
    assert ended.value.code == 0
    with pytest.raises(DataExhausted, match="training ended after step 8 of 20"):
        script(LaunchOptions(config, tmp_path / "run"), **arguments)
    assert (tmp_path / "c" / "iter_0000008" / "acodm").is_dir()


def _few(provider: Callable[[list[int]], list[Any]], sizes: list[int]) -> list[Any]:
    """The data, whose ledger then holds 32 sequences a domain alone."""
    from megatron_acodm.megatron import builder

    original = builder._build_one_epoch
    builder._build_one_epoch = lambda *args: [_Shortened(dataset) for dataset in original(*args)]  # type: ignore[assignment]
    try:
        return provider(sizes)
    finally:
        builder._build_one_epoch = original


class _Shortened:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.indices, self.dataset = dataset.indices, dataset.dataset

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


# Checkpoints ----------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_hosts_checkpoint(script: Script, tmp_path: Path) -> None:
    save = {"save": str(tmp_path / "c"), "load": str(tmp_path / "c")}
    script(LaunchOptions(UNIFORM, tmp_path / "whole"))
    with pytest.raises(SystemExit):
        script(LaunchOptions(UNIFORM, tmp_path / "run"), exit_interval=2, **save)
    script(LaunchOptions(UNIFORM, tmp_path / "run"), **save)
    assert _drawn(tmp_path / "run") == _drawn(tmp_path / "whole")
    assert [folder.name for folder in (tmp_path / "c").glob("iter_*")] == ["iter_0000004"]


def test_a_policy_caught_while_it_was_replaced_still_loads(script: Script, tmp_path: Path) -> None:
    save = {"save": str(tmp_path / "c"), "load": str(tmp_path / "c")}
    script(LaunchOptions(UNIFORM, tmp_path / "whole"))
    with pytest.raises(SystemExit):
        script(LaunchOptions(UNIFORM, tmp_path / "run"), exit_interval=2, **save)
    folder = tmp_path / "c" / "iter_0000002"
    (folder / "acodm").rename(folder / "acodm.old")
    script(LaunchOptions(UNIFORM, tmp_path / "run"), **save)
    assert _drawn(tmp_path / "run") == _drawn(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["before the policy", "before the announcement"])
def test_a_crash_in_a_save_leaves_the_last_checkpoint(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    checkpointing = sys.modules["megatron.training.checkpointing"]
    save = {"save": str(tmp_path / "c"), "load": str(tmp_path / "c"), "overwrites": True}
    name = "get_checkpoint_tracker_filename" if moment == "before the policy" else "announce"
    original = getattr(checkpointing, name)

    def crash(*args: Any) -> Any:
        if (tmp_path / "c" / "iter_0000004").exists():
            assert len(_steps(tmp_path / "run")) == 4  # all that the checkpoint comes after
            raise KeyboardInterrupt
        return original(*args)

    # The launcher wraps the first: the crash comes before it has put the policy in its place.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if name == "announce":
            patch.setattr(checkpointing, name, crash)
        else:
            from megatron_acodm.megatron.hosts.checkpoints import CheckpointLifeCycle

            put = CheckpointLifeCycle.put_in_place
            patch.setattr(CheckpointLifeCycle, "put_in_place", lambda self: (crash(""), put(self)))
        script(LaunchOptions(UNIFORM, tmp_path / "run"), **save)
    tracker = tmp_path / "c" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text(encoding="utf-8") == "2"
    has_policy = (tmp_path / "c" / "iter_0000004" / "acodm").is_dir()
    assert has_policy == (moment == "before the announcement")
    patches.unpatch()
    script(LaunchOptions(UNIFORM, tmp_path / "run"), **save)
    assert [step["iteration"] for step in _steps(tmp_path / "run")] == [1, 2, 3, 4]
    assert tracker.read_text(encoding="utf-8") == "4"
    assert not (tmp_path / "c" / ".acodm_being_saved").exists()


def test_a_plain_checkpoint_starts_the_policy_afresh_and_says_so(
    script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    save = {"save": str(tmp_path / "c"), "load": str(tmp_path / "c")}
    with pytest.raises(SystemExit):
        script(LaunchOptions(UNIFORM, tmp_path / "run"), exit_interval=2, **save)
    shutil.rmtree(tmp_path / "c" / "iter_0000002" / "acodm")
    script(LaunchOptions(UNIFORM, tmp_path / "run"), **save)
    assert "the policy starts afresh" in caplog.text
    assert [step["iteration"] for step in _steps(tmp_path / "run")] == [1, 2, 3, 4]


def test_other_batch_sizes_than_those_of_the_checkpoint_are_refused(
    script: Script, tmp_path: Path
) -> None:
    save = {"save": str(tmp_path / "c"), "load": str(tmp_path / "c")}
    with pytest.raises(SystemExit):
        script(LaunchOptions(UNIFORM, tmp_path / "run"), exit_interval=2, **save)
    with pytest.raises(ValueError, match=r"saved after 16 sequences, .* it would be 8"):
        script(LaunchOptions(UNIFORM, tmp_path / "run"), global_batch_size=4, **save)


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataloader_type": "cyclic"}, "--dataloader-type is 'cyclic'.*single"),
        ({"dataloader_type": "external"}, "--dataloader-type is 'external'"),
        ({"mock_data": True}, "--mock-data is True: mock data has no domains; give --data-path"),
        ({"fim_data": True}, "--fim-data"),
        ({"sft": True}, "--sft"),
        ({"expert_model_parallel_size": 8}, "--expert-model-parallel-size is 8"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        (
            {"overlap_param_gather": True, "fp8_param_gather": True},
            "--overlap-param-gather with --fp8-param-gather: .*remove one of them",
        ),
        ({"ckpt_format": "fsdp_dtensor"}, "--ckpt-format is 'fsdp_dtensor'"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl is 'local'"),
        ({"save": "msc://bucket/run"}, "--save must be a folder"),
    ],
)
def test_what_does_not_work_is_refused_with_a_remedy(
    arguments: dict[str, Any], message: str
) -> None:
    good = {"dataloader_type": "single", "cuda_graph_impl": "none", "ckpt_format": "torch_dist"}
    refuse_unsupported(Namespace(**good, overlap_param_gather=True), AcodmConfig())
    with pytest.raises(ValueError, match=message):
        refuse_unsupported(Namespace(**{**good, **arguments}), AcodmConfig())


def test_a_host_mixes_by_sequence_only_where_a_micro_batch_is_one() -> None:
    config = AcodmConfig(blending=BlendingConfig(granule="sequence"))
    refuse_unsupported(Namespace(micro_batch_size=1), config)
    with pytest.raises(ValueError, match="'sequence'.*'micro-batch', or --micro-batch-size 1"):
        refuse_unsupported(Namespace(micro_batch_size=2), config)


def test_graphs_are_fine_where_no_gradient_is_measured() -> None:
    args = Namespace(dataloader_type="single", cuda_graph_impl="local")
    refuse_unsupported(args, UNIFORM)
    by_losses = MixingConfig(agent=AgentConfig(reward="loss"))
    refuse_unsupported(args, AcodmConfig(mixing=by_losses))


def test_weights_may_be_gathered_in_eight_bits_where_no_norm_of_them_is_measured() -> None:
    args = Namespace(dataloader_type="single", overlap_param_gather=True, fp8_param_gather=True)
    refuse_unsupported(args, UNIFORM)


def test_all_that_does_not_work_is_named_at_once(script: Script) -> None:
    with pytest.raises(ValueError, match=r"--mock-data(.|\n)*--sft"):
        script(LaunchOptions(UNIFORM), mock_data=True, sft=True)


def test_data_that_one_tensor_parallel_rank_alone_builds_is_refused() -> None:
    def provider() -> None: ...

    refuse_unshared_data(provider, 1)
    with pytest.raises(ValueError, match="is_distributed = True"):
        refuse_unshared_data(provider, 2)
    provider.is_distributed = True  # type: ignore[attr-defined]
    refuse_unshared_data(provider, 2)


# The command line -----------------------------------------------------------------------------


def test_the_script_divides_our_flags_from_its_own() -> None:
    words = ["--acodm-depths", "0.5", "1", "a/pretrain_gpt.py", "--lr", "1", "other.py"]
    assert launch._split(words) == (words[:3], "a/pretrain_gpt.py", ["--lr", "1", "other.py"])


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ([], None),
        (["--acodm-policy", "none"], None),
        (["--acodm-policy", "none", "--acodm-run-dir", "r"], None),
        (["--acodm-policy", "odm"], "odm"),
    ],
)
def test_without_a_policy_there_is_no_config(words: list[str], policy: str | None) -> None:
    config = launch._config(launch.build_parser().parse_args(words))
    assert (config and config.mixing.policy) == policy


def test_flags_without_a_policy_are_refused() -> None:
    args = launch.build_parser().parse_args(["--acodm-run-dir", "r"])
    with pytest.raises(ValueError, match="--acodm-run-dir needs a policy"):
        launch._config(args)


@pytest.mark.parametrize(
    ("words", "is_for_cpu"),
    [
        (["--distributed-backend", "gloo"], True),
        (["--distributed-backend=gloo"], True),
        (["--distributed-backend", "nccl"], False),
        ([], False),
    ],
)
def test_the_cpu_is_used_only_when_gloo_is_asked_for(words: list[str], is_for_cpu: bool) -> None:
    assert cpu.runs_on_cpu(words) == is_for_cpu


def test_a_ramp_up_is_read_as_the_host_has_it() -> None:
    args = Namespace(train_iters=5, global_batch_size=16, micro_batch_size=2, seed=3,
                     rampup_batch_size=["4", "4", "16"])  # fmt: skip
    assert megatron_lm.run_shape(args).rampup_batch_size == (4, 4, 16)
