"""Keep a training run going: launch, watch, and launch again from the newest checkpoint until it has finished.

    python launch/supervise.py [options] -- deepspeed [--hostfile FILE | --num_gpus N] launch/train.py RECIPE [key=...]

Hosts that do not answer are left out and taken in again; the global batch stays. The exit code is the run's: 0 only
when it has finished. The attempts are recorded in output_dir/supervise.jsonl. See docs/reliability.md.
"""

import argparse
import sys

from vidcls.command import user_errors
from vidcls.supervision.policy import Limits
from vidcls.supervision.signals import StopRequests
from vidcls.supervision.supervise import Options, Supervisor


def seconds(text: str) -> float:
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 0")
    return value


def main() -> int:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--max-restarts", type=int, default=100, help="launches after the first (default: %(default)s)")
    add("--backoff", type=seconds, default=5, help="seconds before a restart; doubled until there is progress (5)")
    add("--max-backoff", type=seconds, default=300, help="at most so many (%(default)s)")
    add("--min-hosts", type=int, default=1, help="hosts below which the run waits (%(default)s)")
    add("--rejoin-every", type=seconds, default=60, help="seconds between looks at hosts left out (%(default)s)")
    add("--drain", type=seconds, default=45, help="seconds from a rank's failure to the launch's end (%(default)s)")
    add("--silence", type=seconds, help="end a launch that says nothing for so many seconds (off)")
    add("--stop-timeout", type=seconds, help="seconds to save when asked to stop (the recipe's stop_timeout)")
    given = parser.parse_args(words[:split])
    options = Options(
        Limits(given.max_restarts, given.backoff, given.max_backoff),
        given.drain,
        given.silence,
        given.stop_timeout,
        given.min_hosts,
        given.rejoin_every,
    )
    requests = StopRequests()
    with user_errors():
        supervisor = Supervisor.of(words[split + 1 :], options, requests)
    requests.listen()
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
