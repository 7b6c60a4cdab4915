"""The online dataset in real DataLoader workers: they see stages appended later, and never hang."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_acodm.blending import Ledger, LedgerReader, OnlineBlendedDataset
from megatron_acodm.blending.live import StageRing

SIZES = [7, 20, 3]
NAMES = ["web", "code", "law"]
MICRO_BATCH_SIZE = 2
GLOBAL_BATCH_SIZE = 8
STEPS = 12

# Scripts find the package also where it is not installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


class Domain(Dataset):
    """A domain whose sequences say which they are."""

    def __init__(self, domain: int, size: int) -> None:
        self.domain, self.size = domain, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < self.size
        return {"tokens": torch.tensor([self.domain, index])}


def weights_of(step: int) -> np.ndarray:
    """A mixture that moves, as a policy's would."""
    raw = np.array([1 + step % 3, 2, step % 5])
    return raw / raw.sum()


def ledger_of(stages: int) -> Ledger:
    ledger = Ledger(SIZES, MICRO_BATCH_SIZE, seed=5, names=NAMES)
    for step in range(stages):
        ledger.append(weights_of(step), GLOBAL_BATCH_SIZE)
    return ledger


def dataset_of(reader: LedgerReader, steps: int = STEPS) -> OnlineBlendedDataset:
    domains = [Domain(k, size) for k, size in enumerate(SIZES)]
    return OnlineBlendedDataset(domains, reader, size=steps * GLOBAL_BATCH_SIZE, names=NAMES)


def batches_of(data_rank: int, data_size: int, first: int = 0) -> Iterator[list[int]]:
    """What Megatron's sampler yields: a rank's micro-batches of consecutive samples."""
    stride = MICRO_BATCH_SIZE * data_size
    for start in range(first, STEPS * GLOBAL_BATCH_SIZE, stride):
        begin = start + data_rank * MICRO_BATCH_SIZE
        yield list(range(begin, begin + MICRO_BATCH_SIZE))


def train(
    num_workers: int, context: str | None, lag: int, prefetch_factor: int | None = None
) -> list[list[int]]:
    """Draw a run's samples as training does: the stage of step t + 1 + lag follows step t."""
    ledger = ledger_of(1 + lag)
    loader = DataLoader(
        dataset_of(ledger.reader(timeout_s=60)),
        batch_sampler=list(batches_of(0, 1)),
        num_workers=num_workers,
        multiprocessing_context=context,
        persistent_workers=num_workers > 0,
        prefetch_factor=prefetch_factor,
    )
    samples, iterator = [], iter(loader)
    for step in range(STEPS):
        for _ in range(GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE):
            batch = next(iterator)
            assert (batch["dataset_id"] == batch["tokens"][:, 0]).all()
            assert len(batch["dataset_id"].unique()) == 1
            samples += batch["tokens"].tolist()
        if step + 1 + lag < STEPS:
            ledger.append(weights_of(step + 1 + lag), GLOBAL_BATCH_SIZE)
    return samples


def expected_samples() -> list[list[int]]:
    ledger = ledger_of(STEPS)
    domains, positions = ledger.locate(np.arange(ledger.num_samples))
    _, sequences = ledger.epoch_and_index(domains, positions)
    return np.stack([domains, sequences], axis=1).tolist()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("num_workers", "context", "prefetch_factor"),
    [(0, None, None), (1, "fork", 1), (2, "fork", 2), (3, "fork", 9)],
)
def test_all_loaders_draw_the_ledgers_samples(num_workers, context, prefetch_factor, lag):
    assert train(num_workers, context, lag, prefetch_factor) == expected_samples()


