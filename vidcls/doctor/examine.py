"""The whole examination: a probe on every host, what all are asked, and what comes of it."""

from __future__ import annotations

import secrets
import socket
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidcls.doctor import judge
from vidcls.doctor.conversation import ProbeError, Session, ask_clock, remote_command
from vidcls.doctor.environment import check_environment, check_launcher, exported
from vidcls.doctor.findings import FAIL, WARN, Finding, Report
from vidcls.hosts import run_for, ssh_words

LINK_BYTES, LINK_SECONDS = 64 * 2**20, 1.0  # each way, whichever ends first
SETUP = "make the same environment there: source launch/setup_env.sh"


@dataclass(frozen=True)
class Plan:
    """slots: of the hostfile, {} for this machine alone. timeout: seconds for one answer of one host."""

    script: Path
    directory: Path
    environment: Mapping[str, str]
    slots: Mapping[str, int]
    output_dir: str | None
    data: list[str]
    port: int
    timeout: float
    ssh_port: int | None = None


def examine(plan: Plan) -> Report:
    """Look at every host of the plan. Never raises for what is wrong with a host; always ends."""
    here = socket.gethostname()
    report = Report(list(plan.slots) or [here])
    if plan.slots:
        # The host this is typed on need not be one of those that train; its row comes first then.
        coordinator = next((host for host in plan.slots if host.rpartition("@")[2] == here), f"{here} (here)")
        if coordinator not in report.hosts:
            report.hosts.insert(0, coordinator)
        report.looked([coordinator], "launch", check_environment(coordinator, plan.directory, plan.environment))
        if len(plan.slots) > 1:
            report.looked([coordinator], "launch", check_launcher(coordinator))
    with ExitStack() as stack:
        _Examination(plan, report, stack).run()
    order = {host: number for number, host in enumerate(report.hosts)}
    report.findings.sort(key=lambda finding: (finding.level != FAIL, order[finding.host]))
    return report


