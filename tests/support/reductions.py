"""deepspeed --num_gpus N tests/support/reductions.py: a small engine under ZeRO-2 whose gradients are known.

Prints what each rank's weights are off from start - mean gradient, at most, and which collectives carried how many
numbers in the step.
"""

import inspect
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from torch import nn

from vidcls import distributed
from vidcls.faults.guard import Limits, guarded
from vidcls.training.reduction import reduce_to_owners

SIZES = (7, 1000, 3, 33, 501, 1)  # ranks own uneven parts of a bucket, and of some none
BUCKET = 900
COLLECTIVES = {"all_reduce": "tensor", "reduce": "tensor", "all_to_all_single": "input"}  # and what is sent


class Weighted(nn.Module):
    """The sum of all parameters, each number times a factor, which is its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in SIZES])

    def forward(self, factors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(p * c).sum() for p, c in zip(self.weights, factors, strict=True)]).sum()


def engine() -> tuple[deepspeed.DeepSpeedEngine, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Weighted()
    before = [p.detach().clone() for p in model.parameters()]
    zero = {"stage": 2, "reduce_bucket_size": BUCKET, "overlap_comm": True, "reduce_scatter": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "communication_data_type": "fp32",
    }
    made, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
    return made, before


def factors_of(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank + 1)
    return [torch.randn(size, generator=generator) for size in SIZES]


def counting(name: str, argument: str, sent: Counter[str]) -> Callable[..., Any]:
    function = getattr(torch.distributed, name)
    signature = inspect.signature(function)

    def counted(*args: Any, **kwargs: Any) -> Any:
        sent[name] += signature.bind(*args, **kwargs).arguments[argument].numel()
        return function(*args, **kwargs)

    return counted


if __name__ == "__main__":
    with guarded(None, Limits()), distributed.leaving():
        distributed.start(60)
        made, before = engine()
        reduce_to_owners(made)
        sent: Counter[str] = Counter()
        for name, argument in COLLECTIVES.items():
            setattr(torch.distributed, name, counting(name, argument, sent))
        made.backward(made(factors_of(distributed.rank())))
        made.step()
        everyone = [factors_of(rank) for rank in range(distributed.world_size())]
        means = [torch.stack(each).double().mean(0) for each in zip(*everyone, strict=True)]
        after = [p.detach() for p in made.module.parameters()]
        off = max((a - (b - m)).abs().max().item() for a, b, m in zip(after, before, means, strict=True))
        found = distributed.gather_objects({"off": off, "sent": sent})
        if distributed.is_main():
            print("found " + json.dumps(found), flush=True)
