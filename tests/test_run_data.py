"""The data of whole runs: granules, quotas, repetition, ramp-up, and other domains on a resume."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Corpus, Run, Train
from preprocessing import record, write
from preprocessing import run as preprocess

from megatron_acodm.config import BlendingConfig
from megatron_acodm.megatron.quota import minimum_quota
from megatron_acodm.megatron.run import RunShape
from megatron_acodm.mixing import load_state

QUIET = ("--eval-interval", "0")


def _columns(run: Run, key: str) -> np.ndarray:
    """[steps, domains] of a quantity in the metrics."""
    return np.array([[d[key] for d in step["domains"].values()] for step in run.steps], float)


def _ledger(checkpoints: Path) -> dict[str, Any]:
    """The ledger of the last checkpoint."""
    iteration = (checkpoints / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8")
    return load_state(checkpoints / f"iter_{int(iteration):07d}" / "acodm" / "ledger")


def _with_another_domain(corpus: Corpus, folder: Path) -> str:
    """A manifest of the corpus with a new domain in the place of Python Code."""
    text = "\n".join(corpus.texts["Python Code"])
    preprocess(write(folder / "new.jsonl", [record(text, "new one")]), folder / "new")
    data = Path(shutil.copytree(corpus.manifest.parent, folder / "data"))
    for file in (folder / "new").glob("new_one_*"):
        shutil.copy(file, data)
    manifest, other = (
        json.loads((path / "manifest.json").read_text("utf-8")) for path in (data, folder / "new")
    )
    manifest["domains"] = [d for d in manifest["domains"] if d["name"] != "Python Code"]
    manifest["domains"] += other["domains"]
    (data / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return str(data / "manifest.json")


def _static(path: Path, weights: dict[str, float]) -> tuple[str, str]:
    path.write_text(f"mixing: {{policy: static, weights: {json.dumps(weights)}}}\n", "utf-8")
    return "--acodm-config", str(path)


# Granules and quotas --------------------------------------------------------------------------


def test_mixing_by_sequence_follows_weights_within_one_and_tells_losses_apart(train: Train) -> None:
    common = (*QUIET, "--train-iters", "4", "--acodm-policy", "static")
    mixed = train(*common, "--acodm-granule", "sequence")
    alone = train(*common, "--micro-batch-size", "1")  # one sequence a granule either way
    assert mixed.code == 0 and alone.code == 0, mixed.output + alone.output
    wanted, drawn = _columns(mixed, "weight").cumsum(0) * 16, _columns(mixed, "samples").cumsum(0)
    assert np.abs(wanted - drawn).max() < 1
    assert (_columns(mixed, "samples") % 2 == 1).any()  # no whole micro-batches
    np.testing.assert_array_equal(_columns(mixed, "samples"), _columns(alone, "samples"))
    np.testing.assert_allclose(_columns(mixed, "loss"), _columns(alone, "loss"), rtol=1e-4)


def test_gradients_of_mixed_micro_batches_cannot_be_compared(train: Train) -> None:
    arguments = (*QUIET, "--train-iters", "2", "--acodm-granule", "sequence")
    refused = train(*arguments)
    assert refused.code != 0
    assert "use alignment.estimator 'captured', the granule 'micro-batch'" in refused.output
    assert "Traceback" not in refused.output
    assert train(*arguments, "--micro-batch-size", "1").code == 0


def test_a_minimum_quota_draws_every_domain_in_every_step(
    train: Train, corpus: Corpus, tmp_path: Path
) -> None:
    names = list(corpus.texts)
    weights = dict(zip(names, (0.98, 0.01, 0.01), strict=True))
    common = (*QUIET, "--train-iters", "5", *_static(tmp_path / "mix.yaml", weights))
    plain = train(*common)
    bounded = train(*common, "--acodm-minimum-quota", "1")
    assert plain.code == 0 and bounded.code == 0, plain.output + bounded.output
    assert (_columns(plain, "samples") == 0).any()
    assert (_columns(bounded, "samples") >= 2).all()
    rarer = [sorted(step["domains"][name]["weight"] for name in names) for step in bounded.steps]
    np.testing.assert_allclose(rarer, [[1 / 8, 1 / 8, 6 / 8]] * 5)
    refused = train(*common, "--acodm-minimum-quota", "3")
    assert "minimum_quota 3 for 3 domains needs 9 granules, a step has 8" in refused.output


def test_the_agent_sees_every_domain_in_every_step_where_that_takes_a_tenth_at_most() -> None:
    config = BlendingConfig()
    assert [minimum_quota(config, 3, granules, True) for granules in (29, 30)] == [0, 1]
    assert minimum_quota(config, 3, 30, False) == 0


# Repetition -----------------------------------------------------------------------------------


def test_a_run_whose_data_is_used_up_ends_cleanly_and_goes_on_when_allowed(
    train: Train, learning: str, tmp_path: Path
) -> None:
    common = ("--eval-interval", "5", "--eval-iters", "1", "--train-iters", "40")
    common += ("--acodm-config", learning, "--save", str(tmp_path), "--num-workers", "1")
    capped = train(*common, "--acodm-repetition", "cap 0.06")
    assert capped.code == 0, capped.output
    last = capped.steps[-1]["iteration"]
    assert 5 < last < 40
    assert re.search(rf"training ended after step {last}: .*0.06 times.*saved in", capped.output)
    assert _columns(capped, "epochs").max() <= 0.06
    assert (np.diff(_columns(capped, "epochs"), axis=0) >= 0).all()
    assert capped.validations[-1]["iteration"] == last
    # A domain that was used up is masked out of the agent's mixture (always so: test_mixer.py).
    weights, epochs = _columns(capped, "weight"), _columns(capped, "epochs")
    assert weights[0].all()
    used_up = weights[-1] == 0
    np.testing.assert_array_equal(epochs[-1][used_up], epochs[-2][used_up])
    saved = (tmp_path / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8")
    assert int(saved) == last

    again = train(
        *common, "--load", str(tmp_path), "--acodm-repetition", "cap 0.06",
        directory=capped.directory,
    )  # fmt: skip
    assert again.code == 0, again.output
    assert again.steps[-1]["iteration"] == last
    longer = train(
        *common, "--load", str(tmp_path), "--train-iters", str(last + 3), directory=capped.directory
    )
    assert longer.code == 0, longer.output
    assert [step["iteration"] for step in longer.steps] == list(range(1, last + 4))
    assert (_columns(longer, "weight")[-1] > 0).all()


def test_repetition_as_an_error_saves_names_the_domain_and_fails(
    train: Train, tmp_path: Path
) -> None:
    text = " ".join(f"word {i}" for i in range(300))
    documents = [record(text, "large")] * 30 + [record(text[:500], "small")] * 4
    data = tmp_path / "data"
    preprocess(write(tmp_path / "corpus.jsonl", documents), data)
    run = train(
        *(*QUIET, "--train-iters", "30", "--acodm-policy", "uniform", "--split", "100,0,0"),
        *("--acodm-repetition", "error", "--save", str(tmp_path / "saved")),
        data=(str(data / "manifest.json"),),
        processes=2,
    )
    assert run.code != 0
    assert run.output.count("error: training ended after step") == 1
    assert re.search(r"small .31 sequences. would be gone through more than 1 times", run.output)
    assert "DataExhausted" not in run.output  # no traceback of ours; torchrun prints its own
    last = run.steps[-1]["iteration"]
    assert _columns(run, "epochs").max() <= 1
    saved = (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8")
    assert int(saved) == last


def test_a_domain_of_one_sequence_and_weights_of_zero_train(train: Train, tmp_path: Path) -> None:
    text = "x" * 70  # one sequence of 64 tokens
    documents = [record(text, f"domain {k}") for k in range(40)]
    preprocess(write(tmp_path / "corpus.jsonl", documents), tmp_path / "data")
    weights = {f"domain {k}": 0.0 for k in range(40)}
    weights |= {"domain 7": 1.0, "domain 8": 1e-12}
    run = train(
        *(*QUIET, "--train-iters", "3", "--split", "100,0,0", "--num-workers", "1"),
        *_static(tmp_path / "mix.yaml", weights),
        data=(str(tmp_path / "data" / "manifest.json"),),
    )
    assert run.code == 0, run.output
    for step in run.steps:
        assert step["domains"]["domain 7"]["samples"] == 16
    assert run.steps[-1]["domains"]["domain 7"]["epochs"] == 48


# Ramp-up --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rampup", [(4, 4, 40), (8, 8, 100), (2, 14, 7), (4, 2, 1000)])
def test_batch_sizes_ramp_up_as_megatrons_do(rampup: tuple[int, int, int]) -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    calculator = RampupBatchsizeNumMicroBatchesCalculator(16, 2, 1, False, 1, *rampup)
    run = RunShape(200, 16, 2, rampup_batch_size=rampup)
    consumed = 0
    for iteration in range(200):
        assert run.samples_before(iteration) == consumed
        assert run.steps_within(consumed) == iteration
        assert run.steps_within(consumed + 1) == iteration
        calculator.update(consumed, consistency_check=True)
        assert run.batch_size(consumed) == calculator.get_current_global_batch_size()
        consumed += run.batch_size(consumed)
    assert run.train_samples == consumed


@pytest.mark.parametrize(
    ("rampup", "message"),
    [
        ((16, 4, 40), "first batch size below the global one .16."),
        ((4, 5, 40), "from 4 to 16 in steps of 5"),
        ((4, 0, 40), "an increment and a number of samples of at least 1"),
        ((3, 13, 40), "first batch size of the ramp-up 3 is not a multiple of the micro-batch"),
        ((4, 3, 40), "increment of the ramp-up 3 is not a multiple of the micro-batch"),
    ],
)
def test_an_impossible_ramp_up_is_refused(rampup: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunShape(200, 16, 2, rampup_batch_size=rampup)


def test_a_ramped_up_run_draws_the_same_samples_at_any_size_and_across_a_resume(
    train: Train, learning: str, tmp_path: Path
) -> None:
    common = (*QUIET, "--acodm-config", learning, "--rampup-batch-size", "4", "4", "40")
    common += ("--train-samples", "110")
    whole = train(*common)
    assert whole.code == 0, whole.output
    sizes = _columns(whole, "samples").sum(1)
    assert sizes.tolist() == [4, 4, 4, 4, 8, 8, 12, 16, 16, 16, 16]
    assert whole.steps[-1]["consumed_samples"] == 108
    first = train(*common, "--save", str(tmp_path), "--exit-interval", "5", "--num-workers", "2")
    assert first.code == 0, first.output
    rest = train(
        *common, "--load", str(tmp_path), "--num-workers", "2",
        directory=first.directory, processes=2,
    )  # fmt: skip
    assert rest.code == 0, rest.output
    np.testing.assert_array_equal(_columns(rest, "samples"), _columns(whole, "samples"))
    for ours, reference in zip(rest.steps, whole.steps, strict=True):
        assert ours["consumed_samples"] == reference["consumed_samples"]
        assert ours["learning_rate"] == pytest.approx(reference["learning_rate"])
        assert ours["lm_loss"] == pytest.approx(reference["lm_loss"], rel=1e-4)


def test_a_static_blend_ramps_up_too(train: Train) -> None:
    run = train(
        *(*QUIET, "--acodm-policy", "none", "--rampup-batch-size", "4", "4", "40"),
        *("--train-iters", "9"),
    )
    assert run.code == 0, run.output
    assert run.steps[-1]["consumed_samples"] == 4 * 4 + 8 * 2 + 12 + 16 * 2


# Other domains on a resume --------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(train: Train, learning: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of 4 of 8 steps on the three domains of the corpus."""
    folder = tmp_path_factory.mktemp("saved")
    run = train(
        *(*QUIET, "--acodm-config", learning, "--train-iters", "8"),
        *("--save", str(folder), "--exit-interval", "4"),
    )
    assert run.code == 0, run.output
    return folder


