"""tools/checkpoint.py: what it says, its exit codes, and that it is there at once. Real checkpoints: test_damage.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.launch import ROOT
from tools.checkpoint import diff, show, verify
from vidcls.manifest import CheckpointError
from vidcls.training.folders import CONFIG_NAME, publish, temporary_folder
from vidcls.training.sharded_state import RunState, write_state, write_tensors

ABOUT = {
    "schedule": {"type": "cosine", "steps": 9, "next_learning_rate": 1e-4},
    "layout": {"ranks": 1, "zero_stage": 2, "micro_batch": 4, "accumulation": 1, "global_batch": 4},
    "label_spaces": {"default": "abc"},
}


def write_checkpoint(output_dir: Path, step: int, *, rate: float = 0.1, seed: int = 0, shift: float = 0.0) -> Path:
    folder = temporary_folder(output_dir)
    write_state(folder, RunState(step, step, {"seed": seed}), ABOUT)
    (folder / CONFIG_NAME).write_text(yaml.safe_dump({"learning_rate": rate}))
    tensors = {f"{kind}/{name}": torch.zeros(2, 3) for kind in ("weight", "exp_avg") for name in "ab"}
    tensors["weight/b"][1, 2] = shift
    write_tensors(folder, tensors, 0, 1)
    return publish(folder, output_dir, step)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/checkpoint.py", *(str(word) for word in words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_output_dir_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step)
    os.truncate(tmp_path / "checkpoint-2" / CONFIG_NAME, 3)
    temporary_folder(tmp_path)
    assert show(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["checkpoint-1", "checkpoint-2", "checkpoint-10"]
    assert lines[0].endswith("  whole")
    assert f"damaged: {tmp_path / 'checkpoint-2' / CONFIG_NAME} is damaged: it has 3 bytes" in lines[1]
    assert lines[3].startswith("checkpoint.tmp-")
    assert len(lines) == 4


def test_one_checkpoint_says_where_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    show(write_checkpoint(tmp_path, 3))
    said = capsys.readouterr().out
    for part in (
        "whole",
        "step      3 of 9, 3 of them applied",
        "cosine, next learning rate 0.0001",
        "head default: abc",
    ):
        assert part in said
    assert "tensors   weight: 2, 12 numbers" in said


def test_damage_does_not_keep_it_from_speaking(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_checkpoint(tmp_path, 3)
    (folder / "training_state.json").write_text("{")
    show(folder)
    assert f"{folder}: damaged, " in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="none is not a whole checkpoint: there is no such folder"):
        show(tmp_path / "none")


def test_differences_are_said_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = write_checkpoint(tmp_path / "a", 3)
    assert diff(one, write_checkpoint(tmp_path / "b", 3)) == 0
    assert capsys.readouterr().out == "tensors  exp_avg: all 2 are equal\ntensors  weight: all 2 are equal\n"
    other = write_checkpoint(tmp_path / "c", 3, rate=0.2, seed=7, shift=-0.5)
    assert diff(one, other) == 1
    assert capsys.readouterr().out.splitlines() == [
        "recipe   learning_rate: 0.1 in the first, 0.2 in the second",
        "stream   seed: 0 in the first, 7 in the second",
        "tensors  exp_avg: all 2 are equal",
        "tensors  weight: 1 of 2 differ, by 0.5 at most (b)",
    ]


def test_what_is_not_a_number_differs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = write_checkpoint(tmp_path / "a", 3)
    assert diff(one, write_checkpoint(tmp_path / "b", 3, shift=float("nan"))) == 1
    assert "weight: 1 of 2 differ, by nan at most (b)" in capsys.readouterr().out


def test_exit_codes_as_a_user_meets_them(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3)
    assert run("verify", folder).returncode == 0
    (folder / CONFIG_NAME).unlink()
    done = run("verify", folder)
    assert (done.returncode, done.stdout) == (1, f"{folder / CONFIG_NAME} is missing\n")
    assert verify(folder) == 1
    done = run("diff", folder, tmp_path / "none")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert run().returncode == 2
    assert "exit 0: whole; 1: every fault" in run("--help").stdout


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = "('torch', 'numpy', 'transformers', 'deepspeed', 'peft')"
    program = f"import sys, tools.checkpoint, vidcls.training.folders; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    program = "import sys, vidcls.training.sharded_state; print('deepspeed' in sys.modules, 'peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
