"""The deepspeed command that is supervised: taken apart, and put together anew for every launch."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

DEFAULT_HOSTFILE = Path("/job/hostfile")  # DeepSpeed's own
# As deepspeed.launcher.runner has them, with its abbreviations; importing it costs seconds and could fail.
VALUE_OPTIONS = (
    ("-H", "--hostfile"),
    ("-i", "--include"),
    ("-e", "--exclude"),
    ("--num_nodes",),
    ("--num_gpus", "--num_accelerators"),
    ("--master_port",),
    ("--master_addr",),
    ("--node_rank",),
    ("--launcher",),
    ("--launcher_args",),
    ("--enable_each_rank_log",),
    ("--autotuning",),
    ("--bind_core_list",),
    ("--ssh_port",),
    ("--venv_script",),
    ("--log_level",),
)
FLAGS = (
    ("--module",),
    ("--no_python",),
    ("--no_local_rank",),
    ("--no_ssh",),
    ("--no_ssh_check",),
    ("--force_multi",),
    ("--save_pid",),
    ("--bind_cores_to_rank",),
    ("-q", "--quiet"),
)
NUMBERS = ("num_nodes", "num_gpus", "ssh_port")
REFUSED = {
    "no_ssh": "one supervise starts all hosts over ssh",
    "node_rank": "one supervise starts all hosts over ssh",
    "autotuning": "that is no training run",
    "module": "give the path of launch/train.py",
    "no_python": "give the path of launch/train.py",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"command: {message}")


@dataclass(frozen=True)
class Command:
    """options: what was given for the launcher, by DeepSpeed's name without dashes; True for a flag."""

    program: str
    options: Mapping[str, Any]
    script: str
    recipe: str
    overrides: tuple[str, ...]

    @property
    def hostfile(self) -> Path | None:
        """The hostfile DeepSpeed would read; None for this host alone."""
        named = self.options.get("hostfile")
        if named is not None:
            return Path(named)
        return DEFAULT_HOSTFILE if DEFAULT_HOSTFILE.is_file() else None

    def words(self, options: Mapping[str, Any], overrides: Mapping[str, Any], launch: str) -> list[str]:
        """The command for a launch of this name, some launcher options (None: left out) and recipe keys replaced."""
        launcher = []
        for name, value in {**self.options, **options}.items():
            if value is True:
                launcher.append(f"--{name}")
            elif value is not None:
                launcher.append(f"--{name}={value}")
        kept = [item for item in self.overrides if item.partition("=")[0] not in overrides]
        added = [f"{key}={'' if value is None else value}" for key, value in overrides.items()]
        return [self.program, *launcher, self.script, self.recipe, *kept, *added, f"--launch-name={launch}"]


def parse_command(words: Sequence[str]) -> Command:
    """Take `deepspeed [options] launch/train.py RECIPE [key=value ...]` apart.

    Raises:
        ValueError: it is not such a command, or one that cannot be supervised; names the word.
    """
    if not words or Path(words[0]).name != "deepspeed":
        raise ValueError(
            f"command: {' '.join(words)!r} must begin with deepspeed: "
            "supervise.py [options] -- deepspeed [options] launch/train.py RECIPE [key=value ...]"
        )
    program = shutil.which(words[0])
    if program is None:
        raise ValueError(f"command: {words[0]!r} is no program here; source launch/setup_env.sh puts it into PATH")
    parser = _Parser(add_help=False)
    for names in VALUE_OPTIONS:
        name = next(each for each in names if each.startswith("--")).lstrip("-")
        parser.add_argument(*names, dest=name, type=int if name in NUMBERS else str)
    for names in FLAGS:
        parser.add_argument(*names, action="store_const", const=True)
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    found = {name: value for name, value in vars(parser.parse_args(list(words[1:]))).items() if value is not None}
    script, arguments = found.pop("script"), found.pop("arguments")
    for name, reason in REFUSED.items():
        if name in found:
            raise ValueError(f"command: --{name} cannot be supervised: {reason}")
    for name in NUMBERS:
        if name in found and found[name] < 1:
            raise ValueError(f"command: --{name}={found[name]} must be at least 1")
    if not Path(script).is_file():
        raise ValueError(f"command: {script!r} is not a file; launch/train.py is what can be supervised")
    if not arguments:
        raise ValueError(f"command: no recipe behind {script}")
    command = Command(program, found, script, arguments[0], tuple(arguments[1:]))
    if command.hostfile is not None and ("include" in found or "exclude" in found):
        raise ValueError(
            "command: --include and --exclude cannot be supervised with a hostfile: hosts come and go; "
            "write the hosts and slots you want into the hostfile"
        )
    return command
