#!/usr/bin/env python3
"""Compares mixing policies over seeds in the real trainer: final perplexities, and with what noise.

CONFIG is YAML: `train` and `valid` (manifests; the flags below override them), `trainer` (the
trainer's flags without dashes), `seeds` (a list, or how many), `policies` (by name, what a file for
the trainer's --acodm-config holds), and `references` (the policies to compare with). With a seed,
all policies start from the same weights and draw each domain's sequences in the same order (but for
that within a step), so that their differences are paired; each validation is of the whole split.

`proxies` are like `policies`, but each may hold a `trainer` section of its own on top of the common
one (a smaller model, fewer steps), and they are not compared. A policy `frozen` that says
`learned_from: NAME` is driven by what that proxy or policy `acodm` learned with the same seed.

OUTPUT/runs/POLICY/seed_N holds each run. A finished run is not repeated; one that was interrupted
starts over, or goes on from its checkpoint where `trainer` has a save-interval. results.json,
table.md and the plots are written when all are finished.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_acodm import AcodmConfig
from megatron_acodm.arguments import build_parser, check_arguments
from megatron_acodm.files import write_atomically
from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.preprocess.manifest import Manifest
from megatron_acodm.reporting.comparison import Comparison, tables
from megatron_acodm.reporting.comparison_plots import write_plots
from megatron_acodm.reporting.run import Run

KEYS = ("train", "valid", "trainer", "seeds", "proxies", "policies", "references")
OWN_FLAGS = ("run-dir", "seed", "data-path", "valid-data-path", "eval-iters", "save", "load",
             "exit-interval", "data-cache-path")  # fmt: skip
FILE_KEYS = ("weights_file", "policy_file")  # of a policy's mixing section
OWN_KEYS = ("learned_from", "trainer")  # of a run's section, for this tool
POLICY_FILE = "policy"  # in the folder of a run that others learn from
TAIL_LINES = 15


@dataclass(frozen=True)
class Plan:
    """What a config asks for."""

    flags: list[str]  # of the trainer, the same for all runs
    seeds: list[int]
    proxies: dict[str, dict[str, Any]]  # what runs before the policies, and is not compared
    policies: dict[str, dict[str, Any]]
    references: list[str]
    settings: dict[str, Any]  # what decides the figures of every run, beside its flags
    keeps_checkpoints: bool


@dataclass(frozen=True)
class PlannedRun:
    """One policy with one seed, in its folder."""

    policy: str
    seed: int
    folder: Path
    flags: tuple[str, ...] = ()  # of this run's trainer, beyond the plan's
    source: PlannedRun | None = None  # whose policy drives it

    @property
    def startable(self) -> bool:
        """Whether the run that it depends on has ended."""
        return self.source is None or self.source.finished

    @property
    def finished(self) -> bool:
        """Whether it has been trained to its end, and left what others learn from."""
        files = ["finished.json"]
        if "--acodm-save-policy" in self.flags:
            files.append(f"{POLICY_FILE}.safetensors")
        return all((self.folder / name).is_file() for name in files)

    def __str__(self) -> str:
        return f"{self.policy}, seed {self.seed}"


# --- The config ---------------------------------------------------------------------------------


def read_plan(path: Path, train: str | None, valid: str | None) -> Plan:
    """Read and check a config.

    Args:
        path: the YAML file.
        train: manifest of the training data; None for the config's.
        valid: manifest of the validation data; None for the config's.

    Raises:
        ValueError: for whatever is wrong in it, before anything is trained.
        OSError: when it cannot be read.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("trainer"), dict):
        raise ValueError(f"{path} must be a mapping with the keys {', '.join(KEYS)}")
    if unknown := sorted(map(str, content.keys() - set(KEYS))):
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; keys are {', '.join(KEYS)}")
    manifests = {"train": train, "valid": valid}
    for name, given in manifests.items():
        if given is None and name in content:
            manifests[name] = str(path.parent / content[name])
        elif given is None:
            flag = "--data-path" if name == "train" else "--valid-data-path"
            raise ValueError(f"{path} names no manifest under {name!r}; add it, or give {flag}")
    sections: dict[str, dict[str, Any]] = {}
    for kind in ("proxies", "policies"):
        for name, section in dict(content.get(kind) or {}).items():
            if str(name) in sections:
                raise ValueError(f"{path}: there are two runs of the name {name}")
            sections[str(name)] = _policy(str(name), section, path.parent, kind == "proxies")
    for name, section in sections.items():
        _check_source(name, section, sections)
    proxies = {str(name): sections.pop(str(name)) for name in dict(content.get("proxies") or {})}
    policies = sections
    references = list(content.get("references") or [])
    if not references or not set(references) <= set(policies):
        raise ValueError(f"references are {references}; name some of {', '.join(policies)}")
    flags = [
        *_flags(content["trainer"]),
        *("--data-path", str(manifests["train"]), "--valid-data-path", str(manifests["valid"])),
    ]
    args = build_parser().parse_args([*flags, "--run-dir", "unused"])
    check_arguments(args)
    for name, proxy in proxies.items():
        own = proxy.get("trainer", {})
        if set(own) & {"eval-interval", "save-interval"}:
            raise ValueError(
                f"proxy {name}: these intervals are the same for all runs; remove them"
            )
        check_arguments(build_parser().parse_args([*flags, *_flags(own), "--run-dir", "unused"]))
    if args.eval_interval == 0:
        raise ValueError("eval-interval is 0; without validations there is nothing to compare")
    valid_manifest = Manifest.load(str(manifests["valid"]))
    flags += ["--eval-iters", str(_whole_split(valid_manifest, args))]
    settings = {}
    for name, manifest in manifests.items():
        file = Path(str(manifest))
        file = file / "manifest.json" if file.is_dir() else file
        settings[name] = hashlib.sha256(file.read_bytes()).hexdigest()  # it holds the data's own
    return Plan(
        flags,
        _seeds(content.get("seeds")),
        proxies,
        policies,
        references,
        settings,
        bool(args.save_interval),
    )


