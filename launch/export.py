"""Export a checkpoint: one folder of safetensors and JSON that loads with vidcls, or with transformers and peft alone.

    python launch/export.py CHECKPOINT --out DIR [--merge] [--dtype bf16|fp32] [--base-name NAME] [--push-to-hub REPO]

DIR has the adapter (--merge: whole weights), the <ACTION> embedding, heads, tokenizer, label maps, preprocessing
settings and a model card, README.md, with scores and the code to use it.
"""

import argparse
from pathlib import Path

from vidcls.command import heavy_imports, user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N folder, or best/")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--merge", action="store_true", help="whole weights: no base model and no peft needed")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the stored weights (default: as trained)")
    parser.add_argument("--base-name", help="what adapter and card call the base model (default: its folder)")
    parser.add_argument("--push-to-hub", metavar="REPO", help="then upload it, as USER/NAME; look at the card before")
    parser.add_argument("--public", action="store_true", help="a repository that --push-to-hub makes is not private")
    parser.add_argument("--model", help="the base model's folder, if it has moved since training")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the base model's own tokenizer code")
    arguments = parser.parse_args()
    with user_errors():
        with heavy_imports():
            from vidcls.export.folder import export_checkpoint
            from vidcls.export.hub import push

        done = export_checkpoint(
            arguments.checkpoint,
            arguments.out,
            merge=arguments.merge,
            dtype=arguments.dtype,
            base=arguments.model,
            base_name=arguments.base_name,
            trust_remote_code=arguments.trust_remote_code,
        )
    classes = ", ".join(f"{head.name}: {len(head.labels)} classes" for head in done.heads)
    print(f"{done.folder}: {done.bytes / 1e6:.1f} MB; {classes}; how to use it is in {done.folder / 'README.md'}")
    if arguments.push_to_hub:
        with user_errors():
            print(f"published: {push(done.folder, arguments.push_to_hub, private=not arguments.public)}")


if __name__ == "__main__":
    main()