def _drawn(state: dict[str, Any], sample: int) -> dict[str, int]:
    rows, names = state["rows"].numpy(), state["fingerprint"]["names"]
    (row,) = rows[rows[:, 0] == sample]
    return dict(zip(names, row[1 + len(names) : -1].tolist(), strict=True))


def test_domains_that_came_or_went_are_refused_or_adopted(
    train: Train, corpus: Corpus, learning: str, saved: Path, tmp_path: Path
) -> None:
    data = (_with_another_domain(corpus, tmp_path),)
    common = (*QUIET, "--acodm-config", learning, "--train-iters", "8")
    refused = train(*common, "--load", str(saved), data=data)
    assert refused.code != 0
    assert "domain 'Python Code': saved, but missing now" in refused.output
    assert "domain 'new one': new, was not saved" in refused.output
    assert "--acodm-adopt" in refused.output

    kept_in = tmp_path / "adopted"
    common += ("--save", str(kept_in))
    adopted = train(
        *common, "--load", str(saved), "--acodm-adopt", data=data, processes=2
    )  # fmt: skip
    assert adopted.code == 0, adopted.output
    assert re.search("2 domains go on where they were.*the policy starts afresh", adopted.output)
    before, after = _drawn(_ledger(saved), 64), _drawn(_ledger(kept_in), 64)
    shared = before.keys() & after.keys()
    assert len(shared) == 2
    assert all(after[name] == before[name] > 0 for name in shared)
    assert after["new one"] == 0
    assert [step["iteration"] for step in adopted.steps] == [5, 6, 7, 8]
    # What was adopted is then a run like any other.
    again = train(
        *common, "--load", str(kept_in), "--train-iters", "9",
        data=data, directory=adopted.directory,
    )  # fmt: skip
    assert again.code == 0, again.output
    assert again.steps[-1]["iteration"] == 9