def _seeds(value: Any) -> list[int]:
    seeds = list(range(1, value + 1)) if isinstance(value, int) else value
    if not isinstance(seeds, list) or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {value!r}; give their number, or a list of different ones")
    return [int(seed) for seed in seeds]


def _policy(name: str, section: Any, folder: Path, proxy: bool) -> dict[str, Any]:
    """A run's section, checked, with its files' paths taken from the config's folder."""
    if not re.fullmatch(r"[\w.+=-]+", name):
        raise ValueError(f"policy {name!r} names a folder; use letters, digits and . _ + = - only")
    section = json.loads(json.dumps(section or {}))  # a copy
    for key in ("mixing", "trainer"):
        if not isinstance(section.get(key, {}), dict):
            raise ValueError(f"policy {name}: {key} is {section[key]!r}; give it settings")
    mixing = section.get("mixing", {})
    for key in FILE_KEYS:
        if isinstance(mixing.get(key), str):
            mixing[key] = str((folder / mixing[key]).resolve())
    try:
        AcodmConfig.from_dict(_mix(section, ("learned_from", "trainer" if proxy else "")))
    except ValueError as error:
        raise ValueError(f"policy {name}: {error}") from error
    return section


def _mix(section: dict[str, Any], left_out: Sequence[str] = OWN_KEYS) -> dict[str, Any]:
    """What the trainer's --acodm-config is to hold."""
    return {key: value for key, value in section.items() if key not in left_out}


def _check_source(name: str, section: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    mixing, source = section.get("mixing", {}), section.get("learned_from")
    if source is None:
        return
    if mixing.get("policy") != "frozen" or "policy_file" in mixing:
        raise ValueError(
            f"policy {name}: learned_from is for policy 'frozen' without a policy_file"
        )
    if not isinstance(source, str) or source not in sections:
        raise ValueError(f"policy {name}: learned_from names {source!r}, which is not in the file")
    if sections[source].get("mixing", {}).get("policy", "acodm") != "acodm":
        raise ValueError(f"policy {name}: learned_from names {source!r}, which is no policy acodm")


def _flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        if name in OWN_FLAGS or name.startswith("acodm"):
            raise ValueError(f"trainer.{name} is set by the benchmark; remove it")
        if value is True or value is False:
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            items = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, items)]
    return flags


def _whole_split(manifest: Manifest, args: argparse.Namespace) -> int:
    """Global batches that hold all validation text of any domain."""
    tokens = max(domain.tokens for domain in manifest.domains)
    return math.ceil(math.ceil(tokens / args.seq_length) / args.global_batch_size)


# --- Running ------------------------------------------------------------------------------------


def plan_runs(plan: Plan, output: Path) -> list[PlannedRun]:
    """All runs, seed by seed, with their folders and settings written.

    Raises:
        ValueError: when a folder holds a run with other settings.
    """
    runs: dict[tuple[str, int], PlannedRun] = {}
    sections = {**plan.proxies, **plan.policies}
    sources = {section.get("learned_from") for section in sections.values()}
    order = sorted(sections, key=lambda name: "learned_from" in sections[name])  # sources first
    for seed, policy in itertools.product(plan.seeds, order):
        section = sections[policy]
        folder = output / "runs" / policy / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        flags = _flags(section.get("trainer", {}))
        if policy in sources:
            flags += ["--acodm-save-policy", str(folder / POLICY_FILE)]
        settings = {**plan.settings, **_resolved(plan, section)}
        source = None
        if "learned_from" in section:
            source = runs[section["learned_from"], seed]
            flags += ["--acodm-load-policy", str(source.folder / POLICY_FILE)]
            settings["source"] = _resolved(plan, sections[section["learned_from"]])
        text = json.dumps(settings, indent=2, sort_keys=True)
        path = folder / "settings.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if before and (differences := _differences(before, json.loads(text))):
            raise ValueError(
                f"{folder} holds a run with other settings ({differences}); remove it or give "
                "another --output"
            )
        write_atomically(path, text)
        write_atomically(folder / "mix.yaml", yaml.safe_dump(_mix(section), sort_keys=False))
        runs[policy, seed] = PlannedRun(policy, seed, folder, tuple(flags), source)
    return list(runs.values())


