"""An unedited Megatron-LM under the launcher: the checkout that MEGATRON_LM_PATH names.

Without one these tests are skipped; ``test_hosts.py`` covers the launcher with a stub host.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, REPOSITORY, Corpus
from running import Running, mount, remount

CHECKOUT = os.environ.get("MEGATRON_LM_PATH")
STEPS = 6
EOD = 256

MODEL = [
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--seq-length", "64", "--max-position-embeddings", "64"),
    *("--micro-batch-size", "2", "--global-batch-size", "16"),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine", "--seed", "7"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(EOD + 1)),
    *("--transformer-impl", "local", "--no-persist-layer-norm", "--no-masked-softmax-fusion"),
    *("--no-gradient-accumulation-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--no-rope-fusion"),
    *("--no-create-attention-mask-in-dataloader", "--distributed-backend", "gloo"),
    *("--split", "90,10,0", "--eval-interval", "1000", "--eval-iters", "1"),
    *("--log-interval", "1", "--num-workers", "1", "--save-interval", "1000"),
]


HOST_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTHONPATH": f"{REPOSITORY}:{CHECKOUT}",
}


def _why_not() -> str | None:
    """Why there is no host to test with, if so."""
    if CHECKOUT is None:
        return "MEGATRON_LM_PATH names no checkout of Megatron-LM"
    result = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "unmixed_pretrain.py", "-"],
        env={**ENVIRONMENT, **HOST_ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if result.returncode == 0:
        return None
    return f"megatron.training of {CHECKOUT}: {result.stderr.strip().splitlines()[-1]}"


@pytest.fixture(scope="module", autouse=True)
def _needs_a_checkout() -> None:
    if reason := _why_not():
        pytest.skip(reason)


@dataclass(frozen=True)
class Trained:
    """A finished run of the host."""

    code: int
    output: str
    run_dir: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What a step's line has that does not depend on time."""
        lines = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        timed = ("step_time_s", "mixing_time_s")
        return [
            {key: value for key, value in json.loads(line).items() if key not in timed}
            for line in lines
        ]

    @property
    def printed_losses(self) -> list[str]:
        """The host's own loss of each step but the second, which it averages with the first."""
        losses = re.findall(r"iteration +(\d+)/.*? lm loss: (\S+)", self.output)
        return [loss for iteration, loss in losses if iteration != "2"]


class Launcher:
    """Runs the launcher, or the host without it, on the corpus."""

    def __init__(self, corpus: Corpus, config: str, folder: Path) -> None:
        domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
        prefixes = [str(corpus.manifest.parent / domain["prefix"]) for domain in domains]
        self._config, self._folder = config, folder
        self._data = [
            "--data-path",
            *(x for pair in zip("532", prefixes, strict=True) for x in pair),
        ]
        self._data += ["--data-cache-path", str(folder / "cache")]
        self._count = 0

    def __call__(
        self,
        *arguments: str,
        processes: int = 1,
        policy: str | None = "acodm",
        length: tuple[str, ...] = ("--train-iters", str(STEPS)),
        environment: dict[str, str] | None = None,
        run_dir: Path | None = None,
        check: int | None = None,
    ) -> Trained:
        self._count += 1
        run_dir = run_dir or self._folder / f"run{self._count}"
        result = subprocess.run(
            [*self._command(processes, policy, run_dir, check), *length, *self._data, *arguments],
            env={**ENVIRONMENT, **HOST_ENVIRONMENT, **(environment or {})},
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )
        return Trained(result.returncode, result.stdout, run_dir)

    def start(self, folder: Path, *arguments: str) -> Running:
        """Begin a long run of two processes, and return while it goes on."""
        command = self._command(2, "acodm", folder / "metrics", None)
        command += ["--train-iters", "400", *self._data, *arguments]
        return Running(command, folder / "metrics", folder / "log.txt", HOST_ENVIRONMENT)

    def _command(
        self, processes: int, policy: str | None, run_dir: Path, check: int | None
    ) -> list[str]:
        command = [sys.executable]
        if check is None or processes > 1:
            command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        if policy is None:
            command += [str(REPOSITORY / "tests" / "unmixed_pretrain.py")]
            script = Path(str(CHECKOUT)) / "pretrain_gpt.py"
        else:
            command += ["-m", "megatron_acodm.launch", "--acodm-config", self._config]
            command += ["--acodm-policy", policy, "--acodm-run-dir", str(run_dir)]
            command += [] if check is None else ["--check", str(check)]
            script = REPOSITORY / "tests" / "recorded_pretrain.py"
        return [*command, str(script), *MODEL]


