import errno
import fcntl
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.support.web import forked
from vidcls.data import cache as cache_module
from vidcls.data.cache import Part, ShardCache
from vidcls.data.places import CacheSettings, PlaceError

SIZE = 1000


def shard(number: int) -> tuple[str, bytes]:
    """(sha256, contents)"""
    data = random.Random(number).randbytes(SIZE)
    return hashlib.sha256(data).hexdigest(), data


def fetch(cache: ShardCache, number: int, fill: Callable[[Part], None] | None = None) -> bytes:
    digest, data = shard(number)
    descriptor = cache.open(digest, SIZE, f"shard {number}", fill or (lambda part: part.write(data)))
    try:
        return os.read(descriptor, 2 * SIZE)
    finally:
        os.close(descriptor)


def kept(folder: Path) -> set[int]:
    names = {shard(number)[0] + ".tar": number for number in range(20)}
    return {names[path.name] for path in folder.glob("*.tar")}


def never(part: Part) -> None:
    raise AssertionError("downloaded again")


@pytest.fixture
def three(tmp_path: Path) -> ShardCache:
    """Room for three shards, almost four."""
    return ShardCache(CacheSettings(folder=tmp_path / "cache", max_bytes=4 * SIZE - 1))


def test_fetched_once(three: ShardCache) -> None:
    assert fetch(three, 1) == shard(1)[1]
    assert fetch(three, 1, never) == shard(1)[1]
    assert {path.name for path in three.settings.folder.iterdir()} == {shard(1)[0] + ".tar", "cache.lock"}


def test_the_least_recently_used_goes_first(three: ShardCache) -> None:
    folder = three.settings.folder
    for number in (1, 2, 3):
        fetch(three, number)
        used = time.time() - 1000 + number
        os.utime(folder / f"{shard(number)[0]}.tar", (used, used))
    fetch(three, 1, never)  # used again: now 2 is the oldest
    fetch(three, 4)
    assert kept(folder) == {1, 3, 4}
    fetch(three, 5)
    assert kept(folder) == {1, 4, 5}


def test_what_is_not_ours_stays(three: ShardCache) -> None:
    folder = three.settings.folder
    folder.mkdir()
    strangers = ["notes.tar", "0" * 63 + ".tar", "A" * 64 + ".tar", "0" * 64 + ".tar.bak", "mine.part"]
    for name in strangers:
        (folder / name).write_bytes(bytes(9 * SIZE))
        os.utime(folder / name, (1, 1))
    for number in range(6):
        fetch(three, number)
    assert all((folder / name).exists() for name in strangers)


def test_evicted_while_read(three: ShardCache) -> None:
    digest, data = shard(1)
    descriptor = three.open(digest, SIZE, "shard 1", lambda part: part.write(data))
    os.utime(descriptor, (1, 1))
    for number in (2, 3, 4):
        fetch(three, number)
    assert 1 not in kept(three.settings.folder)
    assert os.read(descriptor, 2 * SIZE) == data
    os.close(descriptor)


def test_a_file_cut_short_is_fetched_again(three: ShardCache) -> None:
    fetch(three, 1)
    os.truncate(three.settings.folder / f"{shard(1)[0]}.tar", SIZE - 1)
    assert fetch(three, 1) == shard(1)[1]


def test_a_failed_download_leaves_nothing(three: ShardCache) -> None:
    def fails(part: Part) -> None:
        part.write(b"half")
        raise PlaceError("the server is gone")

    with pytest.raises(PlaceError, match="the server is gone"):
        fetch(three, 1, fails)
    assert [path.name for path in three.settings.folder.iterdir()] == ["cache.lock"]
    assert fetch(three, 1) == shard(1)[1]


def test_a_part_takes_no_byte_too_many(three: ShardCache) -> None:
    def too_much(part: Part) -> None:
        part.write(bytes(SIZE))
        part.write(b"x")

    with pytest.raises(PlaceError, match=f"more than the {SIZE} bytes"):
        fetch(three, 1, too_much)


def test_a_part_can_start_again(three: ShardCache) -> None:
    digest, data = shard(1)

    def twice(part: Part) -> None:
        part.write(bytes(700))
        part.restart()
        part.write(data[:10])
        part.write(data[10:])
        assert (part.written, part.sha256) == (SIZE, digest)

    assert fetch(three, 1, twice) == data


def test_bad_requests(three: ShardCache) -> None:
    with pytest.raises(
        PlaceError, match=f"shard: its {4 * SIZE} bytes must be at least 1 and at most the {4 * SIZE - 1}"
    ):
        three.open("0" * 64, 4 * SIZE, "shard", never)
    with pytest.raises(PlaceError, match="at least 1"):
        three.open("0" * 64, 0, "shard", never)
    for digest in ("0" * 63, "A" * 64, "../" + "0" * 61):
        with pytest.raises(PlaceError, match="is not 64 lower-case hexadecimal digits"):
            three.open(digest, 1, "shard", never)


def test_full_disk(three: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(PlaceError, match=f"cache folder {three.settings.folder}: its disk is full"):
                fetch(three, 1)
    assert fetch(three, 1) == shard(1)[1]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match=f"cache folder {tmp_path}/file/cache"):
        fetch(ShardCache(CacheSettings(folder=tmp_path / "file" / "cache")), 1)


