"""Run by tests/training/test_selfcheck.py on two ranks: short trainings under the self-check, sound and faulty ones.

    selfchecks.py SHARDS OUT STAGE CASE...

OUT/rank{r}.json holds by case the error that stopped it (or None) and the lines that the main rank logged. Exits with 1
if a case failed.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vidcls import distributed
from vidcls.config import config_from_values
from vidcls.data import loader
from vidcls.data.batch import Batch
from vidcls.model import classifier, pretrained
from vidcls.training import engine, loop, saving
from vidcls.training.objective import Objective
from vidcls.training.setup import setup
from vidcls.training.telemetry import RunLog

RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-3,
    "max_steps": 5,
    "save_steps": 3,
    "warmup_steps": 1,
    "plot_loss": False,
    "report_to": "none",
    "dataloader_num_workers": 0,
    "seed": 3,
}
SAVED = RECIPE["save_steps"]

Patch = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Case:
    """options: of the recipe. fault: patches a function for the whole case. tamper: is given engine and step, before
    the step."""

    options: dict[str, Any] = field(default_factory=dict)
    fault: Patch = contextlib.nullcontext
    tamper: Callable[[Any, int], None] = lambda engine, step: None


@contextlib.contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Inside, owner.name is `wrapper`, which gets the original first."""
    original = getattr(owner, name)
    with patch.object(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs)):
        yield


def head_left_out(original: Any, *args: Any) -> Any:
    return [group for group in original(*args) if not group["name"].startswith("head")]


def lora_frozen(original: Any, *args: Any, **kwargs: Any) -> Any:
    model = original(*args, **kwargs)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return model


def labels_rolled(original: Any, *args: Any) -> Batch:
    batch = original(*args)
    return replace(batch, labels_B=batch.labels_B.roll(1))


def classes_shifted(original: Any, *args: Any) -> Batch:
    batch = original(*args)
    return replace(batch, labels_B=(batch.labels_B + 1) % 4)


def token_detached(original: Any, self: Any, embeds_BLD: torch.Tensor, is_action_BL: torch.Tensor) -> torch.Tensor:
    return original(self, embeds_BLD, is_action_BL).detach()


def bias_changed(original: Any, folder: Path, model: Any, spec: Any, weights: Any, *rest: Any) -> None:
    changed = {**weights, "heads.default.layers.bias": weights["heads.default.layers.bias"] + 0.5}
    original(folder, model, spec, changed, *rest)


def alpha_changed(original: Any, folder: Path, model: Any, spec: Any, *rest: Any) -> None:
    original(folder, model, spec, *rest)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))


def loss_is_nan_on_rank_1(original: Any, self: Objective, logits_BC: torch.Tensor, batch: Batch) -> torch.Tensor:
    losses_B = original(self, logits_BC, batch)
    # 0, with a slope of inf * 0.
    return losses_B + (0 * logits_BC.sum()).sqrt() if distributed.rank() == 1 else losses_B


def loss_halved(original: Any, self: Objective, logits_BC: torch.Tensor, batch: Batch) -> torch.Tensor:
    return original(self, logits_BC, batch) / 2


def divided_by_accumulation(own: Any, step: int) -> None:
    if step == 0:
        backward = own.backward
        own.backward = lambda loss, **scale: backward(loss / own.gradient_accumulation_steps(), **scale)


def frozen_weight_changed(own: Any, step: int) -> None:
    if step == 4 and distributed.rank() == 1:
        parameters: dict[str, Any] = dict(own.module.named_parameters())
        parameter = next(p for name, p in parameters.items() if name.endswith("visual.blocks.1.mlp.up_proj.weight"))
        held = getattr(parameter, "ds_tensor", parameter).data.view(-1)
        first, last = held[0].clone(), held[7].clone()
        held[0], held[7] = last, first


def head_rate_zero(own: Any, step: int) -> None:
    for group in own.optimizer.param_groups:
        if group["name"].startswith("head"):
            group["lr_scale"] = 0.0


