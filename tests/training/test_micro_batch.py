"""`per_device_train_batch_size: auto`: what is chosen, that no trial crosses the limit, and that numbers stay."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import launch
from vidcls.training.memory import group_free
from vidcls.training.micro_batch import MARGIN, Needs, largest, next_trial

RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 8,
    "lora_dropout": 0.1,
    "train_batch_size": 8,
    "learning_rate": 2e-3,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "plot_loss": False,
    "html_report": False,
    "report_to": "none",
    "seed": 7,
}


def search(memory: Callable[[int], float], limit: float, share: int, *, held: int = 100, ranks: int = 1) -> list[int]:
    """The trials of equal ranks whose trial of n clips peaks at memory(n); then what was chosen."""
    needs = [Needs(limit, held, 0) for _ in range(ranks)]
    trials = []
    while (clips := next_trial(needs, share)) is not None:
        trials.append(clips)
        for each in needs:
            each.peaks[clips] = memory(clips)
    return [*trials, largest(needs, share)]


def test_the_largest_divisor_below_the_limit_is_found_without_crossing_it() -> None:
    def linear(clips: int) -> float:
        return 100 + 10 * clips

    assert search(linear, 1000, 12) == [1, 2, 3, 4, 6, 12, 12]
    assert search(linear, 165, 12) == [1, 2, 3, 4, 6, 6]
    assert search(linear, 125, 12) == [1, 2, 2]
    assert search(linear, 115, 12) == [1, 1]
    assert search(linear, 105, 12) == [1, 0]  # nothing tells what one clip needs before it was tried
    assert search(linear, 100, 12) == [0]
    assert search(linear, 1000, 5) == [1, 2, 5, 5]  # two are tried although they do not divide
    assert search(linear, 125, 5) == [1, 2, 1]
    assert search(linear, 1000, 1) == [1, 1]
    for limit in range(111, 300):
        assert all(linear(clips) < limit for clips in search(linear, limit, 64)[:-1])


def test_a_clip_dearer_than_the_one_before_counts_for_all_that_follow() -> None:
    needs = Needs(1000, 100, 7, {1: 150, 2: 160, 4: 220})
    assert needs.of(2) == 160 + 7
    assert needs.of(8) == pytest.approx(220 + 30 * 4 * (1 + MARGIN) + 7)


def test_out_of_memory_is_too_large() -> None:
    assert search(lambda clips: 110 if clips < 3 else math.inf, 10_000, 6) == [1, 2, 3, 2]
    assert search(lambda _: math.inf, 10_000, 6) == [1, 0]


def test_the_rank_that_has_least_decides() -> None:
    needs = [Needs(1000, 100, 0, {1: 110, 2: 120}), Needs(125, 100, 0, {1: 110, 2: 120})]
    assert next_trial(needs, 4) is None
    assert largest(needs, 4) == 2


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/a/b", "a", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/a/b",
            "memory/a",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_a_control_group_above_limits_memory(tmp_path: Path, line: str, folder: str, names: tuple[str, ...]) -> None:
    group = tmp_path / folder
    (group / "b").mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text(f"9:cpuset:/\n{line}\n")
    assert group_free(tmp_path, membership) is None
    for name, text in zip(names, ("1000", "700", f"anon 5\n{names[2]} 50"), strict=True):
        (group / (name if name != names[2] else "memory.stat")).write_text(f"{text}\n")
    assert group_free(tmp_path, membership) == 1000 - 700 + 50
    (group / names[0]).write_text("max\n")
    if names[0] == "memory.max":
        assert group_free(tmp_path, membership) is None


def write(folder: Path, shards: Path, name: str, stage: int = 2, **values: Any) -> Path:
    zero = f"ds_configs/zero{stage}.json"
    content = {**RECIPE, "dataset": str(shards), "output_dir": str(folder / name), "deepspeed": zero, **values}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def runs(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks, in one start: under both stages with "auto" and with the number that it comes to; and runs that go
    on from the one of stage 2 half-way, on the same layout with less memory, and on another one."""
    top = tmp_path_factory.mktemp("micro")
    recipes = []
    for stage in (2, 3):
        recipes.append(write(top, small_shards, f"auto{stage}", stage, per_device_train_batch_size="auto"))
        recipes.append(write(top, small_shards, f"four{stage}", stage, per_device_train_batch_size=4))
    one = {"per_device_train_batch_size": 1, "max_steps": 4}
    recipes.append(write(top, small_shards, "one2", **one))
    auto = {"per_device_train_batch_size": "auto", "resume_from_checkpoint": str(top / "one2" / "checkpoint-2")}
    recipes.append(write(top, small_shards, "resumed2", **auto))
    recipes.append(write(top, small_shards, "resumed3", 3, **auto))
    done = launch.deepspeed(2, "tests/support/trainings.py", *recipes, log=top / "log")
    assert done.code == 0, done.output[-4000:]
    return top


def rows(run: Path) -> list[tuple[float, ...]]:
    lines = map(json.loads, (run / "train_log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in lines]


def layout(run: Path) -> dict[str, int]:
    return json.loads((run / "checkpoint-4" / "training_state.json").read_text())["layout"]


@pytest.mark.launch
@pytest.mark.parametrize("stage", [2, 3])
def test_the_numbers_are_those_of_that_micro_batch_by_number(runs: Path, stage: int) -> None:
    """Where all fits, all is taken; and the trials leave no trace."""
    assert layout(runs / f"auto{stage}") == layout(runs / f"four{stage}")
    assert layout(runs / f"auto{stage}")["micro_batch"] == 4
    assert rows(runs / f"auto{stage}") == rows(runs / f"four{stage}")


@pytest.mark.launch
def test_a_resume_on_the_same_layout_takes_the_same_micro_batch(runs: Path) -> None:
    """One clip, although all would fit; so it goes on bit for bit. On another stage it is measured anew, and said."""
    assert layout(runs / "resumed2")["micro_batch"] == 1
    assert rows(runs / "resumed2") == rows(runs / "one2")[2:]
    assert layout(runs / "resumed3")["micro_batch"] == 4
    said = (runs / "log").read_text()
    assert "auto is 1 as in " in said
    assert re.search(r"auto is measured anew: .*zero_stage 2.*zero_stage 3", said)


@pytest.mark.launch
def test_limits_that_allow_all_one_and_none(small_shards: Path, tmp_path: Path) -> None:
    """One process each. What one clip and two need is learned from the run that may take all."""
    values = {"per_device_train_batch_size": "auto", "max_steps": 1, "self_check": False}

    def train(name: str, code: int, **more: object) -> str:
        words = [launch.PYTHON, "launch/train.py", write(tmp_path, small_shards, name, **values, **more)]
        done = launch.run(words, log=tmp_path / f"{name}.log")
        assert done.code == code, done.output[-3000:]
        return done.output

    told = train("all", 0)
    assert "auto is 8 of 8 clips a rank; memory_limit 0.9 is " in told
    found = re.search(r" 1: ([0-9.]+), 2: ([0-9.]+)", told)
    assert found
    one, two = map(float, found.groups())
    assert one < two
    told = train("one", 0, memory_limit=f"{(one + two) / 2}GB")
    assert "auto is 1 of 8 clips a rank; " in told
    assert "training  1 steps of 8 clips = 1 x 8 accumulation x 1 ranks" in told
    told = train("none", 2, memory_limit="0.01GB")
    assert re.search(r"memory_limit: 0.01GB leaves 0.01 GB for rank 0, and 0.\d\d GB are needed for the model", told)
