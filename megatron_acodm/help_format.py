"""How ``--help`` reads: with the default of a flag where there is one, told once."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.HelpFormatter):
    """Adds defaults that a help text does not name itself, and keeps paragraphs apart."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default" in text or not _has_default(action):
            return text
        return f"{text} (default: %(default)s)"

    def _format_action(self, action: argparse.Action) -> str:
        if action.help is None and _has_default(action):
            action.help = "default: %(default)s"
        return super()._format_action(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(paragraph, width, indent) for paragraph in text.split("\n\n"))


def _has_default(action: argparse.Action) -> bool:
    default = action.default
    return not (default is None or default is False or default in ([], argparse.SUPPRESS))
