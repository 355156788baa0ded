"""Say what is done in video files.

python launch/predict.py CHECKPOINT VIDEO... [--head NAME] [--top 5] [--json]
"""

import argparse
import json
import sys
from pathlib import Path

from vidcls.command import heavy_imports, user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N folder")
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEO", help="video files")
    parser.add_argument("--head", help="which head's classes, where the checkpoint has several")
    parser.add_argument("--top", type=int, default=5, help="classes listed per video (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--model", help="the base model's folder, if it has moved since training")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the base model's own tokenizer code")
    arguments = parser.parse_args()
    with user_errors():
        if arguments.top < 1:
            raise ValueError(f"--top: {arguments.top}; legal: >= 1")
        if missing := [str(video) for video in arguments.videos if not video.is_file()]:
            raise ValueError(f"VIDEO: not a file: {', '.join(missing)}")

        with heavy_imports():
            from vidcls.predict import Predictor

        predictor = Predictor.load(
            arguments.checkpoint,
            head=arguments.head,
            base=arguments.model,
            trust_remote_code=arguments.trust_remote_code,
        )
    failed = False
    for video in arguments.videos:
        try:
            ranked = predictor.predict(video)[: arguments.top]
        except ValueError as error:  # one bad file must not cost the others
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        if arguments.json:
            top = [{"class": name, "score": round(score, 6)} for name, score in ranked]
            print(json.dumps({"video": str(video), "top": top}, ensure_ascii=False))
        else:
            print(video)
            for name, score in ranked:
                print(f"  {score:6.1%}  {'#' * round(30 * score):30}  {name}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
