"""Say what is done in video files.

    python launch/predict.py MODEL VIDEO...                         MODEL: a checkpoint-N folder, best/ or an export
    python launch/predict.py MODEL --folder DIR | --csv LIST [--csv-out FILE]
    python launch/predict.py MODEL VIDEO... --window 4 --stride 2 --timeline DIR        long videos: what is done when

Exit codes: 0 done, 1 some videos cannot be read (each is named, the others are answered), 2 wrong options.
"""

import argparse
import sys
from pathlib import Path

from vidcls.command import heavy_imports, user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="MODEL", help="a checkpoint-N folder, best/ or an export")
    parser.add_argument("videos", type=Path, nargs="*", metavar="VIDEO", help="video files")
    parser.add_argument("--folder", type=Path, help="every video file below this folder")
    parser.add_argument("--csv", type=Path, help="a list: the column `video`, or the first; relative to its folder")
    parser.add_argument("--head", help="which head's classes, where the model has several")
    parser.add_argument("--top", type=int, default=5, help="classes listed per video (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--csv-out", type=Path, help="write a row for each of the listed classes too")
    parser.add_argument("--window", type=float, help="classify windows of so many seconds")
    parser.add_argument("--stride", type=float, help="seconds from one window to the next (default: half a window)")
    parser.add_argument("--timeline", type=Path, help="with --window: write a JSON file and a picture per video here")
    parser.add_argument("--batch-size", type=int, default=8, help="clips per forward (default: 8)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: 2; 0: in this one)")
    parser.add_argument("--model", help="the base model's folder, if it has moved since training")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the base model's own tokenizer code")
    arguments = parser.parse_args()
    with user_errors():
        with heavy_imports():
            from vidcls.predict.command import predict_videos

        sys.exit(predict_videos(arguments))


if __name__ == "__main__":
    main()
