"""The report shows what the record says, needs no network, and copes with any honest record."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_acodm.metrics import MetricsWriter, RunInfo, domain_metrics, write_run_info
from megatron_acodm.report import closing_table, write_report
from megatron_acodm.reporting import plots

SVG = "{http://www.w3.org/2000/svg}"
SECTIONS = ["Domains", "Weights", "Training loss", "Rewards", "Validation perplexity", "Time"]


def record(
    path: Path,
    names: Sequence[str],
    steps: int,
    *,
    policy: str = "acodm",
    validate: bool = True,
    train_iters: int = 100,
) -> Path:
    """Write a small record: losses fall from 5, weights move linearly from even to one-sided."""
    k = len(names)
    write_run_info(path, RunInfo(list(names), 256, 8, train_iters, policy))
    rng = np.random.default_rng(0)
    even, one_sided = np.full(k, 1 / k), np.arange(1, k + 1) / np.arange(1, k + 1).sum()
    with MetricsWriter(path, tensorboard=False) as writer:
        if validate:
            writer.validation(0, dict.fromkeys(names, 5.0), dict.fromkeys(names, 1 / k))
        for t in range(1, steps + 1):
            weights = even + (one_sided - even) * t / steps
            samples = rng.multinomial(8, weights)
            losses = np.where(samples > 0, 5 / t**0.2, np.nan)
            rewards = rng.normal(0.1, 0.01, k) / t
            writer.step(
                t,
                consumed_samples=8 * t,
                lm_loss=5 / t**0.2,
                step_time_s=0.5,
                mixing_time_s=0.01,
                domains=domain_metrics(
                    names,
                    weights,
                    samples,
                    losses,
                    rewards if policy == "acodm" else None,
                    epochs=np.arange(k) + t / 8,
                ),
            )
        if validate:
            last = {name: float(np.log(20.0 + i)) for i, name in enumerate(names)}
            writer.validation(steps, last, {names[0]: 0.75, names[-1]: 0.25})
    return path


def svgs(page: str) -> list[ElementTree.Element]:
    """The plots of a page, parsed; a malformed one raises."""
    figures = re.findall(r"<svg xmlns:xlink.*?</svg>", page, flags=re.DOTALL)
    return [ElementTree.fromstring(figure) for figure in figures]


def ids(element: ElementTree.Element) -> list[str]:
    return [node.get("id", "") for node in element.iter()]


class PageReader(HTMLParser):
    """Collects headings, texts of cells and everything that could reach for the network."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.references: list[str] = []
        self._tag = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("svg", "line"):  # the line samples before the domain names
            self._tag = tag
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and not str(value).startswith("#"):
                self.references.append(f"{name}={value}")

    def handle_data(self, data: str) -> None:
        if self._tag == "h2" and data.strip():
            self.headings.append(data)
        if self._tag in ("td", "th") and data.strip():
            self.cells.append(data)


def test_the_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    awkward = "Code <&> $x_1$"
    page = write_report(record(tmp_path, ["Books", awkward], 40)).read_text(encoding="utf-8")
    reader = PageReader(page)
    assert reader.headings == SECTIONS
    assert reader.references == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert awkward in reader.cells  # escaped in the page, as written in the browser
    figures = svgs(page)
    assert len(figures) == 5
    labels = [text.text or "" for text in figures[0].iter(f"{SVG}text")]
    assert any(label.startswith(awkward) for label in labels)
    all_ids = [name for figure in figures for name in ids(figure) if name]
    assert len(set(all_ids)) == len(all_ids)
    for plot in ("weights", "training-loss", "rewards", "validation-perplexity"):
        assert {f"{plot}-domain-0", f"{plot}-domain-1"} <= set(all_ids)


def test_the_closing_table_states_tokens_weights_and_perplexities(tmp_path: Path) -> None:
    record(tmp_path, ["Books", "Code"], 10)
    table = closing_table(tmp_path).splitlines()
    assert table[1].split() == ["domain", "tokens", "epochs", "first", "last", "first", "last"]
    books, code = (line.split() for line in table[2:4])
    assert [books[0], *books[2:]] == ["Books", "1.25", "48.3%", "33.3%", "148.4", "20"]
    assert [code[0], *code[2:]] == ["Code", "2.25", "51.7%", "66.7%", "148.4", "21"]
    tokens = [int(row[1].replace(",", "")) for row in (books, code)]
    assert sum(tokens) == 10 * 8 * 256
    assert table[4].split() == ["mean", "of", "domains", "148.4", "20.5"]
    assert table[5].split() == ["by", "natural", "weight", "148.4", "20.25"]
    assert table[-1] == "mixing took 2.00% of the step time (10.0 of 500 ms a step)"


