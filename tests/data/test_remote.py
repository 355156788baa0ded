import gc
import hashlib
import logging
import os
import pickle
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from tests.support.web import Web, forked, web
from vidcls.data import remote
from vidcls.data.places import CacheSettings, PlaceError, ShardFolder, open_folder

pytestmark = pytest.mark.launch  # servers, processes and time limits: slow

SIZE = 300_000  # several reads of a socket
SHARDS = {f"shard-{i:06d}.tar": random.Random(i).randbytes(SIZE) for i in range(4)}
SHARD = "shard-000000.tar"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server() -> Iterator[Web]:
    """Serves SHARDS and an index.json below data/."""
    with web() as served:
        served.files = {f"data/{name}": data for name, data in SHARDS.items()} | {"data/index.json": b'{"a": 1}'}
        yield served


@pytest.fixture
def settings(tmp_path: Path) -> CacheSettings:
    return CacheSettings(folder=tmp_path / "cache", max_bytes=10 * SIZE, attempts=3, timeout_seconds=8)


@pytest.fixture
def folder(server: Web, settings: CacheSettings) -> ShardFolder:
    return open_folder(f"{server.url}/data/", settings)


@pytest.fixture
def hasty(server: Web, settings: CacheSettings) -> ShardFolder:
    """For a server that stalls; too hasty for counting requests on a busy machine."""
    return open_folder(f"{server.url}/data/", replace(settings, timeout_seconds=0.5))


def entry(name: str) -> tuple[str, int, str]:
    return name, SIZE, hashlib.sha256(SHARDS[name]).hexdigest()


def fetch(folder: ShardFolder, name: str = SHARD) -> bytes:
    descriptor = folder.open(*entry(name))
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def fetch_all(folder: ShardFolder, seed: int = 0) -> None:
    for name in random.Random(seed).sample(sorted(SHARDS), len(SHARDS)):
        assert fetch(folder, name) == SHARDS[name]


def faults(server: Web, *wrongs: int | str, path: str = f"data/{SHARD}") -> None:
    server.faults[path] = deque(wrongs)


def until(condition: Callable[[], Any], seconds: float = 10) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.01)


def test_http(server: Web, folder: ShardFolder) -> None:
    assert folder.read("index.json", 8) == b'{"a": 1}'
    folder.check(dict.fromkeys(SHARDS, 1))
    assert not server.requests["data/" + SHARD]
    for _ in range(2):
        fetch_all(folder)
    assert set(server.requests.values()) == {1}


def test_the_same_shard_elsewhere_is_not_fetched(server: Web, folder: ShardFolder, settings: CacheSettings) -> None:
    fetch(folder)
    assert fetch(open_folder(f"{server.url}/other", settings)) == SHARDS[SHARD]
    assert server.requests.total() == 1


def test_a_copy_that_rots_on_the_disk_is_fetched_again(
    server: Web, folder: ShardFolder, settings: CacheSettings
) -> None:
    fetch(folder)
    assert not folder.mend(*entry(SHARD))
    (copy,) = settings.folder.glob("*.tar")
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    assert fetch(folder) == data  # the reader's own checksums are what notices
    assert folder.mend(*entry(SHARD))
    assert fetch(folder) == SHARDS[SHARD]
    assert server.requests["data/" + SHARD] == 2


def test_pickled(folder: ShardFolder) -> None:
    assert folder.read("index.json", 8)
    assert fetch(pickle.loads(pickle.dumps(folder))) == SHARDS[SHARD]


@pytest.mark.parametrize("wrong", [503, 500, 429, "cut", "short", "wrong", "stall"])
def test_what_may_pass_is_tried_again(server: Web, hasty: ShardFolder, wrong: int | str) -> None:
    faults(server, wrong)
    assert fetch(hasty) == SHARDS[SHARD]
    assert server.requests.total() == 2


