"""A picture of what a recipe's augmentation makes of some clips: read by the loader itself, with the recipe's seed.

Frames are drawn pixel for pixel, small ones enlarged by whole numbers: what is smeared or cut off there is so in
training too.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vidcls.config import Config
from vidcls.data.augment import AugmentSettings
from vidcls.data.batch import Grid
from vidcls.data.frames import view
from vidcls.data.index import ShardIndex
from vidcls.data.joint import select, source_seed
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, Request
from vidcls.data.mirror import ONE_SIDED, mirror_for
from vidcls.data.places import LocalFolder
from vidcls.geometry import FACTOR, smart_resize
from vidcls.options import AugmentOptions

CLIPS, EPOCHS, MOST_COLUMNS = 6, 3, 8
LEAST_HEIGHT = 96  # pixels of a frame on the picture
MARGIN, GAP, TITLE = 10, 2, 20
TEXT, NOTED, BACKGROUND = "#202020", "#b3261e", "white"
PATCH, FRAMES_PER_GRID = FACTOR // 2, 2


@dataclass(frozen=True)
class Strip:
    """One row: frames uint8 [T, H, W, 3] and what stands above them. noted: the label or the target is another one."""

    frames: np.ndarray
    title: str
    noted: bool


def draw_augmented(out: Path, place: Path | str, config: Config) -> int:
    """Writes a PNG of some clips of the data set at `place` and returns how many it shows.

    Of each: as it is evaluated, and as it is trained on in the first epochs, with the label after flipping and what is
    mixed in. Where `place` is one of the recipe's data sets, exactly these pictures are trained on.

    Raises ValueError (ShardError, FrameError) for what cannot be read or is no pair of classes, OSError for `out`.
    """
    index = ShardIndex.open(place)
    number, augment = _data_set(config, place)
    seed = source_seed(config.run.seed, number)
    ids, _ = select(len(index), seed, most=config.data.max_samples, val_size=config.data.val_size)
    mirror = mirror_for(augment.mirror_pairs, augment.horizontal_flip, index.labels)
    settings = AugmentSettings(**augment.model_dump(exclude={"mirror_pairs"}))
    data = config.data
    apart = data.shuffle_shards is not None or not isinstance(index.folder, LocalFolder)
    source = ClipSource(index, data.prompt, augment=settings, mirror=mirror, ids=ids, shards_apart=apart)
    clips = ClipBatches(
        [source],
        _Sizes(data.video_min_pixels, data.video_max_pixels, data.image_max_pixels or data.video_max_pixels),
        FrameChoice(data.video_maxlen, data.frame_sampling, data.dense_stride),
        seed=seed,
        jitter=data.temporal_jitter,
    )
    chosen = choose(index.label[ids], mirror)
    temporary = out.with_name(out.name + ".tmp")
    try:
        _paint([_strips(clips, int(ids[place])) for place in chosen]).save(temporary, format="PNG")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return len(chosen)


def choose(label: np.ndarray, mirror: np.ndarray | None) -> list[int]:
    """Places in `label` of up to CLIPS clips of different classes, evenly spread over the classes.

    With a mirror, classes that become another one come first, then those that must not be flipped.
    """
    classes = np.unique(label)
    becomes = classes if mirror is None else mirror[classes]
    changed = [*zip(classes.tolist(), becomes.tolist(), strict=True)]
    paired = list(dict.fromkeys(each for one, other in changed if 0 <= other != one for each in (one, other)))
    paired = [each for each in paired if each in classes]
    one_sided = [one for one, other in changed if other == ONE_SIDED]
    special = (paired + one_sided)[: CLIPS - 1]
    others = np.setdiff1d(classes, special)
    spread = others[view(len(others), min(CLIPS - len(special), len(others)))].tolist() if len(others) else []
    members = [np.flatnonzero(label == each) for each in special + spread]
    return [int(places[len(places) // 2]) for places in members]


@dataclass(frozen=True)
class _NoText:
    input_ids: np.ndarray
    position_ids: np.ndarray
    action_position: int = 0
    answer_start: int = 1
    video_start: int = 0


@dataclass(frozen=True)
class _Sizes:
    """A ClipEncoder for pictures alone: frame sizes as the model has them, and no text."""

    min_pixels: int
    max_pixels: int
    image_max_pixels: int
    frames_per_grid: int = FRAMES_PER_GRID

    def frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        most = self.image_max_pixels if frames == 1 else self.max_pixels
        return smart_resize(height, width, factor=FACTOR, min_pixels=self.min_pixels, max_pixels=most)

    def grid(self, frames: int, height: int, width: int) -> Grid:
        return frames // FRAMES_PER_GRID, height // PATCH, width // PATCH

    def video_tokens(self, grid: Grid) -> int:
        return 0

    def encode(self, prompt: str, grid: Grid, seconds_per_grid: float, answer: str | None = None) -> _NoText:
        return _NoText(np.zeros(1, dtype=np.int64), np.zeros((3, 1), dtype=np.int64))


def _data_set(config: Config, place: Path | str) -> tuple[int, AugmentOptions]:
    """The number of the recipe's data set at `place`, and its augmentation; of another data set, 0 and the recipe's."""
    for number, each in enumerate(config.train_sets):
        if each.place == str(place) or Path(each.place).absolute() == Path(place).absolute():
            return number, each.augment
    return 0, config.augment


def _strips(clips: ClipBatches, sample: int) -> list[Strip]:
    names = clips.sources[0].index.labels.names
    strips = []
    for epoch in (None, *range(EPOCHS)):
        batch = clips.read(Request((sample,), epochs=None if epoch is None else (epoch,)))
        grid, rows, columns = batch.grid_thw[0]
        frames = batch.frames.numpy().reshape(grid * FRAMES_PER_GRID, rows * PATCH, columns * PATCH, 3)
        name, share = names[int(batch.labels_B[0])], float(batch.shares_B[0])
        if epoch is None:
            strips.append(Strip(frames, f"{name}   {batch.keys[0]}", False))
            continue
        mixed = f"{1 - share:.0%} {name} + {share:.0%} {names[int(batch.partners_B[0])]}"
        title = f"epoch {epoch}: {mixed if share else name}"
        own = int(clips.sources[0].index.label[sample])
        strips.append(Strip(frames, title, share > 0 or int(batch.labels_B[0]) != own))
    return strips


def _paint(clips: list[list[Strip]]) -> Image.Image:
    pictures = [[_side_by_side(strip.frames) for strip in strips] for strips in clips]
    width = max(picture.width for row in pictures for picture in row) + 2 * MARGIN
    height = MARGIN + sum(MARGIN + sum(TITLE + picture.height for picture in row) for row in pictures)
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    # matplotlib's font knows more scripts than Pillow's own.
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 12)
    top = MARGIN
    for strips, row in zip(clips, pictures, strict=True):
        for strip, picture in zip(strips, row, strict=True):
            title = _fitting(strip.title, font, width - 2 * MARGIN)
            draw.text((MARGIN, top + 2), title, fill=NOTED if strip.noted else TEXT, font=font)
            canvas.paste(picture, (MARGIN, top + TITLE))
            top += TITLE + picture.height
        top += MARGIN
    return canvas


def _side_by_side(frames: np.ndarray) -> Image.Image:
    """Up to MOST_COLUMNS of the frames, each pixel as a square of whole pixels."""
    shown = frames[view(len(frames), MOST_COLUMNS)]
    scale = -(-LEAST_HEIGHT // shown.shape[1])
    large = shown.repeat(scale, axis=1).repeat(scale, axis=2)
    padded = np.pad(large, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(padded), axis=1))


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """One line of a data set's text, cut to `width` pixels."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in text[:500])
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
