"""Lays a run out as one HTML page that needs nothing from the network."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from megatron_acodm.reporting import diagnostics, plots
from megatron_acodm.reporting.run import LAST_STEPS, Run
from megatron_acodm.reporting.table import MEANS, domain_row, duration, number, percent, short


def render(run: Run) -> str:
    """The report as one HTML page that needs nothing from the network."""
    return _PAGE.format(
        title=html.escape(f"{run.info.policy}: {len(run.domains)} domains"),
        subtitle=html.escape(f"{run.info.hardware} · started {run.info.started}"),
        style=_STYLE,
        script=_SCRIPT,
        headline="\n".join(_card(*figure) for figure in _headline(run)),
        notices="\n".join(
            f'<p class="notice">{html.escape(text)}</p>' for text in diagnostics.notices(run)
        ),
        rows="\n".join(_table_row(run, k) for k in range(len(run.domains))),
        plots="\n".join(_section(*plot) for plot in _plots(run)),
        details="\n".join(_detail(*item) for item in _details(run)),
    )


def _headline(run: Run) -> list[tuple[str, str, str]]:
    """(label, figure, note) of each headline figure."""
    steps = len(run.iteration)
    figures = [
        ("Steps", f"{run.iteration[-1]:,.0f}", f"of {run.info.train_iters:,}"),
        (
            "Tokens",
            short(run.consumed_samples[-1] * run.info.sequence_length),
            f"{run.info.global_batch_size:,} × {run.info.sequence_length:,} a step",
        ),
        (
            "Training loss",
            number(run.last_loss),
            f"mean of {min(LAST_STEPS, steps)} steps; {number(run.lm_loss[0])} at first",
        ),
    ]
    if len(run.perplexity):
        for name, (first, last) in zip(MEANS, run.mean_perplexity[[0, -1]].T, strict=True):
            figures.append(("Perplexity", number(last), f"{name}; {number(first)} at first"))
    figures += [
        (
            "Mixing",
            f"{run.mixing_share:.2%}",
            f"of the step time: {1e3 * np.nanmean(run.mixing_time_s):.1f} ms",
        ),
        (
            "Step time",
            f"{np.nanmedian(run.step_time_s):.3g} s",
            f"median; {duration(np.nansum(run.step_time_s))} in all",
        ),
    ]
    return figures


def _plots(run: Run) -> list[tuple[str, str, str]]:
    """(heading, what it shows, SVG) of each plot."""
    static = f"policy {run.info.policy}"
    return [
        _domain_plot(
            run, "Weights", run.weights, static,
            "Share of the batch that the policy gave to each domain.",
            percent=True,
        ),
        _domain_plot(
            run, "Training loss", run.losses, static,
            "Mean token loss of each domain where it was drawn: faint as measured, strong "
            "smoothed. Black: the whole batch.",
            smooth=True, overall=run.lm_loss,
        ),
        _domain_plot(
            run, "Rewards", run.rewards, static,
            "What each domain is drawn for, smoothed: the alignment of its gradient with what the "
            "policy is to lower, or its loss.",
            scale="asinh",
        ),
        _domain_plot(
            run, "Validation perplexity", run.perplexity, "nothing was validated",
            "On each domain’s own held-out text; lower is better. Black: the mean of the domains.",
            x=run.validation_iteration, scale="log", markers=True,
            overall=run.mean_perplexity[:, 0],
        ),
        *diagnostics.sections(run),
        (
            "Time", "Seconds a step, and the part of it that the step waited for mixing.",
            plots.series(
                "times", run.iteration, {"step": run.step_time_s, "mixing": run.mixing_time_s},
                ylabel="seconds", unit=" s", scale="log",
            ),
        ),
    ]  # fmt: skip


def _domain_plot(
    run: Run, heading: str, values: np.ndarray, absent: str, caption: str, **options: Any
) -> tuple[str, str, str]:
    """A plot of [T, K] values, or the reason for their absence in its place."""
    options = {"x": run.iteration, **options}
    shown = [values, options["overall"]] if "overall" in options else [values]
    if not any(np.isfinite(part).any() for part in shown):
        return heading, html.escape(f"No {heading.lower()}: {absent}."), ""
    name = heading.replace(" ", "-").lower()
    return heading, caption, plots.domain_lines(name, run.domains, values, **options)


def _details(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what a reader needs to run the same again."""
    versions = ", ".join(f"{name} {version}" for name, version in run.info.versions.items())
    flat = _flatten(run.info.config)
    return [("command", run.info.command), ("versions", versions), *flat]


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            items += _flatten(value, f"{prefix}{key}.")
        else:
            items.append((f"{prefix}{key}", str(value)))
    return items


