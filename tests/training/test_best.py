"""output_dir/best: whole, only what inference reads, and never half."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidcls.manifest import CheckpointError, StorageError, seal, verify
from vidcls.training.best import publish_best


def checkpoint(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    (folder / "heads" / "a").mkdir(parents=True)
    (folder / "vidcls_model.json").write_text(f"spec {step}")
    (folder / "heads" / "a" / "label_map.json").write_text(f"labels {step}")
    (folder / "training_state-00001-of-00001.safetensors").write_text("moments")
    (folder / "deepspeed").mkdir()
    (folder / "deepspeed" / "latest").write_text("state")
    (folder / "training_state.json").write_text("step")
    seal(folder)
    (folder / "evaluation").mkdir()  # not part of the checkpoint
    (folder / "evaluation" / "eval.json").write_text("{}")
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("links", [True, False])
def test_it_holds_what_inference_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    source = checkpoint(tmp_path, 8)
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no hard links here")))
    best = publish_best(source, tmp_path, {"step": 8})
    assert best == tmp_path / "best"
    assert files(best) == {"vidcls_model.json", "heads/a/label_map.json", "best.json", "MANIFEST.json", "COMPLETE"}
    verify(best)
    assert json.loads((best / "best.json").read_text()) == {"step": 8}
    same = (best / "vidcls_model.json").stat().st_ino == (source / "vidcls_model.json").stat().st_ino
    assert same == links


def test_a_better_one_takes_its_place_and_nothing_is_left_over(tmp_path: Path) -> None:
    publish_best(checkpoint(tmp_path, 8), tmp_path, {})
    (tmp_path / "best.tmp-dead").mkdir()
    publish_best(checkpoint(tmp_path, 9), tmp_path, {})
    assert (tmp_path / "best" / "vidcls_model.json").read_text() == "spec 9"
    assert {path.name for path in tmp_path.iterdir()} == {"best", "checkpoint-8", "checkpoint-9"}


def test_a_damaged_checkpoint_is_no_best(tmp_path: Path) -> None:
    publish_best(checkpoint(tmp_path, 8), tmp_path, {})
    damaged = checkpoint(tmp_path, 9) / "heads" / "a" / "label_map.json"
    damaged.write_text("labels x")
    with pytest.raises(CheckpointError, match=r"label_map.json is damaged"):
        publish_best(tmp_path / "checkpoint-9", tmp_path, {})
    assert (tmp_path / "best" / "vidcls_model.json").read_text() == "spec 8"
    verify(tmp_path / "best")


def test_a_full_disk_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path, 8)

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr("vidcls.training.best.seal", full)
    with pytest.raises(StorageError, match=r"best\.tmp-\w+ cannot be written: No space left on device; \d+ bytes"):
        publish_best(source, tmp_path, {})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8"}
