"""Making the vision cache of a recipe: the tower's output for every clip, a part at a time, on any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console

from vidcls import distributed
from vidcls.config import Config, ConfigError
from vidcls.data.batch import Batch, ClipShape
from vidcls.data.feature_parts import is_done, start_cache, write_part
from vidcls.data.features import ClipFacts, FeatureCache, FeatureOrigin
from vidcls.data.frames import Views
from vidcls.data.loader import ClipBatches, ClipSource, Request
from vidcls.data.reading import read_batches
from vidcls.evaluation.heads import frame_choice
from vidcls.faults import guard
from vidcls.faults.lock import lock_output
from vidcls.manifest import check_space
from vidcls.model.classifier import ActionClassifier
from vidcls.model.pretrained import ModelSpec, build_encoder
from vidcls.model.tower import load_tower
from vidcls.progress import progress_bar
from vidcls.training.data_sets import open_data_sets
from vidcls.training.evaluating import eval_views, open_eval_clips
from vidcls.training.setup import model_spec
from vidcls.training.vision_cache import VisionCache

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class _Set:
    """A data set to be cached. bytes: of each clip's tokens, int64."""

    name: str
    source: ClipSource
    origin: FeatureOrigin
    bytes: np.ndarray


@dataclass(frozen=True)
class _Job:
    """A part to be made. set: number of its data set."""

    set: int
    part: int


@dataclass(frozen=True)
class Work:
    """What is to be made, on all ranks together. clips: of the data sets whose caches these are, in their order."""

    config: Config
    spec: ModelSpec
    clips: ClipBatches
    caches: list[FeatureCache]
    jobs: list[_Job]


def plan(config: Config) -> Work:
    """Check a recipe, begin the caches of its data sets, and find out what is missing. All ranks must call it.

    Raises:
        ValueError: the recipe cannot be cached.
        StorageError: the disk is too full, or refuses.
    """
    options = config.run
    with distributed.joining(options.ddp_timeout, max(options.start_timeout, options.save_timeout)):
        spec = model_spec(config)
        cache = VisionCache.of(config, spec)
        if cache is None:
            raise ConfigError("vision_cache: not given; it must be the folder where the features go")
        encoder = build_encoder(spec, trust_remote_code=config.model.trust_remote_code)
        sources = _sources(config, cache)
        skip = config.data.on_bad_sample == "skip"
        clips = ClipBatches(
            list(sources.values()), encoder, frame_choice(spec), seed=options.seed, jitter=False, skip_bad=skip
        )
        sets = [_measured(name, source, cache, clips) for name, source in sources.items()]
    caches = _start(cache, sets)
    jobs = _missing(caches, bad_allowed=skip)
    _tell(sets, caches, jobs)
    return Work(config, spec, clips, caches, jobs)


def cache_features(work: Work) -> None:
    """Make what is missing. All ranks must call it; each makes parts of its own and waits for nobody, but the main rank
    for the others.

    Raises:
        ShardError or FrameError: with on_bad_sample: error, a clip cannot be read.
        StorageError: the disk refuses.
    """
    if mine := work.jobs[distributed.rank() :: distributed.world_size()]:
        _make(work, mine, load_tower(work.spec).to(distributed.device()))
    if not distributed.is_main():
        return
    _wait(work)
    bad = sum(each.seal(part).bad for each in work.caches for part in range(each.parts))
    unread = f"; {bad} clips could not be read" if bad else ""
    print(f"complete: {', '.join(str(each.folder) for each in work.caches)}{unread}", flush=True)


def _sources(config: Config, cache: VisionCache) -> dict[str, ClipSource]:
    """The different data sets of a recipe, as training and evaluation read them, by name."""
    data = open_data_sets(config)
    cache.check_frames(data)
    named = list(zip(data.names, data.sources(), strict=True))
    if config.eval.eval_strategy != "no" and eval_views(config) == Views():
        named += [(f"{each.name} (evaluation)", each.source) for each in open_eval_clips(config, data)]
    by_digest: dict[str, tuple[str, ClipSource]] = {}
    for name, source in named:
        by_digest.setdefault(source.index.digest, (name, ClipSource(source.index, source.prompt)))
    return dict(by_digest.values())


def _measured(name: str, source: ClipSource, cache: VisionCache, clips: ClipBatches) -> _Set:
    index, origin = source.index, cache.origin(source.index)
    used = np.minimum(index.frames, clips.frames.most)
    sizes, which = np.unique(np.stack([used, index.height, index.width], 1), axis=0, return_inverse=True)
    of_size = [origin.clip_bytes(ClipShape.of(clips.encoder, *size).grid) for size in sizes.tolist()]
    return _Set(name, source, origin, np.array(of_size, dtype=np.int64)[which.reshape(-1)])


def _start(cache: VisionCache, sets: list[_Set]) -> list[FeatureCache]:
    """The caches, begun where they are not, and locked against another run of this command."""
    with distributed.all_or_none(f"starting {cache.top}"):
        if distributed.is_main():
            for each in sets:
                place, total = each.source.index.folder.name, int(each.bytes.sum())
                folder = start_cache(cache.top, each.origin, place=place, clips=len(each.bytes), bytes_=total)
                lock_output(folder, "vision_cache")
    # A host that does not see it does not share the storage.
    with distributed.all_or_none("vision_cache must be on storage that all hosts share; opening it"):
        return [FeatureCache.open(cache.top, each.origin) for each in sets]


