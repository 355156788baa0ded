"""Records -> a folder of shards (its layout: shards.py), by any number of processes, going on where a killed run was.

The work is cut into shards beforehand: record i belongs to shard i // samples_per_shard. A shard is written under a
temporary name, renamed, and then noted in a file part-NNNNNN.json beside it; a shard without its note is made again.
Nothing depends on who makes which shard, so any number of workers, hosts and restarts gives the same bytes.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from vidcls.data.index import (
    BLOCK,
    COLUMNS,
    FAILED,
    FORMAT_VERSION,
    INDEX,
    SAMPLES,
    Counts,
    Header,
    ShardError,
    ShardFile,
    Table,
    pack_table,
    read_header,
)
from vidcls.data.labels import LabelSpace
from vidcls.data.places import LocalFolder
from vidcls.data.settings import DecodeSettings
from vidcls.sharding.packing import PackedClip, pack_all
from vidcls.sharding.records import ClipRecord
from vidcls.sharding.team import Alone, Team

PLAN = "plan.json"
OURS = re.compile(
    r"(shard-\d{6}\.tar|part-\d{6}\.json|failed\.jsonl|samples\.safetensors|plan\.json|index\.json)(\.tmp)?"
)
DECODERS = ("av", "decord", "pillow", "simplejpeg")  # another version may give other pixels or other bytes
RECORD = 20 * BLOCK  # tar files are whole records


@dataclass(frozen=True)
class Plan:
    """What is to be made: the same plan gives the same bytes. ShardError unless it can be made."""

    records: Sequence[ClipRecord]
    labels: LabelSpace
    settings: DecodeSettings
    samples_per_shard: int

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ShardError(f"samples_per_shard = {self.samples_per_shard}: must be at least 1")
        if not self.records:
            raise ShardError("records: there are no clips to write")
        keys = set()
        for record in self.records:
            if record.key in keys:
                raise ShardError(f"key = {record.key!r}: two clips have it")
            keys.add(record.key)
            if not record.label < len(self.labels) or self.labels.names[record.label] != record.class_name:
                raise ShardError(
                    f"{record.key}: label {record.label} and class {record.class_name!r} do not agree with the "
                    "label space"
                )

    @property
    def shards(self) -> int:
        return -(-len(self.records) // self.samples_per_shard)

    def records_of(self, shard: int) -> Sequence[ClipRecord]:
        return self.records[shard * self.samples_per_shard : (shard + 1) * self.samples_per_shard]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the bytes depend on, short enough to show a person where two plans differ."""
        records = hashlib.sha256()
        for record in self.records:
            records.update(json.dumps([str(value) for value in vars(record).values()]).encode() + b"\n")
        return {
            "format_version": FORMAT_VERSION,
            "samples_per_shard": self.samples_per_shard,
            **self.settings.to_dict(),
            "clips": len(self.records),
            "records": records.hexdigest(),
            "label_space": self.labels.fingerprint,
            **{f"{name} version": version(name) for name in DECODERS},
        }

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()


@dataclass(frozen=True)
class ShardSummary:
    """A finished data set. made: clips that this call tried, the others were there already.

    decoders: clips per decoder. damaged: clips of which only the beginning decoded. seconds: of this call.
    """

    samples: int
    failed: int
    damaged: int
    shards: int
    bytes: int
    decoders: dict[str, int]
    made: int = 0
    seconds: float = 0.0


Progress = Callable[[int, int, int], None]
"""Called as progress(done, failed, of) after each clip: numbers of the clips that fall to this process."""


def write_shards(
    plan: Plan,
    out: Path,
    *,
    workers: int,
    clip_timeout: float = 120.0,
    overwrite: bool = False,
    progress: Progress | None = None,
    team: Team | None = None,
) -> ShardSummary:
    """Make the data set in `out`, or the rest of it. All processes of the team must call it, and see the same folder.

    A clip that cannot be decoded, crashes its worker or takes more than `clip_timeout` seconds is left out and
    listed in failed.jsonl. workers: decoding processes of this process; 0: none, and no protection against crashes
    and hangs.

    Raises:
        ShardError: `out` holds another data set, finished or not (unless `overwrite`), or files of others; another
            process is writing there; the disk is full (the rest can be made later); not one clip could be decoded.
            The other processes then wait for this one, until Team.end.
    """
    started = time.monotonic()
    team = team or Alone()
    if workers < 0:
        raise ShardError(f"workers = {workers}: must be at least 0")
    with _locked_folder(out) if team.rank == 0 else contextlib.nullcontext(), _named_when_full(out):
        todo: list[int] = team.share(_shards_to_make(plan, out, overwrite) if team.rank == 0 else [])
        _make(plan, out, todo[team.rank :: team.size], workers, clip_timeout, progress)
        team.wait()
        if team.rank == 0:
            _finish(plan, out)
        team.wait()
    made = sum(len(plan.records_of(shard)) for shard in todo)
    return replace(_summary(out), made=made, seconds=time.monotonic() - started)


