"""The HTTP service: good uploads, hostile uploads, many at once, and its page in a browser."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import signal
import socket
import struct
import subprocess
import tarfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.testclient import TestClient
from PIL import Image

import vidcls
from tests.support import launch
from tests.support.browser import find_chromium, run
from tests.support.checkpoints import make_checkpoint
from tests.support.clips import mpeg4_avi, video
from vidcls.predict.predictor import Predictor
from vidcls.serve.app import create_app
from vidcls.serve.batching import Batcher
from vidcls.serve.limits import ServeLimits


@pytest.fixture(scope="module")
def checkpoint(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("serve") / "checkpoint-1", {"default": small_shards})


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return vidcls.load(checkpoint)


@pytest.fixture(scope="module")
def clips(small_shards: Path) -> list[Path]:
    return sorted((small_shards.parent / "videos").rglob("*.mp4"))[::5]


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    with TestClient(create_app(predictor, ServeLimits(upload_bytes=300_000, video_seconds=5, workers=1))) as client:
        yield client


def post(
    client: TestClient | httpx.Client, content: bytes, name: str = "clip.mp4", **options: object
) -> httpx.Response:
    return client.post("/predict", files={"video": (name, content)}, params=options)


def test_an_upload_is_answered_as_the_file_is_predicted(
    client: TestClient, predictor: Predictor, clips: list[Path]
) -> None:
    for clip in clips:
        answer = post(client, clip.read_bytes(), clip.name, top=4)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["video"] == clip.name
        expected = dict(predictor.predict(clip))
        assert {each["class"]: each["score"] for each in told["top"]} == pytest.approx(expected, abs=1e-5)
        assert "frames" not in told
    picture = post(client, clips[0].read_bytes(), frames="true").json()["frames"]
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (4 * 96, 96)


def test_health_metrics_and_page(client: TestClient, clips: list[Path]) -> None:
    health = client.get("/health").json()
    assert (health["status"], health["classes"]) == ("ok", 4)
    before = client.get("/metrics").text
    assert "vidcls_request_seconds_bucket" in before
    post(client, b"no video")
    after = client.get("/metrics").text

    def count(text: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith('vidcls_requests_total{outcome="wrong_type"}')]
        return float(lines[0].split()[-1]) if lines else 0.0

    assert count(after) == count(before) + 1
    assert "<title>vidcls</title>" in client.get("/").text
    assert "/predict" in client.get("/openapi.json").json()["paths"]


def test_what_is_refused_and_how(client: TestClient, clips: list[Path], tmp_path: Path) -> None:
    good = clips[0].read_bytes()
    long = video(tmp_path / "long.mp4", frames=80).read_bytes()  # 6.7 s
    cases = {
        "empty": (post(client, b""), 422, "the file is empty"),
        "no video": (post(client, b"hello " * 99), 415, "not a video of a known type (mp4, mov, 3gp, mkv, "),
        "no more video": (post(client, good[:200]), 422, ""),
        "too long": (post(client, long), 413, "at most 5 s are taken"),
        "too large": (post(client, bytes(400_000)), 413, "more than 300000 bytes"),
        "no file": (client.post("/predict", files={"other": good}), 422, "the form has no file `video`"),
        "no form": (client.post("/predict", content=good), 415, "send multipart/form-data"),
        "bad form": (
            client.post("/predict", content=b"xx", headers={"content-type": "multipart/form-data; boundary=y"}),
            400,
            "the form cannot be read",
        ),
        "bad top": (post(client, good, top=0), 422, "top: 0; legal: >= 1"),
        "no number": (post(client, good, top="many"), 422, "top: Input should be a valid integer"),
        "odd charset": (
            client.post(
                "/predict",
                content=b'--y\r\nContent-Disposition: form-data; name="video"; filename="a"\r\n\r\nx\r\n--y--\r\n',
                headers={"content-type": "multipart/form-data; boundary=y; charset=undefined"},
            ),
            400,
            "the form cannot be read",
        ),
        "get": (client.get("/predict"), 405, ""),
    }
    for name, (answer, status, words) in cases.items():
        assert answer.status_code == status, f"{name}: {answer.status_code} {answer.text}"
        assert words in answer.text, name
        assert "/tmp/" not in answer.text, name
        if name != "get":
            assert answer.json().keys() == {"error", "kind"}, name
    pieces = client.post(
        "/predict",
        content=(bytes(100_000) for _ in range(5)),
        headers={"content-type": "multipart/form-data; boundary=y"},
    )
    assert pieces.status_code in (400, 413)
    assert post(client, good).status_code == 200


def test_more_than_the_limit_at_once_are_told_to_come_again(predictor: Predictor, clips: list[Path]) -> None:
    limits = ServeLimits(waiting=1, workers=1)
    with TestClient(create_app(predictor, limits)) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(client, clips[0].read_bytes()), range(8)))
    found = Counter(answer.status_code for answer in answers)
    assert found[200] >= 1
    assert found[200] + found[503] == 8
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 503)


def test_an_upload_that_never_ends_gives_its_place_up(predictor: Predictor, clips: list[Path]) -> None:
    """Half a form, and then nothing: for ever, if it may. Nor does one that is broken off leave anything."""
    limits = ServeLimits(waiting=2, workers=1, upload_seconds=1.0)
    with in_thread(create_app(predictor, limits)) as address:
        host, port = address.removeprefix("http://").split(":")
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=y\r\n"
        stalled = [socket.create_connection((host, int(port))) for _ in range(2)]
        for each in stalled:
            each.sendall(head + b"Content-Length: 1000\r\n\r\n--y\r\n")
        until = time.monotonic() + 30
        with httpx.Client(base_url=address, timeout=30) as client:
            while (answer := post(client, clips[0].read_bytes())).status_code == 503:
                assert time.monotonic() < until
                time.sleep(0.1)
            assert answer.status_code == 200
            stalled[0].settimeout(10)
            assert b" 408 " in stalled[0].recv(1000).splitlines()[0]
            broken = socket.create_connection((host, int(port)))
            broken.sendall(head + b"Content-Length: 1000\r\n\r\n--y\r\n")
            broken.close()
            while 'outcome="gone"} 1.0' not in client.get("/metrics").text:
                assert time.monotonic() < until
                time.sleep(0.1)
        for each in stalled:
            each.close()


def test_requests_at_once_share_forwards(predictor: Predictor, clips: list[Path]) -> None:
    """And each gets the answer for its own clip."""
    with TestClient(create_app(predictor, ServeLimits(batch_wait=0.3, workers=2))) as client:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda clip: post(client, clip.read_bytes(), clip.name, top=4).json(), clips * 2))
        metrics = client.get("/metrics").text
    for clip, told in zip(clips * 2, answers, strict=True):
        expected = dict(predictor.predict(clip))
        assert {each["class"]: each["score"] for each in told["top"]} == pytest.approx(expected, abs=1e-5)
    forwards = float(metrics.partition("vidcls_batch_clips_count ")[2].split()[0])
    assert forwards < len(answers)


@pytest.mark.parametrize("wait", [0.0, 0.01])
def test_what_waits_already_goes_together(wait: float) -> None:
    sizes: list[int] = []

    def scores(clips: list[Any]) -> np.ndarray:
        sizes.append(len(clips))
        return np.array([[clip] for clip in clips])

    async def ask() -> list[float]:
        batcher = Batcher(scores, most=8, wait=wait)
        waiting = [asyncio.ensure_future(batcher(number)) for number in range(16)]  # type: ignore[arg-type]
        await asyncio.sleep(0)  # all are in the queue before anything is taken from it
        batcher.start()
        answers = await asyncio.gather(*waiting)
        await batcher.close()
        return [float(answer[0]) for answer in answers]

    assert asyncio.run(ask()) == list(range(16))
    assert sizes == [8, 8]


# Hostile uploads, to the service as it runs


def malformed(good: list[bytes], number: int) -> tuple[str, bytes]:
    """One of 200: a kind of damage, and the bytes."""
    draw = random.Random(number)
    kind = ("cut", "cut", "noise", "empty", "text", "huge png", "tar", "zip bomb", "header", "flipped")[number % 10]
    content = draw.choice(good)
    if kind == "cut":  # in the first part: later cuts leave a shorter, good video
        return kind, content[: draw.randrange(1, len(content) // 5)]
    if kind == "noise":
        return kind, draw.randbytes(draw.randrange(1, 50_000))
    if kind == "empty":
        return kind, b""
    if kind == "text":
        return kind, b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.mp4\nfile:///etc/passwd\n"
    if kind == "huge png":  # 60000 x 60000, all zeros: 3.6 GB of pixels in some kB

        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
        return kind, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**7)))
    out = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as tar:
            info = tarfile.TarInfo("clip.mp4")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        return kind, out.getvalue()
    if kind == "zip bomb":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("clip.mp4", bytes(30_000_000))
        return kind, out.getvalue()
    if kind == "header":  # the first bytes of a video, then noise
        return kind, content[:64] + draw.randbytes(len(content))
    damaged = bytearray(content)
    for _ in range(len(damaged) // 20):
        damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
    return kind, bytes(damaged)


@contextmanager
def service(checkpoint: Path, folder: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [launch.PYTHON, "launch/serve.py", checkpoint, "--port", port, "--workers", 2, "--decode-seconds", 20]
    process = launch.start(words, log=folder / "service.log")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until = time.monotonic() + 120
            while True:
                try:
                    client.get("/health")
                    break
                except httpx.TransportError:
                    assert process.poll() is None, (folder / "service.log").read_text()
                    assert time.monotonic() < until
                    time.sleep(0.2)
            yield client, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert not launch.end_session(process.pid)


def memory(process: subprocess.Popen) -> int:
    """Bytes of the service's own process."""
    return psutil.Process(process.pid).memory_info().rss


