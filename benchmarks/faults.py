"""What happens on many hosts, one fault after another: what the user sees, and how long until all is gone.

    python benchmarks/faults.py [--only NAME ...] [--keep DIR]       about fifteen minutes; needs root, sshd, pdsh, ip

Two hosts with addresses, process ids and an sshd of their own, made of network namespaces on this machine, train the
tiny model through `deepspeed --hostfile` (pdsh), with limits of 20 s for collectives and 25 s for a phase. Each fault
is made once in a run of its own. Then the supervisor has three hosts, of which one is powered off.

    gone       seconds from the fault (of launches: from the command) until no process of the run is on any host
    says       the fault's own words were found in what the command printed or in failures/

It fails when something is left after 60 s, when the words are missing, or when the exit code is another than the one
that docs/reliability.md gives. Exit codes: 0 all is as it should be, 1 something is not, 2 wrong options.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT, tool
from rounds import RESULTS, conditions, table, write_json

sys.path.insert(0, str(ROOT))  # the faults are those of tests/many_hosts
from tests.support.host_faults import FAULTS, LAUNCH_FAULTS, cut_link_briefly, power_off
from tests.support.hosts import Hosts, NoHostsError
from tests.support.many_hosts import Run, deepspeed_words, see, see_resumed, supervise_words

BRIEF, SUPERVISED = "cut_link_briefly", "supervised"


@dataclass(frozen=True)
class Row:
    """code: of the command, as a shell has it. gone: seconds, None: more than 60. right: it is as documented."""

    name: str
    title: str
    code: int | None
    gone: float | None
    words: str
    right: bool


def fault_row(hosts: Hosts, shards: Path, folder: Path, name: str) -> Row:
    if name in FAULTS:
        fault = FAULTS[name]
        with Run(hosts, shards, folder, deepspeed_words(hosts)) as run:
            run.wait_for_step(3)
            since = time.monotonic()
            fault.act(run)
            seen = see(run, since)
        title, says, codes = fault.title, fault.says, fault.codes
    else:
        launch = LAUNCH_FAULTS[name]
        with launch.around(hosts) as words, Run(hosts, shards, folder, words) as run:
            seen = see(run, run.started)
        title, says, codes = launch.title, launch.says, launch.codes
    right = seen.seconds is not None and says in seen.words and seen.code in codes
    return Row(name, title, seen.code, seen.seconds, says, right)


def brief_row(hosts: Hosts, shards: Path, folder: Path) -> Row:
    with Run(hosts, shards, folder, deepspeed_words(hosts), max_steps=60) as run:
        run.wait_for_step(5)
        cut_link_briefly(run)
        code = run.process.wait(120)
        right = code == 0 and len(run.rows()) == 60 and not run.reports()
    return Row(BRIEF, "link cut for 5 s", code, 0.0, "nothing: the run goes on", right)


def supervised_row(shards: Path, folder: Path) -> Row:
    hosts = Hosts(3)
    try:
        with Run(hosts, shards, folder, supervise_words(hosts)) as run:
            run.wait_for_save()
            since = time.monotonic()
            power_off(run)
            resumed = see_resumed(run, since)
    finally:
        hosts.close()
    words = f"{resumed.ranks} ranks took the first new step after {resumed.seconds} s"
    title = "one of three hosts powered off, supervised"
    return Row(SUPERVISED, title, resumed.code, resumed.seconds, words, resumed.ranks == 2 and resumed.code == 75)


def main() -> int:
    names = [*FAULTS, BRIEF, *LAUNCH_FAULTS, SUPERVISED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--keep", type=Path, help="folder for what the runs wrote (default: a temporary one)")
    args = parser.parse_args()
    work = args.keep or Path(tempfile.mkdtemp(prefix="vidcls-faults-"))
    rows = []
    try:
        tool("make_motion_clips.py", "--out", work / "videos", "--per-class", 8, "--size", 56)
        settings = ("--frames", 4, "--short-side", 56, "--workers", 0)
        tool("make_shards.py", "folder", "--videos", work / "videos", "--out", work / "shards", *settings)
        hosts = Hosts(2)
        try:
            for name in args.only:
                if name == SUPERVISED:
                    continue
                if name == BRIEF:
                    rows.append(brief_row(hosts, work / "shards", work / name))
                else:
                    rows.append(fault_row(hosts, work / "shards", work / name, name))
                print(f"{rows[-1].title}: {'as it should be' if rows[-1].right else 'NOT AS IT SHOULD BE'}", flush=True)
        finally:
            hosts.close()
        if SUPERVISED in args.only:
            rows.append(supervised_row(work / "shards", work / SUPERVISED))
    except NoHostsError as error:
        print(f"error: no hosts can be made here: {error}", file=sys.stderr)
        return 1
    finally:
        if args.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    lines = [
        [
            row.title,
            str(row.code),
            "-" if row.gone is None else f"{row.gone:.1f} s",
            row.words,
            "yes" if row.right else "NO",
        ]
        for row in rows
    ]
    table("Faults on many hosts", ["fault", "exit code", "gone", "says", "right"], lines)
    write_json(RESULTS / "faults.json", {**conditions("torch", "deepspeed"), "faults": rows})
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