def _make(
    plan: Plan, out: Path, shards: list[int], workers: int, clip_timeout: float, progress: Progress | None
) -> None:
    records = list(chain.from_iterable(map(plan.records_of, shards)))
    done = failed = 0
    with contextlib.closing(pack_all(records, plan.settings, workers, clip_timeout)) as outcomes:
        clips = zip(records, outcomes, strict=True)
        for shard in shards:
            part = _Part(f"shard-{shard:06d}.tar")
            with _new_file(out / part.name) as file:
                for record, outcome in islice(clips, len(plan.records_of(shard))):
                    part.add(record, outcome, file)
                    done, failed = done + 1, failed + isinstance(outcome, str)
                    if progress is not None:
                        progress(done, failed, len(records))
                part.close(file)
            if part.bytes == 0:
                (out / part.name).unlink()
            _write(out / f"part-{shard:06d}.json", json.dumps(vars(part)).encode())


class _Part:
    """One shard and what there is to say about it; its attributes are the note beside the shard."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bytes = 0
        self.sha256 = ""
        self.keys: list[str] = []
        self.prompts: list[str | None] = []
        self.columns: dict[str, list[int]] = {column: [] for column in COLUMNS if column not in ("shard", "prompt")}
        self.failures: list[dict[str, str]] = []
        self.decoders: dict[str, int] = {}
        self.damaged = 0

    def add(self, record: ClipRecord, outcome: PackedClip | str, file: "_Hashed") -> None:
        if isinstance(outcome, str):
            failure = {"key": record.key, "path": str(record.path), "class_name": record.class_name, "reason": outcome}
            self.failures.append(failure)
            return
        height, width = outcome.frame_size
        row = {
            "label": record.label,
            "offset": file.size,
            "bytes": len(outcome.tar),
            "crc32": outcome.crc32,
            "frames": outcome.frames,
            "height": height,
            "width": width,
        }
        file.write(outcome.tar)
        self.keys.append(record.key)
        self.prompts.append(record.prompt)
        for column, values in self.columns.items():
            values.append(row[column])
        self.decoders[outcome.decoder] = self.decoders.get(outcome.decoder, 0) + 1
        self.damaged += outcome.damaged

    def close(self, file: "_Hashed") -> None:
        """A tar ends with two empty blocks, in whole records."""
        if self.keys:
            file.write(bytes(2 * BLOCK + -(file.size + 2 * BLOCK) % RECORD))
            self.bytes, self.sha256 = file.size, file.sha256.hexdigest()


def _shards_to_make(plan: Plan, out: Path, overwrite: bool) -> list[int]:
    """Prepare the folder for the plan. Removes what cannot be gone on with; never anything that is not ours."""
    names = set(os.listdir(out))
    foreign = sorted(name for name in names if not OURS.fullmatch(name))
    if foreign:
        raise ShardError(f"{out}: holds files that are not shards ({', '.join(foreign[:5])}); use an empty folder")
    if INDEX in names and not overwrite:
        header, _ = read_header(LocalFolder(out))
        if header.plan != plan.digest:
            raise ShardError(f"{out}: already holds another finished data set; use another folder, or --overwrite")
        for name in names:
            if name == PLAN or name.startswith("part-"):  # a run was killed as it cleaned up
                (out / name).unlink()
        return []
    if overwrite and (INDEX in names or _other_plan(plan, out)):
        (out / INDEX).unlink(missing_ok=True)  # first: from here on there is no data set
        for name in sorted(names - {INDEX}):
            (out / name).unlink()
    elif difference := _other_plan(plan, out):
        raise ShardError(
            f"{out}: holds the beginning of another data set ({difference}); use another folder, or --overwrite"
        )
    _write(out / PLAN, json.dumps(plan.facts, indent=1).encode())
    return [shard for shard in range(plan.shards) if not _is_made(out, shard)]


def _other_plan(plan: Plan, out: Path) -> str | None:
    """How the plan of an unfinished data set in `out` differs from this one; None if it does not, or none is there."""
    try:
        facts = json.loads((out / PLAN).read_bytes())
    except FileNotFoundError:
        leftovers = sorted(os.listdir(out))
        return (
            f"files without {PLAN}: {', '.join(leftovers[:3])}" if leftovers and leftovers != [f"{PLAN}.tmp"] else None
        )
    except ValueError:
        return f"{PLAN} is damaged"
    changed = [name for name in plan.facts if facts.get(name) != plan.facts[name]]
    shown = [f"{name}: {facts.get(name)} there, {plan.facts[name]} now" for name in changed if name != "records"]
    return "; ".join(shown or ["other clips, labels or prompts"]) if changed else None


def _is_made(out: Path, shard: int) -> bool:
    """Whether the note and its shard are there. Both were renamed when they were whole and on disk."""
    try:
        part = json.loads((out / f"part-{shard:06d}.json").read_bytes())
    except FileNotFoundError:
        return False
    tar = out / part["name"]
    return part["bytes"] == (tar.stat().st_size if tar.exists() else 0)


def _finish(plan: Plan, out: Path) -> None:
    """Join the notes to the index, which makes the folder a data set, and remove them."""
    if (out / INDEX).exists():
        return
    parts = [json.loads((out / f"part-{shard:06d}.json").read_bytes()) for shard in range(plan.shards)]
    failures = list(chain.from_iterable(part["failures"] for part in parts))
    if failures:
        _write(out / FAILED, "".join(json.dumps(failure) + "\n" for failure in failures).encode())
    parts = [part for part in parts if part["keys"]]
    if not parts:
        raise ShardError(f"{out}: not one of {len(plan.records)} clips could be decoded, see {out / FAILED}")
    keys = list(chain.from_iterable(part["keys"] for part in parts))
    columns: dict[str, Sequence[int]] = {
        name: list(chain.from_iterable(part["columns"][name] for part in parts)) for name in parts[0]["columns"]
    }
    columns["shard"] = [number for number, part in enumerate(parts) for _ in part["keys"]]
    prompts = list(chain.from_iterable(part["prompts"] for part in parts))
    different = list(dict.fromkeys(prompt for prompt in prompts if prompt is not None))
    row_of = {prompt: row for row, prompt in enumerate(different)}
    columns["prompt"] = [-1 if prompt is None else row_of[prompt] for prompt in prompts]
    table = pack_table(columns, keys, different)
    _write(out / SAMPLES, table)
    decoders = sum((Counter(part["decoders"]) for part in parts), Counter())
    header = Header(
        format_version=FORMAT_VERSION,
        plan=plan.digest,
        counts=Counts(samples=len(keys), failed=len(failures), damaged=sum(part["damaged"] for part in parts)),
        decoders=dict(sorted(decoders.items())),
        settings=plan.settings.to_dict(),
        label_space=plan.labels.to_dict(),
        shards=[
            ShardFile(name=part["name"], samples=len(part["keys"]), bytes=part["bytes"], sha256=part["sha256"])
            for part in parts
        ],
        table=Table(bytes=len(table), sha256=hashlib.sha256(table).hexdigest()),
    )
    _write(out / INDEX, header.to_json())
    for shard in range(plan.shards):
        (out / f"part-{shard:06d}.json").unlink()
    (out / PLAN).unlink()


def _summary(out: Path) -> ShardSummary:
    header, _ = read_header(LocalFolder(out))
    return ShardSummary(
        samples=header.counts.samples,
        failed=header.counts.failed,
        damaged=header.counts.damaged,
        shards=len(header.shards),
        bytes=sum(shard.bytes for shard in header.shards),
        decoders=header.decoders,
    )


@contextlib.contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Create `out` and keep other writers away. The kernel drops the lock with the process, however it ends."""
    if out.exists() and not out.is_dir():
        raise ShardError(f"{out}: is a file, must be a folder")
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{out}: another process is writing there") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _named_when_full(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ShardError(f"{out}: the disk is full; make space, then the same command goes on where it was") from error


class _Hashed:
    """A file that knows its size and sha256 as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[_Hashed]:
    """Whole or not at all, and on disk when the block ends."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield _Hashed(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # above all when the disk is full
        raise
    os.replace(temporary, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the folder's entry
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with _new_file(path) as file:
        file.write(data)
