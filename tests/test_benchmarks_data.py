"""The benchmarks of the data path run and write what they promise; how fast anything is, is not asserted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.make_motion_clips import make_motion_clips

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_motion_clips(tmp_path_factory.mktemp("bench") / "videos", 2, frames=20, size=64)


def run(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def written(json_file: Path, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(json_file.read_text())


def test_sharding(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "sharding.json"
    done = run("sharding", "--videos", videos, "--clips", 40, "--workers", 2, "--rounds", 2, "--json", out)
    results = written(out, done)
    assert results["clips"] == 40
    assert results["versions"]["vidcls"]
    assert results["load_average"] >= 0
    ratios = {each["name"]: each["ratio"] for each in results["ratios"]}
    for variant in ("short side 128", "max-pixels 16384"):
        for part in ("steady / ceiling", "steady / ceiling, by CPU time", "command / ceiling"):
            ratio = ratios[f"{variant}: {part}"]
            assert 0 < ratio["least"] <= ratio["median"] <= ratio["most"]
        assert all(cost > 0 for cost in results["milliseconds_per_clip"][variant].values())
        assert f"{variant}: steady" in done.stdout


def test_loader(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "loader.json"
    options = ("--clips", 160, "--workers", 1, "--rounds", 1, "--seconds", 0.2, "--epochs", 2, "--index-samples", 3000)
    results = written(out, run("loader", "--videos", videos, *options, "--remote", "--json", out))
    assert [ratio["name"] for ratio in results["ratios"]] == [
        "loader / ceiling (bare simplejpeg)",
        "loader / ceiling, by CPU time",
        "loader / batches (simplejpeg, kept)",
        "loader / webdataset",
        "loader / decord on the fly",
    ]
    assert results["cpu_milliseconds_per_clip"].keys() == results["clips_per_second"].keys()
    assert results["clips_per_second"].keys() == {"ceiling", "batches", "loader", "webdataset", "decord"}
    assert len(results["memory"]["bytes"]) == 2 * 20
    assert results["big_index"].keys() >= {"samples", "open_seconds", "resume_seconds", "growth_bytes"}
    assert all(rate["median"] > 0 for rate in results["remote_clips_per_second"].values())
    assert (tmp_path / "loader_memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sharding", ("--clips", 5)),
        ("sharding", ("--videos", "missing")),
        ("loader", ("--videos", "missing")),
    ],
)
def test_wrong_options_are_answered(name: str, options: tuple[object, ...]) -> None:
    done = run(name, *options)
    assert done.returncode == 2
    assert str(options[0]) in done.stderr or str(options[1]) in done.stderr
    assert "Traceback" not in done.stderr
