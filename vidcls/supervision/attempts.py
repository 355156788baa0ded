"""One launch: watched until it ends, and what its end means."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vidcls.faults.exits import MEANINGS, Exit
from vidcls.supervision.folder import RunFolder, step_of
from vidcls.supervision.places import Return
from vidcls.supervision.session import Session
from vidcls.supervision.signals import LOOK_SECONDS, StopRequests

KILLED_RANK = 247  # launch.py leaves with -9
KILLED = (KILLED_RANK, 128 + 9)
SSH_FAILED = 255
FOLLOWS = ("peer_lost", "launcher_gone", "stopped")  # kinds that another rank's end brings about


@dataclass(frozen=True)
class Patience:
    """Seconds. drain: from a rank's report to the end of the command. silence: without output or log row; None: any.
    stop: from a request to stop to the end of the command."""

    drain: float = 45.0
    silence: float | None = None
    stop: float = 300.0


@dataclass(frozen=True)
class End:
    """How a launch ended. asked: what the supervisor did about it: "", rejoin, stop, drain, silence or force."""

    code: int
    asked: str = ""


@dataclass(frozen=True)
class Attempt:
    """One launch and its verdict: a row of supervise.jsonl.

    step: where it failed, by the report of the rank that failed first. last_step: the furthest it is known to have
    come.
    resumed_from and saved: the newest checkpoint before and after it.
    """

    number: int
    started: float
    ended: float
    launch: str  # the name it was given; its ranks' reports have it
    hosts: Mapping[str, int]  # {}: this host, without a hostfile
    dropped: Mapping[str, str]  # host -> why it does not take part
    ranks: int | None
    port: int
    code: int
    verdict: str
    asked: str
    step: int | None
    resumed_from: int
    last_step: int
    saved: int
    cause: str

    @property
    def progressed(self) -> bool:
        return self.saved > self.resumed_from

    def row(self) -> dict[str, Any]:
        return asdict(self)


def watch(
    session: Session,
    folder: RunFolder,
    launch: str,
    requests: StopRequests,
    patience: Patience,
    rejoin: Return,
) -> End:
    """Wait for the end of a launch, and bring it about where it must be.

    Args:
        launch: its name.
    """
    asked, deadline = "", None
    first_report, looked, size = None, 0.0, folder.log_size()
    alive = time.monotonic()
    while (code := session.code()) is None:
        now = time.monotonic()
        if requests.force:
            return End(session.kill(), "force")
        if deadline is not None and now > deadline:
            _say(f"not stopped after {patience.stop:g} s: killed")
            return End(session.kill(), asked)
        reason = "stop" if requests.stop else "rejoin" if rejoin.back else ""
        if reason and asked != "stop" and asked != reason:
            asked, deadline = reason, now + patience.stop
            _say(f"{requests.stop or ', '.join(rejoin.back) + ' answers again'}: the run is asked to save and stop")
            if not _ask_to_stop(folder):
                return End(session.kill(), asked)
        if now - looked > 1.0:
            looked = now
            if first_report is None and folder.reports(launch):
                first_report = now
            if folder.log_size() != size:
                size, alive = folder.log_size(), now
        if first_report is not None and now - first_report > patience.drain:
            _say(f"a rank has failed, and the command goes on {patience.drain:g} s later: killed")
            return End(session.kill(), asked or "drain")
        if patience.silence is not None and now - max(alive, session.last_output) > patience.silence:
            _say(f"no sign of life for {patience.silence:g} s: killed")
            return End(session.kill(), asked or "silence")
        time.sleep(LOOK_SECONDS)
    session.end()
    return End(code, asked)


def _ask_to_stop(folder: RunFolder) -> bool:
    try:
        folder.ask_to_stop()
    except OSError as error:
        _say(f"the run cannot be asked to stop, {error}: killed")
        return False
    return True


@dataclass(frozen=True)
class Verdict:
    name: str
    code: int
    cause: str
    step: int | None = None


def judge(end: End, outcome: Mapping[str, Any], reports: list[dict[str, Any]]) -> Verdict:
    """What the end of a launch means. Neither its code nor silence is believed alone.

    Args:
        outcome: the run's own word that it ended well; {} without.
        reports: the ranks' last words, oldest first.
    """
    word = outcome.get("outcome")
    if word == "finished":  # a rank that fails after that has nothing more to do
        return Verdict("finished", Exit.DONE, "" if end.code == 0 else f"all is saved; then exit code {end.code}")
    first = first_failure(reports)
    if end.asked in ("stop", "force") and end.code != Exit.USER_ERROR:
        saved = "saved and stopped" if word == "stopped" else f"ended (exit code {end.code}) without saving anew"
        return Verdict("stopped", Exit.STOPPED, f"asked by a signal; the run {saved}")
    if word == "stopped" or (end.code == Exit.STOPPED and first is None):
        if end.asked == "rejoin":
            return Verdict("rejoin", Exit.STOPPED, "stopped to take hosts in again")
        return Verdict("stopped", Exit.STOPPED, "asked by somebody else: a STOP file, or a signal to the ranks")
    if first is not None:
        return _from_report(end, first, _silent_ranks(reports))
    if end.asked == "silence":
        return Verdict("silent", Exit.STUCK, "no output and no log row in time")
    if end.code == 0:
        return Verdict("false_success", Exit.FAILED, "exit code 0, but the run does not say that it has finished")
    if end.code in KILLED:
        return Verdict("killed", end.code, f"exit code {end.code}: a rank, or the launcher, was killed (SIGKILL)")
    if end.code == SSH_FAILED:
        return Verdict("connection_lost", end.code, "exit code 255: ssh lost a host, or did not reach it")
    if end.code in MEANINGS:
        kind = Exit(end.code)
        return Verdict(kind.name.lower(), kind, f"exit code {end.code}: {MEANINGS[kind]}")
    return Verdict(f"code_{end.code}", end.code, f"exit code {end.code}")


def first_failure(reports: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the reports, oldest first, the one the others follow from."""
    own = [report for report in reports if report.get("kind") not in FOLLOWS]
    return next(iter(own or reports), None)