def test_22_domains_have_22_different_looks_and_labels_that_do_not_overlap(tmp_path: Path) -> None:
    assert len({plots.look(k) for k in range(22)}) == 22
    names = [f"Domain {k}" for k in range(22)]
    page = write_report(record(tmp_path, names, 30)).read_text(encoding="utf-8")
    weights = svgs(page)[0]
    labels = {
        node.get("id"): next(node.iter(f"{SVG}text"))
        for node in weights.iter(f"{SVG}g")
        if "-label-" in node.get("id", "")
    }
    assert len(labels) == 22
    heights = sorted(
        float(re.findall(r"[-\d.]+", text.get("transform", ""))[-1]) for text in labels.values()
    )
    assert min(np.diff(heights)) > 9  # points; the labels are set in 9 point type


@given(
    st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=25).map(sorted),
    st.floats(0.001, 0.04),
)
def test_labels_keep_their_order_their_distance_and_the_frame(
    wanted: list[float], gap: float
) -> None:
    placed = plots.spread(np.array(wanted), gap)
    assert (np.diff(placed) >= gap - 1e-12).all()
    assert placed.min() >= -1e-12
    assert placed.max() <= 1 + 1e-12


def test_labels_that_do_not_collide_stay_where_they_belong() -> None:
    np.testing.assert_allclose(plots.spread(np.array([0.1, 0.5, 0.9]), 0.05), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(plots.spread(np.array([0.5, 0.5]), 0.1), [0.45, 0.55])


def test_smoothing_of_a_constant_is_the_constant_from_the_first_value_on() -> None:
    np.testing.assert_allclose(plots.smoothed(np.full(50, 3.0), 10), np.full(50, 3.0))


def test_a_run_of_one_step_without_validation_or_rewards_is_shown(tmp_path: Path) -> None:
    record(tmp_path, ["Books", "Code"], 1, policy="static", validate=False)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert PageReader(page).headings == SECTIONS
    assert "No rewards: policy static." in page
    assert "No validation perplexity: nothing was validated." in page
    assert closing_table(tmp_path).splitlines()[2].split()[-2:] == ["–", "–"]


def test_a_run_without_a_policy_shows_its_loss_and_dashes_for_the_rest(tmp_path: Path) -> None:
    write_run_info(tmp_path, RunInfo(["Books"], 256, 8, 10, "none"))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for t in (1, 2):
            writer.step(
                t,
                consumed_samples=8 * t,
                lm_loss=float("nan"),
                step_time_s=0.5,
                mixing_time_s=0.0,
                domains={},
            )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No weights: policy none." in page
    assert closing_table(tmp_path).splitlines()[2].split() == ["Books", *"––––––"]


def run_door(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_acodm.report", *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_door_prints_the_table_and_writes_where_it_is_told(tmp_path: Path) -> None:
    record(tmp_path / "run", ["Books", "Code"], 5)
    output = tmp_path / "page.html"
    result = run_door(tmp_path / "run", "--output", output)
    assert result.returncode == 0
    assert result.stdout == closing_table(tmp_path / "run") + f"\nreport: {output}\n"
    assert result.stderr == ""
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_directory_without_a_run_is_one_clear_error(tmp_path: Path) -> None:
    result = run_door(tmp_path / "nowhere")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: cannot read")


def test_a_record_of_other_domains_is_refused(tmp_path: Path) -> None:
    record(tmp_path, ["Books", "Code"], 3)
    write_run_info(tmp_path, RunInfo(["Books", "Law"], 256, 8, 100, "acodm"))
    with pytest.raises(ValueError, match=r"do not fit together.*Law"):
        write_report(tmp_path)


def test_a_record_without_a_step_says_so(tmp_path: Path) -> None:
    record(tmp_path, ["Books"], 0)
    with pytest.raises(ValueError, match="no training step yet"):
        write_report(tmp_path)
