"""The decision benchmark times every policy, and its floor is what the agent multiplies."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_acodm.mixing import MixingController

TOOL = Path(__file__).parents[1] / "tools" / "benchmark_decision.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_decision", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_policy_is_timed(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, report = torch.get_num_threads(), tmp_path / "report.json"
    arguments = ["--domains", "3", "--rounds", "2", "--decisions", "1", "--json", str(report)]
    try:
        assert tool.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    rows = {row["candidate"]: row for row in json.loads(report.read_text())["rows"]}
    assert {"acodm", "frozen", "odm", "ado", "pike", tool.FLOOR} < set(rows)
    assert all(row["median_s"] > 0.0 for row in rows.values())
    assert rows[tool.FLOOR]["over_floor"] == 1.0 < rows["acodm"]["over_floor"]
    assert "budget 2 ms" in capsys.readouterr().out


def test_timed_decisions_learn_and_the_floor_multiplies_as_much(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[MixingController] = []

    def recorded(*arguments: Any) -> MixingController:
        built.append(MixingController(*arguments))
        return built[-1]

    monkeypatch.setattr(tool, "MixingController", recorded)
    decisions = tool.candidates(K=5, D=2)
    agent: Any = built[0].policy
    weight = next(agent.agent.actor.network.parameters())
    before = weight.clone()
    counted = {}
    for name in ("acodm", tool.FLOOR):
        with FlopCounterMode(display=False) as counter:
            decisions[name]()
        counted[name] = counter.get_total_flops()
    assert not torch.equal(weight, before)
    assert counted["acodm"] == counted[tool.FLOOR] > 0


def test_a_policy_that_fails_is_not_timed(tool: ModuleType) -> None:
    controller = MixingController(
        tool.build_policy(tool.MixingConfig(), ["a", "b"], [1, 1], 2, 100, seed=1)
    )
    steps = tool.observations(K=3, D=2, seed=0)
    with pytest.raises(RuntimeError, match="failed on a made-up step"):
        tool.decide(controller, steps)


@pytest.mark.parametrize("flag", ["--domains", "--probes", "--rounds", "--decisions"])
def test_figures_that_leave_nothing_to_time_are_refused(
    tool: ModuleType, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tool.main([flag, "0"])
    assert f"{flag} " in capsys.readouterr().err
