"""Evaluation while training: when, on which clips, and which checkpoint was the best so far."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vidcls import distributed
from vidcls.config import Config, ConfigError
from vidcls.data.batch import ClipEncoder
from vidcls.data.frames import Views
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice
from vidcls.evaluation.evaluate import evaluate
from vidcls.evaluation.metrics import Metrics
from vidcls.manifest import MANIFEST_NAME, CheckpointError
from vidcls.training.averaging import WeightAverage
from vidcls.training.best import BEST_NAME, publish_best
from vidcls.training.data_sets import DataSets, cache_settings
from vidcls.training.telemetry import read_log

EVALUATIONS_NAME = "evaluations.jsonl"
LOWER_IS_BETTER = ("loss",)


@dataclass(frozen=True)
class EvalClips:
    """A data set to evaluate on; ids: the samples to take, rising, if not all."""

    name: str
    source: ClipSource
    ids: np.ndarray | None = None


def open_eval_clips(config: Config, data: DataSets) -> list[EvalClips]:
    """The data sets to evaluate on, with the clips that val_size holds out of those to train on. Reads no clip.

    A part held out is named as its data set, or NAME.val where clips of eval_dataset have that name.

    Raises:
        ShardError: a folder is no data set.
        LabelSpaceError: its classes are not those of the head.
        ConfigError: val_size holds no clip of a data set out.
    """
    heads = list(data.heads)
    opened = []
    for about in config.eval_sets:
        index = ShardIndex.open(about.place, cache_settings(config.data))
        data.heads[about.head].check_same(index.labels, f"head {about.head} in training", f"eval_dataset {about.place}")
        opened.append(EvalClips(about.name, ClipSource(index, about.prompt, heads.index(about.head))))
    if config.data.val_size:
        taken = {each.name for each in opened}
        for part, source in zip(data.parts, data.sources(), strict=True):
            name = part.about.name
            if not len(part.held_out):
                raise ConfigError(
                    f"val_size: {config.data.val_size:g} holds out none of the {len(part.ids)} clips of data set {name}"
                )
            opened.append(EvalClips(f"{name}.val" if name in taken else name, source, part.held_out))
    return opened


@dataclass(frozen=True)
class Schedule:
    """When to evaluate. every: optimizer steps; None: at the first step that ends an epoch. last: of the run."""

    every: int | None
    last: int
    clips_per_epoch: int
    global_batch: int

    @classmethod
    def of(cls, config: Config, *, last: int, clips_per_epoch: int, global_batch: int) -> Schedule:
        steps = config.eval.eval_steps or config.run.logging_steps
        every = steps if config.eval.eval_strategy == "steps" else None
        return cls(every, last, clips_per_epoch, global_batch)

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` optimizer steps; always after the last."""
        if done == self.last:
            return True
        if self.every is not None:
            return done % self.every == 0
        return self._epochs(done) > self._epochs(done - 1)

    def _epochs(self, done: int) -> int:
        return done * self.global_batch // self.clips_per_epoch


@dataclass(frozen=True)
class Evaluation:
    """The metrics of every data set, by name, after `step` optimizer steps. views: segments and crops of each clip."""

    step: int
    metrics: dict[str, Metrics]
    views: tuple[int, int] = (1, 1)

    def value(self, metric: str) -> float:
        """The mean over data sets."""
        return float(np.mean([getattr(each, metric) for each in self.metrics.values()]))

    def log_row(self, metric: str) -> dict[str, float]:
        """eval/top1 and so on; of several data sets eval/NAME/top1 and, of `metric`, also the mean."""
        if len(self.metrics) == 1:
            (only,) = self.metrics.values()
            return {"step": self.step, **_scalars("eval", only)}
        row: dict[str, float] = {"step": self.step, f"eval/{metric}": self.value(metric)}
        for name, each in self.metrics.items():
            row |= _scalars(f"eval/{name}", each)
        return row

    def to_dict(self) -> dict[str, Any]:
        metrics = {name: each.to_dict() for name, each in self.metrics.items()}
        return {"step": self.step, "metrics": metrics, "views": list(self.views)}

    @classmethod
    def from_dict(cls, stored: Any) -> Evaluation:
        """The inverse of to_dict; KeyError, TypeError or AttributeError when `stored` is none."""
        segments, crops = stored.get("views", (1, 1))  # without: written before there were any
        metrics = {name: Metrics(**each) for name, each in stored["metrics"].items()}
        return cls(int(stored["step"]), metrics, (segments, crops))

    def clips(self) -> dict[str, int]:
        return {name: each.seen for name, each in self.metrics.items()}


