"""How an index of very many clips opens, and goes on far into a run, in a process that has just started."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from vidcls.data.index import FORMAT_VERSION, INDEX, SAMPLES, Counts, Header, ShardFile, ShardIndex, Table, pack_table
from vidcls.data.joint import JointOrder
from vidcls.data.labels import LabelSpace
from vidcls.data.loader import training_requests
from vidcls.data.order import ShardWindow, StepLayout
from vidcls.data.settings import DecodeSettings

CLASSES, SAMPLES_PER_SHARD, SAMPLE_BYTES = 174, 256, 200 * 512
GLOBAL_BATCH, WINDOW_SHARDS = 64, 16
EPOCHS_DONE = 7.3  # where the run goes on


def write_big_index(out: Path, samples: int) -> Path:
    """`samples` clips as far as index and file sizes can tell: the tars are holes."""
    out.mkdir()
    number = np.arange(samples)
    shard, within = np.divmod(number, SAMPLES_PER_SHARD)
    constant = {"bytes": SAMPLE_BYTES, "crc32": 0, "frames": 16, "height": 112, "width": 140, "prompt": -1}
    columns = {
        "label": number % CLASSES,
        "shard": shard,
        "offset": within * SAMPLE_BYTES,
        **{name: np.full(samples, value) for name, value in constant.items()},
    }
    table = pack_table(columns, [f"clip_{i:09d}" for i in range(samples)], [])  # type: ignore[arg-type]
    (out / SAMPLES).write_bytes(table)
    shards = []
    for index, count in enumerate(np.bincount(shard).tolist()):
        shards.append(
            ShardFile(name=f"shard-{index:06d}.tar", samples=count, bytes=count * SAMPLE_BYTES, sha256="0" * 64)
        )
        with open(out / shards[-1].name, "wb") as file:
            file.truncate(shards[-1].bytes)
    header = Header(
        format_version=FORMAT_VERSION,
        plan="0" * 64,
        counts=Counts(samples=samples, failed=0, damaged=0),
        decoders={"decord": samples},
        settings=DecodeSettings(short_side=None, max_pixels=128 * 128).to_dict(),
        label_space=LabelSpace(tuple(f"class {i}" for i in range(CLASSES))).to_dict(),
        shards=shards,
        table=Table(bytes=len(table), sha256=hashlib.sha256(table).hexdigest()),
    )
    (out / INDEX).write_bytes(header.to_json())
    return out


def open_and_resume(place: Path) -> dict[str, float]:
    """What `main` prints, of a fresh process."""
    command = [sys.executable, __file__, str(place)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(place: Path) -> None:
    """Prints JSON: seconds to open the index, from there to the first request of a run that goes on far in, and by how
    many bytes that made the process grow, afterwards and at its peak. What was imported before does not count."""
    me = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, peak_before = me.memory_full_info().uss, _peak()
    started = time.perf_counter()
    index = ShardIndex.open(place)
    opened = time.perf_counter()
    order = JointOrder.single(len(index), 1, ShardWindow(index.shard, WINDOW_SHARDS))
    step = int(EPOCHS_DONE * len(index)) // GLOBAL_BATCH
    next(training_requests(order, StepLayout(GLOBAL_BATCH, 8, 1, 0), step, step + 1))
    resumed = time.perf_counter()
    results = {
        "open_seconds": opened - started,
        "resume_seconds": resumed - opened,
        "growth_bytes": me.memory_full_info().uss - before,
        "peak_growth_bytes": _peak() - peak_before,
    }
    print(json.dumps(results))


def _peak() -> int:
    """Of this process's resident set, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