@pytest.mark.launch
def test_two_hundred_hostile_uploads(checkpoint: Path, clips: list[Path], tmp_path: Path) -> None:
    """Each is answered with a 4xx, memory stays flat, and good requests in between get their answers."""
    good = [clip.read_bytes() for clip in clips]
    good += [mpeg4_avi(tmp_path / "a.avi").read_bytes(), video(tmp_path / "b.mkv").read_bytes()]
    wrong: list[str] = []
    with service(checkpoint, tmp_path) as (client, process):
        first = post(client, good[0]).json()
        for number in range(20):  # whatever is loaded at first
            post(client, malformed(good, number)[1])
        before = memory(process)
        stop, served = threading.Event(), Counter[int]()

        def keep_asking() -> None:
            with httpx.Client(base_url=client.base_url, timeout=60) as other:
                while not stop.is_set():
                    answer = post(other, good[0])
                    served[answer.status_code if answer.json() == first else -1] += 1

        other = threading.Thread(target=keep_asking)
        other.start()
        try:
            kinds = Counter[str]()
            for number in range(200):
                kind, content = malformed(good, number)
                answer = post(client, content, f"{kind}.mp4")
                kinds[kind] += 1
                decoded_after_all = kind == "flipped" and answer.status_code == 200
                if not (400 <= answer.status_code < 500 or decoded_after_all) or not answer.json():
                    wrong.append(f"{number} {kind}: {answer.status_code} {answer.text[:200]}")
        finally:
            stop.set()
            other.join(60)
        after = memory(process)
        assert client.get("/health").json()["status"] == "ok"
        assert post(client, good[0]).json() == first
    assert wrong == []
    assert len(kinds) == 9
    assert served[200] >= 5
    assert list(served) == [200]
    assert after - before < 60 * 2**20, (before, after)
    assert "Traceback" not in (tmp_path / "service.log").read_text()
    assert not [name for name in os.listdir("/tmp") if name.startswith("vidcls-upload-")]


