"""The accuracy study runs on any manifest and writes its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import ENVIRONMENT, REPOSITORY, Corpus


def test_the_study_compares_every_estimator_with_float64(corpus: Corpus, tmp_path: Path) -> None:
    command = [sys.executable, "tools/study_alignment.py", "--manifest", str(corpus.manifest)]
    command += ["--output", str(tmp_path), "--steps", "1", "3", "--num-layers", "2"]
    command += ["--hidden-size", "32", "--seq-length", "32", "--micro-batches", "1"]
    command += ["--batches", "2", "--seeds", "4"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "study.json").read_text())
    assert [point["step"] for point in report["points"]] == [1, 3]
    for point in report["points"]:
        lines = {(row["estimator"], row["size"]): row for row in point["estimators"]}
        exact = lines.pop(("exact", 32 * 128))
        assert exact["W"] < 1e-5
        assert exact["kendall"] == 1.0
        widths = {f"captured, width {width}" for width in (16, 32, 64)}
        assert {name for name, _ in lines} == {"sketch", "coordinates"} | widths
        assert all(1e-5 < row["W"] < 1 for row in lines.values())
        assert all(-1 <= row["kendall"] <= 1 for row in lines.values())
        default, *others = point["selections"].values()
        assert default["with_default"] == 1.0
        assert len(others) == 6
    assert (tmp_path / "study.md").read_text() in done.stdout
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
