"""The shared folder and its locks, between two processes; shards, whole and damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vidcls.doctor import folders
from vidcls.doctor.folders import Files, nearest, read_shards


def test_the_nearest_folder(tmp_path: Path) -> None:
    told = nearest(str(tmp_path / "runs" / "new"))
    assert (told["folder"], told["exists"]) == (str(tmp_path), False)
    assert nearest(str(tmp_path))["exists"]
    assert 0 < told["free"] <= told["total"]
    (tmp_path / "file").write_text("")
    assert nearest(str(tmp_path / "file" / "run"))["error"] == f"{tmp_path / 'file'} is a file"


def test_files_are_seen_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SEEN_SECONDS", 0.3)
    files = Files()
    assert files.write(str(tmp_path), "one", "token 1") is None
    found = files.read(str(tmp_path), ["one", "two"], 7)
    assert found == {"one": "token 1", "two": None}
    assert (tmp_path / "one").stat().st_size == folders.WRITTEN_BYTES
    assert files.write(str(tmp_path), "one", "again") == "File exists"
    assert files.write(str(tmp_path / "missing"), "one", "x") == "No such file or directory"
    files.remove()
    files.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_seen_by_another_process(tmp_path: Path) -> None:
    program = (
        "import sys; from vidcls.doctor.folders import Files; print(Files().try_lock(sys.argv[1], 'one'), flush=True)"
    )

    def other() -> str:
        words = [sys.executable, "-c", program, str(tmp_path)]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    files = Files()
    assert files.write(str(tmp_path), "one", "token") is None
    assert other() == "free"
    assert files.lock(str(tmp_path), "one") is None
    assert other() == "held"
    files.remove()
    assert list(tmp_path.iterdir()) == []


def test_shards(small_shards: Path, tmp_path: Path) -> None:
    told = read_shards(str(small_shards), 60.0)
    assert (told["clips"], told["shards"], told["tried"]) == (26, 3, 3)
    copy = shutil.copytree(small_shards, tmp_path / "copy")
    assert read_shards(str(copy), 60.0) == told
    assert read_shards(str(copy), 0.0)["tried"] == 1  # time is up after the first shard
    last = sorted(copy.glob("*.tar"))[-1]
    damaged = bytearray(last.read_bytes())
    damaged[600] ^= 1
    last.write_bytes(damaged)
    assert f"{last.name}: " in read_shards(str(copy), 60.0)["error"]
    last.unlink()
    assert "is missing" in read_shards(str(copy), 60.0)["error"]
    assert "not a finished data set" in read_shards(str(tmp_path), 60.0)["error"]
