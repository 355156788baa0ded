"""Classify video files with a checkpoint, through the same decoding, storing and resizing as in training."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from vidcls import distributed
from vidcls.data.batch import PreparedClip, collate, prepare_clip
from vidcls.data.codecs import decode_frames, encode_frames
from vidcls.data.loader import FrameChoice
from vidcls.evaluation.evaluate import class_scores
from vidcls.evaluation.heads import StoredHead, check_classes, choose_head, frame_choice, read_heads
from vidcls.model.classifier import ActionClassifier
from vidcls.model.pretrained import load_model
from vidcls.model.prompt import PromptEncoder
from vidcls.predict.timeline import Timeline, Window, check_windows, windows_of
from vidcls.predict.videos import Job, Unreadable, all_seconds, decode_all
from vidcls.sharding.decode import Clip, DecodeError


@dataclass(frozen=True)
class Prediction:
    """Of a video, or of its part from `start` to `end` seconds: probabilities of the head's classes, float64 [C]."""

    video: str
    scores_C: np.ndarray
    names: tuple[str, ...]
    start: float | None = None
    end: float | None = None

    def ranked(self) -> list[tuple[str, float]]:
        """(class name, probability), the most probable first."""
        order = np.argsort(-self.scores_C, kind="stable")
        return [(self.names[i], float(self.scores_C[i])) for i in order.tolist()]


class Predictor:
    """A loaded checkpoint or export, and one of its heads.

    Predictor.load("runs/my/checkpoint-500").predict("clip.mp4")[0]   ->  ("Archery", 0.97)
    """

    def __init__(
        self, model: ActionClassifier, encoder: PromptEncoder, head: StoredHead, frame_choice: FrameChoice
    ) -> None:
        self.model, self.encoder, self.head, self.frame_choice = model, encoder, head, frame_choice

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        head: str | None = None,
        base: str | None = None,
        trust_remote_code: bool = False,
    ) -> Predictor:
        """Read a checkpoint-N folder onto the accelerator of this machine.

        Args:
            head: whose classes are predicted; needed where there are several.
            base: the base model's folder, if it has moved since training.
            trust_remote_code: let that folder's own tokenizer code run.

        Raises:
            ValueError: a file is missing or damaged, or no one head is meant; names it, or the heads.
        """
        folder = Path(checkpoint)
        heads = read_heads(folder)
        chosen = choose_head(heads, head)
        model, encoder, spec = load_model(folder, model_name_or_path=base, trust_remote_code=trust_remote_code)
        check_classes(heads, model.classes)
        return cls(model.to(distributed.device()), encoder, chosen, frame_choice(spec))

    def predict(self, video: str | Path) -> list[tuple[str, float]]:
        """(class name, probability) of every class of the head, the most probable first.

        Raises:
            DecodeError: the file cannot be decoded; gives the reason.
        """
        (found,) = self.predict_many([video])
        if isinstance(found, Unreadable):
            raise DecodeError(str(video), found.reason.removeprefix(f"{video}: "))
        return found.ranked()

    def predict_many(
        self, videos: Iterable[str | Path], *, batch_size: int = 8, workers: int = 0
    ) -> Generator[Prediction | Unreadable, None, None]:
        """A Prediction of each video, in order, or why it cannot be read.

        Args:
            batch_size: clips per forward.
            workers: processes that decode ahead; one that a file crashes costs that file only. 0: in this process.
        """
        jobs = [Job(str(video), self.head.settings) for video in videos]
        yield from self._predict_jobs(jobs, batch_size, workers)

    def timelines(
        self, videos: Iterable[str | Path], window: float, stride: float, *, batch_size: int = 8, workers: int = 0
    ) -> Generator[Timeline | Unreadable, None, None]:
        """What is done when, in each video: windows of `window` seconds, one every `stride` seconds, each classified as
        a clip of its own.

        Raises:
            ValueError: window or stride makes no sense.
        """
        check_windows(window, stride)
        names = [str(video) for video in videos]
        lengths = all_seconds(names, workers)
        spans = [[] if isinstance(each, Unreadable) else windows_of(each, window, stride) for each in lengths]
        jobs = [Job(name, self.head.settings, *span) for name, cut in zip(names, spans, strict=True) for span in cut]
        predictions = self._predict_jobs(jobs, batch_size, workers)
        for name, length, cut in zip(names, lengths, spans, strict=True):
            found = list(islice(predictions, len(cut)))
            bad = [each for each in (length, *found) if isinstance(each, Unreadable)]
            if bad:
                yield bad[0]
                continue
            assert isinstance(length, float)
            seen = [
                Window(start, end, each.scores_C)
                for (start, end), each in zip(cut, found, strict=True)
                if isinstance(each, Prediction)
            ]
            yield Timeline(name, length, window, stride, self.head.labels.names, tuple(seen))

    def _predict_jobs(
        self, jobs: list[Job], batch_size: int, workers: int
    ) -> Generator[Prediction | Unreadable, None, None]:
        clips = iter(zip(jobs, decode_all(jobs, workers), strict=True))
        while part := list(islice(clips, batch_size)):
            prepared = [(job, self._try_to_prepare(job, clip)) for job, clip in part]
            good = [clip for _, clip in prepared if isinstance(clip, PreparedClip)]
            scores: Iterator[np.ndarray] = iter(self.scores(good))
            for job, clip in prepared:
                if isinstance(clip, Unreadable):
                    yield clip
                else:
                    yield Prediction(job.video, next(scores), self.head.labels.names, job.start, job.end)

    def _try_to_prepare(self, job: Job, clip: Clip | Unreadable) -> PreparedClip | Unreadable:
        if isinstance(clip, Unreadable):
            return clip
        try:
            return self.prepare(job, clip)
        except ValueError as error:  # frames that are too long and narrow, or more tokens than the model takes
            return Unreadable(f"{job.video}: {error}")

    def prepare(self, job: Job, clip: Clip) -> PreparedClip:
        """A decoded video as the model takes it; on the host. Raises ValueError where the model cannot take it."""
        settings = self.head.settings
        chosen = self.frame_choice.evaluation(len(clip.frames), 0, 1)
        # Through the codec as in the shards: the model never saw frames without its traces.
        height, width = clip.frames.shape[1:3]
        frames = decode_frames(encode_frames(clip.frames[chosen], settings), settings.codec, height, width)
        prepared = prepare_clip(
            key=job.video,
            label=0,
            frames=frames,
            times=clip.times[chosen].tolist(),
            prompt=self.head.prompt,
            encoder=self.encoder,
            max_frames=len(chosen),
        )
        return replace(prepared, head=self.head.number)

    def scores(self, clips: list[PreparedClip]) -> np.ndarray:
        """Class probabilities, float64 [N, C]."""
        if not clips:
            return np.empty((0, len(self.head.labels)))
        device = next(self.model.heads.parameters()).device
        with torch.inference_mode():
            logits_BC = self.model(**collate(clips).to(device).model_inputs())
        return class_scores(logits_BC, len(self.head.labels)).cpu().numpy()
