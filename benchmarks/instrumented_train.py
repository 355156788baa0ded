"""launch/train.py with a clock; throughput.py starts it through the launcher.

    deepspeed benchmarks/instrumented_train.py RECIPE key=value ...

Writes parts.json into output_dir: for each optimizer step of the main rank the seconds of each part. The device is
waited for around every part, which costs a little of what it measures on a GPU and nothing on a CPU.

As a contestant that takes turns step by step (turns.py) it writes turns.json instead: the seconds from one step's
beginning to the next one's, without the warm-up and the last step.
"""

import json
import os
import runpy
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turns import PLACE, Turns

ROOT = Path(__file__).resolve().parents[1]
PARTS_NAME, TURNS_NAME = "parts.json", "turns.json"
# Collective -> the argument whose bytes are its payload: the whole tensor, of all ranks.
PAYLOADS = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "broadcast": "tensor",
    "all_gather": "tensor_list",
    "all_gather_into_tensor": "output_tensor",
    "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input",
    "all_to_all_single": "input",
}
WARM_UP = 3  # steps that do not count: the self-check looks at them


class Clock:
    """Seconds of nested parts, each without those inside it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # of each part that is open, the seconds of those within
        self._began = time.perf_counter()

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        from vidcls import distributed

        def timed(*args: Any, **kwargs: Any) -> Any:
            distributed.synchronize()
            start = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                distributed.synchronize()
                took = time.perf_counter() - start
                self._now[part] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return timed

    def end_step(self) -> None:
        now = time.perf_counter()
        rest = now - self._began - sum(self._now.values())
        self.steps.append({**self._now, "other": rest})
        self._now.clear()
        self._began = now


def instrument(clock: Clock) -> None:
    import torch

    from vidcls.data.batch import Batch
    from vidcls.data.reading import BatchReader
    from vidcls.model.classifier import ActionClassifier
    from vidcls.training.engine import Engine

    def wrap(owner: Any, name: str, part: str) -> None:
        setattr(owner, name, clock.around(part, getattr(owner, name)))

    wrap(BatchReader, "__next__", "data wait")
    wrap(Batch, "to", "host to device")
    wrap(ActionClassifier, "encode_video", "vision")
    wrap(Engine, "forward", "language forward")
    wrap(Engine, "backward", "backward")
    wrap(Engine, "step", "optimizer")
    for name in PAYLOADS:
        wrap(torch.distributed, name, "communication")
    after_each_step(clock.end_step)


def after_each_step(done: Callable[[], None]) -> None:
    from vidcls.training import loop

    train_step = loop.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        done()
        return result

    loop.train_step = step


def take_turns(steps: int) -> Turns:
    """A turn is a step and what the loop does behind it; there are `steps` in all."""
    from vidcls import distributed
    from vidcls.training import loop

    turns, train_step = Turns(distributed.synchronize), loop.train_step

    def step(*args: Any, step: int, **kwargs: Any) -> Any:
        if step >= WARM_UP:
            turns.next(last=step == steps - 1)
        return train_step(*args, step=step, **kwargs)

    loop.train_step = step
    return turns


def main() -> None:
    from vidcls.command import command_arguments, heavy_imports
    from vidcls.config import load_config

    words = command_arguments()
    config = load_config(words[0], words[1:])
    name, clock, turns = PARTS_NAME, Clock(), None
    with heavy_imports():  # as launch/train.py has them
        if PLACE in os.environ:
            assert config.optim.max_steps is not None
            name, turns = TURNS_NAME, take_turns(config.optim.max_steps)
        else:
            instrument(clock)
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
    if os.environ.get("RANK", "0") == "0":
        found: Any = clock.steps if turns is None else turns.seconds
        (Path(config.run.output_dir) / name).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
