"""How fast are batches read from stored vision features, beside decoding frames, and how large are they?

    python benchmarks/features.py [--videos DIR] [--clips 400] [--workers 2] [--rounds 12]

Clips of 16 frames of at most 112 x 112 pixels, and tokens of the 3B model's size (128 x 2048 bf16 a square clip; their
values are random, since reading does not look at them). Both are read by read_batches as training does, in random
order, checksums included, in batches of 8 that the parent receives and drops, by turns in short rounds, from a warm
page cache.
DIR holds <Class>/<clips>; without it, synthetic H.264 clips of 240x240 are made.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from loader import FRAMES, compare, loader, reader_of
from rounds import RESULTS, Ratio, clips_of, conditions, show_ratios, table, write_json

from vidcls.data.batch import ClipShape
from vidcls.data.feature_parts import start_cache, write_part
from vidcls.data.features import ClipFacts, FeatureCache, FeatureOrigin
from vidcls.data.index import ShardIndex
from vidcls.data.settings import DecodeSettings
from vidcls.sharding.writer import Plan, write_shards

SIDE, WIDTH = 112, 2048
ROUND_SECONDS = 1.5


def random_features(index: ShardIndex, top: Path) -> FeatureCache:
    origin = FeatureOrigin(
        tower="0" * 64,
        vision={"out_hidden_size": WIDTH, "spatial_merge_size": 2},
        frames="all",
        video_min_pixels=SIDE**2,
        video_max_pixels=SIDE**2,
        image_max_pixels=None,
        dtype="bfloat16",
        shards=index.digest,
    )
    sizes = clip_bytes(index, origin)
    start_cache(top, origin, place=index.folder.name, clips=len(index), bytes_=sum(sizes))
    cache = FeatureCache.open(top, origin)
    for part in range(cache.parts):
        clips = cache.clips_of(part)
        tokens = [torch.randn(sizes[clip] // origin.token_bytes, WIDTH).bfloat16() for clip in clips]
        write_part(cache, part, tokens, [ClipFacts(seconds_per_grid=0.25)] * len(clips))
    return cache


def clip_bytes(index: ShardIndex, origin: FeatureOrigin) -> list[int]:
    encoder = reader_of(index).encoder
    sizes = zip(index.frames.tolist(), index.height.tolist(), index.width.tolist(), strict=True)
    return [origin.clip_bytes(ClipShape.of(encoder, *size).grid) for size in sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path)
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        labels, records = clips_of(args.videos, args.clips, Path(work))
        settings = DecodeSettings(frames=FRAMES, short_side=None, max_pixels=SIDE**2)
        write_shards(Plan(records, labels, settings, 100), Path(work) / "shards", workers=args.workers)
        index = ShardIndex.open(Path(work) / "shards")
        cache = random_features(index, Path(work) / "features")
        found = compare(
            {
                "frames": loader(index, args.workers, ROUND_SECONDS),
                "features": loader(index, args.workers, ROUND_SECONDS, cache),
            },
            args.rounds,
        )
    stored = {"frames": index.size.mean() / 1e3, "features": np.mean(clip_bytes(index, cache.origin)) / 1e3}
    rates = {name: sorted(each)[len(each) // 2] for name, each in found.rates.items()}
    rows = [(name, f"{rates[name]:.0f}", f"{stored[name]:.1f}") for name in stored]
    table(f"{args.workers} workers, warm", ("read", "clips/s (median)", "kB stored a clip"), rows)
    ratios = [
        Ratio.of("features / frames, clips/s", found.rates["features"], found.rates["frames"]),
        Ratio.of("features / frames, CPU time a clip", found.cpu["features"], found.cpu["frames"]),
    ]
    show_ratios("features beside frames", ratios)
    about = conditions("torch", "safetensors")
    write_json(RESULTS / "features.json", {**about, "rates": found.rates, "cpu": found.cpu, "kilobytes": stored})


if __name__ == "__main__":
    main()
