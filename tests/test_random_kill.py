"""Runs that are killed at random moments lose nothing; and what says so sees a loss where there is one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import kills, launch

SEED = 10725  # of the launched test: its kills are of all kinds
STEPS, BATCH, RANKS = 6, 4, 2
CLIPS = [f"clip_{i}" for i in range(8)]  # 6 steps of 4 are three epochs
LAST = f"checkpoint-{STEPS}"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def seal(folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.glob("*.safetensors")
    }
    manifest = folder / "MANIFEST.json"
    manifest.write_text(json.dumps({"files": files}))
    (folder / "COMPLETE").write_text(hashlib.sha256(manifest.read_bytes()).hexdigest() + "\n")


@pytest.fixture
def straight(tmp_path: Path) -> Path:
    """What a run of STEPS steps leaves, as far as it is looked at."""
    run = tmp_path / "straight"
    rows = [{"step": s, "loss": 1 / s, "grad_norm": 3.1 * s, "lr": 0.1, "top1": 0.5, "rate": s} for s in range(1, 7)]
    write_lines(run / "train_log.jsonl", rows)
    for rank in range(RANKS):
        taken = [[CLIPS[(4 * step + 2 * rank + i) % 8] for i in range(2)] for step in range(STEPS)]
        order = [{"step": step, "keys": keys} for step, keys in enumerate(taken)]
        write_lines(run / "order" / f"rank-{rank:05d}.jsonl", order)
    (run / "outcome.json").write_text(json.dumps({"outcome": "finished", "step": STEPS}))
    generator = torch.Generator().manual_seed(0)
    for step in (3, STEPS):
        folder = run / f"checkpoint-{step}"
        folder.mkdir()
        for rank in range(RANKS):
            state = {f"exp_avg/{rank}": torch.randn(5, generator=generator), f"weight/{rank}": torch.zeros(3)}
            save_file(state, folder / f"training_state-{rank + 1:05d}-of-00002.safetensors")
        save_file({"a": torch.randn(4, generator=generator).bfloat16()}, folder / "adapter_model.safetensors")
        seal(folder)
    return run


@pytest.fixture
def run(straight: Path) -> Path:
    """The same, killed after step 4 and gone on with from step 3; a kill has cut a line of the order log."""
    run = straight.with_name("run")
    shutil.copytree(straight, run)
    for rank in range(RANKS):
        path = run / "order" / f"rank-{rank:05d}.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:4], lines[4][:13], *lines[3:]]) + "\n")
    return run


def faults(run: Path, straight: Path) -> list[str]:
    order, again = kills.read_order(run, RANKS)
    found = kills.row_faults(run, straight) + kills.completeness_faults(run, STEPS) + again
    found += kills.order_faults(order, kills.read_order(straight, RANKS)[0])
    found += kills.epoch_faults(order, CLIPS, STEPS, BATCH)
    return found + kills.tensor_faults(run / LAST, straight / LAST)


def test_a_run_that_lost_nothing_passes(run: Path, straight: Path) -> None:
    assert faults(run, straight) == []


@pytest.mark.parametrize("name", kills.NUMBERS)
def test_the_last_bit_of_a_logged_number_is_seen(run: Path, straight: Path, name: str) -> None:
    rows = kills.json_lines(run / "train_log.jsonl")
    rows[3][name] = float.fromhex("0x1.0000000000001p0") * rows[3][name]
    write_lines(run / "train_log.jsonl", rows)
    assert [fault[:14] for fault in faults(run, straight)] == ["row of step 4:"]


def test_a_number_that_no_run_logs_is_no_evidence(run: Path, straight: Path) -> None:
    """None equals None; rows without the numbers must not pass for equal ones."""
    for folder in (run, straight):
        rows = kills.json_lines(folder / "train_log.jsonl")
        del rows[2]["loss"]
        write_lines(folder / "train_log.jsonl", rows)
    assert faults(run, straight) == ["row of step 3 has no loss"]


@pytest.mark.parametrize("change", ["lost", "twice"])
def test_a_row_that_is_not_there_once_is_seen(run: Path, straight: Path, change: str) -> None:
    rows = kills.json_lines(run / "train_log.jsonl")
    write_lines(run / "train_log.jsonl", rows[:2] + rows[3:] if change == "lost" else [*rows[:3], *rows[2:]])
    assert any(fault.startswith("rows are of steps [") for fault in faults(run, straight))


def test_an_end_that_is_not_said_is_seen(run: Path, straight: Path) -> None:
    (run / "outcome.json").write_text(json.dumps({"outcome": "stopped", "step": STEPS}))
    assert len(faults(run, straight)) == 1


def test_a_dropped_clip_is_seen(run: Path, straight: Path) -> None:
    """Of another clip in its place, too: the step then differs from the straight run's, and one clip comes twice."""
    path = run / "order" / "rank-00001.jsonl"
    rows = kills.json_lines(path)
    rows[-1]["keys"] = ["clip_0", "clip_7"]
    write_lines(path, rows)
    assert faults(run, straight) == [
        "rank 1 took ['clip_0', 'clip_7'] in step 5, in the straight run ['clip_6', 'clip_7']",
        "epoch 2: clip_0 was taken 2 times",
        "epoch 2: clip_6 was not taken",
    ]
    rows[-1]["keys"] = ["clip_7"]
    write_lines(path, rows)
    assert f"23 clips were taken in {STEPS} steps of {BATCH}" in faults(run, straight)