def _card(label: str, figure: str, note: str) -> str:
    return (
        f'<div class="card"><span>{html.escape(label)}</span><b>{html.escape(figure)}</b>'
        f"<small>{html.escape(note)}</small></div>"
    )


def _table_row(run: Run, k: int) -> str:
    tokens, epochs, *values = domain_row(run, k)
    share = run.tokens[k] / run.tokens.sum()
    cells = "".join(f"<td>{cell}</td>" for cell in (tokens, percent(share), epochs, *values))
    swatch = plots.swatch(k)
    name = html.escape(run.domains[k])
    return f'<tr data-domain="{k}"><th scope="row">{swatch}{name}</th>{cells}</tr>'


def _section(heading: str, caption: str, body: str) -> str:
    return f"<section><h2>{heading}</h2><p>{caption}</p>{body}</section>"


def _detail(name: str, value: str) -> str:
    return f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff;
  max-width: 1080px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 19px; margin: 36px 0 0; }
p { color: #57606a; margin: 2px 0 10px; } svg { width: 100%; height: auto; display: block; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 20px 0 8px; }
.card { border: 1px solid #d8dee4; border-radius: 8px; padding: 10px 14px; }
.card span, .card small { display: block; color: #57606a; font-size: 13px; line-height: 1.35; }
.card b { font-size: 23px; }
.notice { border-left: 4px solid #D55E00; background: #fff4ec; color: #1f2328;
  padding: 7px 14px; margin: 10px 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid #eaeef2;
  white-space: nowrap; }
th { font-weight: 500; } th[scope=row], thead th:first-child { text-align: left; }
thead th { color: #57606a; border-bottom: 1px solid #afb8c1; }
thead tr:first-child th { border: 0; padding-bottom: 0; text-align: center; }
tr[data-domain] { cursor: pointer; } tr[data-domain]:hover, tr.chosen { background: #f3f6f9; }
tr svg { width: 26px; height: 10px; display: inline-block; margin-right: 9px; }
.dim { opacity: .08; }
details { margin-top: 36px; } summary { cursor: pointer; font-weight: 600; }
details td { white-space: pre-wrap; text-align: left; word-break: break-word; }
"""

_SCRIPT = """
let chosen = null;
function show(domain) {
  for (const g of document.querySelectorAll('g[id*="-domain-"]'))
    g.classList.toggle('dim', domain !== null && !g.id.endsWith('-domain-' + domain));
}
for (const row of document.querySelectorAll('tr[data-domain]')) {
  row.onmouseenter = () => show(row.dataset.domain);
  row.onmouseleave = () => show(chosen);
  row.onclick = () => {
    document.querySelectorAll('tr.chosen').forEach(other => other.classList.remove('chosen'));
    chosen = chosen === row.dataset.domain ? null : row.dataset.domain;
    if (chosen !== null) row.classList.add('chosen');
    show(chosen);
  };
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1><p>{subtitle}</p>
<div class="cards">{headline}</div>
{notices}
<h2>Domains</h2><p>Point at a row to see its domain alone in every plot; click to keep it.</p>
<div class="wide"><table><thead>
<tr><th></th><th colspan="3">drawn</th><th colspan="2">weight</th>
<th colspan="2">perplexity</th></tr>
<tr><th>domain</th><th>tokens</th><th>share</th><th>epochs</th><th>first</th><th>last</th><th>first</th>
<th>last</th></tr></thead><tbody>
{rows}
</tbody></table></div>
{plots}
<details><summary>Run</summary><table>{details}</table></details>
<script>{script}</script></body></html>
"""
