"""When a run saves by the clock, and when it gives up on steps that are not finite."""

from __future__ import annotations

import pytest

from vidcls import distributed
from vidcls.faults.causes import DivergedError
from vidcls.training import loop
from vidcls.training.agreement import Agreement, Decision
from vidcls.training.loop import SaveTimer
from vidcls.training.patience import Patience


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    monkeypatch.setattr(distributed, "rank", lambda: 0)


def test_a_save_is_due_once_when_the_minutes_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    timer, never = SaveTimer(2.0), SaveTimer(None)
    now = 219.0
    assert not timer.is_due()
    now = 221.0
    assert timer.is_due()
    assert not timer.is_due()  # it was said, and the others have heard it
    timer.restart()
    now = 340.0
    assert not timer.is_due()
    now = 342.0
    assert timer.is_due()
    assert not never.is_due()


def test_other_ranks_do_not_look_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    timer = SaveTimer(1e-9)
    assert not timer.is_due()


def test_steps_that_are_not_finite_end_the_run_in_the_end() -> None:
    patience = Patience(3)
    assert patience.after_step(1, applied=True, suspects=()) is None
    for done in (2, 3):
        told = patience.after_step(done, applied=False, suspects=("clip_a",))
        assert told is not None
        assert f"step {done}: loss or gradient is not finite, the step was skipped" in told
        assert "clip_a" in told
    assert patience.after_step(4, applied=True, suspects=()) is None  # in a row, not in all
    patience.after_step(5, applied=False, suspects=())
    patience.after_step(6, applied=False, suspects=())
    with pytest.raises(DivergedError, match=r"max_nonfinite_steps: 3 such steps in a row.*diverged"):
        patience.after_step(7, applied=False, suspects=())


def test_a_single_rank_decides_at_once() -> None:
    agreement = Agreement()
    assert agreement.exchange(stop=True, save=False, failed=False) == Decision(stop=True)
    assert agreement.exchange(stop=False, save=False, failed=True) == Decision(failed=True)
    assert agreement.finish() == Decision()
