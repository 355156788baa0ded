import base64
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.browser import dom, find_chromium
from tests.support.clips import mpeg4_avi, truncated, video
from vidcls.data.index import ShardIndex
from vidcls.data.labels import LabelSpace
from vidcls.data.settings import DecodeSettings
from vidcls.inspection.gallery import choose, write_gallery
from vidcls.inspection.similarity import look_at, matches
from vidcls.sharding.records import ClipRecord
from vidcls.sharding.writer import Plan, write_shards

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;\u2028"


def shards_of(folder: Path, classes: tuple[str, ...], per_class: int) -> Path:
    """Clips k0_0, k0_1, ... whose sources are hostile too; of an empty class none."""
    path = video(folder / "clip.mp4")
    records = [
        ClipRecord(f"k{label}_{i}", path, label, name, source=f"{i}/{HOSTILE}")
        for label, name in enumerate(classes)
        for i in range(0 if name == "empty" else per_class)
    ]
    plan = Plan(records, LabelSpace(classes), DecodeSettings(frames=3, short_side=32), 1000)
    write_shards(plan, folder / "shards", workers=0)
    return folder / "shards"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 clips each of 2 classes, and a class without any."""
    return shards_of(tmp_path_factory.mktemp("hostile"), ("walk", f"jump {HOSTILE}", "empty"), 5)


class Blocks(html.parser.HTMLParser):
    """The page as a parser other than a browser sees it: its JSON blocks, its elements and their addresses."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.json: dict[str, object] = {}
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._block: str | None = None
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        self.addresses += [str(values[name]) for name in ("src", "href", "action", "data") if name in values]
        self._block = values.get("id") if values.get("type") == "application/json" else None

    def handle_data(self, data: str) -> None:
        if self._block is not None:
            self.json[self._block] = json.loads(data)
            self._block = None


def picture(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_clips_are_spread_evenly_over_their_class() -> None:
    assert choose(np.arange(100, 110), 3) == [101, 105, 108]
    assert choose(np.arange(4), 12) == [0, 1, 2, 3]
    assert choose(np.arange(40), 0) == [*range(40)]
    assert choose(np.arange(0), 3) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_page_holds_the_chosen_clips_and_nothing_of_elsewhere(hostile: Path, tmp_path: Path, workers: int) -> None:
    page = tmp_path / "page.html"
    progress: list[tuple[int, int]] = []
    shown = write_gallery(page, hostile, per_class=3, workers=workers, progress=lambda i, of: progress.append((i, of)))
    assert shown == 6
    assert progress == [(i, 6) for i in range(1, 7)]
    blocks = Blocks(page)
    assert blocks.addresses == ["#clips"]
    assert not {"img", "link", "iframe", "object"} & {*blocks.tags}
    assert blocks.tags.count("script") == 3 + 3 + 1  # pictures of each class, three more of JSON, the program
    walk, jump, empty = blocks.json["classes"]  # type: ignore[misc]
    assert (walk["name"], jump["name"], empty["name"]) == ("walk", f"jump {HOSTILE}", "empty")
    assert (walk["count"], empty["count"], empty["clips"]) == (5, 0, [])
    assert [clip["key"] for clip in walk["clips"]] == ["k0_0", "k0_2", "k0_4"]
    assert walk["clips"][1]["source"] == f"2/{HOSTILE}"
    assert len(blocks.json["pictures-1"]) == 3  # type: ignore[arg-type]
    assert [*tmp_path.iterdir()] == [page]


def test_strip_is_the_first_middle_and_last_frame(hostile: Path, tmp_path: Path) -> None:
    """The blob moves to the right, and the strip shows it."""
    write_gallery(tmp_path / "page.html", hostile, per_class=1, workers=0)
    strip = picture(Blocks(tmp_path / "page.html").json["pictures-0"][0])  # type: ignore[index]
    assert strip.shape == (96, 3 * 96, 3)
    index = ShardIndex.open(hostile)
    data = (hostile / index.shards[0].name).read_bytes()[int(index.offset[2]) :]
    stored = [picture(base64.b64encode(part).decode()) for part in re.findall(rb"\xff\xd8\xff.+?\xff\xd9", data, re.S)]
    for part, frame in zip(np.split(strip, 3, axis=1), stored[:3], strict=True):
        assert abs(part.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3)) - frame).mean() < 8
    assert abs(stored[0] - stored[2]).mean() > 16


