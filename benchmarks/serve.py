"""What the HTTP service costs: its rate and latency beside the bare model's, over loopback, in one run.

    python benchmarks/serve.py [--requests 200] [--at-once 1 4 16]       about a minute

The built-in tiny backbone, or --model CHECKPOINT; videos of 64 x 64 that it makes itself, or --videos DIR. First, in
this process: the model on clips that are decoded already, in batches of 8; and predict(), a file at a time, decoding
and model. Then launch/serve.py as its users start it, and N clients at once that each ask again as soon as they are
answered. Each level is warmed up before it is measured.

Exit codes: 0 done, 1 the service failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from processes import ROOT, end_session, free_port
from rounds import RESULTS, conditions, table, write_json

START_SECONDS = 180.0
BATCH = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="at each level (default: 200)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16], help="clients (default: 1 4 16)")
    parser.add_argument("--model", type=Path, help="a checkpoint (default: a tiny one with random weights)")
    parser.add_argument("--videos", type=Path, help="a folder of videos (default: made)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vidcls-serve-") as scratch:
        return measure(arguments, Path(scratch))


def measure(arguments: argparse.Namespace, scratch: Path) -> int:
    sys.path.insert(0, str(ROOT))
    from tests.support.checkpoints import make_checkpoint
    from tests.support.shards import make_shards
    from tools.make_motion_clips import make_motion_clips
    from vidcls.predict.predictor import Predictor
    from vidcls.predict.videos import Job, decode, find_videos
    from vidcls.sharding.decode import Clip

    folder = arguments.videos or make_motion_clips(scratch / "videos", 8, frames=24, size=64)
    videos = find_videos(folder)[:32]
    model = arguments.model or make_checkpoint(
        scratch / "checkpoint-1", {"default": make_shards(folder, scratch / "shards", frames=8, short_side=56)}
    )
    predictor = Predictor.load(model)
    clips = []
    for video in videos:
        job = Job(str(video), predictor.head.settings)
        clip = decode(job)
        assert isinstance(clip, Clip), clip
        clips.append(predictor.prepare(job, clip))
    rows: list[dict[str, Any]] = []
    batches = [(clips * BATCH)[i : i + BATCH] for i in range(0, len(clips), BATCH)]
    predictor.scores(batches[0])
    began, done = time.perf_counter(), 0
    while done < arguments.requests:
        done += len(predictor.scores(batches[(done // BATCH) % len(batches)]))
    bare = done / (time.perf_counter() - began)
    rows.append({"what": "model alone, batches of 8", "rate": bare, "p50": None, "p95": None, "p99": None})
    seconds = []
    for number in range(arguments.requests // 2):
        began = time.perf_counter()
        predictor.predict(videos[number % len(videos)])
        seconds.append(time.perf_counter() - began)
    rows.append({"what": "predict(), file by file", **spread(seconds, sum(seconds))})
    port = free_port()
    words = [sys.executable, "launch/serve.py", model, "--port", port]
    with (scratch / "log").open("w") as log:
        service = subprocess.Popen(
            [str(word) for word in words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, service)
        contents = [video.read_bytes() for video in videos]
        for clients in arguments.at_once:
            ask(address, contents, clients, max(2 * clients, 10))
            began = time.perf_counter()
            seconds = ask(address, contents, clients, arguments.requests)
            rows.append({"what": f"served, {clients} at once", **spread(seconds, time.perf_counter() - began)})
    except (httpx.HTTPError, RuntimeError) as error:
        print(f"the service failed: {error}\n{(scratch / 'log').read_text()[-3000:]}", file=sys.stderr)
        return 1
    finally:
        os.kill(service.pid, signal.SIGTERM)
        service.wait(60)
        end_session(service.pid)
    shown = [
        [
            row["what"],
            f"{row['rate']:.1f}",
            f"{row['rate'] / bare:.2f}",
            *(told(row[key]) for key in ("p50", "p95", "p99")),
        ]
        for row in rows
    ]
    table("Serving", ["what", "clips/s", "of the model alone", "median", "95 %", "99 %"], shown)
    path = RESULTS / "serve.json"
    write_json(path, {**conditions(), "rows": rows})
    print(f"written: {path}")
    return 0


def ask(address: str, contents: list[bytes], clients: int, requests: int) -> list[float]:
    """Seconds of each of so many uploads by so many clients at once."""

    def client(number: int) -> list[float]:
        seconds = []
        with httpx.Client(base_url=address, timeout=60) as http:
            for i in range(number, requests, clients):
                began = time.perf_counter()
                answer = http.post("/predict", files={"video": ("clip.mp4", contents[i % len(contents)])})
                seconds.append(time.perf_counter() - began)
                if answer.status_code != 200:
                    raise RuntimeError(f"{answer.status_code}: {answer.text}")
        return seconds

    with ThreadPoolExecutor(clients) as pool:
        return [each for part in pool.map(client, range(clients)) for each in part]


def spread(seconds: list[float], wall: float) -> dict[str, float]:
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]).tolist()
    return {"rate": len(seconds) / wall, "p50": p50, "p95": p95, "p99": p99}


def told(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.0f} ms"


def wait_for(address: str, service: subprocess.Popen) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            httpx.get(f"{address}/health")
            return
        except httpx.TransportError:
            if service.poll() is not None or time.monotonic() > until:
                raise RuntimeError("it did not start") from None
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