def _silent_ranks(reports: list[dict[str, Any]]) -> list[int]:
    """The ranks that said nothing, where all others only lost a peer: one of those is the peer."""
    if any(report.get("kind") not in FOLLOWS for report in reports):
        return []
    world = max(int(report.get("world_size") or 0) for report in reports)
    return sorted(set(range(world)) - {report.get("rank") for report in reports})


def _from_report(end: End, report: dict[str, Any], silent: list[int]) -> Verdict:
    kind, step = str(report.get("kind", "failed")), report.get("step")
    known = {each.name.lower(): int(each) for each in Exit}
    if kind == "killed":
        code = KILLED_RANK
    else:
        code = known.get(kind, known["peer_lost"] if kind in FOLLOWS else end.code or int(Exit.FAILED))
    where = f"rank {report.get('rank')} on {report.get('host')} in phase {report.get('phase')}"
    at = "" if step is None else f" at step {step}"
    clips = f"; clips {report['clips']}" if report.get("clips") else ""
    unheard = f"; no word from rank {', '.join(map(str, silent))}" if silent else ""
    return Verdict(kind, code, f"{where}{at}: {kind}: {report.get('message')}{clips}{unheard}", step)


def last_step(folder: RunFolder, reports: list[dict[str, Any]], saved: int) -> int:
    """The most optimizer steps that anything of a launch tells of."""
    told = [report["step"] for report in reports if isinstance(report.get("step"), int)]
    logged = [row["step"] for row in folder.rows()[-1:]]
    return max([saved, step_of(folder.newest_checkpoint()), *told, *logged])


def _say(text: str) -> None:
    print(f"supervise: {text}", flush=True)
