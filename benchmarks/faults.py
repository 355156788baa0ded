"""What happens on many hosts, one fault after another: what the user sees, and how long until all is gone.

    python benchmarks/faults.py [--only NAME ...] [--keep DIR]       about 13 minutes; needs root, sshd, pdsh, ip

Two hosts with addresses, process ids and an sshd of their own, made of network namespaces on this machine, train the
tiny model through `deepspeed --hostfile` (pdsh), with limits of 20 s for collectives and 25 s for a phase. Each fault
is made in a run of its own, and those that a restart helps against once more under launch/supervise.py. Last, the
supervisor has three hosts, of which one is powered off.

    gone       seconds from the fault (of launches: from the command) until no process of the run is on any host
    says       the fault's own words were found in what the command printed or in failures/
    resumed    supervised: seconds from the fault (or the command) to the first new step, and the ranks that took it

It fails when something is left after 60 s, when the words are missing, when the exit code is another than the one that
docs/reliability.md gives, or when a supervised run did not go on. Exit codes: 0 all is as it should be, 1 something is
not, 2 wrong options.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from processes import ROOT, tool
from rounds import RESULTS, conditions, table, write_json

sys.path.insert(0, str(ROOT))  # the faults are those of tests/many_hosts
from tests.support.host_faults import FAULTS, LAUNCH_FAULTS, cut_link_briefly
from tests.support.hosts import Hosts, NoHostsError
from tests.support.many_hosts import Resumed, Run, deepspeed_words, see, see_resumed, supervise_words
from vidcls.faults.exits import Exit

BRIEF, THREE = "cut_link_briefly", "three_hosts"
LEFT_OUT = ("unreachable", "ssh_refused", "host_key_changed")  # the supervisor launches on the other host


@dataclass(frozen=True)
class Row:
    """code: of the command, as a shell has it. gone: seconds, None: more than 60, or the run went on. right: it is as
    documented. resumed: "", where a restart does not help."""

    name: str
    title: str
    code: int | None
    gone: float | None
    words: str
    right: bool
    resumed: str = ""


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
    return Row(BRIEF, "link cut for 5 s", code, None, "nothing: the run goes on", right)


def supervised(hosts: Hosts, shards: Path, folder: Path, name: str) -> Resumed:
    if name in FAULTS:
        with Run(hosts, shards, folder, supervise_words(hosts)) as run:
            run.wait_for_save()
            since = time.monotonic()
            FAULTS[name].act(run)
            return see_resumed(run, since)
    with LAUNCH_FAULTS[name].around(hosts) as words, Run(hosts, shards, folder, supervise_words(hosts, *words)) as run:
        return see_resumed(run, run.started, attempt=1)


def with_resume(row: Row, resumed: Resumed) -> Row:
    if resumed.seconds is None or resumed.code != Exit.STOPPED:
        return replace(row, resumed=f"NO, code {resumed.code}", right=False)
    return replace(row, resumed=f"{resumed.seconds:.1f} s, {resumed.ranks} rank{'s' * (resumed.ranks != 1)}")


def main() -> int:
    names = [*FAULTS, BRIEF, *LAUNCH_FAULTS, THREE]
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
                if name == THREE:
                    continue
                if name == BRIEF:
                    row = brief_row(hosts, work / "shards", work / name)
                else:
                    row = fault_row(hosts, work / "shards", work / name, name)
                if name in (*FAULTS, *LEFT_OUT):
                    folder = work / f"{name}-supervised"
                    row = with_resume(row, supervised(hosts, work / "shards", folder, name))
                rows.append(row)
                print(f"{row.title}: {'as it should be' if row.right else 'NOT AS IT SHOULD BE'}", flush=True)
        finally:
            hosts.close()
        if THREE in args.only:
            hosts = Hosts(3)
            try:
                resumed = supervised(hosts, work / "shards", work / THREE, "power_off")
            finally:
                hosts.close()
            row = Row(THREE, "one of three hosts powered off", resumed.code, None, "", resumed.ranks == 2)
            rows.append(with_resume(row, resumed))
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
            row.resumed,
            "yes" if row.right else "NO",
        ]
        for row in rows
    ]
    table("Faults on many hosts", ["fault", "exit code", "gone", "says", "resumed", "right"], lines)
    write_json(RESULTS / "faults.json", {**conditions("torch", "deepspeed"), "faults": rows})
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