def labels_shifted_behind_the_check(original: Any, self: Any, logits_BC: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Only where the step itself asks for the losses."""
    if sys._getframe(2).f_code.co_name == "train_step":
        batch = replace(batch, labels_B=(batch.labels_B + 1) % 4)
    return original(self, logits_BC, batch)


SOUND = {
    "lora": Case(),
    "lora-unchecked": Case({"self_check": False}),
    "resumed": Case({"resume": "lora"}),
    "fp32": Case({"bf16": False, "max_grad_norm": 0.01}),
    "dora": Case({"use_dora": True, "gradient_checkpointing": True}),
    "rslora-everywhere": Case({"use_rslora": True, "vision_tuning": "lora", "merger_tuning": "lora"}),
    "full": Case({"finetuning_type": "full", "vision_tuning": "full", "merger_tuning": "full", "warmup_steps": 3}),
    "lora-vision-full": Case({"vision_tuning": "full", "loraplus_lr_ratio": 8}),
    "freeze": Case({"finetuning_type": "freeze"}),
    "attention-zeros": Case(
        {
            "action_decoder_type": "attention",
            "action_decoder_init": "zeros",
            "max_grad_norm": 0,
            "layerwise_lr_decay": 0.02,  # below the head next to nothing moves, which is not the head's fault
        }
    ),
    "mlp-zeros-ema": Case(
        {
            "action_decoder_type": "mlp",
            "action_decoder_init": "zeros",
            "ema_decay": 0.9,
            "gradient_accumulation_steps": 2,
        }
    ),
    "mixed-flipped-smoothed": Case(
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "horizontal_flip": 0.5, "label_smoothing": 0.1}
    ),
    "focal-balanced-answers": Case({"loss_type": "focal", "class_balance_beta": 0.9, "lm_loss_weight": 0.5}),
    "class-names": Case({"action_decoder_init": "class_names", "gradient_accumulation_steps": 3}),
    "two-heads": Case({"two": True, "action_decoder_init": "zeros", "max_steps": 12}),
}
FAULTS = {
    "head-left-out": Case(fault=lambda: wrapped(engine, "parameter_groups", head_left_out)),
    "lora-frozen": Case(fault=lambda: wrapped(pretrained, "tune", lora_frozen)),
    "labels-rolled": Case(fault=lambda: wrapped(loader, "collate", labels_rolled)),
    "classes-shifted": Case(fault=lambda: wrapped(loader, "collate", classes_shifted)),
    "labels-shifted-later": Case(fault=lambda: wrapped(Objective, "losses", labels_shifted_behind_the_check)),
    "divided-twice": Case({"gradient_accumulation_steps": 3}, tamper=divided_by_accumulation),
    "loss-halved": Case({"action_decoder_init": "zeros"}, fault=lambda: wrapped(Objective, "losses", loss_halved)),
    "token-detached": Case(fault=lambda: wrapped(classifier.ActionToken, "forward", token_detached)),
    "nan": Case(fault=lambda: wrapped(Objective, "losses", loss_is_nan_on_rank_1)),
    "nan-fp32": Case({"bf16": False}, fault=lambda: wrapped(Objective, "losses", loss_is_nan_on_rank_1)),
    "head-not-stepped": Case(tamper=head_rate_zero),
    "wrong-file": Case(fault=lambda: wrapped(saving, "save_model", bias_changed)),
    "wrong-scale": Case(fault=lambda: wrapped(saving, "save_model", alpha_changed)),
    "frozen-changed": Case(tamper=frozen_weight_changed),
}


def run_case(case: Case, name: str, shards: str, out: Path, stage: int, lines: list[str]) -> None:
    options = dict(case.options)
    values = {**RECIPE, "output_dir": str(out / name), "deepspeed": str(out / f"zero{stage}.json")}
    if options.pop("two", False):
        values["datasets"] = [
            {"name": "common", "dataset": shards, "weight": 5},
            {"name": "rare", "dataset": shards, "weight": 1},
        ]
    else:
        values["dataset"] = shards
    if resumed := options.pop("resume", None):
        values["resume_from_checkpoint"] = str(out / resumed / f"checkpoint-{SAVED}")
    engines: list[Any] = []

    def step(original: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        engines[:] = [own]
        case.tamper(own, kwargs["step"])
        return original(own, *args, **kwargs)

    def note(original: Any, self: Any, text: str) -> None:
        if text.startswith("self-check"):
            lines.append(text)

    try:
        with case.fault(), wrapped(loop, "train_step", step), wrapped(RunLog, "message", note):
            loop.train(setup(config_from_values({**values, **options})))
    finally:
        for own in engines:
            own.destroy()


def main() -> int:
    shards, folder, stage, *names = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    out = Path(folder)
    results: dict[str, dict[str, Any]] = {}
    distributed.start(120)
    for name in names:
        lines: list[str] = []
        results[name] = {"error": None, "lines": lines}
        try:
            run_case({**SOUND, **FAULTS}[name], name, shards, out, int(stage), lines)
        except Exception as error:
            results[name]["error"] = f"{type(error).__name__}: {error}"
        print(name, results[name], flush=True)
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(results))
    distributed.stop()
    return int(any(result["error"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