def test_spawned_workers_draw_the_same_and_leave_nothing_behind():
    script = [sys.executable, __file__, "train", "spawn"]
    run = subprocess.run(script, capture_output=True, env=ENVIRONMENT, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == expected_samples()
    assert run.stderr == ""  # e.g. of a resource tracker about leaked shared memory


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_data_parallel_ranks_share_the_same_samples_wherever_they_resume(data_size):
    first = 3 * GLOBAL_BATCH_SIZE
    dataset = dataset_of(ledger_of(STEPS).reader())
    loaders = [
        DataLoader(dataset, batch_sampler=list(batches_of(rank, data_size, first)))
        for rank in range(data_size)
    ]
    samples = [
        sample
        for micro_batches in zip(*loaders, strict=True)
        for batch in micro_batches
        for sample in batch["tokens"].tolist()
    ]
    assert samples == expected_samples()[first:]


# Waiting --------------------------------------------------------------------------------------


def test_a_worker_gives_up_after_the_timeout_and_says_what_to_do():
    ledger = ledger_of(1)
    loader = DataLoader(
        dataset_of(ledger.reader(timeout_s=0.3)), batch_size=MICRO_BATCH_SIZE, num_workers=1
    )
    with pytest.raises(TimeoutError) as caught:
        list(loader)
    message = str(caught.value)
    assert "sample 8 is not decided after waiting 0.3" in message
    assert "holds 8 samples in 1 stages" in message
    assert "blending.stage_timeout_s, now 0.3" in message


def test_without_workers_an_undecided_sample_fails_at_once():
    dataset = dataset_of(ledger_of(1).reader(timeout_s=600))
    assert dataset[GLOBAL_BATCH_SIZE - 1]["dataset_id"] in range(3)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"decided 8 samples .*blending\.decision_lag"):
        dataset[GLOBAL_BATCH_SIZE]
    assert time.monotonic() - start < 60


def report_error(reader: LedgerReader, index: int, found: multiprocessing.Queue) -> None:
    found.put("waiting")
    try:
        reader.locate(index)
    except RuntimeError as error:
        found.put(str(error))


def test_closing_the_ledger_ends_the_wait():
    ledger = ledger_of(1)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    arguments = (ledger.reader(timeout_s=600), GLOBAL_BATCH_SIZE, found)
    process = context.Process(target=report_error, args=arguments)
    process.start()
    assert found.get(timeout=60) == "waiting"
    ledger.close()
    message = found.get(timeout=60)
    process.join()
    assert message == "sample 8 will not be decided: the ledger was closed at sample 8"


def test_workers_end_when_the_training_process_is_killed():
    script = [sys.executable, __file__, "wait"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, env=ENVIRONMENT) as trainer:
        assert trainer.stdout is not None
        workers = json.loads(trainer.stdout.readline())
        assert all(is_running(pid) for pid in workers)
        trainer.send_signal(signal.SIGKILL)  # a zombie until it is waited for, as under a launcher
        deadline = time.monotonic() + 30
        while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(is_running(pid) for pid in workers)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The window -----------------------------------------------------------------------------------


def test_a_sample_older_than_the_window_is_refused_and_the_rest_found():
    ledger = ledger_of(10)
    reader = ledger.reader(window=4)
    ledger.append(weights_of(10), GLOBAL_BATCH_SIZE)
    oldest = 7 * GLOBAL_BATCH_SIZE
    with pytest.raises(RuntimeError, match=f"sample {oldest - 1} is older than the 4 most recent"):
        reader.locate(oldest - 1)
    indices = range(oldest, ledger.num_samples)
    located = np.array([reader.locate(index) for index in reversed(indices)])[::-1]
    np.testing.assert_array_equal(located, np.stack(ledger.locate(indices), axis=1))


@pytest.mark.parametrize("seen_stages", range(7))
def test_a_sample_whose_stage_is_not_seen_yet_is_waited_for(seen_stages: int) -> None:
    ring = StageRing(1, window=4)
    for stage in range(7):
        ring.publish(stage, np.array([[8 * stage], [8 * stage + 8]]))
    assert ring.find(55) is not None
    ring.header[1] = seen_stages  # while the count of samples is the last one already
    assert ring.find(55) is None
    ring.header[1] = 7
    with pytest.raises(RuntimeError, match="sample 23 is older than the 4 most recent"):
        ring.find(23)


