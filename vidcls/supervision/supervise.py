"""The loop: launch, watch, judge, decide, and launch again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from vidcls.config import Config, check_output_dir, load_config
from vidcls.faults.exits import Exit
from vidcls.faults.lock import LOCK_NAME, lock_output
from vidcls.supervision import record
from vidcls.supervision.attempts import Attempt, End, Patience, Verdict, judge, last_step, watch
from vidcls.supervision.command import Command, parse_command
from vidcls.supervision.folder import RunFolder, global_batch_of, step_of
from vidcls.supervision.launches import (
    THIS_HOST,
    Batch,
    batch_keys,
    free_port,
    launch_environment,
    launcher_options,
    start_from,
)
from vidcls.supervision.places import Places, Return, probe_all, write_hostfile
from vidcls.supervision.policy import NO_HOSTS, NO_OUTPUT, Limits, decide
from vidcls.supervision.session import Session
from vidcls.supervision.signals import StopRequests


@dataclass(frozen=True)
class Options:
    """stop_timeout: None: the recipe's."""

    limits: Limits = field(default_factory=Limits)
    drain: float = 45.0
    silence: float | None = None
    stop_timeout: float | None = None
    min_hosts: int = 1
    rejoin_every: float = 60.0


@dataclass
class Supervisor:
    """Keeps one run going until it has finished, or until going on makes no sense."""

    command: Command
    config: Config
    places: Places | None
    batch: Batch | None
    options: Options
    patience: Patience
    requests: StopRequests
    folder: RunFolder
    begun: bool = False  # a launch has opened the output folder
    history: list[Attempt] = field(default_factory=list)
    _ports: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, words: list[str], options: Options, requests: StopRequests) -> Supervisor:
        """Check everything that can be checked before a launch, and keep other supervisors out of the output folder.

        Raises:
            ValueError: a user's mistake: the command, the hostfile, the recipe, or the output folder, also one that
                another supervisor works in.
        """
        command = parse_command(words)
        config = load_config(command.recipe, list(command.overrides))
        if not config.run.do_train or config.run.save_only_model:
            key = "save_only_model: true" if config.run.save_only_model else "do_train: false"
            raise ValueError(f"{key} cannot be supervised: there is nothing that a restart could go on from")
        folder = RunFolder(Path(config.run.output_dir))
        first = start_from(config, begun=False, newest=None)
        given = first["resume_from_checkpoint"]
        check_output_dir(config.run.model_copy(update={"resume_from_checkpoint": given}))
        places, ranks = None, command.options.get("num_gpus")
        if command.hostfile is not None:
            wanted, port = command.options.get("num_nodes"), command.options.get("ssh_port")
            places = Places.read(command.hostfile, wanted, ranks, port)
            ranks = sum(places.full.values())
            if not 1 <= options.min_hosts <= places.wanted:
                raise ValueError(f"--min-hosts: {options.min_hosts} must be 1 to {places.wanted}, the hosts of the run")
        resumed = folder.newest_checkpoint() if given == "latest" else Path(given) if given else None
        batch = Batch.of(config.optim, ranks, resumed)
        stop = config.run.stop_timeout if options.stop_timeout is None else options.stop_timeout
        patience = Patience(options.drain, options.silence, stop)
        try:
            (folder.path / record.FOLDER_NAME).mkdir(parents=True, exist_ok=True)
            lock_output(folder.path / record.FOLDER_NAME)
        except OSError as error:
            raise ValueError(f"output_dir: {config.run.output_dir!r} cannot be written: {error}") from error
        return cls(command, config, places, batch, options, patience, requests, folder)

    def run(self) -> int:
        """The exit code: 0 only when the run has finished."""
        first_number = record.next_number(self.folder.path)
        with tempfile.TemporaryDirectory(prefix="vidcls-supervise-") as scratch:
            while True:
                attempt = self._attempt(first_number + len(self.history), Path(scratch))
                self.history.append(attempt)
                self._record(attempt)
                decision = decide(self.history, self.options.limits)
                why = f": {decision.why}" if decision.why else ""
                say(f"attempt {attempt.number}: {attempt.verdict} at step {attempt.last_step}{why}")
                if decision.code is None:
                    if decision.wait:
                        say(f"the next one in {decision.wait:g} s, from step {attempt.saved}")
                    self.requests.pause(decision.wait)
                if self.requests.stop and decision.code is None:
                    return self._finish(Exit.STOPPED)
                if decision.code is not None:
                    return self._finish(decision.code)

    def _attempt(self, number: int, scratch: Path) -> Attempt:
        """One launch, from the look at the hosts to the verdict."""
        started, before = time.time(), self.folder.newest_checkpoint()
        hosts, dropped = self.places.look() if self.places else ({}, {})
        for host, fault in dropped.items():
            say(f"{host} is left out: {fault}")
        attempt = Attempt(
            number=number,
            started=started,
            ended=started,
            launch=uuid.uuid4().hex[:12],
            hosts=hosts,
            dropped=dropped,
            ranks=None,
            port=0,
            code=Exit.LAUNCH,
            verdict=NO_HOSTS,
            asked="",
            step=None,
            resumed_from=step_of(before),
            last_step=step_of(before),
            saved=step_of(before),
            cause=f"{len(hosts)} hosts answer; --min-hosts {self.options.min_hosts}",
        )
        if self.requests.stop:
            return _not_launched(attempt)
        if self.places and len(hosts) < self.options.min_hosts:
            return replace(attempt, ended=time.time())
        try:
            return self._launch(attempt, scratch)
        except OSError as error:  # the supervisor's own
            return replace(attempt, ended=time.time(), verdict=NO_OUTPUT, code=Exit.STORAGE, cause=str(error))

    def _launch(self, attempt: Attempt, scratch: Path) -> Attempt:
        before = self.folder.newest_checkpoint()
        saved = max((attempt.saved for attempt in self.history), default=0)
        if self.begun and saved and before is None:
            # An empty mount point looks like a new run; it would start over, and fill the wrong disk.
            raise FileNotFoundError(f"{self.folder.path} no longer has the checkpoint of step {saved}")
        keys = start_from(self.config, begun=self.begun, newest=before)
        given = keys["resume_from_checkpoint"]
        resumed_from = step_of(before) if given == "latest" else step_of(Path(given)) if given else 0
        hosts, ranks = attempt.hosts, self.command.options.get("num_gpus") if not self.places else None
        if self.batch is not None:
            layout = self.batch.layout(hosts or {THIS_HOST: ranks or 1})
            keys |= batch_keys(self.config.optim, layout)
            hosts, ranks = layout.hosts, layout.ranks
        port = free_port(self._ports)
        hostfile = write_hostfile(scratch / f"hosts-{attempt.number}", hosts)
        words = self.command.words(
            launcher_options(self.command, self.places, hosts, hostfile, port), keys, attempt.launch
        )
        self._wait_for_lock()
        if self.requests.stop:
            return _not_launched(attempt)
        begun = self.folder.begun()
        self.folder.forget_outcome()
        self.folder.take_back_stop()
        where = ", ".join(f"{host}:{slots}" for host, slots in hosts.items()) or THIS_HOST
        say(f"attempt {attempt.number} on {where}, from step {resumed_from}, port {port}")
        session = Session(words, launch_environment(os.environ), record.log_path(self.folder.path, attempt.number))
        few = self.places is not None and len(attempt.hosts) < self.places.wanted
        probe = self.places.probe if self.places else probe_all
        back = Return(list(attempt.dropped) if few else [], probe, self.options.rejoin_every)
        try:
            end = watch(session, self.folder, attempt.launch, self.requests, self.patience, back)
        finally:
            back.close()
            session.kill()
        with contextlib.suppress(OSError):
            self.folder.take_back_stop()
        self.begun = self.begun or self.folder.begun() != begun
        return self._ended(replace(attempt, hosts=hosts, ranks=ranks, port=port, resumed_from=resumed_from), end)

    def _ended(self, attempt: Attempt, end: End) -> Attempt:
        reports = self.folder.reports(attempt.launch)
        verdict: Verdict = judge(end, self.folder.outcome(), reports)
        newest = step_of(self.folder.newest_checkpoint())
        saved = newest if self.begun else attempt.resumed_from
        return replace(
            attempt,
            ended=time.time(),
            code=int(verdict.code),
            verdict=verdict.name,
            asked=end.asked,
            step=verdict.step,
            saved=saved,
            last_step=last_step(self.folder, reports, saved) if self.begun else saved,
            cause=verdict.cause,
        )

    def _wait_for_lock(self) -> None:
        """Ranks of an earlier launch on a host that was cut off may take a while to find out."""
        if not self.history:
            return  # then it is another run, and the launch will say so
        deadline = time.monotonic() + self.config.run.ddp_timeout + self.patience.drain
        path, told = self.folder.path / LOCK_NAME, False
        while is_locked(path) and time.monotonic() < deadline and not self.requests.stop:
            if not told:
                say(f"ranks of the last attempt are still there ({path.read_text(encoding='utf-8').strip()}): waiting")
                told = True
            self.requests.pause(1.0)

    def _finish(self, code: int) -> int:
        batch = self.batch.global_ if self.batch else global_batch_of(self.folder.newest_checkpoint())
        summary = record.summarize(self.history, self.folder.rows(), batch)
        path = self.folder.path / record.FOLDER_NAME / record.SUMMARY_NAME
        self._tell(
            lambda: path.write_text(json.dumps({"code": int(code), **summary.content()}) + "\n", encoding="utf-8")
        )
        say(f"exit code {int(code)}; {summary.text()}")
        return int(code)

    def _record(self, attempt: Attempt) -> None:
        self._tell(lambda: record.append(self.folder.path, attempt))

    def _tell(self, write: Callable[[], object]) -> None:
        """The record is worth less than the run: a full disk does not end it."""
        try:
            write()
        except OSError as error:
            say(f"the record cannot be written: {error}")


def _not_launched(attempt: Attempt) -> Attempt:
    return replace(attempt, verdict="stopped", code=Exit.STOPPED, cause="asked by a signal before the launch")


def is_locked(path: Path) -> bool:
    """Whether a run holds an output folder's lock."""
    try:
        with path.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks on this file system
        return False
    return False


def say(text: str) -> None:
    print(f"supervise: {text}", flush=True)