def _resolved(plan: Plan, section: dict[str, Any]) -> dict[str, Any]:
    """What a run's section amounts to with the defaults of today, which may change."""
    flags = [*plan.flags, *_flags(section.get("trainer", {})), "--run-dir", "unused"]
    args = build_parser().parse_args(flags)
    check_arguments(args)
    left_out = {name.replace("-", "_") for name in OWN_FLAGS}
    return {
        "trainer": {
            name: value
            for name, value in vars(args).items()
            if name not in left_out and not name.startswith("acodm")
        },
        "policy": AcodmConfig.from_dict(_mix(section)).to_dict(),
        "files": _contents(section),
        "learned_from": section.get("learned_from"),
    }


def _contents(section: dict[str, Any]) -> dict[str, str]:
    """Digests of the files that a policy's section names."""
    digests = {}
    named = section.get("mixing", {})
    for key in filter(named.get, FILE_KEYS):
        for suffix in ("", ".json", ".safetensors"):  # a learned policy is two files of one name
            path = Path(named[key] + suffix)
            if path.is_file():
                digests[key + suffix] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def _differences(before: Any, now: Any, name: str = "") -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        parts = [
            _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys
        ]
        return ", ".join(filter(None, parts))
    return f"{name} was {before}, is {now}" if before != now else ""


def command(plan: Plan, run: PlannedRun) -> list[str]:
    """The trainer's command line for a run."""
    words = [sys.executable, "-m", "megatron_acodm.train", *plan.flags, "--seed", str(run.seed)]
    words += ["--run-dir", str(run.folder), "--acodm-config", str(run.folder / "mix.yaml")]
    words += run.flags
    if plan.keeps_checkpoints:
        checkpoints = str(run.folder / "checkpoints")
        words += ["--save", checkpoints, "--load", checkpoints]
    return words


def run_all(plan: Plan, runs: Sequence[PlannedRun], jobs: int) -> None:
    """Train what is not finished, so many at once; ends them all when one fails.

    Raises:
        RuntimeError: when a run failed, with the end of what it printed, or ended early.
    """
    waiting = [run for run in runs if not run.finished]
    done = len(runs) - len(waiting)
    if done:
        print(f"{done} of {len(runs)} runs are finished already", flush=True)
    running: dict[PlannedRun, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            while len(running) < jobs and any(run.startable for run in waiting):
                run = next(run for run in waiting if run.startable)
                waiting.remove(run)
                running[run] = (_start(plan, run), time.monotonic())
            for run, (process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                done += 1
                _finish(run, process.returncode, time.monotonic() - start, f"{done}/{len(runs)}")
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def _start(plan: Plan, run: PlannedRun) -> subprocess.Popen[bytes]:
    with open(run.folder / "output.txt", "wb") as output:
        return subprocess.Popen(
            command(plan, run),
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # jobs would compete for cores
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _finish(run: PlannedRun, code: int, seconds: float, place: str) -> None:
    output = run.folder / "output.txt"
    if code != 0:
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        tail = "\n".join(f"  {line}" for line in lines)
        raise RuntimeError(f"{run} exited with {code}; the end of {output}:\n{tail}")
    result = Run.load(run.folder)
    _check_reached_end(run, result)
    write_atomically(run.folder / "finished.json", json.dumps({"seconds": seconds}))
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    perplexity = result.mean_perplexity[-1, 0]
    print(f"[{place}] {run}: mean perplexity {perplexity:.2f}, {seconds:.0f} s", flush=True)


def _check_reached_end(run: PlannedRun, result: Run) -> None:
    """Refuse a run that exited with 0 before its end: after a SIGTERM, or for want of data."""
    if result.validation_iteration[-1:].tolist() == [result.info.train_iters]:
        return
    output = (run.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    if said := re.search(r"^training ended after step \d+: .*", output, re.MULTILINE):
        raise RuntimeError(f"{run}: {said[0]}; lower train-iters, or let domains repeat")
    raise RuntimeError(
        f"{run} ended after step {result.iteration[-1]:.0f} of {result.info.train_iters}; the same "
        "command goes on from there"
    )


# --- The door -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a thread each")
    parser.add_argument("--data-path", help="training manifest, in place of the config's")
    parser.add_argument("--valid-data-path", help="validation manifest, likewise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that runs end with it
    try:
        plan = read_plan(options.config, options.data_path, options.valid_data_path)
        runs = plan_runs(plan, options.output)
        run_all(plan, runs, options.jobs)
        loaded: dict[str, dict[int, Run]] = {policy: {} for policy in plan.policies}
        for run in runs:
            if run.policy in loaded:
                loaded[run.policy][run.seed] = Run.load(run.folder)
        comparison = Comparison(loaded, plan.references)
    except (ValueError, OSError, RuntimeError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
    text, figures = tables(comparison), json.dumps(comparison.to_dict(), indent=2) + "\n"
    write_atomically(options.output / "table.md", text)
    for path in filter(None, (options.output / "results.json", options.json)):
        write_atomically(path, figures)
    plots = write_plots(comparison, options.output)
    print(f"\n{text}\nplots: {', '.join(map(str, plots))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
