"""Serve a model over HTTP: POST a video file, get its classes as JSON; / is a page to drop one on.

    pip install -e '.[serve]'
    python launch/serve.py MODEL [--port 8000]            MODEL: a checkpoint-N folder, best/ or an export
    curl -F video=@clip.mp4 http://127.0.0.1:8000/predict

/health says that it works, /metrics is for Prometheus, /docs describes the interface. A file that cannot be used is
answered with a 4xx and the reason. There is no TLS and no login: put a proxy in front of it that has both.
"""

import argparse
from pathlib import Path

from vidcls.command import heavy_imports, user_errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="MODEL", help="a checkpoint-N folder, best/ or an export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--head", help="which head's classes, where the model has several")
    parser.add_argument("--max-mb", type=float, default=100, help="megabytes of an upload (default: 100)")
    parser.add_argument("--max-seconds", type=float, default=600, help="seconds of a video (default: 600)")
    parser.add_argument("--decode-seconds", type=float, default=30, help="seconds to decode it in (default: 30)")
    parser.add_argument("--max-waiting", type=int, default=64, help="uploads at once; others get 503 (default: 64)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: 2)")
    parser.add_argument("--batch-size", type=int, default=8, help="clips per forward (default: 8)")
    parser.add_argument("--batch-wait", type=float, default=0.01, help="seconds to wait for others (default: 0.01)")
    parser.add_argument("--model", help="the base model's folder, if it has moved since training")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the base model's own tokenizer code")
    arguments = parser.parse_args()
    with user_errors():
        with heavy_imports():
            from vidcls.serve.command import serve

        serve(arguments)


if __name__ == "__main__":
    main()
