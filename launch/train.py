"""Train a video action classifier.

    deepspeed [--num_gpus N | --hostfile FILE] launch/train.py RECIPE.yaml [key=value ...]
    python launch/train.py RECIPE.yaml [key=value ...]        one process

RECIPE.yaml holds `key: value` lines; key=value arguments win over it. Shipped recipes are in launch/recipes/.
"""

import argparse
import sys
from pathlib import Path

from vidcls.command import command_arguments, heavy_imports, user_errors
from vidcls.config import check_output_dir, describe_options, load_config
from vidcls.faults.exits import Exit
from vidcls.faults.guard import Limits, guarded


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=describe_options(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    parser.add_argument("--launch-name", default="", help=argparse.SUPPRESS)  # by launch/supervise.py
    arguments = parser.parse_args(command_arguments())

    with user_errors():  # before the heavy imports below: a typing mistake is answered at once
        config = load_config(arguments.recipe, arguments.overrides)
        check_output_dir(config.run)

    with guarded(Path(config.run.output_dir), Limits.from_options(config.run), arguments.launch_name):
        with heavy_imports():
            from vidcls import distributed
            from vidcls.training.loop import train
            from vidcls.training.setup import setup

        with distributed.leaving():
            with user_errors():
                distributed.check_hostfile()
                run = setup(config)
            outcome = train(run)
    if not outcome.finished:
        sys.exit(Exit.STOPPED)


if __name__ == "__main__":
    main()
