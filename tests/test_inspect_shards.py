"""tools/inspect_shards.py as users start it: a process of its own, from another folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.forgery import forge
from tests.support.shards import make_shards
from tests.support.web import web
from tools.make_motion_clips import make_motion_clips

pytestmark = pytest.mark.launch  # servers, processes and time limits: slow

TOOL = Path(__file__).parents[1] / "tools" / "inspect_shards.py"


def run(folder: Path, *options: object, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, options)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TOOL.parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_numbers(small_shards: Path, tmp_path: Path) -> None:
    code, out, err = run(tmp_path, small_shards, "--json", "out.json")
    assert (code, err) == (0, "")
    assert f"{small_shards}: 26 clips of 4 classes" in out
    assert "3 shards" in out
    assert re.search(r"down █{30} 7\n", out)
    assert re.search(r"left █{26} 6\n", out)
    assert "56x56" in out
    assert json.loads((tmp_path / "out.json").read_text())["overview"]["per_class"] == [7, 6, 7, 6]


def test_torch_is_not_imported() -> None:
    program = (
        "import sys, tools.inspect_shards; from vidcls.inspection import charts, gallery, similarity, verify;"
        "print([m for m in ('torch', 'transformers', 'decord') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TOOL.parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_everything_at_once(small_shards: Path, tmp_path: Path) -> None:
    outs = ("--html", "page.html", "--plot", "plot.png", "--json", "out.json")
    code, out, err = run(tmp_path, small_shards, "--verify", *outs, "--workers", "2", "--per-class", "2")
    assert (code, err) == (0, "")
    assert "no problems found" in out
    assert "page: page.html, 8 clips" in out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "out.json").read_text())["problems"] == []


def test_problems_are_lines_and_exit_code_1(tmp_path: Path) -> None:
    shards = make_shards(make_motion_clips(tmp_path / "videos", 1, frames=8, size=56), tmp_path / "shards", frames=4)
    tar = shards / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[512] ^= 1
    tar.write_bytes(data)
    code, out, err = run(tmp_path, "shards", "--verify", "--workers", "1", "--json", "out.json")
    assert (code, err) == (1, "")
    assert "shard-000000.tar: down_clip_0000: checksum differs" in out
    problems = json.loads((tmp_path / "out.json").read_text())["problems"]
    assert f"{len(problems)} problems found" in out
    assert {problem["key"] for problem in problems} == {None, "down_clip_0000"}
    assert all(problem["shard"] == "shard-000000.tar" for problem in problems)
    code, out, _ = run(tmp_path, "shards", "--against", "shards", "--workers", "0")
    assert code == 1
    assert "down_clip_0000: not compared: " in out
    tar.unlink()
    code, out, _ = run(tmp_path, "shards", "--verify", "--json", "out.json")
    assert code == 1
    assert "shard-000000.tar is missing" in out
    assert len(json.loads((tmp_path / "out.json").read_text())["problems"]) == 1


def test_common_clips(small_shards: Path, tmp_path: Path) -> None:
    videos = make_motion_clips(tmp_path / "videos", 2, frames=8, size=56)
    make_shards(videos, tmp_path / "same", frames=4)
    code, out, err = run(tmp_path, "same", "--against", small_shards, "--json", "out.json", "--html", "page.html")
    assert (code, err) == (1, "")
    assert "same source: 8 pairs" in out
    assert "  up_clip_0001 and up_clip_0001 (up/clip_0001.mp4)" in out
    common = {match["reason"]: match for match in json.loads((tmp_path / "out.json").read_text())["common"]}
    assert common["same source"]["count"] == len(common["same source"]["pairs"]) == 8
    other = make_motion_clips(tmp_path / "others", 1, seed=5, frames=8, size=56)
    for clip in other.rglob("*.mp4"):
        clip.rename(clip.with_name("other.mp4"))
    make_shards(other, tmp_path / "other", frames=4)
    code, out, _ = run(tmp_path, "other", "--against", "other", "--max-distance", "10")
    assert code == 0
    assert "no clip is there twice" in out
    code, out, _ = run(tmp_path, "other", "--against", "same", "--max-distance", "0")
    assert code == 0
    assert "no clip in common with same" in out


def test_folder_behind_a_web_server(small_shards: Path, tmp_path: Path) -> None:
    """The numbers need no tar."""
    with web() as served:
        served.files = {path.name: path.read_bytes() for path in small_shards.iterdir()}
        cache = str(tmp_path / "cache")
        code, out, err = run(tmp_path, served.url, VIDCLS_CACHE=cache)
        assert (code, err) == (0, "")
        assert f"{served.url}: 26 clips" in out
        assert not any(name.endswith(".tar") for name in served.requests)
        code, out, err = run(tmp_path, served.url, "--verify", "--workers", "1", VIDCLS_CACHE=cache)
        assert (code, err) == (0, "")
        assert "no problems found" in out


def test_hostile_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    made = make_motion_clips(tmp_path / "clips", 1, frames=8, size=56)
    name = "\x1b]0;owned\x07[red]class\x1b[2J"
    (made / "up").rename(tmp_path / "videos" / name)
    make_shards(tmp_path / "videos", tmp_path / "shards", frames=4)
    code, out, _ = run(tmp_path, "shards")
    assert code == 0
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]class" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("none",), "error: none/index.json: cannot be read"),
        (("ftp://x/y",), "error: 'ftp://x/y': must be a local folder, or a URL"),
        (("DIR", "--against", "none"), "error: none/index.json"),
        (("DIR", "--workers", "-1"), "--workers must be at least 0"),
        (("DIR", "--max-distance", "200"), "--max-distance must be from 0 to 128"),
        (("DIR", "--html", "none/page.html"), "there is no folder"),
        (("DIR", "--plot", "."), "error: "),
    ],
)
def test_mistakes_give_exit_code_2(small_shards: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    code, _, err = run(tmp_path, *[small_shards if option == "DIR" else option for option in options])
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_index_that_contradicts_itself_is_a_problem(small_shards: Path, tmp_path: Path) -> None:
    shards = make_shards(make_motion_clips(tmp_path / "videos", 1, frames=8, size=56), tmp_path / "shards", frames=4)
    forge(shards, lambda header, tensors: tensors["label"].__setitem__(0, 99))
    assert run(tmp_path, "shards")[0] == 2
    code, out, _ = run(tmp_path, "shards", "--verify")
    assert code == 1
    assert "label[0] = 99" in out
