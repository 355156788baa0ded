"""Evaluate a checkpoint on shards: each clip exactly once, on any number of ranks.

    deepspeed [--num_gpus N | --hostfile FILE] launch/evaluate.py CHECKPOINT --data SHARDS [--head NAME] [--out DIR]
    python launch/evaluate.py CHECKPOINT --data SHARDS        one process

Writes eval.json (top1 with a 95 % interval, top5, mean_class_accuracy, macro F1, loss, calibration), predictions.jsonl,
classes.csv and confusion.csv. Of several heads, the one that has the classes of the shards is evaluated. A clip that
cannot be read is left out, listed in missing.jsonl, and makes the exit code 74. The run's report.html shows it all.
"""

import argparse
import sys
from pathlib import Path

from vidcls.command import command_arguments, heavy_imports, user_errors
from vidcls.faults.exits import Exit
from vidcls.faults.guard import Limits, guarded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N folder")
    parser.add_argument("--data", required=True, help="folder of shards, or its http(s):// or s3:// URL")
    parser.add_argument("--head", help="which head, where several have the classes of the shards")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: CHECKPOINT/evaluation; with several heads, HEAD below it)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="clips per forward and rank (default: 8)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes per rank (default: 1)")
    parser.add_argument("--segments", type=int, default=1, help="choices of frames per clip, averaged (default: 1)")
    parser.add_argument("--crops", type=int, default=1, help="1: whole frames; 3: squares along them (default: 1)")
    control = parser.add_mutually_exclusive_group()
    controls = {
        "shuffled": ("--shuffle-frames", "in random order"),
        "single": ("--single-frame", "the middle one alone"),
    }
    for name, (flag, what) in controls.items():
        help_ = f"frames {what}: how far does the model use time?"
        control.add_argument(flag, dest="control", action="store_const", const=name, default="none", help=help_)
    parser.add_argument("--model", help="the base model's folder, if it has moved since training")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the base model's own tokenizer code")
    parser.add_argument(
        "--timeout", type=int, default=600, help="seconds until a stuck collective fails (default: 600)"
    )
    arguments = parser.parse_args(command_arguments())

    limits = Limits(step=arguments.timeout + 60)
    with guarded(arguments.out, limits):
        with heavy_imports():
            from vidcls import distributed
            from vidcls.data.frames import Views
            from vidcls.evaluation.command import evaluate_checkpoint
            from vidcls.report.write import add_evaluation

        with distributed.leaving(), user_errors():
            distributed.check_hostfile()
            if arguments.batch_size < 1 or arguments.workers < 0:
                raise ValueError(
                    f"--batch-size {arguments.batch_size} --workers {arguments.workers}: legal: >= 1, >= 0"
                )
            distributed.start(arguments.timeout)
            found, out = evaluate_checkpoint(
                arguments.checkpoint,
                arguments.data,
                arguments.out,
                head=arguments.head,
                micro=arguments.batch_size,
                workers=arguments.workers,
                base=arguments.model,
                trust_remote_code=arguments.trust_remote_code,
                views=Views(arguments.segments, arguments.crops, arguments.control),
            )
            if distributed.is_main():
                add_evaluation(arguments.checkpoint, out)
    if found.missing:
        sys.exit(Exit.DATA)


if __name__ == "__main__":
    main()
