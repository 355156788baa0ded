"""Two hosts: they train and evaluate as one host with two ranks does, and whatever happens has a name and an end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import launch
from tests.support.host_faults import FAULTS, LAUNCH_FAULTS, cut_link_briefly
from tests.support.hosts import Hosts
from tests.support.many_hosts import GONE_SECONDS, RECIPE, Run, deepspeed_words, see
from vidcls.faults.exits import Exit

pytestmark = pytest.mark.launch
STEPS = 60


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def alone(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as two ranks of this host."""
    out = tmp_path_factory.mktemp("alone") / "run"
    options = {**RECIPE, "dataset": str(small_shards), "output_dir": str(out), "max_steps": STEPS}
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(json.dumps(options))
    done = launch.deepspeed(2, "launch/train.py", recipe, log=out.parent / "log")
    assert done.code == 0, done.output[-3000:]
    return out


def test_training_and_evaluation(two: Hosts, small_shards: Path, tmp_path: Path, alone: Path) -> None:
    """Bit for bit what one host computes, with the link cut for five seconds on the way."""
    with Run(two, small_shards, tmp_path, deepspeed_words(two), max_steps=STEPS) as run:
        run.wait_for_step(5)
        cut_link_briefly(run)
        assert run.process.wait(120) == 0, run.said[-3000:]
        assert not run.left()
        assert not run.reports()
    assert json.loads((run.out / "outcome.json").read_text())["outcome"] == "finished"
    rows = [json.loads(line) for line in (alone / "train_log.jsonl").read_text().splitlines()]
    assert numbers(run.rows()) == numbers(rows)

    files = []
    for name, out in (("there", run.out), ("here", alone)):
        words = ["launch/evaluate.py", out / f"checkpoint-{STEPS}", "--data", small_shards, "--out", tmp_path / name]
        if name == "there":
            process = two.start(1, [*deepspeed_words(two), *words], tmp_path / "evaluation")
            assert process.wait(120) == 0, (tmp_path / "evaluation").read_text()[-3000:]
        else:
            done = launch.run([launch.PYTHON, *words], log=tmp_path / "here.log", timeout=120)
            assert done.code == 0, done.output[-3000:]
        files.append((tmp_path / name / "predictions.jsonl").read_text().splitlines())
    assert len(files[0]) == 26
    assert [json.loads(line)["predicted"] for line in files[0]] == [json.loads(line)["predicted"] for line in files[1]]


def test_open_mpi(two: Hosts, small_shards: Path, tmp_path: Path, alone: Path) -> None:
    """Its ranks find each other through mpi4py, and compute what the others compute."""
    launcher = ["--launcher", "openmpi", "--launcher_args", "--bind-to none"]
    environment = ["env", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]
    with Run(two, small_shards, tmp_path, [*environment, *deepspeed_words(two), *launcher], max_steps=10) as run:
        assert run.process.wait(120) == 0, run.said[-3000:]
        assert not run.left()
    rows = [json.loads(line) for line in (alone / "train_log.jsonl").read_text().splitlines()]
    assert numbers(run.rows()) == numbers(rows)[:10]


# A rank that is stopped is seen by its guardian, whatever hosts there are (test_faults_command.py); a link that is cut
# looks to the others as a host without power.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in ("cut_link", "stop_rank") else ()) for name in FAULTS]
)
def test_a_fault_has_a_name_and_an_end(two: Hosts, small_shards: Path, tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    with Run(two, small_shards, tmp_path, deepspeed_words(two)) as run:
        run.wait_for_step(3)
        since = time.monotonic()
        fault.act(run)
        seen = see(run, since)
    assert seen.seconds is not None, f"still there after {GONE_SECONDS} s: {seen.left}\n{seen.said[-3000:]}"
    assert fault.says in seen.words, seen.said[-3000:]
    assert seen.code in fault.codes, seen.said[-3000:]


def test_shards_that_one_host_lacks(two: Hosts, small_shards: Path, tmp_path: Path) -> None:
    """The other host is told why, instead of waiting for it until ddp_timeout."""
    there = Path("/run/shards")  # /run is each host's own
    assert two.start(1, ["cp", "-r", small_shards, there], tmp_path / "copied").wait(30) == 0
    with Run(two, there, tmp_path, deepspeed_words(two), ddp_timeout=600) as run:
        seen = see(run, run.started)
    assert seen.seconds is not None, f"still there after {GONE_SECONDS} s: {seen.left}\n{seen.said[-3000:]}"
    assert seen.code == Exit.USER_ERROR, seen.said[-3000:]
    assert f"{two.name(2)}: error: {there}/index.json: cannot be read" in seen.said
    assert f"{two.name(1)}: error: checking recipe, data and model failed on rank 1: {there}" in seen.said


@pytest.mark.parametrize("name", ["unreachable", "other_version"])
def test_a_launch_that_cannot_work_is_told(two: Hosts, small_shards: Path, tmp_path: Path, name: str) -> None:
    fault = LAUNCH_FAULTS[name]
    with fault.around(two) as words, Run(two, small_shards, tmp_path, words) as run:
        seen = see(run, run.started)
    assert seen.seconds is not None, f"still there after {GONE_SECONDS} s: {seen.left}\n{seen.said[-3000:]}"
    assert fault.says in seen.words, seen.said[-3000:]
    assert seen.code in fault.codes, seen.said[-3000:]
    assert seen.code != Exit.DONE
