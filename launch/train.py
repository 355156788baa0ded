"""Train a video action classifier.

    deepspeed [--num_gpus N | --hostfile FILE] launch/train.py RECIPE.yaml [key=value ...]
    python launch/train.py RECIPE.yaml [key=value ...]        one process

RECIPE.yaml holds `key: value` lines; key=value arguments win over it. Shipped recipes are in launch/recipes/.
"""

import argparse

from vidcls.command import command_arguments, user_errors
from vidcls.config import check_output_dir, describe_options, load_config


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=describe_options(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    arguments = parser.parse_args(command_arguments())

    with user_errors():  # before the heavy imports below: a typing mistake is answered at once
        config = load_config(arguments.recipe, arguments.overrides)
        check_output_dir(config.run)

    from vidcls import distributed
    from vidcls.training.loop import train
    from vidcls.training.setup import setup

    try:
        with user_errors():
            distributed.check_hostfile()
            run = setup(config)
        train(run)
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
