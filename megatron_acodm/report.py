"""Door: ``python -m megatron_acodm.report RUN_DIR`` shows a run as a table and an HTML page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.reporting import page, table
from megatron_acodm.reporting.run import Run


def closing_table(run_dir: str | Path) -> str:
    """What happened to each domain of a run, and what mixing cost, as text for a terminal.

    Raises:
        ValueError: if the run directory is missing or damaged.
    """
    return table.closing_table(Run.load(run_dir))


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run and return its path, ``run_dir/report.html`` by default.

    Raises:
        ValueError: if the run directory is missing or damaged.
        OSError: if the report cannot be written.
    """
    path = Path(run_dir) / "report.html" if output is None else Path(output)
    path.write_text(page.render(Run.load(run_dir)), encoding="utf-8")
    return path


def main() -> None:
    """Parse the command line, write the report and print the closing table."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_acodm.report",
        description="Show a training run as a table on the terminal and as an HTML page.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, help="directory that the training run wrote")
    parser.add_argument("--output", type=Path, help="default: RUN_DIR/report.html")
    arguments = parser.parse_args()
    try:
        path = write_report(arguments.run_dir, arguments.output)
        print(closing_table(arguments.run_dir))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"report: {path}")


if __name__ == "__main__":
    main()