@pytest.mark.parametrize(
    ("wrong", "requests", "reason"),
    [
        (404, 1, "does not exist"),
        (403, 1, "HTTP status 403"),
        (503, 3, "gave up after 3 attempts; the last: HTTP status 503"),
        ("cut", 3, "gave up after 3 attempts; the last: ClientPayloadError"),
        ("short", 3, f"gave up after 3 attempts; the last: ended after {SIZE // 2} of {SIZE} bytes"),
        ("wrong", 2, "its sha256 is [0-9a-f]{64}, but [0-9a-f]{64} in the index"),
        ("long", 1, f"has {SIZE + 1} bytes, more than the {SIZE}"),
        ("endless", 1, f"has more than the {SIZE} bytes"),
        ("stall", 3, "gave up after 3 attempts; the last: .*Timeout"),
    ],
)
def test_what_lasts_is_an_error(
    server: Web, hasty: ShardFolder, settings: CacheSettings, wrong: int | str, requests: int, reason: str
) -> None:
    server.faults[f"data/{SHARD}"] = deque(repeat(wrong, 20))
    start = time.monotonic()
    with pytest.raises(PlaceError, match=f"^{server.url}/data/{SHARD}: {reason}"):
        fetch(hasty)
    assert time.monotonic() - start < 5
    assert server.requests.total() == requests
    assert not [path for path in settings.folder.iterdir() if path.name != "cache.lock"]


def test_read_is_bounded_and_tried_again(server: Web, folder: ShardFolder) -> None:
    faults(server, 503, "cut", path="data/index.json")
    assert folder.read("index.json", 8) == b'{"a": 1}'
    with pytest.raises(PlaceError, match=r"data/index\.json: has 8 bytes, more than the 7"):
        folder.read("index.json", 7)
    faults(server, "endless", path="data/index.json")
    with pytest.raises(PlaceError, match="has more than the 100 bytes"):
        folder.read("index.json", 100)


def test_nobody_listens(settings: CacheSettings) -> None:
    with web() as gone:
        pass
    with pytest.raises(PlaceError, match="gave up after 3 attempts; the last: ClientConnectorError"):
        open_folder(gone.url, settings).read("index.json", 8)


