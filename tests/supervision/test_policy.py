"""What to do after each history of attempts, as a table."""

from __future__ import annotations

import pytest

from vidcls.supervision.attempts import Attempt
from vidcls.supervision.policy import Decision, Limits, decide

BOTH, ONE = {"a": 1, "b": 1}, {"a": 1}
LIMITS = Limits(max_restarts=4, backoff=5, max_backoff=30)
CODES = {"finished": 0, "user_error": 2, "stopped": 75, "rejoin": 75, "diverged": 76, "killed": 247, "peer_lost": 71}
CODES |= {"false_success": 1, "no_hosts": 78, "no_output": 73, "data": 74, "failed": 1, "launch": 78}


def attempt(verdict: str, *, step: int | None = None, saved: int = 0, hosts: dict[str, int] = BOTH) -> Attempt:
    """saved: checkpoints made in it."""
    return Attempt(
        number=1,
        started=0,
        ended=1,
        launch="abc",
        hosts=hosts,
        dropped={},
        ranks=2,
        port=1,
        code=CODES[verdict],
        verdict=verdict,
        asked="",
        step=step,
        resumed_from=0,
        last_step=0,
        saved=saved,
        cause="rank 1 on node2",
    )


A = attempt
RESTART = None


@pytest.mark.parametrize(
    ("history", "code", "wait"),
    [
        ([A("finished")], 0, 0),
        ([A("killed"), A("finished")], 0, 0),
        ([A("user_error")], 2, 0),
        ([A("stopped", saved=1)], 75, 0),
        ([A("rejoin", saved=1)], RESTART, 0),
        # any failure: once more, waiting longer each time without a new checkpoint, up to a limit
        ([A("failed", step=3)], RESTART, 5),
        ([A("killed", step=1), A("killed", step=2)], RESTART, 10),
        ([A("killed", step=1), A("killed", step=2), A("peer_lost", step=3)], RESTART, 20),
        ([A("killed", step=1), A("killed", step=2), A("killed", step=3), A("killed", step=4)], RESTART, 30),
        # progress: the waiting begins anew
        ([A("killed", step=1), A("killed", step=2), A("killed", step=3, saved=1)], RESTART, 5),
        ([A("killed", step=1), A("killed", step=3, saved=1), A("killed", step=4)], RESTART, 10),
        # what comes from the run itself and comes again at the same step ends it
        ([A("diverged", step=7), A("diverged", step=7)], 76, 0),
        ([A("data", step=7), A("data", step=7)], 74, 0),
        ([A("failed"), A("failed")], 1, 0),
        ([A("diverged", step=7), A("diverged", step=8)], RESTART, 10),
        ([A("diverged", step=7), A("data", step=7)], RESTART, 10),
        ([A("diverged", step=7), A("diverged", step=7, saved=1)], RESTART, 5),
        ([A("diverged", step=7, hosts=BOTH), A("diverged", step=7, hosts=ONE)], 76, 0),
        # what may pass ends it the third time, on the same hosts
        ([A("killed", step=7), A("killed", step=7)], RESTART, 10),
        ([A("killed", step=7), A("killed", step=7), A("killed", step=7)], 247, 0),
        ([A("launch"), A("launch"), A("launch", hosts=ONE)], RESTART, 20),
        ([A("launch", hosts=ONE), A("launch"), A("launch"), A("launch")], 78, 0),
        ([A("false_success"), A("false_success"), A("false_success")], 1, 0),
        # a stop to take a host in again is no failure and not a repetition
        ([A("killed", step=7), A("killed", step=7), A("rejoin", step=7), A("killed", step=7)], RESTART, 5),
        # hosts that do not answer are waited for, as often as the run may restart
        ([A("no_hosts", hosts={})] * 4, RESTART, 30),
        ([A("no_hosts", hosts={})] * 5, 78, 0),
        # so is the output folder
        ([A("no_output", hosts={})] * 4, RESTART, 30),
        ([A("no_output", hosts={})] * 5, 73, 0),
        # restarts are limited whatever the cause, those for hosts that came back aside
        ([A("killed", step=n, saved=1) for n in range(4)], RESTART, 5),
        ([A("killed", step=n, saved=1) for n in range(5)], 247, 0),
        ([A("killed", step=n, saved=1) for n in range(4)] + [A("rejoin", saved=1)] * 3, RESTART, 0),
    ],
)
def test_decisions(history: list[Attempt], code: int | None, wait: float) -> None:
    decision = decide(history, LIMITS)
    assert (decision.code, decision.wait) == (code, wait), decision.why


def test_the_reason_names_kind_number_place_and_cause() -> None:
    decision = decide([attempt("diverged", step=7)] * 2, LIMITS)
    assert decision == Decision(76, 0, "diverged 2 times in a row at step 7, without progress: rank 1 on node2")
    assert decide([attempt("killed", step=n) for n in range(5)], LIMITS).why == (
        "--max-restarts 4 is reached: rank 1 on node2"
    )