# Its page


@contextmanager
def in_thread(app: FastAPI) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


# Drops a file on the page as a person would, in a frame of a phone's width, and tells what the page says then.
DRIVER = """<!doctype html><body style="margin:0"><iframe src="/" style="width:390px;height:900px;border:0"></iframe>
<pre id="told"></pre><script>
const frame = document.querySelector("iframe");
frame.onload = async () => {
  const inside = frame.contentWindow, page = inside.document;
  const bytes = await (await fetch("FILE")).arrayBuffer();
  const given = new inside.DataTransfer();
  given.items.add(new inside.File([bytes], "dropped.mp4"));
  page.getElementById("drop").dispatchEvent(new inside.DragEvent("drop", { dataTransfer: given }));
  const wait = () => {
    const status = page.getElementById("status").textContent;
    if (status.startsWith("Looking")) return setTimeout(wait, 50);
    document.getElementById("told").textContent = [status, page.getElementById("about").textContent,
      page.getElementById("name").textContent, page.getElementById("top").innerText,
      page.getElementById("frames").naturalWidth, page.documentElement.scrollWidth].join("|");
  };
  setTimeout(wait, 50);
};
</script></body>"""


@pytest.mark.launch
def test_dropping_a_file_on_the_page(predictor: Predictor, clips: list[Path], tmp_path: Path) -> None:
    chromium = find_chromium()
    app = create_app(predictor, ServeLimits(workers=1))
    app.get("/good.mp4")(lambda: FileResponse(clips[0]))
    app.get("/bad.mp4")(lambda: HTMLResponse("no video"))
    for name in ("good", "bad"):
        app.get(f"/drive-{name}")(lambda name=name: HTMLResponse(DRIVER.replace("FILE", f"/{name}.mp4")))
    told = {}
    with in_thread(app) as address:
        for name in ("good", "bad"):
            out = _dump(chromium, f"{address}/drive-{name}", tmp_path / "profile")
            told[name] = out.partition('<pre id="told">')[2].partition("</pre>")[0].split("|")
    status, about, name, top, width, wide = told["good"]
    assert status.endswith(" s")
    assert about == "4 classes, head default"
    assert name == "dropped.mp4"
    best, score = predictor.predict(clips[0])[0]
    assert f"{100 * score:.1f}" in top
    assert best in top
    assert int(width) == 4 * 96
    assert wide == "390"
    assert told["bad"][0].startswith("dropped.mp4: not a video of a known type")


def _dump(chromium: str, address: str, profile: Path) -> str:
    """As browser.dom, but a refused upload may be noted in the console, as every browser does."""
    words = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--virtual-time-budget=8000")
    return subprocess.run([chromium, *words, "--dump-dom", address], capture_output=True, text=True, timeout=60).stdout


@pytest.mark.launch
def test_a_picture_of_the_page(predictor: Predictor, tmp_path: Path) -> None:
    chromium = find_chromium()
    with in_thread(create_app(predictor, ServeLimits(workers=1))) as address:
        out = tmp_path / "page.png"
        run(chromium, f"{address}/", tmp_path / "profile", "--virtual-time-budget=2000", f"--screenshot={out}")
        pixels = np.asarray(Image.open(out).convert("RGB"))
        assert pixels.shape[1] == 1280
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