@pytest.fixture(scope="module")
def launch(corpus: Corpus, learning: str, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return Launcher(corpus, learning, tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the undisturbed run, after steps 4 and 6."""
    return tmp_path_factory.mktemp("undisturbed") / "checkpoints"


@pytest.fixture(scope="module")
def undisturbed(launch: Launcher, saved: Path) -> Trained:
    run = launch(
        *("--save", str(saved), "--save-interval", "4"),
        environment={"RECORD_TO": str(saved.parent / "tokens.jsonl")},
    )
    assert run.code == 0, run.output
    return run


def _domain_of(tokens: list[int], texts: dict[str, bytes]) -> str:
    """The only domain that has the longest stretch of one document in a sequence."""
    pieces: list[bytes] = [b""]
    for token in tokens:
        pieces = [*pieces, b""] if token == EOD else [*pieces[:-1], pieces[-1] + bytes([token])]
    longest = max(pieces, key=len)
    (domain,) = [name for name, text in texts.items() if longest in text]
    return domain


def test_what_is_trained_is_what_the_metrics_say(
    undisturbed: Trained, saved: Path, corpus: Corpus
) -> None:
    texts = {name: "\0".join(docs).encode() for name, docs in corpus.texts.items()}
    lines = (saved.parent / "tokens.jsonl").read_text(encoding="utf-8").splitlines()
    batches = [[_domain_of(row, texts) for row in json.loads(line)] for line in lines]
    assert len(batches) == STEPS * 8 and all(len(set(batch)) == 1 for batch in batches)
    for number, step in enumerate(undisturbed.steps):
        trained = Counter(name for batch in batches[8 * number :][:8] for name in batch)
        told = {name: entry["samples"] for name, entry in step["domains"].items()}
        assert {name: count for name, count in told.items() if count} == dict(trained)


def test_losses_of_domains_add_up_to_the_hosts(undisturbed: Trained) -> None:
    for step, printed in zip(
        [x for x in undisturbed.steps if x["iteration"] != 2],
        undisturbed.printed_losses,
        strict=True,
    ):
        drawn = [entry for entry in step["domains"].values() if entry["samples"]]
        mean = sum(entry["loss"] * entry["samples"] for entry in drawn) / 16
        assert mean == pytest.approx(float(printed), rel=1e-5)
        assert step["lm_loss"] == pytest.approx(float(printed), rel=1e-5)


def test_the_agent_moves_the_mixture_and_the_hosts_line_shows_it(undisturbed: Trained) -> None:
    weights = [
        [entry["weight"] for entry in step["domains"].values()] for step in undisturbed.steps
    ]
    assert weights[0] == pytest.approx([1 / 3] * 3) and weights[-1] != pytest.approx([1 / 3] * 3)
    columns = re.findall(r"iteration .* mixing \(ms\): [\d.]+ \| most: (.*) \|", undisturbed.output)
    assert len(columns) == STEPS
    heaviest = max(undisturbed.steps[-1]["domains"].items(), key=lambda item: item[1]["weight"])
    assert columns[-1].startswith(f"{heaviest[0]} {heaviest[1]['weight']:.3f}")


def test_a_crash_before_a_checkpoint_is_announced_resumes_from_the_last_one(
    launch: Launcher, undisturbed: Trained, tmp_path: Path
) -> None:
    save = ("--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2")
    run_dir = tmp_path / "metrics"
    crashed = launch(*save, environment={"CRASH_AT_SAVE": "4"}, run_dir=run_dir)
    assert crashed.code != 0
    assert (tmp_path / "iter_0000004" / "acodm").is_dir(), crashed.output
    resumed = launch(*save, run_dir=run_dir)
    assert resumed.code == 0, resumed.output
    assert "from step 3 on" in resumed.output
    assert resumed.steps == undisturbed.steps
    assert not list(tmp_path.glob(".acodm*"))


def test_an_asynchronous_save_has_the_policy_too(
    launch: Launcher, undisturbed: Trained, tmp_path: Path
) -> None:
    save = ("--save", str(tmp_path), "--load", str(tmp_path))
    run_dir = tmp_path / "metrics"
    first = launch(*save, "--async-save", "--exit-interval", "3", run_dir=run_dir)
    assert first.code == 0, first.output
    resumed = launch(*save, run_dir=run_dir)
    assert resumed.code == 0, resumed.output
    assert resumed.steps == undisturbed.steps


def test_checkpoints_of_the_older_format_resume_exactly(
    launch: Launcher, undisturbed: Trained, tmp_path: Path
) -> None:
    save = ("--save", str(tmp_path), "--load", str(tmp_path), "--ckpt-format", "torch")
    run_dir = tmp_path / "metrics"
    first = launch(*save, "--exit-interval", "3", run_dir=run_dir)
    assert first.code == 0, first.output
    assert (tmp_path / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt").is_file()
    resumed = launch(*save, run_dir=run_dir)
    assert resumed.code == 0, resumed.output
    assert resumed.steps == undisturbed.steps


def test_without_a_policy_losses_are_megatrons_and_it_loads_our_checkpoints(
    launch: Launcher, undisturbed: Trained, saved: Path, tmp_path: Path
) -> None:
    plain = launch("--save", str(tmp_path), "--exit-interval", "4", policy=None)
    none = launch(policy="none")
    assert plain.code == none.code == 0, none.output
    assert len(plain.printed_losses) == 3
    assert plain.printed_losses == none.printed_losses[:3] != undisturbed.printed_losses[:3]
    ours_in_plain = launch("--load", str(saved), "--ckpt-step", "4", policy=None)
    assert ours_in_plain.code == 0, ours_in_plain.output
    assert re.search(r"iteration +5/", ours_in_plain.output)
    plain_in_ours = launch("--load", str(tmp_path))
    assert plain_in_ours.code == 0, plain_in_ours.output
    assert "WARNING: megatron-acodm: " in plain_in_ours.output
    assert "the policy starts afresh" in plain_in_ours.output
    assert [step["iteration"] for step in plain_in_ours.steps] == [5, 6]


@pytest.mark.parametrize(
    "layout",
    [
        ("--tensor-model-parallel-size", "2"),
        ("--pipeline-model-parallel-size", "2"),
        ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
        ("--use-distributed-optimizer", "--overlap-grad-reduce"),
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ],
    ids=[
        "tensor",
        "pipeline",
        "virtual pipeline",
        "data, distributed optimizer",
        "data, gathered late",
    ],
)
def test_layouts_of_two_processes(
    launch: Launcher, undisturbed: Trained, layout: tuple[str, ...]
) -> None:
    run = launch(*layout, processes=2)
    assert run.code == 0, run.output
    for step, printed in zip(
        [x for x in run.steps if x["iteration"] != 2], run.printed_losses, strict=True
    ):
        assert step["lm_loss"] == pytest.approx(float(printed), rel=1e-5)
    first = [{n: e["samples"] for n, e in step["domains"].items()} for step in run.steps[:2]]
    assert first == [
        {n: e["samples"] for n, e in step["domains"].items()} for step in undisturbed.steps[:2]
    ]
    assert all(entry["reward"] is not None for entry in run.steps[-1]["domains"].values())


def test_a_ramp_up_of_the_batch_size_resumes_exactly(launch: Launcher, tmp_path: Path) -> None:
    ramp = ("--rampup-batch-size", "4", "4", "16")
    length = ("--train-samples", "64", "--lr-decay-samples", "64")
    run = functools.partial(launch, *ramp, length=length)
    save = ("--save", str(tmp_path), "--load", str(tmp_path))
    whole = run()
    assert run(*save, "--exit-interval", "2", run_dir=tmp_path / "metrics").code == 0
    resumed = run(*save, run_dir=tmp_path / "metrics")
    assert whole.code == resumed.code == 0, resumed.output
    sizes = [sum(e["samples"] for e in step["domains"].values()) for step in whole.steps]
    calculator = Path(str(CHECKOUT)) / "megatron" / "core" / "num_microbatches_calculator.py"
    is_ignored = "step_batch_size_schedule" in calculator.read_text(encoding="utf-8")
    assert sizes[0] == (16 if is_ignored else 4)
    assert sizes[-1] == 16
    assert resumed.steps == whole.steps


def test_what_does_not_work_ends_every_rank_with_one_message(launch: Launcher) -> None:
    run = launch("--dataloader-type", "cyclic", processes=2)
    assert run.code != 0
    assert run.output.count("error: rank") == 1
    assert "--dataloader-type is 'cyclic'" in run.output


def test_a_damaged_policy_is_named_and_the_checkpoint_before_loads(
    launch: Launcher, undisturbed: Trained, tmp_path: Path
) -> None:
    save = ("--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2")
    run_dir = tmp_path / "metrics"
    first = launch(*save, "--exit-interval", "4", run_dir=run_dir)
    assert first.code == 0, first.output
    (file,) = (tmp_path / "iter_0000004" / "acodm").glob("policy*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    refused = launch(*save, processes=2, run_dir=run_dir)
    assert refused.code != 0
    (message,) = re.findall(r"(?m)^error: rank \d: .*$", refused.output)
    assert re.search(r"iter_0000004/acodm/policy.*was altered", message)
    again = launch(*save, "--ckpt-step", "2", run_dir=run_dir)
    assert again.code == 0, again.output
    assert again.steps == undisturbed.steps


def test_a_save_that_fails_is_told_in_one_message(
    launch: Launcher, undisturbed: Trained, tmp_path: Path
) -> None:
    (tmp_path / "iter_0000004").write_text("in the way", encoding="utf-8")
    save = ("--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2")
    run = launch(*save, processes=2, run_dir=tmp_path / "metrics")
    assert run.code != 0
    assert run.output.count("error: rank") == 1, run.output
    assert f"checkpoint of step 4 could not be written to {tmp_path}" in run.output
    assert f"with --load {tmp_path}, goes on after step 2" in run.output
    (tmp_path / "iter_0000004").unlink()
    again = launch(*save, run_dir=tmp_path / "metrics")
    assert again.code == 0, again.output


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_dataset_that_has_vanished_is_named(
    launch: Launcher, corpus: Corpus, tmp_path: Path, ending: str
) -> None:
    shutil.copytree(corpus.manifest.parent, tmp_path / "data")
    (file, *_) = sorted((tmp_path / "data").glob(f"*{ending}"))
    file.unlink()
    run = launch("--data-path", str(tmp_path / "data" / "manifest.json"), processes=2)
    assert run.code != 0
    assert run.output.count("error: rank") == 1, run.output
    assert str(file) in run.output


@pytest.fixture
def start(launch: Launcher, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts a run that saves to ``tmp_path/c`` every 3 steps."""
    runs: list[Running] = []

    def run(*arguments: str) -> Running:
        save = ("--save", str(tmp_path / "c"), "--load", str(tmp_path / "c"))
        runs.append(launch.start(tmp_path, *save, "--save-interval", "3", *arguments))
        return runs[-1]

    yield run
    for running in runs:
        running.close()


def test_a_killed_rank_ends_the_others_with_one_message(
    start: Callable[..., Running], launch: Launcher, tmp_path: Path
) -> None:
    # Else torchrun's SIGTERM ends rank 0 before it can say anything.
    running = start("--exit-signal-handler")
    running.wait_for_step(5)
    running.trainer(1).kill()
    assert running.wait(90) != 0
    assert "rank      : 1 " in running.output and "SIGKILL" in running.output  # torchrun's
    (message,) = re.findall(r"(?m)^error: rank \d+: .*$", running.output)
    assert message.startswith("error: rank 0: another rank is gone, or did not answer"), message
    step = re.search(r"goes on after step (\d+)$", message)
    assert step is not None, message
    save = ("--save", str(tmp_path / "c"), "--load", str(tmp_path / "c"))
    again = launch(
        *save, processes=2, run_dir=tmp_path / "metrics",
        length=("--train-iters", "400", "--exit-interval", str(int(step[1]) + 2)),
    )  # fmt: skip
    assert again.code == 0, again.output
    steps = [line["iteration"] for line in again.steps]
    assert steps == list(range(1, int(step[1]) + 3))


@pytest.mark.parametrize("to", ["one rank", "every process"])
def test_sigterm_saves_and_ends_after_the_same_step_on_every_rank(
    start: Callable[..., Running], tmp_path: Path, to: str
) -> None:
    running = start("--exit-signal-handler")
    running.wait_for_step(5)  # so that the helpers of a save are there
    if to == "one rank":
        running.trainer(1).terminate()
        assert running.wait() == 0, running.output
    else:  # which ends torchrun with an error; it waits for the trainers
        running.tell_every_process()
        running.wait()
    tracker = tmp_path / "c" / "latest_checkpointed_iteration.txt"
    last = int(tracker.read_text(encoding="utf-8"))
    assert running.steps[-1]["iteration"] == last < 400
    assert (tmp_path / "c" / f"iter_{last:07d}" / "acodm").is_dir()
    assert "error: rank" not in running.output


def test_a_rank_that_hangs_is_given_up_after_the_time_out(start: Callable[..., Running]) -> None:
    running = start("--distributed-timeout-minutes", "1")
    running.wait_for_step(4)
    running.trainer(1).send_signal(signal.SIGSTOP)
    running.wait_for_output("another rank is gone, or did not answer within 1 minutes", 100)
    running.trainer(1).kill()  # torchrun would, 30 s later
    assert running.wait(60) != 0


def test_a_full_disk_in_a_save_leaves_the_last_checkpoint(launch: Launcher, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder))
    try:
        save = ("--save", str(folder / "c"), "--load", str(folder / "c"), "--save-interval", "2")
        run_dir = tmp_path / "metrics"
        first = launch(*save, "--exit-interval", "2", processes=2, run_dir=run_dir)
        assert first.code == 0, first.output
        used = shutil.disk_usage(folder).used  # by one checkpoint; half of another has room
        remount(folder, used * 3 // 2)
        run = launch(*save, processes=2, run_dir=run_dir)
        assert run.code != 0
        assert run.output.count("error: rank") == 1, run.output
        assert f"checkpoint of step 4 could not be written to {folder / 'c'}" in run.output
        assert f"with --load {folder / 'c'}, goes on after step 2" in run.output
        remount(folder, 100_000_000)
        last = launch(*save, processes=2, run_dir=run_dir)
        assert last.code == 0, last.output
        assert [line["iteration"] for line in last.steps] == [1, 2, 3, 4, 5, 6]
    finally:
        subprocess.run(["umount", folder], check=True)


# Without training -----------------------------------------------------------------------------


def test_a_check_tells_what_would_run_and_leaves_nothing(
    launch: Launcher, undisturbed: Trained, saved: Path, tmp_path: Path
) -> None:
    save, files = str(tmp_path / "new"), sorted(saved.rglob("*"))
    fresh = launch("--save", save, "--tensorboard-dir", save, check=8, run_dir=tmp_path / "run")
    assert fresh.code == 0, fresh.output
    assert "data 8" in fresh.output and "it starts from scratch" in fresh.output
    drawn = {name: entry["samples"] for name, entry in undisturbed.steps[0]["domains"].items()}
    for name, samples in drawn.items():
        assert re.search(rf"{re.escape(name)} .* 33.33% +{samples} ", fresh.output), fresh.output
    assert not list(tmp_path.iterdir())
    load = ("--load", str(saved), "--ckpt-step", "4")
    resumed = launch(*load, "--save", str(saved), processes=2, check=0)
    assert resumed.code == 0, resumed.output
    assert "after step 4 of" in resumed.output and "with its policy" in resumed.output
    assert "domain" in resumed.output and resumed.output.count("--check: all is well") == 1
    assert sorted(saved.rglob("*")) == files


def test_a_check_names_all_that_is_wrong(launch: Launcher, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = launch(
        *("--dataloader-type", "cyclic", "--save", str(tmp_path / "file" / "checkpoints")),
        *("--load", str(saved), "--ckpt-step", "4", "--seed", "8"),
        check=1,
    )
    assert run.code == 1
    assert "--check: 3 problem(s)" in run.output, run.output
    for named in ("--dataloader-type is 'cyclic'", "cannot be written: Not a directory",
                  "seed: saved 7, now 8"):  # fmt: skip
        assert named in run.output
    refused = launch(
        *("--num-attention-heads", "5", "--dataloader-type", "cyclic"),
        *("--data-path", str(tmp_path / "nothing")),
        check=1,
    )
    assert refused.code == 1
    assert "fails with AssertionError" in refused.output, refused.output
    assert "nothing.idx does not exist" in refused.output, refused.output
    assert "--dataloader-type is 'cyclic'" in refused.output
    unknown = launch("--no-such-flag", check=1)
    assert unknown.code == 1 and "unrecognized arguments: --no-such-flag" in unknown.output
