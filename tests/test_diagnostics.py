"""What a run says of its policy: figures of every decision, collapses, and how they are shown."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import PageReader, ids, record, svgs
from toy import ToyEnvironment, block_gram, play

from megatron_acodm.config import POLICIES, AgentConfig, MixingConfig
from megatron_acodm.metrics import MetricsWriter, read_metrics
from megatron_acodm.mixing import MixingController, build_policy
from megatron_acodm.mixing.acodm import _clipped_share
from megatron_acodm.mixing.simplex import Bounds
from megatron_acodm.report import closing_table, write_report
from megatron_acodm.reporting.plots import gram_figure

DOMAINS = ["web", "code", "law"]
SIZES = np.array([60, 30, 10])
COMMON = {
    "policy_entropy", "distance_from_natural", "distance_from_uniform", "floor_share",
    "dropped_steps", "policy_failures", "collapsed_steps",
}  # fmt: skip


def _controller(name: str = "acodm", sizes: Any = SIZES, **settings: Any) -> MixingController:
    settings.setdefault("agent", AgentConfig(replay_batch_size=4))
    config = MixingConfig(policy=name, **settings)
    policy = build_policy(config, DOMAINS, np.array(sizes), 4, 100, seed=5)
    return MixingController(policy, config)


def _environment(steps: int = 20) -> ToyEnvironment:
    return ToyEnvironment(block_gram(3, helpful=2), seed=1, steps=steps)


def _decide(controller: MixingController, monkeypatch: Any, weights: Any, steps: int) -> None:
    """Let the policy decide the same weights for some steps."""
    environment = _environment()
    first = controller._iteration + 1
    with monkeypatch.context() as patch:
        patch.setattr(controller.policy, "decide", lambda observation: np.array(weights))
        for iteration in range(first, first + steps):
            controller.decide(environment.step(iteration, controller.weights))


# Figures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"frozen"}))
def test_every_policy_has_the_common_figures(name: str) -> None:
    controller = _controller(name)
    play(controller, _environment())
    figures = controller.diagnostics()
    assert figures.keys() >= COMMON
    assert all(math.isfinite(value) for value in figures.values())


def test_the_agent_has_figures_of_its_own() -> None:
    controller = _controller()
    assert not {"critic_loss", "value"} & controller.diagnostics().keys()  # nothing learned yet
    play(controller, _environment())
    own = controller.diagnostics().keys() - COMMON
    assert own == {"reward", "replay_size", "critic_loss", "value", "clipped_share"}


def test_distances_are_total_variation_and_entropy_is_in_nats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = _controller("ado")
    _decide(controller, monkeypatch, [0.5, 0.4, 0.1], steps=1)
    figures = controller.diagnostics()
    assert figures["distance_from_natural"] == pytest.approx(0.1)
    assert figures["distance_from_uniform"] == pytest.approx(7 / 30)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.4, 0.1))
    assert figures["policy_entropy"] == pytest.approx(entropy)


def test_an_empty_domain_is_in_neither_mixture_nor_at_its_floor() -> None:
    figures = _controller("uniform", sizes=[60, 0, 40]).diagnostics()
    assert figures["distance_from_uniform"] == pytest.approx(0.0)
    assert figures["distance_from_natural"] == pytest.approx(0.1)
    assert figures["floor_share"] == 0.0


def test_weights_within_a_percent_of_their_floor_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = _controller(min_weight=0.1)
    _decide(controller, monkeypatch, [0.7995, 0.1005, 0.1], steps=1)
    assert controller.diagnostics()["floor_share"] == pytest.approx(2 / 3)
    _decide(controller, monkeypatch, [0.78, 0.12, 0.1], steps=1)
    assert controller.diagnostics()["floor_share"] == pytest.approx(1 / 3)


def test_figures_survive_a_resume_even_where_the_next_step_is_dropped() -> None:
    whole, environment = _controller(), _environment()
    play(whole, environment)
    restored = _controller()
    restored.load_state_dict(whole.state_dict())
    assert restored.diagnostics() == whole.diagnostics()


# Clipped weights ----------------------------------------------------------------------------------


@given(st.lists(st.floats(-0.3, 0.3), min_size=5, max_size=5))
def test_only_weights_that_a_bound_cut_count_as_clipped(noise: list[float]) -> None:
    bounds = Bounds.build(np.ones(5, bool), 0.05, 0.6)
    point = np.full(5, 0.2) + noise
    projected = bounds.project(point)
    shift = np.linspace(-2, 2, 400_001)  # the projection by brute force
    sums = np.array([np.clip(point - s, 0.05, 0.6).sum() for s in shift[::4000]])
    low = shift[::4000][np.nonzero(sums >= 1)[0][-1]]
    fine = np.linspace(low, low + 0.04, 20_001)
    sums = np.clip(point[:, None] - fine, 0.05, 0.6).sum(axis=0)
    shifted = point - fine[np.abs(sums - 1).argmin()]
    margin = np.minimum(np.abs(shifted - 0.05), np.abs(shifted - 0.6))
    if (margin > 1e-4).all():
        cut = (shifted < 0.05) | (shifted > 0.6)
        assert _clipped_share(bounds, point, projected) == pytest.approx(cut.mean())


def test_a_masked_domain_is_never_clipped() -> None:
    bounds = Bounds.build(np.array([True, True, True, False]), 0.1, 1.0)
    point = np.array([0.5, 0.45, 0.05, 0.0])
    assert _clipped_share(bounds, point, bounds.project(point)) == pytest.approx(1 / 3)


def test_noise_at_the_floor_is_clipped_and_no_noise_clips_nothing() -> None:
    loud = AgentConfig(replay_batch_size=4, exploration_fraction=1.0, exploration_std=0.5)
    controller = _controller(agent=loud)
    play(controller, _environment())
    assert controller.diagnostics()["clipped_share"] > 0
    calm = _controller(agent=AgentConfig(replay_batch_size=4, exploration_fraction=0.0))
    play(calm, _environment())
    assert calm.diagnostics()["clipped_share"] == 0


# Collapse -----------------------------------------------------------------------------------------


def test_a_collapse_is_said_counted_and_its_end_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = _controller(collapse_steps=5)
    collapsed, healthy = [0.05, 0.9, 0.05], [0.4, 0.4, 0.2]
    with caplog.at_level(logging.WARNING):
        _decide(controller, monkeypatch, collapsed, steps=4)
        assert controller.diagnostics()["collapsed_steps"] == 0 and not caplog.records
        _decide(controller, monkeypatch, collapsed, steps=1)
        assert controller.diagnostics()["collapsed_steps"] == 5
        assert "POLICY acodm HAS COLLAPSED at step 5: code has had more than" in caplog.text
        assert "for 5 steps, now 0.9. The floor keeps each other domain at 0.0333" in caplog.text
        _decide(controller, monkeypatch, collapsed, steps=19)  # said again after 10 and 20
        assert len(caplog.records) == 3
        _decide(controller, monkeypatch, healthy, steps=1)
    assert "step 25: the policy's collapse onto code is over after 24 steps" in caplog.text
    assert controller.diagnostics()["collapsed_steps"] == 0


def test_another_dominant_domain_starts_another_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = _controller(collapse_steps=5)
    _decide(controller, monkeypatch, [0.05, 0.9, 0.05], steps=4)
    _decide(controller, monkeypatch, [0.05, 0.05, 0.9], steps=4)
    assert controller.diagnostics()["collapsed_steps"] == 0


def test_the_threshold_is_the_configured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = _controller(collapse_steps=2, collapse_weight=0.5)
    _decide(controller, monkeypatch, [0.25, 0.5, 0.25], steps=3)
    assert controller.diagnostics()["collapsed_steps"] == 0
    _decide(controller, monkeypatch, [0.25, 0.51, 0.24], steps=3)
    assert controller.diagnostics()["collapsed_steps"] == 3


def test_a_mixture_that_was_asked_for_is_no_collapse() -> None:
    controller = _controller("static", weights={"web": 98, "code": 1, "law": 1}, collapse_steps=2)
    play(controller, _environment())
    assert controller.diagnostics()["collapsed_steps"] == 0


def test_the_last_domain_with_data_is_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    controller, environment = _controller(collapse_steps=2), _environment()
    for iteration in range(1, 8):
        observation = environment.step(iteration, controller.weights)
        observation.available[1:] = False
        assert controller.decide(observation).tolist() == pytest.approx([1, 0, 0])
    assert controller.diagnostics()["collapsed_steps"] == 0
    assert "COLLAPSED" not in caplog.text


@pytest.mark.parametrize("domain", range(3))
def test_the_floor_bounds_the_collapse_of_an_actor_that_wants_one_domain_only(domain: int) -> None:
    controller, environment = _controller(collapse_steps=3), _environment()
    head = controller.policy.agent.actor.network.net[-1]  # type: ignore[attr-defined]
    head.bias.data[domain] = 1e4
    floor = controller.policy.bounds.floor[0]
    for iteration in range(1, 11):
        weights = controller.decide(environment.step(iteration, controller.weights))
        assert weights.min() >= floor - 1e-9 and weights.argmax() == domain
    figures = controller.diagnostics()
    assert figures["collapsed_steps"] == 10
    assert figures["floor_share"] == pytest.approx(2 / 3)


def test_a_collapse_goes_on_over_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, restored = _controller(collapse_steps=5), _controller(collapse_steps=5)
    _decide(whole, monkeypatch, [0.05, 0.9, 0.05], steps=4)
    restored.load_state_dict(whole.state_dict())
    _decide(restored, monkeypatch, [0.05, 0.9, 0.05], steps=1)
    assert restored.diagnostics()["collapsed_steps"] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"collapse_weight": 1.5}, "mixing.collapse_weight is 1.5"),
        ({"collapse_steps": 0}, "mixing.collapse_steps is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixingConfig(**settings)


# What is shown ------------------------------------------------------------------------------------


def _recorded(path: Path, steps: int = 30, **changes: Any) -> Path:
    """A record of ``test_report``, with made-up diagnostics of each step t: a function a figure."""
    record(path, DOMAINS, steps)
    file = path / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    figures: dict[str, Any] = {
        "policy_entropy": lambda t: 1.0, "distance_from_natural": lambda t: 0.2,
        "distance_from_uniform": lambda t: 0.1, "floor_share": lambda t: 0.0,
        "dropped_steps": lambda t: 0.0, "policy_failures": lambda t: 0.0,
        "collapsed_steps": lambda t: 0.0, **changes,
    }  # fmt: skip
    for line in lines:
        if "validation" not in line:
            t = line["iteration"]
            line["diagnostics"] = {name: figure(t) for name, figure in figures.items()}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_run_without_faults_says_nothing_of_them(tmp_path: Path) -> None:
    page = write_report(_recorded(tmp_path)).read_text(encoding="utf-8")
    assert 'class="notice"' not in page
    assert "note:" not in closing_table(tmp_path)


def test_page_and_table_say_which_guard_rails_acted_and_when(tmp_path: Path) -> None:
    _recorded(
        tmp_path,
        dropped_steps=lambda t: float(t >= 4),
        policy_failures=lambda t: float(min(t, 7)),
        collapsed_steps=lambda t: t - 10.0 if 20 <= t <= 25 else 0.0,
    )
    expected = [
        "1 step dropped from mixing, as a loss or gradient was not finite: step 4.",
        "The policy failed 7 times, and training went on with the last good weights: "
        "steps 1, 2, 3, 4, 5, ….",
        "The policy collapsed onto law, which had nearly all the weight for 15 steps up to "
        "step 25.",
    ]
    assert closing_table(tmp_path).splitlines()[-3:] == [f"note: {text}" for text in expected]
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for text in expected:
        assert f'<p class="notice">{text}</p>' in page


def test_figures_of_policy_and_agent_are_plotted_where_the_run_has_them(tmp_path: Path) -> None:
    page = write_report(_recorded(tmp_path / "static")).read_text(encoding="utf-8")
    headings = PageReader(page).headings
    assert "Policy" in headings and "Agent" not in headings and "Gradients" not in headings
    learned = _recorded(
        tmp_path / "acodm",
        critic_loss=lambda t: None if t < 5 else 1 / t,
        value=lambda t: None if t < 5 else -1.0,
        clipped_share=lambda t: 0.5,
        replay_size=lambda t: t - 1.0,
    )
    page = write_report(learned).read_text(encoding="utf-8")
    assert "Agent" in PageReader(page).headings
    assert "Replay holds 29 transitions." in page
    plotted = {name for figure in svgs(page) for name in ids(figure)}
    assert {"policy-entropy", "policy-clipped", "critic-loss-Q-loss", "value-mean-Q"} <= plotted


def _with_gram(path: Path) -> Path:
    """Two Gram matrices, of steps 10 and 20; in the later one ``law`` was not drawn."""
    _recorded(path)
    file = path / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["iteration"] == 10 and "validation" not in line:
            line["gram"] = np.eye(3).tolist()
        if line["iteration"] == 20:
            line["gram"] = [[4.0, -3.0, None], [-3.0, 9.0, None], [None] * 3]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_last_gram_matrix_is_shown_as_cosines_with_names(tmp_path: Path) -> None:
    page = write_report(_with_gram(tmp_path)).read_text(encoding="utf-8")
    assert "Gradients" in PageReader(page).headings
    assert "mean gradients in step 20." in page
    shown = [text.text for text in svgs(page)[-2].iter("{http://www.w3.org/2000/svg}text")]
    assert shown.count("\u2212.50") == 2 and shown.count("1.00") == 2  # law's cells stay empty
    assert all(shown.count(name) == 2 for name in DOMAINS)


def test_a_gram_matrix_of_another_number_of_domains_is_refused(tmp_path: Path) -> None:
    _with_gram(tmp_path)
    file = tmp_path / "metrics.jsonl"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("[null, null, null]", "[null, null]"), encoding="utf-8")
    with pytest.raises(ValueError, match="do not fit together"):
        write_report(tmp_path)


def test_a_matrix_of_22_domains_fits_its_figure() -> None:
    names = [f"A domain of number {k}" for k in range(22)]
    figure = gram_figure(names, np.eye(22))
    figure.canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    for axes in figure.axes:
        for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
            box = label.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def test_tensorboard_gets_diagnostics_and_the_gram_matrix(tmp_path: Path) -> None:
    gram = np.array([[4.0, np.nan], [np.nan, np.nan]])
    with MetricsWriter(tmp_path) as writer:
        writer.step(
            1,
            consumed_samples=8,
            lm_loss=2.0,
            step_time_s=0.5,
            mixing_time_s=0.01,
            domains={"web": {"weight": 0.5}, "code": {"weight": 0.5}},
            diagnostics={"policy_entropy": 0.7},
            gram=gram,
        )
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("diagnostics/policy_entropy")[0].value == pytest.approx(0.7)
    assert events.Images("gram")[0].step == 1
    assert read_metrics(tmp_path)[0][0]["gram"] == [[4.0, None], [None, None]]
