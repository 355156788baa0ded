"""Look at every host before a launch: what is wrong, on which host, and what to do about it.

    python tools/doctor.py                                                 this machine
    python tools/doctor.py --hostfile hosts                                every host of a launch
    python tools/doctor.py --hostfile hosts --output-dir runs/ucf101 --data data/ucf101/train

Starts a probe on each host over ssh, in this folder and with this interpreter, as `deepspeed --hostfile` starts ranks.
It writes nothing but a small file in --output-dir, for a moment. What each column looks at: docs/clusters.md.
Exit codes: 0 nothing fails, 1 something does, 2 wrong options or hostfile, 130 interrupted.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a probe must run where rich is missing
    from vidcls.doctor.findings import Report

PORT = 29500  # DeepSpeed's --master_port
WIDTH = 110  # of the table at least: a narrow terminal folds whole lines, not words


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--hostfile", type=Path, help="as for deepspeed, see launch/hostfile.example (this machine alone)"
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", help="where the run will write; must be one folder for all hosts"
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="SHARDS", help="folders or URLs of shards to read from"
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"of the rendezvous, --master_port of deepspeed ({PORT})"
    )
    parser.add_argument(
        "--ssh-port", type=int, help="of the hosts' sshd, deepspeed's --ssh_port (as ssh is configured)"
    )
    parser.add_argument("--timeout", type=float, default=60, help="seconds that a host may take for one answer (60)")
    parser.add_argument("--json", action="store_true", help="print findings and all that was measured, for programs")
    parser.add_argument("--probe", type=float, metavar="SECONDS", help=argparse.SUPPRESS)  # what it runs on hosts
    args = parser.parse_args()
    for name, port in (("--port", args.port), ("--ssh-port", args.ssh_port)):
        if port is not None and not 1 <= port <= 65535:
            parser.error(f"{name}: must be from 1 to 65535, got {port}")
    if not 1 <= args.timeout <= 3600:
        parser.error(f"--timeout: must be from 1 to 3600 seconds, got {args.timeout}")
    return args


def show(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vidcls.doctor.findings import CHECKS, FAIL

    console = Console(highlight=False, emoji=False)
    console.width = max(console.width, WIDTH)
    styles = {"ok": "green", "warn": "yellow", FAIL: "bold red"}
    shown = [check for check in CHECKS if any(report.cell(host, check) for host in report.hosts)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("host", overflow="fold")
    for check in shown:
        table.add_column(check, min_width=4, no_wrap=True)
    for host in report.hosts:
        cells = [report.cell(host, check) or "-" for check in shown]
        table.add_row(Text(host), *(Text(cell, style=styles.get(cell, "dim")) for cell in cells))
    console.print(table)
    for finding in report.findings:
        line = Text(f"{finding.level:<4} ", style=styles[finding.level])
        line.append(_safe(f"{finding.host} {finding.check}: {finding.text}. "), style="default")
        line.append(_safe(f"Fix: {finding.fix}"), style="default")
        console.print(line, soft_wrap=True)
    if not report.findings:
        console.print("nothing found that would stop a launch")


def _safe(text: str) -> str:
    """What other hosts say, as one line that cannot steer the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def main() -> int:
    args = parse_args()
    if args.probe is not None:
        from vidcls.doctor.probe import serve

        return serve(args.probe)
    from vidcls.doctor.examine import Plan, examine
    from vidcls.hosts import read_hostfile

    try:
        plan = Plan(
            script=Path(__file__).resolve(),
            directory=Path.cwd(),
            environment=dict(os.environ),
            slots={} if args.hostfile is None else read_hostfile(args.hostfile),
            output_dir=args.output_dir,
            data=args.data,
            port=args.port,
            timeout=args.timeout,
            ssh_port=args.ssh_port,
        )
        report = examine(plan)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        show(report)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