def test_a_server_that_trickles_counts_as_stalled(
    server: Web, hasty: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never pauses as long as the time limit, but would take 2 s."""
    monkeypatch.setattr(remote, "SLOWEST", 10 * SIZE)
    server.seconds = 2
    with pytest.raises(PlaceError, match="gave up after 3 attempts; the last: sends less than"):
        fetch(hasty)


def test_processes_download_each_shard_once(server: Web, folder: ShardFolder) -> None:
    """The children have orders of their own. The parent has a connection, which they neither use nor close."""
    assert folder.read("index.json", 8)
    server.seconds = 0.1
    assert forked([partial(fetch_all, folder, seed) for seed in range(4)]) == [0] * 4
    assert {server.requests[f"data/{name}"] for name in SHARDS} == {1}
    fetch_all(folder)
    assert folder.read("index.json", 8)
    assert server.requests["data/index.json"] == 2


def test_fork_during_downloads_of_a_thread(server: Web, folder: ShardFolder, settings: CacheSettings) -> None:
    """Children neither wait for locks of a thread that they do not have nor disturb its connection."""
    server.seconds = 0.2
    folder.prefetch(entry(name) for name in sorted(SHARDS)[:2])
    assert server.started.wait(10)
    own = open_folder(f"{server.url}/data", replace(settings, folder=settings.folder / "child"))

    def child() -> None:
        folder.prefetch([entry(sorted(SHARDS)[2])])
        fetch_all(folder)
        fetch_all(own)

    assert forked([child, child], seconds=15) == [0, 0]
    fetch_all(folder)
    assert {server.requests[f"data/{name}"] for name in SHARDS} == {2}  # one for each of the caches


def test_a_child_keeps_what_its_parent_has_dropped(server: Web, settings: CacheSettings) -> None:
    """fsspec needs a second to close each connection of another process; six folders with equal settings."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(6):
            assert open_folder(f"{server.url}/data", settings).read("index.json", 8)
        child = os.fork()
        if child == 0:
            start = time.monotonic()
            gc.collect()
            os._exit(time.monotonic() - start > 5)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        gc.enable()


def test_prefetch(server: Web, folder: ShardFolder, settings: CacheSettings) -> None:
    names = sorted(SHARDS)
    server.seconds = 0.2
    start = time.monotonic()
    folder.prefetch(entry(name) for name in names)
    assert time.monotonic() - start < 0.1
    assert server.started.wait(10)
    folder.prefetch([entry(names[3])])  # only the first has started; the others are no longer wanted
    until(lambda: len(list(settings.folder.glob("*.tar"))) == 2)
    assert [server.requests[f"data/{name}"] for name in names] == [1, 0, 0, 1]
    fetch_all(folder)
    assert [server.requests[f"data/{name}"] for name in names] == [1, 1, 1, 1]


def test_prefetch_goes_on_after_a_failure(
    server: Web, folder: ShardFolder, settings: CacheSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="vidcls.data.remote")
    faults(server, 404)
    folder.prefetch([entry(SHARD), entry("shard-000001.tar")])
    until(lambda: list(settings.folder.glob("*.tar")))
    assert f"{SHARD}: does not exist" in caplog.text
    assert fetch(folder) == SHARDS[SHARD]


def test_killed_while_downloading(server: Web, folder: ShardFolder, settings: CacheSettings) -> None:
    server.seconds = 5
    child = os.fork()
    if child == 0:
        fetch(folder)
        os._exit(1)
    assert server.started.wait(10)
    os.kill(child, 9)
    assert os.waitpid(child, 0)[1] == 9
    assert [path.stat().st_size for path in settings.folder.glob("*.part")] == [SIZE]
    server.seconds = 0
    assert fetch(folder) == SHARDS[SHARD]
    assert not list(settings.folder.glob("*.part"))


def test_missing_package(monkeypatch: pytest.MonkeyPatch, settings: CacheSettings) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(PlaceError, match=r"^s3://bucket: a package is missing .*s3fs.*pip install 'vidcls\[remote\]'"):
        open_folder("s3://bucket", settings)


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """Bucket clips with SHARDS below train/."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=url, **keys)
    client.create_bucket(Bucket="clips")
    for name, data in {**SHARDS, "index.json": b'{"a": 1}'}.items():
        client.put_object(Bucket="clips", Key=f"train/{name}", Body=data)
    yield url
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, settings: CacheSettings, monkeypatch: pytest.MonkeyPatch) -> ShardFolder:
    """Everything about access comes from the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return open_folder("s3://clips/train", settings)


@pytest.mark.parametrize("chunk", [SIZE // 3, SIZE, 2**24])
def test_s3(s3: ShardFolder, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """A chunk may end where the file ends."""
    monkeypatch.setattr(remote, "CHUNK", chunk)
    assert s3.read("index.json", 100) == s3.read("index.json", 8) == b'{"a": 1}'
    with pytest.raises(PlaceError, match=r"s3://clips/train/index\.json: has more than the 7 bytes"):
        s3.read("index.json", 7)
    assert s3.read(SHARD, 2 * SIZE) == SHARDS[SHARD]
    fetch_all(s3)


def test_s3_in_forked_processes(s3: ShardFolder, settings: CacheSettings) -> None:
    assert s3.read("index.json", 8)
    assert forked([partial(fetch_all, s3, seed) for seed in range(3)]) == [0] * 3
    assert s3.read("index.json", 8)


def test_s3_errors(s3: ShardFolder, settings: CacheSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlaceError, match=r"s3://clips/train/failed\.jsonl: does not exist"):
        s3.read("failed.jsonl", 8)
    with pytest.raises(PlaceError, match=r"s3://nobucket/index\.json: does not exist"):
        open_folder("s3://nobucket", settings).read("index.json", 8)
    name, size, digest = entry(SHARD)
    with pytest.raises(PlaceError, match=f"has more than the {size - 1} bytes"):
        s3.open(name, size - 1, digest)
    with pytest.raises(PlaceError, match="its sha256 is"):
        s3.open(name, size, digest[::-1])


@pytest.mark.parametrize(
    ("wrong", "requests", "reason"),
    [
        (503, 3, "gave up after 3 attempts; the last: HTTP status 503"),
        (403, 1, "HTTP status 403"),
        ("cut", 3, "gave up after 3 attempts; the last: "),
        ("stall", 3, "gave up after 3 attempts; the last: ReadTimeoutError"),
    ],
)
def test_s3_is_tried_again_by_us_alone(
    server: Web,
    s3: ShardFolder,
    settings: CacheSettings,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Any,
    requests: int,
    reason: str,
) -> None:
    """botocore and s3fs have retries of their own, which would multiply."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.faults[f"data/{SHARD}"] = deque(repeat(wrong, 50))
    start = time.monotonic()
    with pytest.raises(PlaceError, match=f"^s3://data/{SHARD}: {reason}"):
        fetch(open_folder("s3://data", replace(settings, timeout_seconds=0.5)))
    assert time.monotonic() - start < 5
    assert server.requests.total() == requests


def test_s3_without_credentials(
    s3_endpoint: str, settings: CacheSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    with pytest.raises(PlaceError, match=r"s3://clips/train/index\.json: NoCredentialsError"):
        open_folder("s3://clips/train", settings).read("index.json", 8)


def test_threads_share_a_folder(server: Web, folder: ShardFolder) -> None:
    server.seconds = 0.1
    threads = [threading.Thread(target=fetch_all, args=(folder, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert set(server.requests.values()) == {1}
