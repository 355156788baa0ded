"""deepspeed --num_gpus N tests/support/reductions.py: a small engine under ZeRO-2 whose gradients are known.

Prints for each way of reducing, of a step of two micro-batches: what each rank's weights are off from start - mean
gradient, at most, the norm, which collectives carried how many numbers; and whether a step was applied whose gradient
is infinite on the last rank.
"""

import inspect
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from vidcls import distributed
from vidcls.faults.guard import Limits, guarded
from vidcls.training import reduction

MICRO_BATCHES = 2
WAYS = ("exchange", "exchange in bf16", "reduce_scatter", "all_reduce", "buckets")
UNUSED = 5  # numbers that nothing depends on
SIZES = (7, 1000, 3, 33, 501, 1)  # ranks own uneven parts of a bucket, and of some none
BUCKET = 900
COLLECTIVES = {  # and what is sent
    "all_reduce": "tensor",
    "reduce": "tensor",
    "all_to_all_single": "input",
    "reduce_scatter_tensor": "input",
}


class Weighted(nn.Module):
    """The sum of all parameters but one, each number times a factor, which is its gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(size).to(dtype)) for size in SIZES])
        self.unused = nn.Parameter(torch.randn(UNUSED).to(dtype))

    def forward(self, factors: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(self.weights, factors, strict=True)
        return torch.stack([(p.float() * c).sum() for p, c in pairs]).sum()


def engine(bf16: bool) -> tuple[deepspeed.DeepSpeedEngine, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Weighted(torch.bfloat16 if bf16 else torch.float32)
    parameters = list(model.parameters())
    before = [p.detach().float() for p in parameters]
    zero = {"stage": 2, "reduce_bucket_size": BUCKET, "overlap_comm": True, "reduce_scatter": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "communication_data_type": "fp32",
        "bf16": {"enabled": bf16},
    }
    groups = [{"params": parameters[:3]}, {"params": parameters[3:]}]
    made, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(groups, lr=1.0), config=config)
    return made, before


def factors_of(rank: int, micro_batch: int) -> list[torch.Tensor]:
    """Eighths, which bf16 holds exactly."""
    generator = torch.Generator().manual_seed(MICRO_BATCHES * rank + micro_batch + 1)
    return [torch.randint(-16, 17, (size,), generator=generator) / 8 for size in SIZES]


def step(made: deepspeed.DeepSpeedEngine, factor: float = 1.0) -> bool:
    """Whether it was applied."""
    for number in range(MICRO_BATCHES):
        made.backward(factor * made(factors_of(distributed.rank(), number)))
        made.step()
    return bool(made.was_step_applied())


def counting(name: str, argument: str, sent: Counter[str]) -> Callable[..., Any]:
    function = getattr(torch.distributed, name)
    signature = inspect.signature(function)

    def counted(*args: Any, **kwargs: Any) -> Any:
        sent[name] += signature.bind(*args, **kwargs).arguments[argument].numel()
        return function(*args, **kwargs)

    return counted


def look(way: str) -> dict[str, Any]:
    """What is found on this rank when gradients are reduced in one of WAYS."""
    bf16 = way.endswith("bf16")
    made, before = engine(bf16)
    kept = reduction.LOCAL_SUM, reduction._way
    way = way.removesuffix(" in bf16")
    reduction.LOCAL_SUM = 0 if way == "buckets" else sum(SIZES) + UNUSED
    forced = "exchange" if way == "buckets" else way
    reduction._way = lambda group: None if distributed.world_size() == 1 else forced
    reduction.reduce_to_owners(made)
    reduction.LOCAL_SUM, reduction._way = kept
    sent: Counter[str] = Counter()
    functions = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
    for name, argument in COLLECTIVES.items():
        setattr(torch.distributed, name, counting(name, argument, sent))
    assert step(made)
    for name, function in functions.items():
        setattr(torch.distributed, name, function)
    found: dict[str, Any] = {"sent": sent, "norm": float(made.get_global_grad_norm())}
    ranks = range(distributed.world_size())
    everything = [[torch.zeros(UNUSED), *factors_of(rank, n)] for rank in ranks for n in range(MICRO_BATCHES)]
    means = [torch.stack(each).double().mean(0) for each in zip(*everything, strict=True)]

    def off(steps: int) -> float:
        after = [safe_get_full_fp32_param(p) for p in made.module.parameters()]
        return max((a - (b - steps * m)).abs().max().item() for a, b, m in zip(after, before, means, strict=True))

    found["off"], found["right_norm"] = off(1), torch.cat(means).norm().item()
    found["applied"] = step(made, factor=float("inf") if distributed.rank() == ranks[-1] else 1.0)
    found["off_when_skipped"] = off(1)
    assert step(made)
    found["off_afterwards"] = off(2)
    return found


if __name__ == "__main__":
    with guarded(None, Limits()), distributed.leaving():
        distributed.start(60)
        found = {way: distributed.gather_objects(look(way)) for way in WAYS}
        if distributed.is_main():
            print("found " + json.dumps(found), flush=True)
