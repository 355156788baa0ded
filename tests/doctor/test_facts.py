"""What is collected of this machine, against other ways of asking for it."""

from __future__ import annotations

import json
import mmap
import platform
import shutil
import socket
from pathlib import Path

import numpy
import psutil
import pytest
import safetensors

from vidcls.doctor import facts

ROOT = Path(__file__).parents[2]


def test_facts_of_this_machine() -> None:
    told = json.loads(json.dumps(facts.gather()))
    assert told["hostname"] == socket.gethostname()
    assert told["python"] == platform.python_version()
    assert told["packages"]["numpy"] == numpy.__version__
    assert told["packages"]["safetensors"] == safetensors.__version__
    assert told["vidcls"]["folder"] == str(ROOT)
    memory = told["memory"]
    assert 0 < memory["available"] <= memory["total"] <= psutil.virtual_memory().total
    assert set(told["addresses"]) <= {
        address.address.partition("%")[0] for each in psutil.net_if_addrs().values() for address in each
    }
    assert told["cpus"] >= 1


def test_the_digest_changes_with_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("vidcls", "launch", "ds_configs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))

    class Spec:
        origin = str(tmp_path / "vidcls" / "__init__.py")

    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda name: Spec)
    seen = {facts.sources()["digest"]}
    for name in ("vidcls/data/order.py", "launch/train.py", "ds_configs/zero2.json"):
        path = tmp_path / name
        path.write_text(path.read_text() + "\n")
        seen.add(facts.sources()["digest"])
    (tmp_path / "vidcls" / "new.py").write_text("")
    seen.add(facts.sources()["digest"])
    assert len(seen) == 5
    (tmp_path / "vidcls" / "note.txt").write_text("no source")
    assert facts.sources()["digest"] in seen


def test_buffers_in_use_are_not_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "SHM", tmp_path)
    used, left = (tmp_path / f"{facts.BUFFERS}0_a_1_{rank}" for rank in (0, 1))
    for path in (used, left):
        path.write_bytes(bytes(4096))
    with used.open("r+b") as stream, mmap.mmap(stream.fileno(), 4096):
        assert facts.shared_memory()["left"] == {left.name: 4096}


def test_a_missing_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert facts.build_tools()[str(tmp_path / "none")] == "not found"
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho '<stdin>:2:10: fatal error: Python.h: No such file or directory' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert facts.build_tools()[str(broken)] == "Python.h: No such file or directory"


def test_torch_that_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "ASK_TORCH", "import nosuchtorch")
    assert facts.ask_torch(60) == {"error": "import torch: ModuleNotFoundError: No module named 'nosuchtorch'"}
    monkeypatch.setattr(facts, "ASK_TORCH", "import time; time.sleep(60)")
    assert facts.ask_torch(0.5) == {"error": "importing torch takes more than 0 s"}
