"""What learning to say the action adds to the memory of training, with the real vocabulary of 151,936 rows.

    python benchmarks/answer_memory.py [--layers 4] [--clips 8] [--keep DIR]

Writes a random model with the 3B's vocabulary and width (2048) and fewer layers, whose share of the vocabulary is
larger than in the whole model, and synthetic clips; trains two steps through the deepspeed launcher (one rank, ZeRO-2,
bf16, LoRA of rank 16) with lm_loss_weight 0, with 0 and prompts that are longer by an answer, and with 0.1: answers
make sequences longer, and what is left is the loss's own.

Memory is the rank's peak RssAnon, sampled two hundred times a second, plus the size of the model's file: on the CPU the
weights are mapped from it, and with lm_loss_weight 0 most of the vocabulary is never read, whereas a GPU holds all of
it in all cases. Beside it stands what float32 logits over the vocabulary for every position would take, of which
training needs at least two (the logits and their gradient).

Exit codes: 0 done, 1 a run failed or the rise is above --limit, 2 wrong options.
"""

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
import yaml
from processes import ROOT, kilobytes, launched, ranks_below, tool
from rounds import RESULTS, conditions
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, Request
from vidcls.model.pretrained import build_encoder, read_spec
from vidcls.model.shapes import PUBLISHED_SHAPES
from vidcls.model.tiny import tiny_config, tiny_tokenizer
from vidcls.options import ACTION_TOKEN, DEFAULT_PROMPT

SHAPE = PUBLISHED_SHAPES["3b"]
VOCABULARY, WIDTH = SHAPE["vocab_size"], SHAPE["hidden_size"]
FRAMES, SIZE, STEPS = 16, 112, 2
SAMPLE_SECONDS = 0.005
# The built-in tokenizer has a token a byte: an answer such as "right", its end and the turn before it are at most 19,
# 9 % of the text and the video together. With the real one Something-Something's are 14 of about 175.
ANSWER_TOKENS = 19
LONGER = DEFAULT_PROMPT.replace(ACTION_TOKEN, "x" * ANSWER_TOKENS + ACTION_TOKEN)
CASES = {"without": (0.0, DEFAULT_PROMPT), "longer": (0.0, LONGER), "with": (0.1, DEFAULT_PROMPT)}


@dataclass
class Case:
    """One training. anonymous: peak bytes that no file backs. resident: VmHWM, mapped pages that were read included."""

    name: str
    anonymous: int = 0
    resident: int = 0
    exit_code: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Tokens:
    """Of one batch."""

    positions: int
    answers: int


