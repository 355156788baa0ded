"""launch/predict.py, from its arguments to what it prints and writes."""

from __future__ import annotations

import csv
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from vidcls.predict.predictor import Prediction, Predictor
from vidcls.predict.timeline import Timeline, check_windows
from vidcls.predict.videos import Unreadable, check_there, find_videos, read_list
from vidcls.progress import progress_bar

BAR = 30  # characters of probability 1
BARS_UP_TO = 20  # videos; of more, each gets a line
COLUMNS = ("video", "start", "end", "rank", "class", "score")

Found = Prediction | Timeline


def predict_videos(arguments: Namespace) -> int:
    """The exit code: 1 where a video could not be read.

    Raises:
        ValueError: a user's mistake, before any video is looked at.
    """
    videos = _videos(arguments)
    if arguments.top < 1 or arguments.batch_size < 1 or arguments.workers < 0:
        raise ValueError(
            f"--top {arguments.top} --batch-size {arguments.batch_size} --workers {arguments.workers}: legal: >= 1, "
            ">= 1, >= 0"
        )
    stride = arguments.stride
    if arguments.window is None and (stride is not None or arguments.timeline is not None):
        raise ValueError("--stride, --timeline: go with --window")
    if arguments.window is not None:
        stride = arguments.window / 2 if stride is None else stride
        check_windows(arguments.window, stride)
    predictor = Predictor.load(
        arguments.checkpoint,
        head=arguments.head,
        base=arguments.model,
        trust_remote_code=arguments.trust_remote_code,
    )
    how = {"batch_size": arguments.batch_size, "workers": arguments.workers}
    found: Generator[Found | Unreadable, None, None]
    if arguments.window is None:
        found = predictor.predict_many(videos, **how)
    else:
        found = predictor.timelines(videos, arguments.window, stride, **how)
    failed = 0
    with ExitStack() as stack:
        show = stack.enter_context(progress_bar(Console(stderr=True), "videos classified"))
        tell = stack.enter_context(_Teller(arguments, len(videos)))
        for number, each in enumerate(found, start=1):
            if isinstance(each, Unreadable):  # one bad file must not cost the others
                print(f"error: {each.reason}", file=sys.stderr)
                failed += 1
            else:
                tell(number, each)
            show(number, len(videos))
    return 1 if failed else 0


def _videos(arguments: Namespace) -> list[Path]:
    given = [bool(arguments.videos), arguments.folder is not None, arguments.csv is not None]
    if sum(given) != 1:
        raise ValueError("VIDEO, --folder, --csv: give one of them")
    if arguments.folder is not None:
        return find_videos(arguments.folder)
    if arguments.csv is not None:
        return read_list(arguments.csv)
    check_there("VIDEO", arguments.videos)
    return arguments.videos


class _Teller:
    """Prints each answer, and writes it where it shall go."""

    def __init__(self, arguments: Namespace, videos: int) -> None:
        self._top, self._json, self._videos = arguments.top, arguments.json, videos
        self._csv_out, self._folder = arguments.csv_out, arguments.timeline
        self._write: Callable[[list[Any]], Any] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Teller:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        if self._csv_out is not None:
            file = self._stack.enter_context(self._csv_out.open("w", encoding="utf-8", newline=""))
            self._write = csv.writer(file, lineterminator="\n").writerow
            self._write(list(COLUMNS))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, number: int, found: Found) -> None:
        if isinstance(found, Timeline):
            self._tell_timeline(number, found)
        else:
            self._tell(found)

    def _tell(self, found: Prediction) -> None:
        ranked = found.ranked()[: self._top]
        if self._write:
            for rank, (name, score) in enumerate(ranked, start=1):
                self._write([found.video, "", "", rank, name, round(score, 6)])
        if self._json:
            top = [{"class": name, "score": round(score, 6)} for name, score in ranked]
            print(json.dumps({"video": found.video, "top": top}, ensure_ascii=False), flush=True)
        elif self._videos <= BARS_UP_TO:
            print(found.video)
            for name, score in ranked:
                print(f"  {score:6.1%}  {'#' * round(BAR * score):{BAR}}  {name}", flush=True)
        else:
            name, score = ranked[0]
            print(f"{score:6.1%}  {name}  {found.video}", flush=True)

    def _tell_timeline(self, number: int, found: Timeline) -> None:
        content = found.to_dict(self._top)
        if self._write:
            for window in content["windows"]:
                for rank, each in enumerate(window["top"], start=1):
                    self._write([found.video, window["start"], window["end"], rank, each["class"], each["score"]])
        if self._folder is not None:
            # Numbered: videos of several folders may have the same name.
            stem = f"{number:0{len(str(self._videos))}}-{Path(found.video).stem}"
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            (self._folder / f"{stem}.json").write_text(text, encoding="utf-8")
            found.draw(self._folder / f"{stem}.png")
        if self._json:
            print(json.dumps(content, ensure_ascii=False), flush=True)
        else:
            print(found.video)
            for each in found.stretches():
                print(f"  {each.start:8.1f} to {each.end:8.1f} s  {each.score:6.1%}  {each.name}", flush=True)
