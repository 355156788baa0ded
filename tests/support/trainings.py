"""What launch/train.py does, for several recipes in one start: starting costs ten times what a tiny run does.

deepspeed --num_gpus N tests/support/trainings.py RECIPE.yaml...
"""

from vidcls.command import command_arguments, heavy_imports
from vidcls.config import load_config
from vidcls.faults.guard import Limits, guarded

with heavy_imports():
    from vidcls import distributed
    from vidcls.training.loop import train
    from vidcls.training.setup import setup

if __name__ == "__main__":
    with guarded(None, Limits()), distributed.leaving():
        for recipe in command_arguments():
            print(f"recipe {recipe}", flush=True)
            train(setup(load_config(recipe)))
