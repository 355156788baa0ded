import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidcls.sharding.records import (
    ClipRecord,
    RecordError,
    check_present,
    make_keys,
    numbered_lines,
    read_class_names,
    read_json,
    read_prompts,
    with_prompts,
)

ASK = "<video>What? <ACTION>"


def test_keys_are_safe_short_and_stable() -> None:
    names = ["a/b_c.mp4", "a_b/c.mp4", "d/e.mp4", "d/e.avi", "d/f.g.mp4", "d/ü.mp4", f"d/{'x' * 200}.mp4", "d/h-1.mp4"]
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    assert keys[-1] == "d_h-1"
    assert keys[4] == "d_f_g-" + hashlib.sha256(b"d/f.g.mp4").hexdigest()[:16]
    assert max(map(len, keys)) == 80
    for key in keys:
        ClipRecord(key, Path("x"), 0, "c")


# Few letters, so that names collide once "/" is "_" and suffixes are gone; and all others that file names may hold.
NAMES = st.one_of(st.text("ab_/.-", min_size=1, max_size=8), st.text(min_size=1, max_size=120)).filter(
    lambda name: name.strip("/.") != ""
)


@given(st.lists(NAMES, unique=True, max_size=30))
def test_keys_of_any_names_are_unique_and_legal(names: list[str]) -> None:
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    for key in keys:
        assert 1 <= len(key) <= 80
        assert all(char.isascii() and (char.isalnum() or char in "_-") for char in key)


@pytest.mark.parametrize("name", ["電{:06d}影.mp4", "x" * 100 + "/{}.mp4"])
def test_a_hundred_thousand_names_that_look_alike_have_keys(name: str) -> None:
    names = [name.format(i) for i in range(100_000)]
    assert (
        len(set(make_keys([name.translate(str.maketrans("0123456789", "零一二三四五六七八九")) for name in names])))
        == 100_000
    )


def test_name_that_is_not_utf8_on_disk_has_a_key() -> None:
    assert make_keys([b"a/\xff.mp4".decode(errors="surrogateescape")])[0].startswith("a__-")


@pytest.mark.parametrize("name", ["", "/", "."])
def test_name_of_no_file_has_no_key(name: str) -> None:
    with pytest.raises(RecordError, match="is not the name of a file"):
        make_keys([name])


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "x" * 81, "ü", "a\n"])
def test_record_refuses_keys_that_tars_cannot_carry(key: str) -> None:
    with pytest.raises(RecordError, match="key = "):
        ClipRecord(key, Path("x"), 0, "c")


@pytest.mark.parametrize(("start", "end"), [(None, None), (0.0, 0.5), (None, 1.0), (2.0, None), (0, 1)])
def test_record_takes_a_part_of_a_video(start: float | None, end: float | None) -> None:
    record = ClipRecord("k", Path("x"), 0, "c", start=start, end=end)
    assert (record.start, record.end) == (start, end)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (1.0, 1.0),
        (2.0, 1.0),
        (-1.0, 1.0),
        (None, 0.0),
        (-0.5, None),
        (math.nan, 1.0),
        (0.0, math.nan),
        (0.0, math.inf),
        (math.inf, None),
    ],
)
def test_record_refuses_a_part_that_is_none(start: float | None, end: float | None) -> None:
    with pytest.raises(RecordError, match=r"k: start = .*need 0 <= start < end"):
        ClipRecord("k", Path("x"), 0, "c", start=start, end=end)


def test_missing_files_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "there.mp4").touch()
    there = ClipRecord("there", tmp_path / "there.mp4", 0, "c")
    check_present([there], "list")
    clips = [ClipRecord(f"k{i}", tmp_path / f"c{i // 2}.mp4", 0, "c", start=i % 2 * 5.0) for i in range(14)]
    with pytest.raises(RecordError, match=r"list: 7 of 8 video files are missing: .*c0.mp4, .*c4.mp4 and 2 more$"):
        check_present([there, *clips], "list")


def records(count: int) -> list[ClipRecord]:
    return [ClipRecord(f"clip{i}", Path("x"), 0, "c") for i in range(count)]


def test_prompt_of_a_clip_depends_on_its_key_alone() -> None:
    pool = [f"<video>{i}? <ACTION>" for i in range(3)]
    given_out = {record.key: record.prompt for record in with_prompts(records(60), pool)}
    assert set(given_out.values()) == set(pool)
    assert given_out["clip7"] == pool[int.from_bytes(hashlib.sha256(b"clip7").digest()) % 3]
    part = with_prompts(records(60)[::-2], pool)
    assert [record.prompt for record in part] == [given_out[record.key] for record in part]


def test_prompt_of_its_own_is_kept() -> None:
    own, other = (replace(record, answer="yes") for record in records(2))
    own = replace(own, prompt="mine")
    assert with_prompts([own, other], [ASK]) == [own, replace(other, prompt=ASK)]


def test_prompt_pools_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="prompts: none given"):
        with_prompts(records(1), [])
    with pytest.raises(RecordError, match=r"prompt 2 of 2: prompt '<video>' has 1 <video> and 0 <ACTION>"):
        with_prompts(records(1), [ASK, "<video>"])
    file = tmp_path / "pool.txt"
    file.write_text(f"# a comment\n\n{ASK}\n<ACTION><video>\n")
    with pytest.raises(RecordError, match=r"pool.txt:4: .*<ACTION> before <video>"):
        read_prompts(file)
    file.write_text("# nothing\n")
    with pytest.raises(RecordError, match="has no prompts"):
        read_prompts(file)


def test_read_prompts(tmp_path: Path) -> None:
    (tmp_path / "pool.txt").write_bytes(f"\ufeff# pool\r\n\r\n{ASK}\r\n  <video>And? <ACTION> \r\n".encode())
    assert read_prompts(tmp_path / "pool.txt") == [ASK, "<video>And? <ACTION>"]


def test_lines_are_numbered_as_editors_do(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\n\r\ntwo\u2028still two\nthree\n".encode())
    assert numbered_lines(file) == [(f"{file}:1", "one"), (f"{file}:3", "two\u2028still two"), (f"{file}:4", "three")]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(RecordError, match=r"a\.json: cannot be read: .*No such file"):
        read_json(file)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(RecordError, match=r"a\.json: cannot be read: .*utf-8"):
        read_json(file)
    for text in ("{", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(RecordError, match=r"a\.json: is not JSON"):
            read_json(file)


def test_class_names(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes(b"walk the dog\r\nrun\r\n")
    assert read_class_names(file).names == ("walk the dog", "run")
    for text in ("", "a\na\n"):
        file.write_text(text)
        with pytest.raises(RecordError, match=r"classes\.txt: names"):
            read_class_names(file)
