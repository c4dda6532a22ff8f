"""Run folders into one HTML page: python -m experiments.report --workdir=a[,b...] [--output=page.html]."""

import argparse
import sys
from pathlib import Path

from k2jax.report.run_folder import RunFolderError
from k2jax.report.training import write_report


def main(arguments: list[str] | None = None) -> None:
    """Write the page and print its path; an unreadable run folder ends the program with the reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="run folders, separated by commas; more than one overlay")
    parser.add_argument("--output", type=Path, help="where the page goes (default: report.html in the first folder)")
    options = parser.parse_args(arguments)
    workdirs = [Path(name) for name in options.workdir.split(",") if name]
    try:
        print(write_report(workdirs, options.output))
    except RunFolderError as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