class _Examination:
    """The steps, in order. A host that stops answering is named once and left out of the later ones."""

    def __init__(self, plan: Plan, report: Report, stack: ExitStack) -> None:
        self.plan, self.report, self.stack = plan, report, stack
        self.hosts = list(plan.slots) or list(report.hosts)
        self.sessions: dict[str, Session] = {}
        self.token = secrets.token_hex(16)  # 32 characters: network.TOKEN_BYTES

    def run(self) -> None:
        self.pool = self.stack.enter_context(ThreadPoolExecutor(len(self.hosts)))
        self.stack.callback(self.end)
        self.start()
        facts = self.ask_all("code", "facts")
        self.report.facts.update(facts)
        seen = self.ask_all("code", "torch", {host: {"seconds": self.plan.timeout} for host in facts})
        if facts:
            self.judge_alone(facts, seen)
            self.clocks()
            self.network(facts)
        if self.plan.output_dir is not None:
            self.folder(str(self.plan.directory / self.plan.output_dir))
        for place in self.plan.data:
            self.shards(place)

    def start(self) -> None:
        """A probe on each host, all at once."""
        plan = self.plan
        seconds = 10 * plan.timeout + 5 * len(self.hosts)
        told = {"python": sys.executable, "script": str(plan.script), "directory": str(plan.directory)}
        words = [sys.executable, "-u", str(plan.script), "--probe", f"{seconds:.0f}"]
        variables = exported(plan.environment, plan.directory)
        command = remote_command(sys.executable, str(plan.script), str(plan.directory), variables, seconds)
        self.sessions = {
            host: Session(host, command if plan.slots else words, told, plan.ssh_port) for host in self.hosts
        }
        self.each("ssh" if plan.slots else "code", lambda host: self.sessions[host].hear("start", plan.timeout))

    def end(self) -> None:
        list(self.pool.map(Session.end, self.sessions.values()))

    def each(self, check: str, do: Callable[[str], Any], hosts: Iterable[str] | None = None) -> dict[str, Any]:
        """`do(host)` for each living host (or those given) at once; a host that fails is failed in `check`."""

        def attempt(host: str) -> tuple[Any, ProbeError | None]:
            try:
                return do(host), None
            except ProbeError as error:
                return None, error

        chosen = [host for host in (self.sessions if hosts is None else hosts) if host in self.sessions]
        results = {}
        for host, (result, error) in zip(chosen, self.pool.map(attempt, chosen), strict=True):
            if error is None:
                results[host] = result
                self.report.looked([host], check)
                continue
            column = error.check or check
            if column != check == "ssh":
                self.report.looked([host], "ssh")  # it led as far as a process that failed
            self.report.looked([host], column, [Finding(host, column, FAIL, error.fault.name, error.fault.fix)])
            self.sessions.pop(host).end()
        return results

    def ask_all(self, check: str, do: str, arguments: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """host -> answer of each living host; arguments: of each host asked (None: all, without any)."""
        given = {host: {} for host in self.sessions} if arguments is None else arguments
        # A question that has its own limit answers by itself; the little more is for the way.
        return self.each(
            check, lambda host: self.sessions[host].ask(do, self.plan.timeout + 5, **given[host]), list(given)
        )

    def judge_alone(self, facts: dict[str, Any], seen: dict[str, Any]) -> None:
        report, slots = self.report, self.plan.slots
        report.looked(facts, "code", judge.judge_code(facts, SETUP))
        report.looked([], "launch", judge.judge_same_machine(facts))
        report.looked(seen, "slots", judge.judge_slots(facts, seen, slots))
        for host, told in facts.items():
            ranks = slots.get(host) or max(1, seen.get(host, {}).get("count", 1))
            report.looked([host], "memory", judge.judge_memory(host, told, ranks))
            report.looked([host], "limits", judge.judge_limits(host, told))
            report.looked([host], "build", judge.judge_build(host, told))

    def clocks(self) -> None:
        if not self.plan.slots:
            return
        offsets = self.each("clock", lambda host: ask_clock(self.sessions[host], self.plan.timeout))
        for host, (offset, uncertainty) in offsets.items():
            self.report.facts[host]["clock"] = {"offset": offset, "uncertainty": uncertainty}
            self.report.looked([host], "clock", judge.judge_clock(host, offset, uncertainty))

    def network(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """The rendezvous port on the first host, every way between two hosts, and the speed of those to the first."""
        if not self.sessions:
            return
        first, report, port = next(iter(self.sessions)), self.report, self.plan.port
        asked = {host: {"port": port if host == first else 0, "token": self.token} for host in self.sessions}
        ports = self.ask_all("port", "listen", {first: asked[first]})
        if "error" in ports.get(first, {}):
            holder = f" by {ports[first]['holder']}" if ports[first]["holder"] else ""
            fix = "end it, or launch with --master_port and another one"
            text = f"port {port}: {ports[first]['error'].lower()}{holder}"
            report.looked([first], "port", [Finding(first, "port", FAIL, text, fix)])
        if len(self.sessions) < 2:
            return
        master = self.master(first)
        others = [host for host in self.sessions if host != first]
        if "port" in ports.get(first, {}):
            self.rendezvous(first, master, facts[first]["addresses"], others)
        self.meet(facts)
        if first in self.sessions:
            self.links(first, master)

    def master(self, first: str) -> str:
        """The address DeepSpeed takes for the rendezvous: the first word of the same command."""
        answer = run_for([*ssh_words(first, self.plan.ssh_port), "hostname", "-I"], self.plan.timeout)
        self.report.looked([first], "peers", judge.judge_master(first, answer.output))
        return next(iter(answer.output.split()), first.rpartition("@")[2])

    def rendezvous(self, first: str, master: str, addresses: list[str], others: list[str]) -> None:
        """Every other host must reach the rendezvous; where one does not, look for an address that all reach."""
        port, name = self.plan.port, first.rpartition("@")[2]
        choices = list(dict.fromkeys([master, name, *addresses]))
        targets = [(address, port, self.token) for address in choices]
        found = self.ask_all("port", "reach", {host: {"targets": targets} for host in others})
        works = [address for i, address in enumerate(choices) if found and all(r[i] is None for r in found.values())]
        fix = f"launch with --master_addr {works[0]}" if works else f"let port {port} of {first} through to the others"
        for host, reasons in found.items():
            if reasons[0] is not None:
                text = f"{first} at {master}, port {port}: {reasons[0]}"
                self.report.looked([host], "port", [Finding(host, "port", FAIL, text, fix)])

    def meet(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Ranks connect to each other at ports of their own choosing: one on each host, tried from all others."""
        listening = self.ask_all("peers", "listen", {host: {"port": 0, "token": self.token} for host in self.sessions})
        has_interface = "GLOO_SOCKET_IFNAME" in exported(self.plan.environment, self.plan.directory)
        targets: dict[str, tuple[str, int, str]] = {}
        for host, told in listening.items():
            wrong = list(judge.judge_own_name(host, facts[host], has_interface))
            self.report.looked([host], "peers", wrong)
            addresses = facts[host]["addresses"]
            if "port" in told and (addresses or not wrong):
                address = facts[host]["own_address"] if not wrong and not has_interface else addresses[0]
                targets[host] = (address, told["port"], self.token)
        asked = {host: [other for other in targets if other != host] for host in self.sessions}
        found = self.ask_all(
            "peers", "reach", {host: {"targets": [targets[o] for o in others]} for host, others in asked.items()}
        )
        for host, reasons in found.items():
            for other, reason in zip(asked[host], reasons, strict=True):
                if reason is not None:
                    text = f"{other} at {targets[other][0]}, a random port: {reason}"
                    fix = f"open all TCP ports between {host} and {other}: ranks choose theirs at random"
                    self.report.looked([host], "peers", [Finding(host, "peers", FAIL, text, fix)])

    def links(self, first: str, master: str) -> None:
        """One host after the other, so that they do not share the first one's link."""
        told = self.ask_all("link", "listen", {first: {"port": 0, "token": self.token}})
        if "port" not in told.get(first, {}):
            return
        arguments = {
            "address": master,
            "port": told[first]["port"],
            "token": self.token,
            "size": LINK_BYTES,
            "seconds": LINK_SECONDS,
        }
        speeds: dict[str, dict[str, float]] = {}
        for host in [host for host in self.sessions if host != first]:
            if self.report.cell(host, "port") == FAIL:
                continue  # it was said already that there is no way
            speeds |= self.ask_all("link", "link", {host: arguments})
        for host, speed in speeds.items():
            self.report.facts[host]["link"] = speed
            rest = [min(other.values()) for name, other in speeds.items() if name != host]
            usual = statistics.median(rest) if rest else 0.0
            self.report.looked([host], "link", judge.judge_link(host, first, speed, usual))

    def folder(self, path: str) -> None:
        """One folder for all: where it is to be made, written by each, read by all, locked by one."""
        told = self.ask_all("folder", "nearest", {host: {"path": path} for host in self.sessions})
        folders: dict[str, str] = {}
        for host, answer in told.items():
            if "error" in answer:
                wrong = Finding(host, "folder", FAIL, answer["error"], "choose another output_dir")
                self.report.looked([host], "folder", [wrong])
                continue
            folders[host] = answer["folder"]
            self.report.facts[host]["folder"] = answer
            self.report.looked([host], "folder", judge.judge_space(host, answer))
        deepest = max(folders.values(), key=len, default="")
        for host in [host for host, folder in folders.items() if folder != deepest]:
            example = next(other for other, folder in folders.items() if folder == deepest)
            text = f"{deepest} is there on {example} but not here"
            fix = f"mount it there as on {example}: output_dir must be one folder for all hosts"
            self.report.looked([host], "folder", [Finding(host, "folder", FAIL, text, fix)])
            del folders[host]
        names = {host: f".vidcls-doctor-{self.token}-{number}" for number, host in enumerate(folders)}
        try:
            self.tokens(deepest, names)
        finally:
            self.ask_all("folder", "remove", {host: {} for host in names})

    def tokens(self, folder: str, names: dict[str, str]) -> None:
        written = self.ask_all(
            "folder",
            "write",
            {host: {"folder": folder, "name": name, "token": f"{self.token} {name}"} for host, name in names.items()},
        )
        for host, reason in written.items():
            if reason is not None:
                text = f"{folder} cannot be written: {reason.lower()}"
                fix = "give this user the right to write there, or room; as root over NFS: no_root_squash"
                self.report.looked([host], "folder", [Finding(host, "folder", FAIL, text, fix)])
        writers = {host: names[host] for host, reason in written.items() if reason is None}
        expected = {name: f"{self.token} {name}" for name in writers.values()}
        question = {"folder": folder, "names": list(expected), "size": len(self.token) + 80}
        for host, found in self.ask_all("folder", "read", dict.fromkeys(writers, question)).items():
            blind = [o for o, n in writers.items() if (found[n] or "").rstrip("\0") != expected[n]]
            if blind:
                text = f"{folder}: a file that {', '.join(blind[:3])} wrote is not seen here"
                fix = f"mount the same shared file system at {folder} on all hosts"
                self.report.looked([host], "folder", [Finding(host, "folder", FAIL, text, fix)])
        self.locks(folder, writers)

    def locks(self, folder: str, writers: dict[str, str]) -> None:
        """A run holds a lock in its output folder, so that no second one writes there, on whatever host."""
        first = next(iter(writers), None)
        if first is None:
            return
        name = writers[first]
        reason = self.ask_all("folder", "lock", {first: {"folder": folder, "name": name}}).get(first)
        fix = "mount it with locks (NFS: not nolock or local_lock; Lustre: flock)"
        if reason is not None:
            text = f"{folder}: files cannot be locked: {reason.lower()}"
            self.report.looked([first], "folder", [Finding(first, "folder", FAIL, text, fix)])
            return
        seeing = [h for h in writers if h != first and self.report.cell(h, "folder") != FAIL]
        answers = self.ask_all("folder", "try_lock", {h: {"folder": folder, "name": name} for h in seeing})
        for host, answer in answers.items():
            if answer == "free":
                text = f"{folder}: a lock of {first} is not seen here; a second run in it would go unnoticed"
                self.report.looked([host], "folder", [Finding(host, "folder", WARN, text, fix)])
            elif answer != "held":
                text = f"{folder}: files cannot be locked: {answer.lower()}"
                self.report.looked([host], "folder", [Finding(host, "folder", FAIL, text, fix)])

    def shards(self, place: str) -> None:
        local = place if "://" in place else str(self.plan.directory / place)
        half = self.plan.timeout / 2  # opening the index takes its time too
        found = self.ask_all("data", "shards", {h: {"place": local, "seconds": half} for h in self.sessions})
        digests = {host: told["digest"] for host, told in found.items() if "digest" in told}
        usual = max(digests.values(), key=list(digests.values()).count, default=None)
        for host, told in found.items():
            self.report.facts[host].setdefault("data", {})[place] = told
            wrong = []
            if "error" in told:
                fix = f"look closer there: python tools/inspect_shards.py {place} --verify"
                wrong.append(Finding(host, "data", FAIL, told["error"], fix))
            elif told["digest"] != usual:
                other = next(h for h, digest in digests.items() if digest == usual)
                text = f"{place}: another data set than on {other} (index {told['digest'][:12]})"
                wrong.append(Finding(host, "data", FAIL, text, f"copy it from {other}, or share it"))
            self.report.looked([host], "data", wrong)
