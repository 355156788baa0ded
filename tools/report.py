"""Write the report of a run again: one HTML file that needs no network.

    python tools/report.py RUN [--out FILE]

Curves of training, every evaluation below RUN with confusion, classes, mistakes and calibration, and how it was made.
A run keeps its report up to date by itself (html_report), and so does launch/evaluate.py.
"""

import argparse
from pathlib import Path

from vidcls.command import user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument("--out", type=Path, help="where to write (default: RUN/report.html)")
    arguments = parser.parse_args()
    with user_errors():
        from vidcls.report.write import is_run, write_report

        if not is_run(arguments.run):
            raise ValueError(f"RUN: {arguments.run} is no output folder of a run: it has no config.yaml")
        print(write_report(arguments.run, arguments.out))


if __name__ == "__main__":
    main()
