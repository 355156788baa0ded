"""What the faults have cost, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.supervision.test_policy import attempt
from vidcls.supervision.record import summarize


def test_lost_steps_and_goodput_by_hand() -> None:
    """10 steps of 8 clips. The first attempt came to step 7 with a checkpoint at 5; the second finished."""
    first = replace(attempt("killed"), started=100, ended=110, last_step=7, saved=5)
    second = replace(attempt("finished"), started=112, ended=120, resumed_from=5, last_step=10, saved=10)
    rows = [
        {"step": 5, "samples_per_second": 8.0},  # five steps of 1 s; steps 6 and 7 were dropped by the resume
        {"step": 6, "samples_per_second": 4.0},  # one of 2 s
        {"step": 10, "samples_per_second": 16.0},  # four of 0.5 s
    ]
    summary = summarize([first, second], rows, 8)
    assert summary.restarts == 1
    assert summary.lost_steps == 2
    assert summary.wall_seconds == 20
    assert summary.useful_seconds == pytest.approx(9)
    assert summary.goodput == pytest.approx(0.45)
    assert "1 restarts, 2 steps done again, 20 s in all; goodput 45 %" in summary.text()


def test_what_was_there_before_is_not_counted() -> None:
    only = replace(attempt("finished"), started=0, ended=10, resumed_from=6)
    rows = [{"step": 6, "samples_per_second": 1.0}, {"step": 8, "samples_per_second": 8.0}]
    assert summarize([only], rows, 8).useful_seconds == pytest.approx(2)
    assert summarize([only], [], 8).goodput is None
    assert summarize([only], rows, None).goodput is None
