"""A contestant of throughput.py: the same model in a plain PyTorch loop, its batches in memory; and the ceiling.

    python benchmarks/bare_loop.py RECIPE key=value ... --steps 5 --out FILE

One process, no DeepSpeed, torch's fused AdamW on the weights as they are. Also counts the floating-point operations of
a step's matrix products (2 per multiply-add), measures the machine's best rate of them after each step, and how long
the step's own products take one by one, with nothing in between.
"""

import argparse
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from turns import Turns

from vidcls import distributed
from vidcls.config import load_config
from vidcls.data.batch import Batch
from vidcls.data.loader import training_requests
from vidcls.data.order import StepLayout
from vidcls.model.prepacking import Prepacked, can_prepack
from vidcls.model.pretrained import TrainingExtras, build_model
from vidcls.training.prepacking import prepack_weights
from vidcls.training.setup import Run, setup

WARM_UP = 2  # steps: the second one still meets fresh memory
IN_MEMORY = 4  # micro-batches that are read before the clock starts, and then go round
PEAK_ROWS = (512, 1024, 2048, 4096)
REPEATS = 3
PREPACKED = "prepacked"  # a kind of product
Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape, strides
Product = tuple[str, tuple[Layout, ...]]  # kind, and its two operands


class Products(TorchDispatchMode):
    """Which matrix products run inside the block, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1].rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            pair = args[1:3] if "add" in name else args[:2]
            self.counts[name.replace("badd", ""), tuple((tuple(t.shape), t.stride()) for t in pair)] += 1
        elif name == "_linear_pointwise":
            x, weight = args[0], args[2 if "binary" in str(function) else 1]
            outer, inner = weight.shape
            self.counts[PREPACKED, ((tuple(x.shape), x.stride()), ((inner, outer), (1, inner)))] += 1
        return function(*args, **(kwargs or {}))

    @property
    def flops(self) -> float:
        return sum(count * flops(product) for product, count in self.counts.items())


def flops(product: Product) -> float:
    """2 per multiply-add."""
    (left, _), (right, _) = product[1]
    batch = left[0] if product[0] == "bmm" else 1
    return 2.0 * batch * left[-2] * left[-1] * right[-1]


def micro_batches(run: Run) -> Iterator[Batch]:
    """The first of this run, on the device; again and again."""
    layout = StepLayout(run.plan.global_, run.plan.micro, 1, 0)
    requests = itertools.islice(training_requests(run.data.order, layout, 0, run.steps), IN_MEMORY)
    return itertools.cycle([run.clips[request].to(distributed.device()) for request in requests])


def steps(run: Run, model: nn.Module) -> Callable[[], None]:
    """What does one optimizer step."""
    config, batches = run.config, micro_batches(run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optim.learning_rate, fused=True)

    def step() -> None:
        for _ in range(run.plan.accumulation):
            batch = next(batches)
            loss = F.cross_entropy(model(**batch.model_inputs()), batch.labels_B)
            (loss / run.plan.accumulation).backward()
        nn.utils.clip_grad_norm_(trained, config.optim.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call, the device's work included."""
    distributed.synchronize()
    start = time.perf_counter()
    function()
    distributed.synchronize()
    return time.perf_counter() - start


def usually(function: Callable[[], Any]) -> float:
    """The median time of several calls after one that does not count."""
    function()
    return statistics.median(timed(function) for _ in range(REPEATS))


def peak(width: int, wide: int, dtype: torch.dtype) -> float:
    """The best rate of matrix products of this model's widths over several numbers of rows, in FLOP/s."""
    device = distributed.device()
    rates = []
    for rows, (inner, outer) in itertools.product(PEAK_ROWS, ((width, wide), (wide, width), (width, width))):
        x, w = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, outer))
        ways = [partial(F.linear, x, w)]
        if can_prepack(w):
            ways.append(partial(Prepacked(w, backward=False).multiply, x, None))
        rates.append(2.0 * rows * inner * outer / min(map(usually, ways)))
    return max(rates)


def products_alone(products: Products, dtype: torch.dtype) -> float:
    """Seconds of a step's products when each kind runs by itself."""
    total = 0.0
    device = distributed.device()
    for (kind, layouts), count in products.counts.items():
        left, right = (
            torch.empty_strided(shape, strides, device=device, dtype=dtype).normal_() for shape, strides in layouts
        )
        if kind == PREPACKED:
            product = partial(Prepacked(right.t(), backward=False).multiply, left, None)
        else:
            product = partial(torch.bmm if kind == "bmm" else torch.mm, left, right)
        total += count * usually(product)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, required=True, help="that count")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--ceiling", action="store_true", help="count operations and measure the machine too")
    args = parser.parse_args()
    run = setup(load_config(args.recipe, args.overrides))
    options = run.config.model
    extras = TrainingExtras(gradient_checkpointing=options.gradient_checkpointing, share_prefix=options.share_prefix)
    model = build_model(run.spec, run.encoder, run.heads, seed=run.config.run.seed, extras=extras)
    model.to(distributed.device()).train()
    step = steps(run, model)
    text = model.inner.config.get_text_config()
    best = partial(peak, text.hidden_size, text.intermediate_size, run.spec.dtype)
    for number in range(WARM_UP):
        step()
        if not number:
            prepack_weights(run.config, model)
    peaks: list[float] = []
    turns = Turns(distributed.synchronize)
    for _ in range(args.steps):
        turns.next(aside=lambda: peaks.append(best()))
        step()
    turns.next(last=True, aside=lambda: peaks.append(best()))
    result: dict[str, Any] = {"seconds": turns.seconds, "device": distributed.accelerator_name()}
    result["peak_flops_per_second"] = peaks
    if args.ceiling:
        with Products() as products:
            step()
        result |= {
            "flops": products.flops,
            "products_alone_seconds": products_alone(products, run.spec.dtype),
            "peak_beside_products": best(),
        }
    args.out.write_text(json.dumps(result), encoding="utf-8")
    distributed.stop()


if __name__ == "__main__":
    main()
