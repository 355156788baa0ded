"""Compiled ops: a stale lock does not hold a run up, and no compiler is no obstacle."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import cpuinfo
import pytest
from deepspeed.ops.op_builder import CPUAdamBuilder

from tests.support import launch
from vidcls import ops


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom vidcls import ops\n"
        "with ops._alone(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
    begin = time.monotonic()
    with ops._alone(path):
        assert time.monotonic() - begin < 5


def test_the_cache_is_this_environments_and_its_ninja_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    folder = ops._prepare_folder()
    assert folder == Path(sys.prefix) / "torch_extensions"
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


def test_the_kernel_names_the_processor_as_cpuinfo_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other flags would have every op compiled anew. Without an answer DeepSpeed asks as ever."""
    builder = CPUAdamBuilder()
    expected = builder.cpu_arch(), builder.simd_width()
    asked = cpuinfo.get_cpu_info
    monkeypatch.setattr("subprocess.Popen", None)  # what takes the time
    with ops.known_processor():
        assert (cpuinfo.get_cpu_info is asked) == (platform.machine() != "x86_64")
        if cpuinfo.get_cpu_info is not asked:
            assert (builder.cpu_arch(), builder.simd_width()) == expected
    assert cpuinfo.get_cpu_info is asked
    monkeypatch.setattr(ops, "PROCESSORS", tmp_path / "none")
    with ops.known_processor():
        assert cpuinfo.get_cpu_info is asked


@pytest.mark.launch
def test_training_goes_on_without_a_compiler(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with torch's lock of a process that died in the middle of compiling."""
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    for name in ("fused_adam", "deepspeed_shm_comm"):
        (tmp_path / "ops" / name).mkdir(parents=True)
        (tmp_path / "ops" / name / "lock").touch()
    words = ("launch/recipes/quickstart.yaml", f"dataset={small_shards}", f"output_dir={tmp_path / 'run'}")
    short = ("max_steps=2", "per_device_train_batch_size=2", "report_to=none", "plot_loss=false")
    done = launch.deepspeed(2, "launch/train.py", *words, *short, log=tmp_path / "log", timeout=180)
    assert done.code == 0, done.output[-3000:]
    line = "DeepSpeed's FusedAdam cannot be compiled"
    assert done.output.count(line) == 1, done.output[-3000:]
    assert (tmp_path / "run" / "checkpoint-2" / "MANIFEST.json").is_file()