def test_other_text_of_the_same_length_is_noticed(
    train: Train, corpus: Corpus, learning: str, saved: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "data"
    shutil.copytree(corpus.manifest.parent, changed)
    binary = changed / "Python_Code_text_document.bin"
    tokens = np.fromfile(binary, dtype=np.uint16)
    tokens[tokens < 256] ^= 1
    tokens.tofile(binary)
    common = (*QUIET, "--acodm-config", learning, "--train-iters", "6", "--load", str(saved))
    data = (str(changed / "manifest.json"),)
    refused = train(*common, data=data)
    assert refused.code != 0
    assert "'Python Code': as many sequences as saved, but of other text" in refused.output
    assert refused.output.count("domain '") == 1
    adopted = train(*common, "--acodm-adopt", "--save", str(tmp_path / "saved"), data=data)
    assert adopted.code == 0, adopted.output
    assert "2 domains go on where they were" in adopted.output
    assert "the policy goes on" in adopted.output
    before, after = _drawn(_ledger(saved), 64), _drawn(_ledger(tmp_path / "saved"), 64)
    assert after == {**before, "Python Code": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--acodm-adopt",), "give --load as well"),
        (("--acodm-adopt", "--load", "x", "--acodm-policy", "none"), "needs a policy"),
        (("--acodm-repetition", "cap"), "'cap N' with a positive number N"),
        (("--acodm-repetition", "cap 0"), "'cap N' with a positive number N"),
        (("--acodm-repetition", "never"), "'cap N' with a positive number N"),
        (("--acodm-minimum-quota", "-1"), "minimum_quota is -1; it must be at least 0"),
        (("--acodm-repetition", "cap 0.0001"), "not enough data for the first step:"),
        (("--train-samples", "15"), "less than a first step needs"),
    ],
)
def test_bad_settings_are_one_clear_error(
    train: Train, arguments: tuple[str, ...], message: str
) -> None:
    length = () if "--train-samples" in arguments else ("--train-iters", "2")
    run = train(*QUIET, *length, *arguments)
    assert run.code != 0
    assert message in run.output
    assert run.output.count("error: ") == 1
    assert "Traceback" not in run.output
