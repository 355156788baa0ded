"""A contestant of throughput.py: the same training as it is usually put together from public parts.

    python benchmarks/usual_way.py RECIPE key=value ... --videos DIR --steps 5 --out FILE

Hugging Face's Trainer on Qwen2_5_VLForConditionalGeneration with PEFT's LoRA: the head reads the last of all hidden
states (output_hidden_states=True), logits over the whole vocabulary are computed beside it, layers are recomputed in
backward (gradient_checkpointing=True), and a dataset decodes each video with decord when it is asked for. Model, clips,
frames, frame size, prompt, LoRA layers, rank, dropout, micro-batch and loader workers are the recipe's; frames and
texts are prepared by vidcls's own functions, so that both train on the same. Precision is the Trainer's bf16, in which
PEFT keeps adapters in float32 and autocast rounds them. The frozen vision tower keeps no gradients here either.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Qwen2_5_VLForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from turns import Turns

from vidcls import distributed
from vidcls.config import load_config
from vidcls.data.batch import prepare_clip
from vidcls.model.patches import frames_to_patches
from vidcls.sharding.readers.folder import read_folder
from vidcls.training.setup import Run, setup

WARM_UP = 1  # steps that do not count


class Videos(Dataset[dict[str, Any]]):
    """Frames decoded, resized and cut into patches on the fly, as the processor of Qwen2-VL does it."""

    def __init__(self, run: Run, videos: Path, length: int) -> None:
        _, self.records = read_folder(videos)
        self.encoder = run.encoder
        self.prompt = next(iter(run.spec.prompts.values()))
        self.frames, self.length = run.config.data.video_maxlen, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        import decord

        record = self.records[number % len(self.records)]
        reader = decord.VideoReader(str(record.path), num_threads=1)
        chosen = np.linspace(0, len(reader) - 1, self.frames).round().astype(int)
        clip = prepare_clip(
            key=record.key,
            label=record.label,
            frames=reader.get_batch(chosen).asnumpy(),
            times=(chosen / reader.get_avg_fps()).tolist(),
            prompt=self.prompt,
            encoder=self.encoder,
            max_frames=self.frames,
        )
        pixels = frames_to_patches(
            torch.from_numpy(clip.frames).flatten(), (clip.grid,), self.encoder.geometry, torch.float32
        )
        return {"pixels": pixels, "grid": clip.grid, "ids": clip.text.input_ids, "label": clip.label}


def collate(rows: list[dict[str, Any]], video_id: int) -> dict[str, torch.Tensor]:
    length = max(len(row["ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row["ids"])] = torch.from_numpy(row["ids"])
        mask[number, : len(row["ids"])] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == video_id).int() * 2,
        "pixel_values_videos": torch.cat([row["pixels"] for row in rows]),
        "video_grid_thw": torch.tensor([row["grid"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


class Classifier(nn.Module):
    """The head on the last hidden state at <ACTION>."""

    def __init__(self, model: Any, classes: int, action_id: int) -> None:
        super().__init__()
        self.model: Any = model
        self.action_id = action_id
        self.head = nn.Linear(model.config.get_text_config().hidden_size, classes)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.gradient_checkpointing_enable(**options)
        self.model.enable_input_require_grads()

    def forward(self, labels: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        out = self.model(**inputs, output_hidden_states=True, use_cache=False)
        state = out.hidden_states[-1][inputs["input_ids"] == self.action_id]
        logits = self.head(state.to(self.head.weight.dtype))
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


class Clock(TrainerCallback):
    """A turn is a step and the fetching of the next batch."""

    def __init__(self) -> None:
        self.turns = Turns(distributed.synchronize)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= WARM_UP:
            self.turns.next()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.turns.next(last=True)


def build(run: Run) -> Classifier:
    spec = run.spec
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        spec.model_name_or_path, dtype=spec.dtype, attn_implementation="sdpa"
    )
    tuning = spec.tuning
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=int(tuning.alpha),
        lora_dropout=tuning.lora_dropout,
        target_modules=rf"model\.{tuning.lora_pattern}",
    )
    head = next(iter(run.heads.values()))
    return Classifier(get_peft_model(model, config), head.num_classes, run.encoder.action_token_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--videos", type=Path, required=True, help="DIR/<class>/<clip>")
    parser.add_argument("--steps", type=int, required=True, help="that count")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    args = parser.parse_args()
    run = setup(load_config(args.recipe, args.overrides))
    config, plan = run.config, run.plan
    arguments = TrainingArguments(
        output_dir=str(args.out.with_suffix(".trainer")),
        per_device_train_batch_size=plan.micro,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=args.steps + WARM_UP,
        learning_rate=config.optim.learning_rate,
        max_grad_norm=config.optim.max_grad_norm,
        bf16=config.optim.bf16,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=config.data.dataloader_num_workers,
        remove_unused_columns=False,
        use_cpu=distributed.accelerator_name() == "cpu",
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    clock, video_id = Clock(), run.encoder.video_token_id
    trainer = Trainer(
        model=build(run),
        args=arguments,
        train_dataset=Videos(run, args.videos, plan.global_ * (args.steps + WARM_UP)),
        data_collator=lambda rows: collate(rows, video_id),
        callbacks=[clock],
    )
    trainer.train()
    args.out.write_text(json.dumps({"seconds": clock.turns.seconds}), encoding="utf-8")


if __name__ == "__main__":
    main()
