"""The deepspeed command is read as DeepSpeed reads it, and written anew with what a launch needs."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from vidcls.supervision.command import FLAGS, VALUE_OPTIONS, parse_command

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
TRAIN = "launch/train.py"


def test_every_option_of_deepspeed_is_known() -> None:
    """The source is read, not imported: an import takes seconds."""
    spec = find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "launcher" / "runner.py").read_text()
    body = source[source.index("def parse_args") : source.index("def fetch_hostfile")]
    calls = re.findall(r"add_argument\((.*?)(?=parser\.|\Z)", body, re.DOTALL)
    theirs = {}
    for call in calls:
        names = tuple(re.findall(r'"(--?\w+)"', call.split("default=")[0].split("type=")[0].split("help=")[0]))
        if names:
            theirs[names] = "store_true" in call
    ours = {**dict.fromkeys(VALUE_OPTIONS, False), **dict.fromkeys(FLAGS, True)}
    assert theirs == ours


@pytest.mark.parametrize(
    ("given", "options", "overrides", "expected"),
    [
        # nothing given: a port and a place to go on from
        (
            [],
            {"master_port": 1234},
            {"resume_from_checkpoint": "latest"},
            ["--master_port=1234", TRAIN, "r.yaml", "resume_from_checkpoint=latest"],
        ),
        # both replaced where they stand in the command; other options and keys stay
        (
            ["--num_gpus", "2", "--master_port", "29500", TRAIN, "r.yaml", "resume_from_checkpoint=old", "seed=3"],
            {"master_port": 1234},
            {"resume_from_checkpoint": "latest"},
            ["--num_gpus=2", "--master_port=1234", TRAIN, "r.yaml", "seed=3", "resume_from_checkpoint=latest"],
        ),
        # abbreviations as argparse lets DeepSpeed take them; None leaves out; a value that looks like an option
        (
            ["-H", "hosts", "--num_n", "2", "--launcher_args=--mca x y", "-q", TRAIN, "r.yaml"],
            {"hostfile": "/tmp/h", "num_nodes": None, "force_multi": True},
            {},
            ["--hostfile=/tmp/h", "--launcher_args=--mca x y", "--quiet", "--force_multi", TRAIN, "r.yaml"],
        ),
        # a key whose name begins like another's is another key; None empties a key
        (
            [TRAIN, "r.yaml", "train_batch_size_x=1", "train_batch_size=8"],
            {},
            {"train_batch_size": 16, "gradient_accumulation_steps": None},
            [TRAIN, "r.yaml", "train_batch_size_x=1", "train_batch_size=16", "gradient_accumulation_steps="],
        ),
    ],
)
def test_rewriting(given: list[str], options: dict, overrides: dict, expected: list[str]) -> None:
    command = parse_command([DEEPSPEED, *(given or [TRAIN, "r.yaml"])])
    words = command.words(options, overrides, "abc")
    assert words.pop() == "--launch-name=abc"
    assert words[0] == DEEPSPEED
    end = words.index(TRAIN)
    assert sorted(words[1:end]) == sorted(expected[: expected.index(TRAIN)])
    assert words[end:] == expected[expected.index(TRAIN) :]
    again = parse_command(words)
    assert sorted(again.words({}, {}, "abc")) == sorted([*words, "--launch-name=abc"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "must begin with deepspeed"),
        (["python", TRAIN, "r.yaml"], "must begin with deepspeed"),
        (["/nowhere/deepspeed", TRAIN, "r.yaml"], "is no program here"),
        ([DEEPSPEED], "required: script"),
        ([DEEPSPEED, "--hostfil"], "expected one argument"),
        ([DEEPSPEED, "--hosts", "h", TRAIN, "r.yaml"], "unrecognized arguments: --hosts"),
        ([DEEPSPEED, "--num_gpus", "two", TRAIN, "r.yaml"], "invalid int value: 'two'"),
        ([DEEPSPEED, "--num_gpus", "0", TRAIN, "r.yaml"], "--num_gpus=0 must be at least 1"),
        ([DEEPSPEED, "launch/tarin.py", "r.yaml"], "'launch/tarin.py' is not a file"),
        ([DEEPSPEED, TRAIN], "no recipe"),
        ([DEEPSPEED, "--no_ssh", "--node_rank=1", TRAIN, "r.yaml"], "--no_ssh cannot be supervised"),
        ([DEEPSPEED, "--autotuning=run", TRAIN, "r.yaml"], "--autotuning cannot be supervised"),
        ([DEEPSPEED, "--hostfile=h", "--include=a:0", TRAIN, "r.yaml"], "--include and --exclude"),
    ],
)
def test_what_cannot_be_supervised_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_command(words)
