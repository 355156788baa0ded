"""Training as the textbook has it: one process, plain PyTorch, nothing of vidcls.training.

It shares with vidcls what it does not prove: how clips are read and what the model computes. What it spells out by
itself: which clips make a step, which parameters decay, the learning rate, clipping, Adam, and master weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import get_scheduler

from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, Request
from vidcls.data.order import SampleOrder
from vidcls.model.classifier import ActionClassifier
from vidcls.model.heads import ActionDecoder
from vidcls.model.pretrained import ModelSpec, build_encoder, build_model
from vidcls.model.weights import load_config
from vidcls.options import DEFAULT_PROMPT

FIRST = 6


@dataclass(frozen=True)
class PlainResult:
    """One loss and gradient norm (before clipping) a step; weights and moments by parameter name, fp32. logits: of the
    first FIRST clips, in eval mode, afterwards."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # keys as in a checkpoint: "kind/name"
    initial: dict[str, torch.Tensor] = field(default_factory=dict)  # by name
    logits: list[torch.Tensor] = field(default_factory=list)


def train_plainly(recipe: dict[str, Any], spec: ModelSpec, *, forward_size: int) -> PlainResult:
    """Train the tiny model by `recipe` (keys as in a recipe file, all that are read must be there).

    Args:
        forward_size: clips per forward. In bf16 it should be that of the run compared with, because a gradient's
            rounding depends on it.
    """
    index = ShardIndex.open(recipe["dataset"])
    torch.manual_seed(0)
    encoder = build_encoder(spec)
    width = load_config(spec.model_name_or_path).text_config.hidden_size
    kind = recipe.get("action_decoder_type", "linear")
    head = ActionDecoder(width, len(index.labels), kind, seed=recipe["seed"])
    model = build_model(spec, encoder, {"default": head}, seed=recipe["seed"])
    model.train()
    source = ClipSource(index, recipe.get("prompt", DEFAULT_PROMPT))
    clips = ClipBatches([source], encoder, FrameChoice(spec.video_maxlen))
    order = SampleOrder(len(index), recipe["seed"])
    trained = {name: p for name, p in model.named_parameters() if _trains(name, recipe)}
    assert all(p.requires_grad == (name in trained) for name, p in model.named_parameters())
    # bf16 weights are too coarse to add small updates to: Adam works on fp32 copies, the model gets them rounded.
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in trained.items()}
    result = PlainResult(initial={name: master.detach().clone() for name, master in masters.items()})
    optimizer = _adam(masters, recipe)
    scheduler = get_scheduler(
        recipe["lr_scheduler_type"], optimizer, num_warmup_steps=recipe["warmup_steps"],
        num_training_steps=recipe["max_steps"],
    )  # fmt: skip
    size = recipe["train_batch_size"]
    for step in range(recipe["max_steps"]):
        samples = [order.at(position)[1] for position in range(step * size, (step + 1) * size)]
        optimizer.zero_grad()
        result.losses.append(_add_gradients(model, clips, samples, forward_size, trained, masters))
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), recipe["max_grad_norm"])
        result.grad_norms.append(norm.item())
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
    model.eval()
    with torch.inference_mode():
        result.logits.append(model(**clips[Request(tuple(range(FIRST)))].model_inputs()))
    for name, master in masters.items():
        result.tensors[f"weight/{name}"] = master.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            result.tensors[f"{moment}/{name}"] = optimizer.state[master][moment]
    return result


def _trains(name: str, recipe: dict[str, Any]) -> bool:
    """What trains, spelled out: head and <ACTION>, and of the language model adapters, all layers, or nothing."""
    if name.startswith(("heads.", "action_token.")):
        return True
    kind = recipe.get("finetuning_type", "lora")
    if kind == "full":
        return name.startswith(("backbone.language_model.layers.", "backbone.language_model.norm."))
    return kind == "lora" and ".lora_" in name


def _adam(masters: dict[str, torch.Tensor], recipe: dict[str, Any]) -> torch.optim.AdamW:
    groups = []
    for name, master in masters.items():
        rate, decay = recipe["learning_rate"], recipe["weight_decay"]
        if name == "action_token.weight":
            rate *= recipe["action_token_lr_scale"]
        if ".lora_B." in name:
            rate *= recipe.get("loraplus_lr_ratio", 1.0)
        if master.ndim == 1:  # biases, norms, DoRA's magnitudes, <ACTION>
            decay = 0.0
        groups.append({"params": [master], "lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)


def _add_gradients(
    model: ActionClassifier,
    clips: ClipBatches,
    samples: list[int],
    forward_size: int,
    trained: dict[str, torch.nn.Parameter],
    masters: dict[str, torch.Tensor],
) -> float:
    """Put the gradient of the mean loss over `samples` into the masters; returns that loss."""
    losses = []
    for name in masters:
        masters[name].grad = torch.zeros_like(masters[name])
    for first in range(0, len(samples), forward_size):
        batch = clips[Request(tuple(samples[first : first + forward_size]))]
        loss = F.cross_entropy(model(**batch.model_inputs()), batch.labels_B)
        share = len(batch) / len(samples)
        (loss * share).backward()
        losses.append(loss.item() * share)
        for name, parameter in trained.items():
            masters[name].grad += parameter.grad.float()
            parameter.grad = None
    return sum(losses)
