"""Runs tasks of EleutherAI's lm-evaluation-harness, on data of this machine where it is given."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_acodm.evaluation.code_execution import can_isolate, execute
from megatron_acodm.evaluation.scoring import Scorer

logger = logging.getLogger(__name__)

HUMANEVAL = "humaneval"
_HUMANEVAL_DATA = "openai/openai_humaneval"


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks are run, and how."""

    tasks: Sequence[str]
    """Names of tasks, groups or tags, or paths of task files (YAML)."""

    include_path: Path | None = None
    """A folder with task files, beside the harness's own."""

    datasets: Path | None = None
    """A folder with datasets: a task's ``cais/mmlu`` is read from its subfolder ``cais/mmlu``."""

    num_fewshot: int | None = None
    """Examples in the prompt; None: each task's own number."""

    limit: int | None = None
    """Questions of each task, its first ones."""

    gen_kwargs: str | None = None
    """In place of the tasks' generation settings, as ``max_gen_toks=256,…``."""

    run_code: bool = False
    """Whether code that the model writes may be run (``humaneval``)."""


def check_options(options: TaskOptions) -> None:
    """Refuse what cannot be run, before a model is loaded.

    Raises:
        ValueError: with the remedy.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks needs lm-evaluation-harness, which is not installed; run: pip install "
            "'megatron-acodm[evaluate]' (or: pip install lm_eval)"
        )
    if HUMANEVAL in options.tasks and not options.run_code:
        raise ValueError(
            "the task humaneval runs code that the model writes, within limits but with this "
            "user's rights; where that is acceptable (in a container, say), give "
            "--allow-code-execution"
        )
    for flag, folder in (
        ("--include-path", options.include_path),
        ("--datasets", options.datasets),
    ):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{flag}: {folder} is not a folder")


def run_tasks(scorer: Scorer, tokenizer: Any, options: TaskOptions) -> dict[str, Any]:
    """Run the tasks, on rank 0, while the others follow the scorer.

    Returns:
        The harness's ``results`` and, for groups of tasks, ``groups``; ``n-shot``, ``n-samples``
        and ``versions`` of each.

    Raises:
        ValueError: when a task is unknown or its data is not there.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megatron_acodm.evaluation.language_model import MegatronLM

    manager = TaskManager(include_path=options.include_path and str(options.include_path))
    with _datasets_from(options.datasets):
        loaded = [task for name in options.tasks for task in _load(manager, name)]
        _refuse_unlimited_code(loaded)
        results = simple_evaluate(
            model=MegatronLM(scorer, tokenizer),
            tasks=loaded,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            gen_kwargs=options.gen_kwargs,
            task_manager=manager,
            log_samples=False,
        )
    kept = ("results", "groups", "n-shot", "n-samples", "versions")
    return {key: results[key] for key in kept if results.get(key)}


def tasks_table(results: Mapping[str, Any]) -> str:
    """The result of ``run_tasks`` as the harness's own table, groups in one of their own."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(str(table).rstrip() for table in tables)


def _load(manager: Any, name: str) -> list[Any]:
    """The tasks or groups of a name, their data read."""
    if name == HUMANEVAL:
        return [_humaneval()]
    try:
        loaded = manager.load([name])
    except KeyError as error:
        raise ValueError(
            f"--tasks: {name} is no task of lm-evaluation-harness, nor of --include-path, nor a "
            "task file; `lm_eval ls tasks` lists its own"
        ) from error
    except Exception as error:  # the datasets library has many kinds
        raise _missing_data(name, error) from error
    inner = {task for group in loaded["groups"].values() for task in group.child_names}
    whole = [group for key, group in loaded["groups"].items() if key not in inner]
    covered = {task.task_name for group in whole for task in group.get_all_tasks()}
    return whole + [task for key, task in loaded["tasks"].items() if key not in covered]


def _refuse_unlimited_code(loaded: Sequence[Any]) -> None:
    for item in loaded:
        for task in item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]:
            if getattr(task, "UNSAFE_CODE", False):
                raise ValueError(
                    f"the task {task.task_name} would run code that the model writes in the "
                    f"harness's own process, without limits; only {HUMANEVAL} is run within them"
                )


def _missing_data(name: str, error: Exception) -> ValueError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(
        f"the task {name} cannot be set up: {lines[0]}; where its data cannot be downloaded, "
        "put the dataset's repository under its name into a folder and give that with --datasets"
    )


@contextlib.contextmanager
def _datasets_from(root: Path | None) -> Iterator[None]:
    """Let tasks find their datasets under ``root``, where they are there."""
    if root is None:
        yield
        return
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        local = root / path
        return original(str(local) if local.is_dir() else path, *args, **kwargs)

    datasets.load_dataset = load_dataset
    try:
        yield
    finally:
        datasets.load_dataset = original


def _humaneval() -> Any:
    """The harness's ``humaneval``, its programs run by ``code_execution``.

    The harness's own runs them in its process, with a metric that it downloads.
    """
    from lm_eval.api.task import ConfigurableTask

    if not can_isolate():
        logger.warning(
            "this system does not let generated code be cut off from the network (no user "
            "namespaces); run it where that does not matter"
        )
    config = {
        "task": HUMANEVAL,
        "dataset_path": _HUMANEVAL_DATA,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "process_results": _passes,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    try:
        return ConfigurableTask(config=config)
    except Exception as error:
        raise _missing_data(HUMANEVAL, error) from error


def _passes(document: Mapping[str, str], completions: Sequence[str]) -> dict[str, float]:
    program = f"{document['prompt']}{completions[0]}\n{document['test']}\n"
    return {"pass@1": float(execute(f"{program}check({document['entry_point']})\n").passed)}