class Evaluations:
    """The evaluations of one run; every rank has one, and each hears of the same numbers.

    With load_best_model_at_end a run keeps the checkpoint of its best evaluation. evaluations.jsonl holds what was
    found, and a resumed run knows the best so far from there alone; only an evaluation on the same clips whose
    checkpoint is still there can be the best.
    """

    def __init__(
        self, config: Config, clips: Sequence[EvalClips], encoder: ClipEncoder, frames: FrameChoice, schedule: Schedule
    ) -> None:
        """Reads and writes nothing. `clips` are those of open_eval_clips.

        Raises:
            ConfigError: the views are not legal, or would all be one.
        """
        assert clips, "nothing to evaluate on"
        views = _views(config, clips, frames)
        self._views = views.segments, views.crops
        self.batches = {each.name: ClipBatches([each.source], encoder, frames, views=views) for each in clips}
        self.ids = {each.name: each.ids for each in clips}
        self.schedule = schedule
        self.metric = config.eval.metric
        self.keeps_best = config.eval.load_best_model_at_end
        self.best: Evaluation | None = None
        self._patience = config.eval.early_stopping_patience
        self._rows: list[Evaluation] = []  # of this run up to now, on the same clips
        self._micro = config.eval.per_device_eval_batch_size
        self._workers = config.data.dataloader_num_workers
        self._seconds = config.run.data_timeout
        self._folder = Path(config.run.output_dir)

    @property
    def best_checkpoint(self) -> Path | None:
        """What rotation must not delete."""
        return _checkpoint(self._folder, self.best.step) if self.best and self.keeps_best else None

    def start(self, step: int) -> None:
        """Go on after `step` optimizer steps: drop the rows of later ones and find the best. All ranks must call it.

        The output folder is there already.

        Raises:
            CheckpointError: evaluations.jsonl holds something else.
        """
        best, rows = None, list[Evaluation]()
        with distributed.all_or_none(f"reading {self._path}"):
            if distributed.is_main():
                rows = [row for row in self._read() if row.step <= step]
                temporary = self._path.with_name(f"{EVALUATIONS_NAME}.tmp")
                temporary.write_text("".join(_line(row) for row in rows), encoding="utf-8")
                temporary.replace(self._path)
                for row in filter(self._can_be_best, rows):
                    best = row if best is None or self._is_better(row, best) else best
                rows = list(filter(self._is_comparable, rows))
        self.best, self._rows = distributed.gather_objects((best, rows))[0]

    def due(self, done: int) -> bool:
        """Whether to `run` after `done` optimizer steps. Do so before a checkpoint of the same step is saved."""
        return self.schedule.due(done)

    def run(self, model: nn.Module, done: int, average: WeightAverage | None = None) -> dict[str, float]:
        """Evaluate after `done` optimizer steps, with the averaged weights if there are any; returns a row to log.

        The model and torch's generator are as before when it returns. All ranks must call it; under ZeRO-3 `model` is
        the engine's module.

        Raises:
            RuntimeError: on every rank, when the main rank cannot write.
        """
        with average.applied() if average else contextlib.nullcontext(), _evaluating(model):
            found = {
                name: evaluate(
                    model,
                    clips,
                    ids=self.ids[name],
                    micro=self._micro,
                    workers=self._workers,
                    seconds=self._seconds,
                ).metrics
                for name, clips in self.batches.items()
            }
        # From the main rank: hosts of different kinds may differ in a last bit, and then over which is the best.
        now = Evaluation(done, distributed.gather_objects(found)[0], self._views)
        with distributed.all_or_none(f"writing {self._path}"):
            if distributed.is_main():
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(_line(now))
        self._rows.append(now)
        if self.best is None or self._is_better(now, self.best):
            self.best = now
        return now.log_row(self.metric)

    def exhausted(self) -> bool:
        """Whether early_stopping_patience is: so many evaluations since the best one were no better."""
        if self._patience is None or not self._rows:
            return False
        best = 0
        for place, row in enumerate(self._rows):
            if self._is_better(row, self._rows[best]):
                best = place
        return len(self._rows) - 1 - best >= self._patience

    def must_save(self, done: int) -> bool:
        """Whether the evaluation after `done` steps is the best so far, and its checkpoint must be kept."""
        return self.keeps_best and self.best is not None and self.best.step == done

    def finish(self) -> Path | None:
        """Make the best checkpoint output_dir/best, if it is wanted; the folder. All ranks must call it.

        Raises:
            RuntimeError or ValueError: on every rank, when the checkpoint is damaged or cannot be copied.
        """
        source = self.best_checkpoint
        if source is None or self.best is None:
            return None
        with distributed.all_or_none(f"copying {source}"):
            if distributed.is_main():
                publish_best(source, self._folder, {"metric": self.metric, **self.best.to_dict()})
        return self._folder / BEST_NAME

    @property
    def _path(self) -> Path:
        return self._folder / EVALUATIONS_NAME

    def _read(self) -> list[Evaluation]:
        try:
            return [Evaluation.from_dict(row) for row in read_log(self._path)]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._path} is damaged, or of another version: {error!r}") from None

    def _clip_counts(self) -> dict[str, int]:
        return {
            name: len(clips.sources[0].index) if (ids := self.ids[name]) is None else len(ids)
            for name, clips in self.batches.items()
        }

    def _is_comparable(self, row: Evaluation) -> bool:
        return row.clips() == self._clip_counts() and row.views == self._views

    def _can_be_best(self, row: Evaluation) -> bool:
        there = (_checkpoint(self._folder, row.step) / MANIFEST_NAME).is_file()
        return self._is_comparable(row) and (there or not self.keeps_best)

    def _is_better(self, one: Evaluation, other: Evaluation) -> bool:
        """Of equals the earlier one stays."""
        difference = one.value(self.metric) - other.value(self.metric)
        return difference < 0 if self.metric in LOWER_IS_BETTER else difference > 0


def eval_views(config: Config) -> Views:
    """Those of the recipe; ConfigError unless they are legal."""
    asked: dict[str, Any] = config.eval.views
    try:
        return Views(**asked)
    except ValueError as error:
        raise ConfigError(f"views: {error}") from None


def _views(config: Config, clips: Sequence[EvalClips], frames: FrameChoice) -> Views:
    views = eval_views(config)
    most = max(int(each.source.index.frames.max()) for each in clips)
    if views.segments > 1 and most <= frames.most:
        raise ConfigError(
            f"views: segments {views.segments} would be one and the same: clips have at most {most} frames, the model "
            f"takes {frames.most}; make shards of more frames"
        )
    return views


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    yield
    model.train(training)


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def _scalars(prefix: str, metrics: Metrics) -> dict[str, float]:
    values = metrics.to_dict()
    del values["seen"]
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _line(row: Evaluation) -> str:
    return json.dumps(row.to_dict()) + "\n"