def test_folder_of_somebody_else(three: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    three.settings.folder.mkdir()
    os.chown(three.settings.folder, 12345, -1) if os.getuid() == 0 else pytest.skip("needs root")
    with pytest.raises(PlaceError, match="belongs to user 12345"):
        fetch(three, 1)


def test_processes_share_downloads_and_stay_below_the_bound(
    three: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 processes want 8 shards each, of which 3 fit; the folder only grows where space is reserved."""
    log, totals = tmp_path / "log", tmp_path / "totals"

    def slow(number: int, part: Part) -> None:
        with log.open("a") as stream:
            stream.write(f"{number}\n")
        part.write(shard(number)[1][:500])
        time.sleep(0.01)
        part.write(shard(number)[1][500:])

    def reads(seed: int) -> Callable[[], None]:
        def call() -> None:
            for number in random.Random(seed).sample(range(8), 8):
                assert fetch(three, number, lambda part, n=number: slow(n, part)) == shard(number)[1]  # type: ignore[misc]

        return call

    reserve = os.posix_fallocate

    def reserve_and_add_up(descriptor: int, start: int, size: int) -> None:
        reserve(descriptor, start, size)
        sizes = {}
        for path in three.settings.folder.iterdir():
            with suppress(FileNotFoundError):
                sizes[path.stem] = path.stat().st_size
        with totals.open("a") as stream:
            stream.write(f"{sum(sizes.values())}\n")

    monkeypatch.setattr(os, "posix_fallocate", reserve_and_add_up)
    assert forked([reads(seed) for seed in range(6)]) == [0] * 6
    assert max(map(int, totals.read_text().split())) == 3 * SIZE
    assert not list(three.settings.folder.glob("*.part"))
    assert len(log.read_text().split()) < 6 * 8

    # With room for all of them each is downloaded once.
    log.unlink()
    three = ShardCache(CacheSettings(folder=tmp_path / "large", max_bytes=8 * SIZE))
    assert forked([reads(seed) for seed in range(6)]) == [0] * 6
    assert sorted(map(int, log.read_text().split())) == list(range(8))


def test_one_download_waits_for_the_room_of_another(tmp_path: Path) -> None:
    """Room for one only; the second starts when the first has ended, not before."""
    one = ShardCache(CacheSettings(folder=tmp_path, max_bytes=SIZE))
    inside, overlaps = threading.Lock(), []

    def slow(number: int, part: Part) -> None:
        overlaps.append(not inside.acquire(blocking=False))
        time.sleep(0.1)
        part.write(shard(number)[1])
        inside.release()

    threads = [threading.Thread(target=fetch, args=(one, n, lambda part, n=n: slow(n, part))) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert overlaps == [False] * 3


def test_a_killed_download_is_taken_over(three: ShardCache) -> None:
    def dies(part: Part) -> None:
        part.write(bytes(500))
        os.kill(os.getpid(), 9)

    for number in (1, 2):
        assert forked([partial(fetch, three, number, dies)]) == [-9]  # type: ignore[list-item]
        # Making room for the second has removed what was left of the first.
        assert [path.stem for path in three.settings.folder.glob("*.part")] == [shard(number)[0]]
    assert fetch(three, 2) == shard(2)[1]
    assert kept(three.settings.folder) == {2}
    assert not list(three.settings.folder.glob("*.part"))


def test_a_lock_dies_with_its_holder_and_not_with_its_children(three: ShardCache, tmp_path: Path) -> None:
    """A loader's worker is forked while a download runs in a thread; then that process is killed, the worker lives."""
    orphan = tmp_path / "orphan"

    def forks(part: Part) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        orphan.write_text(str(child))
        os.kill(os.getpid(), 9)

    holder = os.fork()
    if holder == 0:
        fetch(three, 1, forks)
    os.waitpid(holder, 0)
    try:
        start = time.monotonic()
        assert fetch(three, 1) == shard(1)[1]
        assert time.monotonic() - start < 5
    finally:
        os.kill(int(orphan.read_text()), 9)


def test_the_lock_of_a_file_that_was_renamed_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking its download ended, and another began."""
    path, flock = tmp_path / "a.part", fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        if not (tmp_path / "a.tar").exists():
            path.rename(tmp_path / "a.tar")
            path.touch()
        flock(descriptor, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        assert cache_module._try_lock(path) is None
    lock = cache_module._try_lock(path)
    assert lock is not None
    assert cache_module._try_lock(path) is None
    cache_module._unlock(lock)


def test_waiting_for_a_hung_download_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "LONGEST_PAUSE", 0.1)
    cache = ShardCache(CacheSettings(folder=tmp_path, max_bytes=SIZE, attempts=1, timeout_seconds=0.1))
    hanging, end = threading.Event(), threading.Event()

    def hangs(part: Part) -> None:
        hanging.set()
        end.wait(10)
        part.write(shard(1)[1])

    thread = threading.Thread(target=fetch, args=(cache, 1, hangs))
    thread.start()
    assert hanging.wait(10)
    try:
        with pytest.raises(
            PlaceError, match=f"shard 1: another process .* no progress .* process {os.getpid()} waited"
        ):
            fetch(cache, 1)
        with pytest.raises(PlaceError, match="shard 2: the downloads that fill the cache"):
            fetch(cache, 2)
    finally:
        end.set()
        thread.join(10)
    assert fetch(cache, 1, never) == shard(1)[1]