def make_inputs(work: Path, layers: int, clips: int) -> None:
    """The model and the shards, each only if `work` does not hold it yet."""
    if not (work / "model").exists():
        text = {
            **SHAPE,
            "num_hidden_layers": layers,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "initializer_range": 0.02,
        }
        values = tiny_config().to_dict()
        values["text_config"] = {**values["text_config"], **text, "layer_types": None}
        values["vision_config"] = {**values["vision_config"], "out_hidden_size": WIDTH}
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**values)).bfloat16()
        unfinished = work / "model.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tiny_tokenizer().save_pretrained(unfinished)
        unfinished.replace(work / "model")
    if not (work / "shards").exists():
        videos = work / "videos"
        shutil.rmtree(videos, ignore_errors=True)
        tool("make_motion_clips.py", "--out", videos, "--per-class", -(-clips // 4), "--size", SIZE)
        settings = ("--frames", FRAMES, "--short-side", SIZE, "--workers", 0)
        tool("make_shards.py", "folder", "--videos", videos, "--out", work / "shards", *settings)


def train(work: Path, name: str, clips: int) -> Case:
    """Train and watch the rank's memory until it ends; its output is in train.log."""
    weight, prompt = CASES[name]
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "model_name_or_path": str(work / "model"),
        "dataset": str(work / "shards"),
        "lora_rank": 16,
        "video_max_pixels": SIZE * SIZE,
        "dataloader_num_workers": 0,
        "per_device_train_batch_size": clips,
        "gradient_accumulation_steps": 1,
        "prompt": prompt,
        "lm_loss_weight": weight,
        "max_steps": STEPS,
        "prepack_weights": False,
        "logging_steps": 1,
        "save_only_model": True,
        "self_check": False,
        "plot_loss": False,
        "report_to": "none",
        "deepspeed": "ds_configs/zero2.json",
        "output_dir": str(output),
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    case = Case(name)
    rank: psutil.Process | None = None
    with launched(1, [work / "recipe.yaml"], work / "train.log") as launcher:
        while launcher.poll() is None:
            rank = rank or next(iter(ranks_below(launcher)), None)
            if rank is not None:
                with contextlib.suppress(psutil.Error, OSError):  # it comes and goes
                    status = kilobytes(Path(f"/proc/{rank.pid}/status"))
                    case.anonymous = max(case.anonymous, status.get("RssAnon", 0))
                    case.resident = max(case.resident, status.get("VmHWM", 0))
            time.sleep(SAMPLE_SECONDS if rank is not None else 0.2)
    rows = output / "train_log.jsonl"
    if rows.exists():
        case.losses = [json.loads(line)["loss"] for line in rows.read_text().splitlines()]
    case.exit_code = launcher.returncode
    return case


def count_tokens(work: Path, clips: int) -> Tokens:
    """Of the first clips, as the last training read them."""
    spec = read_spec(work / "run" / f"checkpoint-{STEPS}")
    index, encoder = ShardIndex.open(work / "shards"), build_encoder(spec)
    with_, longer = (
        ClipBatches([ClipSource(index, prompt)], encoder, FrameChoice(FRAMES), answers=answers).read(
            Request(tuple(range(clips)))
        )
        for prompt, answers in ((DEFAULT_PROMPT, True), (LONGER, False))
    )
    assert with_.input_ids_BL.shape == longer.input_ids_BL.shape, "the case of longer text must be as long as answers"
    assert with_.answer_labels_BL is not None
    return Tokens(with_.input_ids_BL.numel(), int((with_.answer_labels_BL != -100).sum()))


def table(cases: list[Case], tokens: Tokens, model_bytes: int) -> str:
    """The result as a Markdown table."""
    naive = tokens.positions * VOCABULARY * 4
    base, longer, top = (case.anonymous + model_bytes for case in cases)
    resident = ", ".join(f"{case.resident / 1e9:.3f}" for case in cases)
    rows = {
        "peak, lm_loss_weight 0": f"{base / 1e9:.3f} GB, of it {model_bytes / 1e9:.3f} GB weights",
        "peak, the same with as much longer prompts": f"{longer / 1e9:.3f} GB, +{longer / base - 1:.1%}",
        "peak, lm_loss_weight 0.1": f"{top / 1e9:.3f} GB, +{top / base - 1:.1%}",
        "positions in a batch; of them predict an answer": f"{tokens.positions}; {tokens.answers}",
        "float32 logits of all positions, once": f"{naive / 1e9:.2f} GB, +{naive / base:.0%}",
        "resident sets (VmHWM), in this order": f"{resident} GB",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of the language model; the 3B has 36 (default: 4)")
    parser.add_argument("--clips", type=int, default=8, help="per step (default: 8)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR/answer_memory and leave its model")
    parser.add_argument("--limit", type=float, default=0.10, help="fail above this rise (default: 0.10)")
    args = parser.parse_args()
    if args.layers < 1 or args.clips < 1:
        parser.error(f"--layers {args.layers} --clips {args.clips}: legal: >= 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the rank ends and files go
    work = (args.keep.resolve() if args.keep else ROOT / "runs") / "answer_memory"
    work.mkdir(parents=True, exist_ok=True)
    cases = []
    try:
        make_inputs(work, args.layers, args.clips)
        for name in CASES:
            cases.append(train(work, name, args.clips))
            if cases[-1].exit_code or len(cases[-1].losses) != STEPS:
                print((work / "train.log").read_text()[-4000:], file=sys.stderr)
                print(f"error: case {name}: exit code {cases[-1].exit_code}", file=sys.stderr)
                return 1
        model_bytes = sum(path.stat().st_size for path in (work / "model").glob("*.safetensors"))
        tokens = count_tokens(work, args.clips)
    except subprocess.CalledProcessError:  # the tool has said why
        return 1
    finally:
        if not args.keep:
            shutil.rmtree(work)
    text = table(cases, tokens, model_bytes)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "answer_memory.md").write_text(text + "\n", encoding="utf-8")
    content = {"conditions": conditions(), "layers": args.layers, "clips": args.clips, "model_bytes": model_bytes}
    content |= {"tokens": asdict(tokens), "cases": [asdict(case) for case in cases]}
    (RESULTS / "answer_memory.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    rise = (cases[-1].anonymous - cases[0].anonymous) / (cases[0].anonymous + model_bytes)
    if rise > args.limit:
        print(f"error: the peak rises by {rise:.1%}, above --limit {args.limit:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
