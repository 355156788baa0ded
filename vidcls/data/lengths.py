"""How many tokens each clip will have in the language model, known from the index alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vidcls.data.batch import ClipShape
from vidcls.data.loader import ClipBatches


@dataclass(frozen=True, eq=False)
class TokenBudget:
    """Of micro-batches. limit: tokens of one, video and text. tokens: `clip_tokens`, none above the limit.

    most_bytes: of the frames or features of so many tokens.
    """

    limit: int
    tokens: list[np.ndarray]
    most_bytes: int

    @classmethod
    def of(cls, clips: ClipBatches, texts: Mapping[tuple[int, str], int], limit: int) -> TokenBudget:
        """ValueError for a limit that a clip which is trained on is above. texts: as `clip_tokens` has them."""
        tokens = clip_tokens(clips, texts)
        for source, own in zip(clips.sources, tokens, strict=True):
            ids = np.arange(len(own)) if source.ids is None else source.ids
            longest = int(ids[own[ids].argmax()])
            if own[longest] > limit:
                raise ValueError(
                    f"max_tokens_per_batch: {limit}, but clip {source.index.keys[longest]!r} of "
                    f"{source.index.folder.name} has {own[longest]} tokens alone; legal: at least that many"
                )
        per_token = ((clips.clip_bytes(shape), clips.encoder.video_tokens(shape.grid)) for shape in clips.shapes())
        return cls(limit, tokens, max(size * limit // count for size, count in per_token))


def clip_tokens(clips: ClipBatches, texts: Mapping[tuple[int, str], int]) -> list[np.ndarray]:
    """For each data set the tokens of each of its samples, int64, as Batch.lengths will hold them in training.

    Where a flip changes a clip's text, the larger number. Answers are not among them.

    Args:
        texts: for each data set and text the tokens beside those of the video.
    """
    found = []
    for number, source in enumerate(clips.sources):
        index = source.index
        columns = (index.prompt, index.frames, index.height, index.width)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        tokens = {}
        for row in set(rows):
            prompt, frames, height, width = row
            shape = ClipShape.of(clips.encoder, min(frames, clips.frames.most), height, width)
            text = max(texts[number, each] for each in source.texts(prompt))
            tokens[row] = text + clips.encoder.video_tokens(shape.grid)
        found.append(np.array([tokens[row] for row in rows], dtype=np.int64))
    return found