def _missing(caches: list[FeatureCache], *, bad_allowed: bool) -> list[_Job]:
    """The parts that are to be made: what is there is read and checked, by all ranks together."""
    parts = [_Job(number, part) for number, each in enumerate(caches) for part in range(each.parts)]
    mine = []
    with distributed.all_or_none("checking what is there"):
        for job in parts[distributed.rank() :: distributed.world_size()]:
            guard.phase("save")
            if not is_done(caches[job.set], job.part, bad_allowed=bad_allowed):
                mine.append(job)
    found = {(job.set, job.part) for rank in distributed.gather_objects(mine) for job in rank}
    return [job for job in parts if (job.set, job.part) in found]


def _tell(sets: list[_Set], caches: list[FeatureCache], jobs: list[_Job]) -> None:
    """Say what is to be made and how large it is; StorageError on every rank where the disk is too full for it."""
    needed = 0
    for number, (each, cache) in enumerate(zip(sets, caches, strict=True)):
        parts = [job.part for job in jobs if job.set == number]
        missing = sum(int(each.bytes[cache.clips_of(part)].sum()) for part in parts)
        needed += missing
        if distributed.is_main():
            total = int(each.bytes.sum())
            print(
                f"{each.name}: {len(each.bytes)} clips, {total / 1e9:.3g} GB of features "
                f"({total / len(each.bytes) / 1e3:.1f} kB a clip), {cache.parts} parts in {cache.folder}: "
                f"{cache.parts - len(parts)} are there, {len(parts)} with {missing / 1e9:.3g} GB to be made",
                flush=True,
            )
    with distributed.all_or_none("looking for space"):
        if distributed.is_main():
            check_space(caches[0].folder, needed)


def _make(work: Work, jobs: list[_Job], tower: ActionClassifier) -> None:
    """Make and write these parts, one after the other. A batch never holds clips of two: a part is always the same."""
    config, caches, clips = work.config, work.caches, work.clips
    micro = config.eval.per_device_eval_batch_size
    device = distributed.device()
    batches = read_batches(
        clips,
        (request for job in jobs for request in _requests(job, caches[job.set], clips, micro)),
        workers=config.data.dataloader_num_workers,
        pin=device.type != "cpu",
        seconds=config.run.data_timeout,
    )
    total, done, written = sum(len(caches[job.set].clips_of(job.part)) for job in jobs), 0, 0
    console = Console(quiet=not distributed.is_main())
    with progress_bar(console, "clips" if distributed.world_size() == 1 else "clips of this rank") as show:
        for job in jobs:
            samples = caches[job.set].clips_of(job.part)
            features: list[torch.Tensor] = []
            facts: list[ClipFacts] = []
            while len(features) < len(samples):
                guard.phase("evaluate", clips=batches.awaited())
                batch = next(batches)
                features += _features(tower, batch, caches[job.set].origin)
                facts += _facts(clips, job.set, samples[len(facts) :], batch)
                show(done + len(features), total, f"{written / 1e9:.3g} GB written")
            guard.phase("save")
            write_part(caches[job.set], job.part, features, facts)
            done += len(samples)
            written += sum(each.nbytes for each in features)
    batches.close()


def _requests(job: _Job, cache: FeatureCache, clips: ClipBatches, micro: int) -> Iterator[Request]:
    samples = list(cache.clips_of(job.part))
    shards = clips.sources[job.set].index.shard[samples]
    ahead = tuple((job.set, shard) for shard in np.unique(shards).tolist())
    for first in range(0, len(samples), micro):
        chosen = tuple(samples[first : first + micro])
        yield Request(chosen, (job.set,) * len(chosen), ahead=ahead)


def _features(tower: ActionClassifier, batch: Batch, origin: FeatureOrigin) -> list[torch.Tensor]:
    """features_VD of each clip, on the host; none of one that could not be read."""
    with torch.no_grad():
        features_VD = tower.encode_video(batch.frames.to(distributed.device()), batch.grid_thw).cpu()
    counts = [origin.clip_bytes(grid) // origin.token_bytes for grid in batch.grid_thw]
    rows = zip(features_VD.split(counts), batch.weights_B.tolist(), strict=True)
    return [each if weight else each[:0] for each, weight in rows]


def _facts(clips: ClipBatches, source: int, samples: range, batch: Batch) -> list[ClipFacts]:
    """Of a batch whose clips are the first of `samples`."""
    bad = dict(batch.bad)
    reasons = [bad.get(f"{source}/{key}") for key in batch.keys]
    return [
        clips.facts(source, sample) if reason is None else ClipFacts(bad=reason)
        for sample, reason in zip(samples, reasons, strict=False)
    ]


def _wait(work: Work) -> None:
    """Until all parts are sealed. Not in a collective, which has a time limit: hosts may be of different speed. The
    launcher ends this rank where another fails."""
    said = False
    while missing := [job for job in work.jobs if not work.caches[job.set].seal_path(job.part).exists()]:
        if not said:
            print(f"this rank is done; {len(missing)} parts of others are under way", flush=True)
            said = True
        guard.phase("evaluate")
        time.sleep(POLL_SECONDS)
