"""Write small synthetic videos of four classes that only the order of their frames tells apart.

    python tools/make_motion_clips.py --out videos --per-class 50

A textured blob moves left, right, up or down over a noisy still background. A "left" clip is a "right" clip with its
frames in reverse, so neither one frame nor all frames without their order tell left from right, or up from down: a
model that scores above 50 % has learned motion.
"""

import argparse
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

CLASSES = ("down", "left", "right", "up")
FRAMES_PER_SECOND = 12


def make_motion_clips(
    folder: Path,
    per_class: int,
    seed: int = 0,
    *,
    frames: int = 24,
    size: int = 96,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write folder/<class>/clip_0000.mp4 ... (size x size pixels, 12 frames a second, H.264) and return `folder`.

    Clip i of a class depends on (seed, class, i) alone. progress(done, total) is called after each clip. Raises
    ValueError for a folder with something in it.
    """
    if per_class < 1 or frames < 2 or size < 32 or size % 2:
        raise ValueError(
            f"per_class = {per_class}, frames = {frames}, size = {size}: must be at least 1, at least 2, and even "
            "and at least 32"
        )
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; use a new folder")
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for clip in range(per_class):
            rng = np.random.default_rng([seed, label, clip])
            write_video(folder / name / f"clip_{clip:04d}.mp4", motion_frames(rng, name, frames, size))
            if progress is not None:
                progress(label * per_class + clip + 1, len(CLASSES) * per_class)
    return folder


def motion_frames(rng: np.random.Generator, direction: str, frames: int, size: int) -> np.ndarray:
    """uint8 [frames, size, size, 3]: one blob that moves `direction` over 35 to 70 % of the picture."""
    radius = size * rng.uniform(0.12, 0.18)
    background = rng.uniform(20, 80) + rng.normal(0, 4, (size, size, 3))
    colour = rng.uniform(180, 255, 3)
    stripes = rng.uniform(0, np.pi), rng.uniform(0.4, 0.9)  # direction, radians per pixel
    room = size - 2 * radius
    travel = min(size * rng.uniform(0.35, 0.70), room)
    along = radius + (room - travel) * rng.random() + np.linspace(0, travel, frames)
    across = np.full(frames, radius + room * rng.random())
    rows, columns = (across, along) if direction in ("left", "right") else (along, across)
    row_grid, column_grid = np.mgrid[:size, :size]
    clip = np.empty((frames, size, size, 3), dtype=np.uint8)
    for i in range(frames):
        down, right = row_grid - rows[i], column_grid - columns[i]
        texture = 0.85 + 0.15 * np.sin(stripes[1] * (np.cos(stripes[0]) * right + np.sin(stripes[0]) * down))
        inside = np.clip(radius - np.hypot(down, right), 0, 1)[..., None]  # a soft edge, one pixel wide
        clip[i] = np.clip(background * (1 - inside) + colour * texture[..., None] * inside, 0, 255)
    return clip[::-1] if direction in ("left", "up") else clip


def write_video(path: Path, frames: np.ndarray, codec: str | None = None) -> None:
    """Encode uint8 [T, H, W, 3] at 12 frames a second: H.264 where FFmpeg can write it, else MPEG-4."""
    codec = codec or ("libx264" if "libx264" in av.codecs_available else "mpeg4")
    # One thread and no B-frames: the same bytes on every machine.
    options = {"preset": "veryfast", "crf": "18", "threads": "1", "bf": "0"} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=FRAMES_PER_SECOND, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_000_000
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FRAMES_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder; clips go to OUT/<class>/")
    parser.add_argument("--per-class", type=int, default=50, help="clips of each of the four classes")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other clips")
    parser.add_argument("--frames", type=int, default=24, help="frames per clip, at 12 a second")
    parser.add_argument("--size", type=int, default=96, help="width and height in pixels")
    args = parser.parse_args()

    def progress(done: int, total: int) -> None:
        if sys.stdout.isatty():
            print(f"\r{done}/{total} clips", end="\n" if done == total else "", flush=True)

    try:
        make_motion_clips(args.out, args.per_class, args.seed, frames=args.frames, size=args.size, progress=progress)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(CLASSES) * args.per_class} clips in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
