"""What the end of a launch means, from its code, the run's own word and the ranks' last words."""

from __future__ import annotations

from typing import Any

import pytest

from vidcls.supervision.attempts import End, first_failure, judge

FINISHED, STOPPED = {"outcome": "finished"}, {"outcome": "stopped"}


def report(kind: str, rank: int = 1, time: float = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "rank": rank,
        "host": f"node{rank}",
        "phase": "backward",
        "message": "m",
        "time": time,
        **more,
    }


@pytest.mark.parametrize(
    ("end", "outcome", "reports", "name", "code"),
    [
        (End(0), FINISHED, [], "finished", 0),
        (End(134), FINISHED, [], "finished", 0),  # a rank that aborts on its way out
        (End(0), {}, [], "false_success", 1),
        (End(0), {}, [report("diverged", step=4)], "diverged", 76),
        (End(2), {}, [], "user_error", 2),
        (End(75), STOPPED, [], "stopped", 75),
        (End(75), {}, [], "stopped", 75),  # SIGTERM to the ranks before there was anything to save
        (End(75), {}, [report("out_of_memory")], "out_of_memory", 77),
        (End(75, "rejoin"), STOPPED, [], "rejoin", 75),
        (End(75, "stop"), STOPPED, [], "stopped", 75),
        (End(137, "stop"), {}, [], "stopped", 75),
        (End(137, "force"), {}, [], "stopped", 75),
        (End(0, "stop"), FINISHED, [], "finished", 0),
        (End(2, "stop"), {}, [], "user_error", 2),
        (End(71, "rejoin"), {}, [report("peer_lost")], "peer_lost", 71),
        (End(247), {}, [], "killed", 247),
        (End(137), {}, [], "killed", 137),
        (End(71), {}, [], "peer_lost", 71),
        (End(78), {}, [], "launch", 78),
        (End(255), {}, [], "connection_lost", 255),
        (End(1), {}, [], "failed", 1),
        (End(9), {}, [], "code_9", 9),
        (End(137, "silence"), {}, [], "silent", 72),
        # the launcher may see the rank that lost a peer first: the peer's own words count
        (End(71), {}, [report("peer_lost", 0, 1.0), report("out_of_memory", 1, 2.0)], "out_of_memory", 77),
        (End(137, "drain"), {}, [report("stuck", 1, 2.0)], "stuck", 72),
        (End(71), {}, [report("killed", 1, 2.0), report("peer_lost", 0, 2.1)], "killed", 247),
        (End(137, "drain"), {}, [report("launcher_gone", 1, 2.0)], "launcher_gone", 71),
    ],
)
def test_verdicts(end: End, outcome: dict, reports: list[dict], name: str, code: int) -> None:
    verdict = judge(end, outcome, reports)
    assert (verdict.name, int(verdict.code)) == (name, code), verdict.cause


def test_the_cause_names_rank_host_step_and_clips() -> None:
    verdict = judge(End(76), {}, [report("diverged", 3, step=12, clips="shard:a,b")])
    assert verdict.cause == "rank 3 on node3 in phase backward at step 12: diverged: m; clips shard:a,b"
    assert verdict.step == 12


def test_ranks_that_said_nothing_are_named_where_the_others_only_lost_a_peer() -> None:
    """As when a host is powered off."""
    lost = [report("peer_lost", rank, world_size=4) for rank in (0, 3)]
    assert judge(End(71), {}, lost).cause.endswith("no word from rank 1, 2")
    known = [*lost, report("killed", 1, world_size=4)]
    assert "no word" not in judge(End(71), {}, known).cause


def test_the_first_of_several_causes() -> None:
    assert first_failure([report("peer_lost", 0), report("killed", 2), report("data", 1)])["rank"] == 2
    assert first_failure([report("peer_lost", 0), report("peer_lost", 1)])["rank"] == 0
    assert first_failure([]) is None
