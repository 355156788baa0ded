"""Run by test_streamed_loading.py on two ranks: load a checkpoint in every way and write down what came of it.

    streaming.py CHECKPOINT OUT

OUT/rank{r}.json holds, by case, a list of complaints, and the losses of short trainings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2_5_VLModel

from vidcls import distributed
from vidcls.model import weights
from vidcls.model.weights import load_backbone
from vidcls.training.partitioning import keep_shared, partitioned

TARGETS = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
STEPS, RATE = 3, 1e-2


def zero(stage: int, *, bf16: bool = False, threshold: int = 0) -> dict[str, Any]:
    # With the default threshold a small model stays whole on every rank.
    options = {"stage3_param_persistence_threshold": threshold} if stage == 3 else {}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, **options},
    }


def whole(parameter: Any) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def check_partitions(name: str, reference: Qwen2_5_VLModel, *, bf16: bool) -> list[str]:
    """What is wrong with a partitioned load, beside a plain one."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    with partitioned(zero(3, bf16=bf16)) as partition:
        model = load_backbone(name, dtype=dtype, partition=partition)
    wrong = [] if model.config.to_dict() == reference.config.to_dict() else ["config"]
    expected = dict(reference.named_parameters())
    found: dict[str, Any] = dict(model.named_parameters())
    if found.keys() != expected.keys():
        wrong.append("names")
    for key, parameter in found.items():
        value = expected[key].to(dtype)
        if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE or parameter.numel():
            wrong.append(f"{key} is whole")
        if parameter.ds_shape != value.shape or parameter.ds_tensor.numel() != -(-value.numel() // 2):
            wrong.append(f"{key} has shape {parameter.ds_shape}, part {parameter.ds_tensor.numel()}")
        if parameter.requires_grad or not torch.equal(whole(parameter), value):
            wrong.append(f"{key} differs or trains")
    buffers = dict(reference.named_buffers())
    for key, buffer in model.named_buffers():
        if buffer.dtype != torch.float32 or not torch.equal(buffer, buffers[key]):
            wrong.append(f"buffer {key}")
    return wrong


def check_uneven_sizes() -> list[str]:
    """A layer of 3 x 5 weights and 5 biases, float32 put into bf16."""
    weight, bias = torch.arange(15.0).reshape(5, 3) / 7, torch.arange(5.0) / 3
    with torch.device("meta"):
        layer = nn.Linear(3, 5)
    with partitioned(zero(3, bf16=True)) as partition:
        weights._fill(layer, [("weight", weight), ("bias", bias)], torch.bfloat16, partition)
    wrong = [] if torch.equal(whole(layer.weight), weight.bfloat16()) else ["weight"]
    return wrong if torch.equal(whole(layer.bias), bias.bfloat16()) else [*wrong, "bias"]


class Toy(nn.Module):
    """The backbone and one weight of its own, which a loss of hidden states needs."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.score = nn.Linear(128, 4, bias=False)
        nn.init.constant_(self.score.weight, 0.02)
        self.score.weight.data[::2] *= -1
        self.score.to(next(backbone.parameters()).dtype)

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        model = self.backbone.get_base_model().language_model
        positions_3BL = torch.arange(ids_BL.shape[1]).expand(3, *ids_BL.shape)
        hidden_BLD = model(inputs_embeds=model.embed_tokens(ids_BL), position_ids=positions_3BL).last_hidden_state
        return self.score(hidden_BLD[:, -1]).float()


def train(name: str, config: dict[str, Any], *, dora: bool) -> list[float]:
    """This rank's losses of three steps from the checkpoint."""
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS, use_dora=dora)
    with partitioned(config) as partition:
        backbone = load_backbone(name, dtype=dtype, partition=partition)
        torch.manual_seed(3)
        model = Toy(get_peft_model(backbone, lora, autocast_adapter_dtype=False)).train()
    keep_shared(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + distributed.rank())
        ids_BL = torch.randint(0, 256, (2, 12), generator=generator)
        loss = nn.functional.cross_entropy(engine(ids_BL), ids_BL[:, 0] % 4)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


def own_pages(name: str, *, shared: bool) -> dict[str, int]:
    """Bytes of the mapped files' pages that an engine of ZeRO-2 made this rank's own, and of the frozen weights."""
    backbone = load_backbone(name, dtype=torch.bfloat16)
    lora = LoraConfig(r=4, target_modules=TARGETS)
    model = Toy(get_peft_model(backbone, lora, autocast_adapter_dtype=False))
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    if shared:
        keep_shared(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero(2, bf16=True))
    engine(torch.zeros(2, 4, dtype=torch.long))
    maps = psutil.Process().memory_maps(grouped=False)
    engine.destroy()
    return {"own": sum(part.anonymous for part in maps if part.path.startswith(name)), "frozen": frozen}


def main() -> None:
    name, out = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    distributed.start(120)
    results: dict[str, Any] = {"uneven": check_uneven_sizes()}
    results["shared"] = own_pages(name, shared=True)  # first: an engine's pages live until its cycles are collected
    results["sent"] = own_pages(name, shared=False)
    for model in (name, "tiny"):
        reference = load_backbone(model, dtype=torch.float32)
        for bf16 in (False, True):
            case = f"{'tiny' if model == 'tiny' else 'folder'}-{'bf16' if bf16 else 'fp32'}"
            part = load_backbone(model, dtype=torch.bfloat16) if bf16 else reference
            results[case] = check_partitions(model, part, bf16=bf16)
    for dora in (False, True):
        kind = "dora" if dora else "lora"
        results[f"{kind}-zero2"] = train(name, zero(2), dora=dora)
        results[f"{kind}-zero3"] = train(name, zero(3), dora=dora)
    results["lora-zero3-persistent"] = train(name, zero(3, threshold=10**5), dora=False)
    Path(out, f"rank{distributed.rank()}.json").write_text(json.dumps(results))
    distributed.stop()


if __name__ == "__main__":
    main()