def test_a_step_done_again_with_other_clips_is_seen(run: Path, straight: Path) -> None:
    path = run / "order" / "rank-00000.jsonl"
    rows = kills.json_lines(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5]
    rows[4]["keys"] = rows[3]["keys"][::-1]
    write_lines(path, rows)
    (fault,) = faults(run, straight)
    assert "when it did step 3 again" in fault


def test_a_step_that_one_rank_never_did_is_seen(run: Path, straight: Path) -> None:
    path = run / "order" / "rank-00000.jsonl"
    write_lines(path, kills.json_lines(path)[:-1])
    assert f"22 clips were taken in {STEPS} steps of {BATCH}" in faults(run, straight)


@pytest.mark.parametrize("file", ["adapter_model", "training_state-00002-of-00002"])
def test_a_flipped_bit_of_a_weight_or_moment_is_seen(run: Path, straight: Path, file: str) -> None:
    path = run / LAST / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert len(faults(run, straight)) == 1
    assert kills.damage(run / LAST) == f"{path.name} is not what MANIFEST.json says"


def test_minus_zero_is_not_zero(run: Path, straight: Path) -> None:
    path = run / LAST / "training_state-00001-of-00002.safetensors"
    save_file({**load_file(path), "weight/0": -torch.zeros(3)}, path)
    assert faults(run, straight) == ["training_state: weight/0 differs"]


def test_a_tensor_that_is_not_there_is_seen(run: Path, straight: Path) -> None:
    (run / LAST / "training_state-00002-of-00002.safetensors").unlink()
    assert faults(run, straight) == [
        "training_state: exp_avg/1 is in one checkpoint only",
        "training_state: weight/1 is in one checkpoint only",
    ]


def test_damage_is_seen_in_the_manifest_and_without_its_seal(run: Path) -> None:
    assert kills.checkpoints(run) == {6: None, 3: None}
    (run / "checkpoint-3" / "COMPLETE").unlink()
    with (run / LAST / "MANIFEST.json").open("a") as manifest:
        manifest.write(" ")
    assert kills.checkpoints(run) == {
        6: "COMPLETE has another digest than MANIFEST.json",
        3: "it has no MANIFEST.json and COMPLETE",
    }


def words(run: Path, step: int | None, *passed: int) -> str:
    lines = [f"vidcls: checkpoint passed over: {run}/checkpoint-{n}/adapter.safetensors is damaged" for n in passed]
    lines += [f"resuming  {run}/checkpoint-{step} at step {step}"] if step is not None else []
    return "\n".join([*lines, "step 4/6  loss 1.0", ""])


def test_the_choice_of_a_checkpoint_is_judged(run: Path) -> None:
    whole = {6: None, 3: None}
    damaged = {6: "it is damaged", 3: None}
    assert kills.choice_faults(words(run, 6), run, whole) == []
    assert kills.choice_faults(words(run, 3, 6), run, damaged) == []
    assert kills.choice_faults("killed before it chose", run, damaged) == []
    assert kills.choice_faults(words(run, None), run, {}) == []
    # a damaged one, an old one, none at all, one out of nowhere, and a whole one passed over
    assert kills.choice_faults(words(run, 6), run, damaged) != []
    assert kills.choice_faults(words(run, 3), run, whole) != []
    assert kills.choice_faults(words(run, None), run, whole) != []
    assert kills.choice_faults(words(run, 3), run, {}) != []
    assert kills.choice_faults(words(run, 3, 6), run, whole) != []
    assert kills.choice_faults(words(run, 3), run, damaged) != []
    assert kills.choice_faults(words(run, 3, 6, 3), run, damaged) != []


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_six_kills_lose_nothing(tmp_path: Path) -> None:
    """The benchmark as it is documented, with fewer kills."""
    out = tmp_path / "random_kill.json"
    command = [launch.PYTHON, "benchmarks/random_kill.py", "--kills", 6, "--steps", 42, "--seed", SEED]
    command += ["--keep", tmp_path / "work", "--json", out]
    done = launch.run(command, log=tmp_path / "log", timeout=840)
    assert done.code == 0, done.output[-6000:]
    results = json.loads(out.read_text())
    assert results["faults"] == []
    assert results["counts"]["kills"] == 6
    killed = [life for life in results["lives"] if life["killed"]]
    assert {life["aim"] for life in killed} == {"save", "step", "start"}
    assert results["lives"][-1]["steps_logged"] == 42
    assert not results["lives"][-1]["killed"]
