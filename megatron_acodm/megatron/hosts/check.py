"""``--check``: runs a script of Megatron-LM up to its data, without training or a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import itertools
import math
import os
import runpy
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_acodm.config import AcodmConfig
from megatron_acodm.megatron import patches
from megatron_acodm.megatron.builder import training_blend
from megatron_acodm.megatron.compat import UnsupportedHostError, host_symbol
from megatron_acodm.megatron.hosts import preflight
from megatron_acodm.megatron.hosts.megatron_lm import (
    LaunchOptions,
    MegatronLM,
    checkpoint_folder,
    run_shape,
)
from megatron_acodm.megatron.hosts.records import default_run_dir
from megatron_acodm.megatron.hosts.refusals import refuse_unshared_data, unsupported
from megatron_acodm.megatron.run import RunShape

_INITIALIZE = "megatron.training.training.initialize_megatron"
_PROVIDER = "train_valid_test_dataset_provider"
"""Parameter of the host's ``pretrain``, which calls the above."""

_NOT_CALLED = (
    *(f"global_vars.{name}" for name in (
        "_set_tensorboard_writer", "_set_wandb_writer", "_set_one_logger", "_set_telemetry",
        "_set_adlr_autoresume",
    )),
    "initialize.init_persistent_async_worker",
    "ft_integration.setup",
)  # fmt: skip
"""What the host would leave behind, or connect to, before its data."""

_MODEL_PARALLEL = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
)  # fmt: skip


class _Known(BaseException):
    """The script came to where all that is to be found out is known."""


def fewest_ranks(script_arguments: Sequence[str]) -> int:
    """How many ranks the layout of a script's arguments takes at least."""
    words = [word for argument in script_arguments for word in argument.split("=", 1)]
    flags = {f"--{name.replace('_', '-')}" for name in _MODEL_PARALLEL}
    sizes = {
        flag: max(1, int(value))
        for flag, value in itertools.pairwise(words)
        if flag in flags and value.isdigit()  # the last one wins, as with argparse
    }
    return math.prod(sizes.values())


