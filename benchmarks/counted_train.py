"""launch/train.py with every collective counted; scaling.py starts it through the launcher.

    deepspeed benchmarks/counted_train.py RECIPE key=value ...

Each rank writes traffic-RANK.json into output_dir: for each optimizer step its seconds, those within collectives, what
each caller's collectives carried, and the bytes that the network interface eth0 has sent and received, where there is
one. What lies between two steps belongs to the second of them.
"""

import inspect
import json
import os
import runpy
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from instrumented_train import PAYLOADS, after_each_step

ROOT = Path(__file__).resolve().parents[1]
INTERFACE = Path("/sys/class/net/eth0/statistics")


def least_sent(collective: str, payload: int, ranks: int) -> float:
    """Bytes that a rank must send at least, averaged over `ranks`.

    Reducing n bytes anywhere, and bringing n bytes everywhere, each takes (ranks - 1) x n bytes in all; an all-reduce
    is both (Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms).
    """
    return payload * (ranks - 1) / ranks * (2 if collective == "all_reduce" else 1)


class Counter:
    """What the step under way has sent, and the steps before it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._sent: defaultdict[str, float] = defaultdict(float)
        self._calls: defaultdict[str, int] = defaultdict(int)
        self._communication = 0.0
        self._began = time.perf_counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        signature = inspect.signature(function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            value = given[PAYLOADS[name]]
            tensors: Iterable[torch.Tensor] = value if isinstance(value, list) else [value]
            payload = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            key = f"{_caller()}: {name}"
            self._sent[key] += least_sent(name, payload, torch.distributed.get_world_size(given.get("group")))
            self._calls[key] += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._communication += time.perf_counter() - start

        return counted

    def end_step(self) -> None:
        now = time.perf_counter()
        step: dict[str, Any] = {"seconds": now - self._began, "communication": self._communication}
        step |= {"sent": dict(self._sent), "calls": dict(self._calls)}
        if INTERFACE.exists():
            step["interface"] = {way: int((INTERFACE / f"{way}_bytes").read_text()) for way in ("tx", "rx")}
        self.steps.append(step)
        self._sent.clear()
        self._calls.clear()
        self._communication = 0.0
        self._began = time.perf_counter()


def _caller() -> str:
    """`deepspeed`, or the module of vidcls that asked for the collective."""
    frame = sys._getframe(2)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        if "deepspeed" in parts:
            return "deepspeed"
        if "vidcls" in parts and parts[-1] != "distributed.py":
            return parts[-1].removesuffix(".py")
        frame = frame.f_back  # type: ignore[assignment]
    return "other"


def instrument(counter: Counter) -> None:
    import torch
    from torch.distributed import distributed_c10d

    for name in PAYLOADS:
        counted = counter.around(name, getattr(distributed_c10d, name))
        setattr(distributed_c10d, name, counted)  # where collectives of objects look for it
        setattr(torch.distributed, name, counted)
    after_each_step(counter.end_step)


def main() -> None:
    from vidcls.command import command_arguments, heavy_imports
    from vidcls.config import load_config

    words = command_arguments()
    output = Path(load_config(words[0], words[1:]).run.output_dir)
    counter = Counter()
    with heavy_imports():  # as launch/train.py has them
        instrument(counter)
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
    rank = os.environ.get("RANK", "0")
    (output / f"traffic-{rank}.json").write_text(json.dumps(counter.steps), encoding="utf-8")


if __name__ == "__main__":
    main()