def test_damaged_and_unreadable_clips_are_marked(tmp_path: Path) -> None:
    whole = mpeg4_avi(tmp_path / "whole.avi", frames=96)
    half = truncated(tmp_path / "half.avi", whole, 0.6)
    records = [ClipRecord("whole", whole, 0, "a"), ClipRecord("half", half, 0, "a"), ClipRecord("last", whole, 0, "a")]
    write_shards(Plan(records, LabelSpace(("a",)), DecodeSettings(short_side=32), 9), tmp_path / "out", workers=0)
    index = ShardIndex.open(tmp_path / "out")
    assert index.header.counts.damaged == 1
    tar = tmp_path / "out" / index.shards[0].name
    data = bytearray(tar.read_bytes())
    data[int(index.offset[2]) + 600] ^= 1
    tar.write_bytes(data)
    write_gallery(tmp_path / "page.html", tmp_path / "out", per_class=0, workers=0)
    ((page,), pictures) = (Blocks(tmp_path / "page.html").json[name] for name in ("classes", "pictures-0"))  # type: ignore[misc]
    good, damaged, bad = page["clips"]
    assert (good["damage"], good["problem"], damaged["problem"]) == (None, None, None)
    assert damaged["damage"]
    assert "checksum differs" in bad["problem"]
    assert [one is not None for one in pictures] == [True, True, False]


def test_failure_leaves_no_file(hostile: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        write_gallery(tmp_path / "none" / "page.html", hostile, per_class=1, workers=0)
    assert [*tmp_path.iterdir()] == []


# In a real browser


@pytest.fixture(scope="session")
def chromium() -> str:
    return find_chromium()


def captions(text: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", text)


def test_browser_shows_the_clips_and_runs_nothing_hostile(chromium: str, hostile: Path, tmp_path: Path) -> None:
    write_gallery(tmp_path / "page.html", hostile, per_class=0, workers=0)
    text = dom(chromium, tmp_path / "page.html", tmp_path / "profile")
    assert captions(text) == [f"k{label}_{i}" for label in (0, 1) for i in range(5)]
    assert text.count('src="data:image/jpeg;base64,') == 10
    assert "owned" not in re.findall("<title>(.*?)</title>", text)[0]
    assert "jump &lt;/script&gt;&lt;script&gt;" in text
    assert "onerror=" not in re.sub("&lt;img src=x onerror=", "", text)
    assert "10 clips in 3 classes, 10 shown; 0 failed, 0 damaged" in text


@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("#q=k1_3", ["k1_3"]),
        ("#q=WALK%204/", ["k0_4"]),
        ("#q=nothing", []),
        ("#damaged=1", []),
        ("#q=%3Cscript", [f"k{label}_{i}" for label in (0, 1) for i in range(5)]),
    ],
)
def test_search(chromium: str, hostile: Path, tmp_path: Path, fragment: str, expected: list[str]) -> None:
    write_gallery(tmp_path / "page.html", hostile, per_class=0, workers=0)
    text = dom(chromium, tmp_path / "page.html", tmp_path / "profile", fragment)
    assert captions(text) == expected
    assert f"{len(expected)} clip{'' if len(expected) == 1 else 's'} of those shown" in text


def test_pictures_far_from_the_window_are_no_elements(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_gallery(page, shards_of(tmp_path, tuple(f"class {i}" for i in range(60)), 1), per_class=0, workers=0)
    top = captions(dom(chromium, page, tmp_path / "profile"))
    assert top[0] == "k0_0"
    assert len(top) < 30
    assert captions(dom(chromium, page, tmp_path / "profile", "#q=class%2059")) == ["k59_0"]
    assert "k40_0" in captions(dom(chromium, page, tmp_path / "profile", "#class-40"))


def test_similar_clips_stand_side_by_side(chromium: str, hostile: Path, tmp_path: Path) -> None:
    other = shards_of(tmp_path, ("walk",), 1)
    ours, theirs = (look_at(place, ShardIndex.open(place), 0) for place in (hostile, other))
    found = matches(ours, theirs)
    assert [match.count for match in found] == [2, 8]  # the same source in both classes, and the same looks
    write_gallery(tmp_path / "page.html", hostile, per_class=1, workers=0, other=other, found=found)
    text = dom(chromium, tmp_path / "page.html", tmp_path / "profile")
    first = text[text.index('id="pairs-0"') : text.index('id="pairs-1"')]
    assert f"Also in {other}: same source" in first
    assert captions(first) == ["k0_0", "k0_0", "k1_0", "k0_0"]