class Check:
    """What is found out about a launch, problem by problem.

    Args:
        options: the launcher's; without a config where that was refused already.
        problems: takes what is wrong.
    """

    def __init__(self, options: LaunchOptions | None, problems: preflight.Problems) -> None:
        self._options, self._problems = options, problems
        self._args: Namespace | None = None  # as the host has validated them
        self._unvalidated: Namespace | None = None
        self._provider: Any = None
        self._builder: Any = None
        self.plan: preflight.Plan | None = None

    def run(self, script: Path, ranks: int) -> None:
        """Check a script, whose command line is in ``sys.argv``, for a job of ``ranks`` ranks."""
        os.environ["WORLD_SIZE"] = str(ranks)
        for name in ("RANK", "LOCAL_RANK"):
            os.environ.setdefault(name, "0")
        with self._problems.noted():
            driver = MegatronLM(self._options or LaunchOptions(AcodmConfig()))
            driver.install()
            driver.uninstall()
            with self._stopping_early():
                self._read_script(script)
        args = self._args or self._unvalidated
        if args is not None:
            self._check_arguments(args)
            self._check_folders(args)
        if self._args is None:
            self._check_files(args)
            return
        if self._provider is not None:
            self._read_data(self._provider)
        if self._builder is not None:
            self._check_data(self._args)

    # What the script says ----------------------------------------------------------------------

    @contextlib.contextmanager
    def _stopping_early(self) -> Iterator[None]:
        """Patch the host so that it ends when its arguments are known."""
        owner, name, original = host_symbol(_INITIALIZE)
        changes: list[tuple[Any, str, Any]] = [(owner, name, self._initialize(original))]
        for path in _NOT_CALLED:
            with contextlib.suppress(UnsupportedHostError):  # another version has it not
                found, attribute, _ = host_symbol(f"megatron.training.{path}")
                changes.append((found, attribute, lambda *args, **kwargs: None))
        for module in ("initialize", "arguments"):  # by version
            with contextlib.suppress(UnsupportedHostError):
                found, attribute, validate = host_symbol(
                    f"megatron.training.{module}.validate_args"
                )
                changes.append((found, attribute, self._validate(validate)))
        with contextlib.suppress(ImportError):
            restart = importlib.import_module("megatron.training.inprocess_restart")
            unwrapped = lambda pretrain: (pretrain, None)  # noqa: E731
            changes.append((restart, "maybe_wrap_for_inprocess_restart", unwrapped))
        with _changed(changes):
            yield

    def _validate(self, original: Any) -> Any:
        def validate_args(args: Namespace, *more: Any, **kwargs: Any) -> Any:
            self._unvalidated = args
            return original(args, *more, **kwargs)

        return validate_args

    def _initialize(self, original: Any) -> Any:
        known = inspect.signature(original).parameters
        early = {"allow_no_cuda": True, "skip_mpu_initialization": True}
        missing = early.keys() - known.keys()
        if missing:
            raise UnsupportedHostError(
                f"{_INITIALIZE} of this Megatron-LM has no parameter {sorted(missing)[0]!r}"
            )

        @functools.wraps(original)
        def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
            original(*args, **{**kwargs, **early})
            self._args = host_symbol("megatron.training.training.get_args")[2]()
            self._provider = sys._getframe(1).f_locals.get(_PROVIDER)
            raise _Known

        return initialize_megatron

    def _read_script(self, script: Path) -> None:
        with self._quietly(script.name):
            runpy.run_path(str(script), run_name="__main__")
        if self._args is None and not self._problems.found:
            self._problems.add(
                f"{script.name} ended without calling Megatron-LM's pretrain(); the launcher is "
                "for scripts that do"
            )

    @contextlib.contextmanager
    def _quietly(self, source: str) -> Iterator[None]:
        """Keep what the host prints to itself, but note why it ends."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                yield
        except _Known:
            pass
        except SystemExit as error:
            if error.code not in (None, 0):
                last = printed.getvalue().strip().rsplit("\n", 1)[-1]
                self._problems.add(last if "error:" in last else f"{source} exits with {error}")
        except Exception as error:
            # Hosts assert, often without a message: then the line says what was expected.
            line = traceback.extract_tb(error.__traceback__)[-1].line
            what = str(error) or line or ""
            self._problems.add(f"{source} fails with {type(error).__name__}: {what}")

    def _read_data(self, provider: Any) -> None:
        """Let the script say which data it would build."""
        owner, name, _ = host_symbol(patches._BUILD)

        def build(builder: Any) -> Any:
            if training_blend(builder.config) is not None:
                self._builder = builder
                raise _Known
            return [None, None, None]

        with _changed([(owner, name, build)]), self._quietly("the script's dataset provider"):
            provider([1, 1, 1])

    # What is checked ---------------------------------------------------------------------------

    def _check_arguments(self, args: Namespace) -> None:
        config = self._options.config if self._options else None
        self._problems.add(*unsupported(args, config))
        if self._provider is not None:
            with self._problems.noted():
                refuse_unshared_data(self._provider, args.tensor_model_parallel_size)
        elif self._args is not None:
            self._problems.add("the script's dataset provider was not found: data is not checked")

    def _check_folders(self, args: Namespace) -> None:
        asked = self._options and (self._options.run_dir or default_run_dir(args))
        save_policy = self._options.save_policy if self._options else None
        for what, path in {
            "the run directory": asked,
            "--save": getattr(args, "save", None),
            "--tensorboard-dir": getattr(args, "tensorboard_dir", None),
            "--data-cache-path": getattr(args, "data_cache_path", None),
            "--acodm-save-policy": save_policy and Path(save_policy).parent,
        }.items():
            if path and "://" not in str(path):
                preflight.refuse_unwritable(what, path, self._problems)

    def _check_files(self, args: Namespace | None) -> None:
        """Look for the data's files where the host has refused its arguments."""
        with contextlib.suppress(Exception):  # which may be why
            resolve = host_symbol("megatron.training.utils.get_blend_and_blend_per_split")[2]
            blend, blends = resolve(args)
            for prefix in (blend or (blends or [[[]]])[0])[0]:
                with self._problems.noted():
                    preflight.refuse_missing(prefix)

    def _check_data(self, args: Namespace) -> None:
        problems, before = self._problems, len(self._problems.found)
        domains = preflight.read_domains(self._builder, problems)
        if self._options is None or len(problems.found) > before:
            return
        sizes = {name: getattr(args, name, 1) or 1 for name in _MODEL_PARALLEL}
        data_size = args.data_parallel_size
        names = [f"{name.split('_')[0]} {size}" for name, size in sizes.items() if size > 1]
        layout = ", ".join([*names, f"data {data_size}", f"ranks {args.world_size}"])
        with problems.noted():
            run = _settled_run_shape(args)
            with problems.noted():
                run.check_divisible(
                    run.micro_batch_size * data_size,
                    f"--micro-batch-size x data-parallel size = {run.micro_batch_size} x "
                    f"{data_size}",
                )
            plan = preflight.plan(self._options.config, run, self._builder, domains, layout)
            checkpoint = _checkpoint(args)
            if checkpoint is not None:
                model_ranks = sizes["tensor_model_parallel_size"]
                model_ranks *= sizes["pipeline_model_parallel_size"]
                preflight.resume(
                    plan, checkpoint, adopt=self._options.adopt, model_parallel_size=model_ranks
                )
            elif args.load:
                plan.starts = f"from scratch, as no checkpoint is announced in {args.load}"
            run_dir = self._options.run_dir or default_run_dir(args)
            plan.outputs = [f"metrics: {run_dir or 'none without --acodm-run-dir or --save'}"]
            self.plan = plan


def _settled_run_shape(args: Namespace) -> RunShape:
    """The run's sizes, once the host has made steps of ``--train-samples``."""
    if not args.train_iters and not args.train_samples:
        raise ValueError("nothing says how long to train; give --train-iters or --train-samples")
    with contextlib.redirect_stdout(io.StringIO()):
        host_symbol("megatron.training.training.update_train_iters")[2](args)
    return run_shape(args)


def _checkpoint(args: Namespace) -> preflight.Checkpoint | None:
    """The checkpoint that the host would load, if it would go on from one.

    Raises:
        ValueError: when none is there and the host is to end without one.
    """
    if not args.load or getattr(args, "finetune", False):
        return None
    path = "megatron.training.checkpointing.get_checkpoint_tracker_filename"
    tracker = Path(host_symbol(path)[2](args.load))
    iteration = getattr(args, "ckpt_step", None)
    if not iteration:
        if not tracker.is_file():
            if getattr(args, "exit_on_missing_checkpoint", False):
                raise ValueError(f"{tracker} does not exist, and --exit-on-missing-checkpoint asks")
            return None
        text = tracker.read_text(encoding="utf-8").strip()
        if text == "release":
            return None
        if not text.isdigit():
            raise ValueError(f"{tracker} holds {text!r}, not the number of a step")
        iteration = int(text)
    return preflight.Checkpoint(checkpoint_folder(Path(args.load), iteration), iteration)


@contextlib.contextmanager
def _changed(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes for a while."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
