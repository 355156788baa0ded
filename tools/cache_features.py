"""Store what a frozen vision tower makes of a recipe's clips, so that training need not call it.

    python tools/cache_features.py RECIPE.yaml [key=value ...]        one process
    deepspeed [--num_gpus N | --hostfile FILE] tools/cache_features.py RECIPE.yaml [key=value ...]

The recipe's vision_cache names the folder; training with the same recipe then reads it. Takes the recipe's training
data sets and those it evaluates on. Killed anywhere, the same command goes on: parts that are whole are kept, missing
and damaged ones are made. A clip that cannot be read ends it, or is noted, as on_bad_sample says.
"""

import argparse

from vidcls.command import command_arguments, heavy_imports, user_errors
from vidcls.config import load_config
from vidcls.faults.guard import Limits, guarded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    arguments = parser.parse_args(command_arguments())

    with user_errors():  # before the heavy imports below: a typing mistake is answered at once
        config = load_config(arguments.recipe, arguments.overrides)

    with guarded(None, Limits.from_options(config.run)):
        with heavy_imports():
            from vidcls import distributed
            from vidcls.training.caching import cache_features, plan

        with distributed.leaving():
            with user_errors():
                distributed.check_hostfile()
                work = plan(config)
            cache_features(work)


if __name__ == "__main__":
    main()