def test_dropping_stages_of_the_ledger_does_not_disturb_readers():
    ledger = ledger_of(6)
    ledger.drop_before(4 * GLOBAL_BATCH_SIZE)
    reader = ledger.reader()
    with pytest.raises(RuntimeError, match="older than"):
        reader.locate(0)
    ledger.drop_before(5 * GLOBAL_BATCH_SIZE)
    ledger.append(weights_of(6), GLOBAL_BATCH_SIZE)
    reference = ledger_of(7)
    for index in range(4 * GLOBAL_BATCH_SIZE, 7 * GLOBAL_BATCH_SIZE):
        assert reader.locate(index) == tuple(int(a[0]) for a in reference.locate([index]))


def test_readers_follow_a_restored_ledger():
    ledger, other = ledger_of(6), Ledger(SIZES, MICRO_BATCH_SIZE, seed=5, names=NAMES)
    for weights in ([1, 0, 0], [0, 1, 0]):
        other.append(weights, 3 * GLOBAL_BATCH_SIZE)
    reader = ledger.reader()
    last = 6 * GLOBAL_BATCH_SIZE - 1
    before = reader.locate(last)
    ledger.load_state_dict(other.state_dict())
    assert reader.locate(last) == tuple(int(a[0]) for a in other.locate([last])) != before
    assert reader.locate(0)[0] == 0
    with pytest.raises(RuntimeError, match="would wait for itself"):
        reader.locate(last + 1)
    ledger.append([0, 0, 1], GLOBAL_BATCH_SIZE)
    assert reader.locate(last + 1)[0] == 2


def watch(ring: StageRing, stages: int, found: multiprocessing.Queue) -> None:
    """Read the record that is being written, over and over."""
    found.put("ready")
    whole, torn = 0, 0
    while (stage := int(ring.header[1])) < stages:
        rows = ring.read(stage)
        if rows is not None:
            whole, torn = whole + 1, torn + bool((rows != stage).any())
    found.put((whole, torn))


def test_a_record_that_is_being_overwritten_is_never_taken_for_whole():
    stages, width = 20_000, 2000
    ring = StageRing(width, window=1)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    process = context.Process(target=watch, args=(ring, stages, found))
    process.start()
    assert found.get(timeout=60) == "ready"
    for stage in range(stages):
        ring.publish(stage, np.full((2, width), stage))
    whole, torn = found.get(timeout=60)
    process.join()
    assert whole > 0
    assert torn == 0


# Binding --------------------------------------------------------------------------------------


def test_the_dataset_looks_like_megatrons_blend():
    dataset = dataset_of(ledger_of(2).reader(), steps=2)
    assert len(dataset) == dataset.size == 2 * GLOBAL_BATCH_SIZE
    assert dataset.names == NAMES
    assert [len(domain) for domain in dataset.datasets] == SIZES
    assert dataset.split is None
    assert [sample["tokens"].tolist() for sample in dataset] == expected_samples()[: len(dataset)]
    with pytest.raises(IndexError, match="sample 16 is outside the run of 16 samples"):
        dataset[16]


def test_datasets_that_the_ledger_was_not_made_for_are_refused():
    reader = ledger_of(1).reader()
    domains = [Domain(k, size) for k, size in enumerate(SIZES)]
    with pytest.raises(ValueError, match="domain 'code' has 19 sequences, its ledger expects 20"):
        OnlineBlendedDataset([domains[0], Domain(1, 19), domains[2]], reader, 8, names=NAMES)
    with pytest.raises(ValueError, match=r"2 datasets .* 3 domains"):
        OnlineBlendedDataset(domains[:2], reader, 8)
    with pytest.raises(ValueError, match="size is 0"):
        OnlineBlendedDataset(domains, reader, 0)
    with pytest.raises(ValueError, match="stage_timeout_s is 0"):
        ledger_of(1).reader(timeout_s=0)


def wait_for_ever() -> None:
    """Let two workers draw all that is decided, so that both wait, and say who they are."""
    loader = DataLoader(
        dataset_of(ledger_of(2).reader()), batch_size=GLOBAL_BATCH_SIZE, num_workers=2
    )
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    print(json.dumps([worker.pid for worker in iterator._workers]), flush=True)
    next(iterator)


if __name__ == "__main__":
    if sys.argv[1] == "wait":
        wait_for_ever()
    else:
        print(json.dumps(train(2, sys.argv[2], lag=1)))
