import os
from pathlib import Path

import pytest

from vidcls.data.places import CacheSettings, LocalFolder, PlaceError, open_folder


def test_local_folder(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(b"12345")
    (tmp_path / "shard-000000.tar").write_bytes(b"tar")
    folder = open_folder(str(tmp_path))
    assert folder == open_folder(tmp_path) == LocalFolder(tmp_path)
    assert folder.name == str(tmp_path)
    assert folder.read("index.json", 5) == b"12345"
    with pytest.raises(PlaceError, match="has 5 bytes, more than the 4"):
        folder.read("index.json", 4)
    descriptor = folder.open("shard-000000.tar", 3, "unused")
    assert os.read(descriptor, 10) == b"tar"
    os.close(descriptor)
    for call in (lambda: folder.read("failed.jsonl", 9), lambda: folder.open("shard-000001.tar", 3, "")):
        with pytest.raises(PlaceError, match=rf"{tmp_path}/\S+: cannot be .* \(No such file or directory\)"):
            call()


def test_local_folder_check_lists_five(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"1234")
    folder = LocalFolder(tmp_path)
    folder.check({"a.tar": 4})
    with pytest.raises(PlaceError, match=r"1 of 1 files cannot be used: a.tar has 4 bytes instead of 5$"):
        folder.check({"a.tar": 5})
    with pytest.raises(PlaceError, match=r"7 of 8 files .*: 0.tar is missing; .*4.tar is missing and 2 more$"):
        folder.check({"a.tar": 4} | {f"{i}.tar": 4 for i in range(7)})


def test_local_folder_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(PlaceError, match="not a regular file"):
        LocalFolder(tmp_path).read("index.json", 10)


@pytest.mark.parametrize(
    "file", ["../a.tar", "/a.tar", "a/b.tar", "a.tar\n", "a.pickle", ".tar", "", "a.tar?x", "å.tar"]
)
def test_file_names_are_plain(tmp_path: Path, file: str) -> None:
    for folder in (open_folder(tmp_path), open_folder("http://localhost")):
        for call in (
            lambda folder=folder: folder.read(file, 1),
            lambda folder=folder: folder.check({file: 1}),
            lambda folder=folder: folder.open(file, 1, "0" * 64),
        ):
            with pytest.raises(PlaceError, match="is not the plain name"):
                call()


@pytest.mark.parametrize("place", ["a/b", "./a:b", "/s3://a", "~", "a|b", Path("a:b"), Path("./pipe:ls")])
def test_local_places(place: str | Path) -> None:
    assert isinstance(open_folder(place), LocalFolder)


@pytest.mark.parametrize("place", ["s3://bucket", "s3://bucket/a/b/", "https://host:81/a%20b", "http://[::1]:80/a"])
def test_remote_places(place: str) -> None:
    assert open_folder(place).name == place.rstrip("/")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("pipe:cat x", "must be a local folder, or a URL"),
        ("file:///tmp", "must be a local folder, or a URL"),
        ("gs://a/b", "must be a local folder, or a URL"),
        ("exec:ls", "must be a local folder, or a URL"),
        ("a:b", r"\./name:here"),
        ("simplecache::s3://a/b", "must be a local folder, or a URL"),
        ("s3://a/b::http://c", "must be a local folder, or a URL"),
        ("S3://a/b", "must be a local folder, or a URL"),
        ("http:/a", "must be a local folder, or a URL"),
        ("", "must be a local folder, or a URL"),
        ("a\0b", "must be a local folder, or a URL"),
        ("http://host/a?token=1", "must not have"),
        ("http://host/a b", "must not have"),
        ("http://host/a\nb", "must not have"),
        ("http:///a", "the host is missing"),
        ("s3://", "the bucket is missing"),
        ("http://host:http/a", "is not a URL"),
        (Path("s3://a/b"), "must be given as text"),
    ],
)
def test_refused_places(place: str | Path, reason: str) -> None:
    with pytest.raises(PlaceError, match=reason):
        open_folder(place)


def test_credentials_in_a_url_are_refused_and_not_shown() -> None:
    for place in ("https://me:hunter2@host/a", "https://hunter2@host/a", "gs://me:hunter2@host/a"):
        with pytest.raises(PlaceError) as caught:
            open_folder(place)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("folder", Path("relative")),
        ("max_bytes", 0),
        ("max_bytes", 1e9),
        ("attempts", 0),
        ("timeout_seconds", 0),
        ("timeout_seconds", float("nan")),
    ],
)
def test_cache_settings_check_themselves(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} = "):
        CacheSettings(**{field: value})  # type: ignore[arg-type]


def test_cache_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDCLS_CACHE", str(tmp_path))
    assert CacheSettings().folder == tmp_path
    monkeypatch.setenv("VIDCLS_CACHE", "")
    assert str(os.getuid()) in CacheSettings().folder.name
