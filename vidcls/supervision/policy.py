"""What to do after a launch: a pure function of what happened so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vidcls.faults.exits import Exit
from vidcls.supervision.attempts import Attempt

# What comes from the run itself, and will come again; all else may pass.
OWN_FAULTS = ("diverged", "data", "storage", "failed")
OWN_REPEATS, OTHER_REPEATS = 2, 3
# Nothing was launched, because too few hosts answer or output_dir is out of reach: waited for, up to --max-restarts.
NO_HOSTS, NO_OUTPUT = "no_hosts", "no_output"


@dataclass(frozen=True)
class Limits:
    """Seconds, and launches after the first one."""

    max_restarts: int = 100
    backoff: float = 5.0
    max_backoff: float = 300.0


@dataclass(frozen=True)
class Decision:
    """code: what to leave with; None: launch again after `wait` seconds."""

    code: int | None
    wait: float
    why: str


def decide(history: Sequence[Attempt], limits: Limits) -> Decision:
    last = history[-1]
    if last.verdict == "finished":
        return Decision(Exit.DONE, 0, last.cause)
    if last.verdict == "user_error":
        return Decision(Exit.USER_ERROR, 0, "a mistake that no restart mends; the run has said which")
    if last.verdict == "stopped":
        return Decision(Exit.STOPPED, 0, last.cause)
    if last.verdict == "rejoin":
        return Decision(None, 0, last.cause)
    times = repeats(history)
    allowed = OWN_REPEATS if last.verdict in OWN_FAULTS else OTHER_REPEATS
    if times >= allowed and last.verdict not in (NO_HOSTS, NO_OUTPUT):
        where = "before the first step" if last.step is None else f"at step {last.step}"
        return Decision(last.code, 0, f"{last.verdict} {times} times in a row {where}, without progress: {last.cause}")
    failures = [attempt for attempt in history if attempt.verdict != "rejoin"]
    if len(failures) > limits.max_restarts:
        return Decision(last.code, 0, f"--max-restarts {limits.max_restarts} is reached: {last.cause}")
    wait = limits.backoff
    for _ in range(without_progress(history) - 1):
        wait = min(2 * wait, limits.max_backoff)
    return Decision(None, min(wait, limits.max_backoff), last.cause)


def repeats(history: Sequence[Attempt]) -> int:
    """How often the last failure has come in a row: of one kind, at one step, with no checkpoint in between.

    A fault of the surroundings that comes on other hosts is another one.
    """
    last, count = history[-1], 1
    for attempt, next_one in zip(reversed(history[:-1]), reversed(history), strict=False):
        same = (attempt.verdict, attempt.step) == (last.verdict, last.step)
        same_hosts = last.verdict in OWN_FAULTS or attempt.hosts == last.hosts
        if next_one.progressed or not (same and same_hosts):
            break
        count += 1
    return count


def without_progress(history: Sequence[Attempt]) -> int:
    """Failures since the last new checkpoint; the one that came after it counts."""
    count = 0
    for attempt in reversed(history):
        if attempt.verdict == "rejoin":
            break
        count += 1
        if attempt.progressed:
            break
    return count
