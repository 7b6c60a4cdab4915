"""Door: ``torchrun … -m megatron_acodm.launch``, an unedited Megatron-LM with a mixed diet."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import runpy
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from megatron_acodm.arguments import acodm_config, add_mixing_arguments
from megatron_acodm.config import AcodmConfig
from megatron_acodm.door import fail, rank, speak_once
from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.job_file import ARGUMENTS, MEGATRON_LM, read_arguments
from megatron_acodm.megatron.hosts.manifests import expand_manifests

if TYPE_CHECKING:
    from megatron_acodm.megatron.hosts.megatron_lm import LaunchOptions


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script that the command line names, under a policy if it names one."""
    own, script, theirs = _split(sys.argv[1:] if arguments is None else list(arguments))
    args = _parse(build_parser(), own, script)
    _set_up_logging()
    from megatron_acodm.blending import DataExhausted
    from megatron_acodm.megatron.compat import UnsupportedHostError

    if args.check is not None:
        _check(args, Path(script), theirs)
        return
    try:
        _launch(args, Path(script), theirs)
    except (ValueError, OSError, UnsupportedHostError, DataExhausted) as error:
        if not _is_ours(error.__traceback__):
            raise
        fail(f"error: rank {rank()}: {error}")


def build_parser() -> ArgumentParser:
    """The parser of the launcher's own flags."""
    parser = ArgumentParser(
        prog="python -m megatron_acodm.launch",
        usage="%(prog)s [--acodm-config FILE] [--acodm-* ...] SCRIPT.py [arguments of the script]",
        description="Run a training script of Megatron-LM, such as pretrain_gpt.py, unedited and "
        "with its own arguments, while a policy decides its data mixture.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("data mixing")
    add_mixing_arguments(group, default_policy="the config's; without a config none")
    group.add_argument("--acodm-run-dir", type=Path, metavar="FOLDER",
                       help="for metrics.jsonl, which the report reads; default: acodm in the "
                       "script's --save or --tensorboard-dir")  # fmt: skip
    parser.add_argument("--check", type=int, nargs="?", const=0, metavar="RANKS",
                        help="check configuration, host, data, layout and checkpoint, and end "
                        "without training; outside torchrun, for a job of this many ranks, by "
                        "default those of WORLD_SIZE, else the fewest that the layout "
                        "takes")  # fmt: skip
    return parser


def _split(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    """Our flags, the script and its arguments: the script is the first that ends in .py."""
    for i, argument in enumerate(arguments):
        if argument.endswith(".py") and not argument.startswith("-"):
            return arguments[:i], argument, arguments[i + 1 :]
    return arguments, "", []


def _parse(parser: ArgumentParser, own: Sequence[str], script: str) -> Namespace:
    speak_once(parser)
    args = parser.parse_args(own)
    if not script:
        parser.error("no script is given: name it, ending in .py, after the --acodm-* flags")
    return args


def _config(args: Namespace) -> AcodmConfig | None:
    """The configuration that the flags add up to; None to leave the script alone.

    Raises:
        ValueError: for a bad value, or flags that have no policy to go with.
    """
    if args.acodm_config is not None or args.acodm_policy is not None:
        return acodm_config(args)
    ours = {name: value for name, value in vars(args).items() if name.startswith("acodm_")}
    given = [name for name, value in ours.items() if value not in (None, False)]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise ValueError(f"{flag} needs a policy: give --acodm-config or --acodm-policy as well")
    return None


def _script_arguments(args: Namespace, given: Sequence[str]) -> list[str]:
    """The script's arguments: the job file's, and those that were given, which win."""
    in_file: list[str] = []
    if args.acodm_config is not None:
        in_file = read_arguments(args.acodm_config, [ARGUMENTS, MEGATRON_LM])
    return [*in_file, *given]


def _refuse_misplaced(script: Path, theirs: list[str]) -> None:
    misplaced = [word for word in theirs if word.startswith("--acodm-") or word == "--check"]
    if misplaced:
        raise ValueError(f"{misplaced[0]} is a flag of the launcher: give it before {script.name}")


def _become(script: Path, theirs: list[str]) -> None:
    """Take the script's command line, and look for modules where Python would for it."""
    if not script.is_file():
        raise ValueError(f"the script {script} does not exist")
    sys.argv = [str(script), *theirs]
    sys.path[0] = str(script.absolute().parent)


def _options(args: Namespace, config: AcodmConfig) -> LaunchOptions:
    from megatron_acodm.megatron.hosts.megatron_lm import LaunchOptions

    return LaunchOptions(config, args.acodm_run_dir, args.acodm_adopt, args.acodm_save_policy)


def _launch(args: Namespace, script: Path, theirs: list[str]) -> None:
    config = _config(args)
    _refuse_misplaced(script, theirs)
    theirs = _script_arguments(args, theirs)
    _become(script, theirs)
    from megatron_acodm.megatron.hosts import cpu

    if cpu.runs_on_cpu(theirs):
        cpu.prepare_megatron_lm()  # before anything of Megatron is imported, as by a manifest
    sys.argv[1:] = expand_manifests(theirs)
    if config is None:
        if rank() == 0:
            print("megatron-acodm: no policy, the script runs as it is", flush=True)
        runpy.run_path(str(script), run_name="__main__")
        return
    if rank() != 0:  # Megatron warns of what is not installed; its scripts filter likewise
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
    from megatron_acodm.megatron.hosts.megatron_lm import MegatronLM

    host = MegatronLM(_options(args, config))
    with host.running():
        runpy.run_path(str(script), run_name="__main__")
    if not host.has_trained:
        raise ValueError(
            f"{script.name} ended without training in megatron.training's loop, so nothing was "
            "mixed; the launcher is for scripts that call its pretrain()"
        )


def _check(args: Namespace, script: Path, theirs: list[str]) -> None:
    """Print what would run, or all that is wrong; once a node, as its files are its own."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    import torch

    from megatron_acodm.megatron.hosts import cpu
    from megatron_acodm.megatron.hosts.check import Check, fewest_ranks
    from megatron_acodm.megatron.hosts.preflight import Problems

    warnings.filterwarnings("ignore")
    logging.getLogger("megatron_acodm").setLevel(logging.WARNING)
    logging.getLogger("megatron").propagate = False  # the host's messages
    logging.getLogger("megatron").addHandler(logging.NullHandler())
    problems, options = Problems(), None
    with problems.noted():
        config = _config(args)
        if config is None:
            raise ValueError("--check needs a policy: give --acodm-config or --acodm-policy")
        options = _options(args, config)
    with problems.noted():
        _refuse_misplaced(script, theirs)
    theirs = [word for word in theirs if not word.startswith("--acodm-") and word != "--check"]
    is_readable = False
    with problems.noted():
        theirs = _script_arguments(args, theirs)
        is_readable = True
    told = args.check or os.environ.get("WORLD_SIZE")
    ranks = int(told or fewest_ranks(theirs))
    check = Check(options, problems)
    if is_readable:  # else the script's arguments are not known
        with problems.noted():
            _become(script, theirs)
            if not torch.cuda.is_available():
                # What cannot be imported, the check of the host's symbols will name.
                with contextlib.suppress(ImportError):
                    cpu.prepare_megatron_lm()
            sys.argv[1:] = expand_manifests(theirs)
            check.run(script, ranks)
    if problems.found:
        where = "" if rank() == 0 else f" on {platform.node()}"
        listed = "".join(f"\n- {problem}" for problem in problems.found)
        fail(f"--check: {len(problems.found)} problem(s){where}:{listed}")
    if rank() == 0:
        guessed = "" if told else ", the fewest that its layout takes (--check RANKS for others)"
        print(f"{check.plan}\n--check: all is well with {script.name} on {ranks} ranks{guessed}")


def _set_up_logging() -> None:
    """Our messages, once; the host sets up its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: megatron-acodm: %(message)s"))
    ours = logging.getLogger("megatron_acodm")
    ours.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
    ours.addHandler(handler)
    ours.propagate = False


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether an error was raised by this package, and not by the host or the script."""
    raised_in = ""
    while traceback is not None:
        raised_in = traceback.tb_frame.f_code.co_filename
        traceback = traceback.tb_next
    return Path(__file__).parent in Path(raised_in).parents


if __name__ == "__main__":
    main()
