"""What ``--help`` says: a word on each flag of ours, and its default, once and where it has one."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, REPOSITORY

from megatron_acodm import arguments, launch
from megatron_acodm.evaluation.arguments import build_parser as build_evaluation_parser
from megatron_acodm.help_format import HelpFormatter

PARSERS = {
    "train": arguments.build_parser,
    "launch": launch.build_parser,
    "evaluate": build_evaluation_parser,
}
SAYS_HELP = """
import runpy, sys
for tool in sys.argv[1:]:
    sys.argv = [tool, "--help"]
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, tool
"""


def explained(text: str) -> dict[str, str]:
    """What a help text says of each flag, in one line each."""
    _, *entries = re.split(r"^  (?=-)", text, flags=re.MULTILINE)
    lines = [" ".join(entry.partition("\n\n")[0].split()) for entry in entries]
    return {match[0]: line for line in lines if (match := re.search(r"--[\w-]+", line))}


def test_a_default_is_told_once_and_where_there_is_one() -> None:
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter, description="One.\n\nTwo.")
    parser.add_argument("--plain", default=0, help="a number")
    parser.add_argument("--told", help="default: all")
    parser.add_argument("--written", default=3, help="a number (default: %(default)s)")
    parser.add_argument("--none", help="a file")
    parser.add_argument("--list", nargs="+", default=[], help="files")
    parser.add_argument("--switch", action="store_true", help="on")
    parser.add_argument("--silent", default=1e-3)
    parser.add_argument("--no-word")
    text = parser.format_help()
    assert "One.\n\nTwo.\n" in text
    assert explained(text) == {
        "--help": "-h, --help show this help message and exit",
        "--plain": "--plain PLAIN a number (default: 0)",
        "--told": "--told TOLD default: all",
        "--written": "--written WRITTEN a number (default: 3)",
        "--none": "--none NONE a file",
        "--list": "--list LIST [LIST ...] files",
        "--switch": "--switch on",
        "--silent": "--silent SILENT default: 0.001",
        "--no-word": "--no-word NO_WORD",
    }


@pytest.mark.parametrize("name", PARSERS)
def test_a_door_tells_no_default_twice_and_explains_its_own_flags(name: str) -> None:
    parser = PARSERS[name]()
    for flag, line in explained(parser.format_help()).items():
        assert line.count("default:") <= 1 and "default: None" not in line, flag
    ours = [a for a in parser._actions if any(s.startswith("--acodm-") for s in a.option_strings)]
    assert [action.option_strings for action in ours if not action.help] == []


def test_the_report_is_called_as_it_says() -> None:
    command = [sys.executable, "-m", "megatron_acodm.report", "--help"]
    text = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True).stdout
    assert text.startswith("usage: python -m megatron_acodm.report [-h]")
    assert "`" not in text and "default: None" not in text


def test_tools_tell_no_default_twice_and_explain_what_they_count() -> None:
    folder = REPOSITORY / "tools"
    tools = sorted(path.name for path in folder.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-c", SAYS_HELP, *tools],
        env=ENVIRONMENT,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    helps = re.split(r"^usage: (?:tools/)?(?=\w+\.py )", done.stdout, flags=re.MULTILINE)[1:]
    assert len(helps) == len(tools)
    for text in helps:
        tool, entries = text.split()[0], explained(text)
        assert "``" not in text, tool
        for flag, line in entries.items():
            assert line.count("default:") <= 1 and "default: None" not in line, (tool, flag)
        for flag in {"--kills", "--rounds", "--seeds", "--lr"} & entries.keys():
            assert re.fullmatch(rf"{flag} \w+ .*\w.* \(default: .+\)", entries[flag]), (tool, flag)
