"""One pass over stored samples by worker processes that may crash or hang: a hostile clip costs only itself."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

from vidcls.data.index import ShardIndex
from vidcls.data.shards import ShardReader
from vidcls.data.workers import Lost, run_all

Result = TypeVar("Result")
SAMPLES_PER_TASK = 16
TASK_SECONDS = 180.0  # for so many samples; healthy ones take milliseconds
SAMPLE_SECONDS = 60.0


def sweep(
    place: Path | str, samples: Sequence[int], visit: Callable[[ShardReader, int], Result], workers: int
) -> Iterator[tuple[int, Result | Lost]]:
    """(sample, visit(reader, sample)) for each of `samples` of the data set at `place`, in order.

    Lost where a sample crashes its worker, takes its memory or too much time. visit must pickle. workers: processes;
    0: none, and no protection.
    """
    tasks = [samples[i : i + SAMPLES_PER_TASK] for i in range(0, len(samples), SAMPLES_PER_TASK)]
    function = partial(_visit_all, place, visit)
    for task, results in zip(tasks, run_all(function, tasks, workers, TASK_SECONDS), strict=True):
        if not isinstance(results, Lost):
            yield from zip(task, results, strict=True)
            continue
        # One of them did it; alone, each speaks for itself.
        for sample, result in zip(task, run_all(function, [[i] for i in task], workers, SAMPLE_SECONDS), strict=True):
            yield sample, result if isinstance(result, Lost) else result[0]


@lru_cache(maxsize=2)
def opened(place: Path | str) -> ShardReader:
    """The index is opened once per worker: to send it with each task would cost more than the task."""
    return ShardReader(ShardIndex.open(place))


def _visit_all(place: Path | str, visit: Callable[[ShardReader, int], Result], samples: Sequence[int]) -> list[Result]:
    reader = opened(place)
    return [visit(reader, sample) for sample in samples]
