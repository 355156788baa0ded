"""What a launch takes along from the host it is typed on: `.deepspeed_env`, exported variables, pdsh.

DeepSpeed reads `.deepspeed_env` in the home folder and then in the working directory, and only on several hosts. It
splits every line at its first `=`: an empty line or a comment ends the launch with a ValueError, and a comment that
has an `=` in it becomes `export # ...`, behind which the shell drops the rest: nothing trains, and the exit code is 0.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vidcls.doctor.findings import FAIL, WARN, Finding

EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # by their beginnings; NCCL on GPUs only
LEFT_BEHIND = re.compile(r"(OMP_NUM_THREADS|TORCH_EXTENSIONS_DIR|DS_ACCELERATOR|(GLOO|VIDCLS|HF|TORCH_NCCL)_\w+)")
"""Variables that change a run, and that DeepSpeed takes to other hosts only through `.deepspeed_env`."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def environment_files(directory: Path, environment: Mapping[str, str]) -> list[Path]:
    """Those that DeepSpeed would read, in its order: a later one wins."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    home = Path(environment.get("HOME") or Path.home())
    found = [folder / name for folder in (home, directory) if (folder / name).is_file()]
    return found[-1:] if len(found) == 2 and found[0].samefile(found[1]) else found


@dataclass(frozen=True)
class LineFault:
    """One line of a `.deepspeed_env` that does not do what its writer meant."""

    line: int
    level: str
    text: str
    fix: str


def read_environment(text: str) -> tuple[dict[str, str], list[LineFault]]:
    """The variables of a `.deepspeed_env`, and its faults."""
    variables: dict[str, str] = {}
    faults = []
    crash = "ends the launch with a ValueError"
    for number, line in enumerate(text.splitlines(), start=1):
        name, equals, value = line.partition("=")
        name, value = name.strip(), value.strip()
        if not line.strip():
            faults.append(LineFault(number, FAIL, f"an empty line {crash}", "delete it"))
        elif line.lstrip().startswith("#"):
            harm = "with = makes the launch train nothing and exit with 0" if equals else crash
            faults.append(LineFault(number, FAIL, f"a comment {harm}", "delete it: this file has no comments"))
        elif not equals:
            faults.append(LineFault(number, FAIL, f"{line.strip()!r}: a line without = {crash}", "write NAME=value"))
        elif not _NAME.fullmatch(name):
            fault = f"{name!r} is not the name of a variable: the shell stops or exports something else"
            faults.append(LineFault(number, FAIL, fault, "write NAME=value, without export and blanks"))
        else:
            variables[name] = value
            if re.search(r"[\"'`]|\$\(", value):
                fault = f"{name}: a shell on each host reads quotes and commands in {value!r}"
                faults.append(LineFault(number, WARN, fault, "write the bare value; blanks in it are kept"))
    return variables, faults


def exported(environment: Mapping[str, str], directory: Path) -> dict[str, str]:
    """What DeepSpeed exports on every host, `.deepspeed_env` included; values are expanded there by the shell."""
    taken = {name: value for name, value in environment.items() if name.startswith(EXPORTED)}
    before = environment.get("PYTHONPATH")
    taken["PYTHONPATH"] = f"{directory}:{before}" if before else str(directory)
    for path in environment_files(directory, environment):
        taken |= read_environment(path.read_text(encoding="utf-8", errors="replace"))[0]
    return taken


def check_environment(here: str, directory: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Findings about the environment files and about variables that would stay on this host.

    here: the name of the host a launch is typed on. directory: where it is typed.
    """
    taken: set[str] = set()
    for path in environment_files(directory, environment):
        variables, faults = read_environment(path.read_text(encoding="utf-8", errors="replace"))
        taken |= set(variables)
        for fault in faults:
            yield Finding(here, "launch", fault.level, f"{path}, line {fault.line}: {fault.text}", fault.fix)
    left = sorted(name for name in environment if LEFT_BEHIND.fullmatch(name) and name not in taken)
    if left:
        yield Finding(
            here,
            "launch",
            WARN,
            f"{', '.join(left)}: set here, but not taken along to the hosts",
            f"add a line {left[0]}={environment[left[0]]} to .deepspeed_env, or unset it",
        )


def check_launcher(here: str, path: str | None = None) -> Iterator[Finding]:
    """Findings about the commands that start ranks on other hosts. path: where they are looked for ($PATH)."""
    if shutil.which("pdsh", path=path) is None:
        has_mpi = shutil.which("ompi_info", path=path) is not None
        fix = "install pdsh (apt-get install pdsh)" + (", or launch with --launcher openmpi" if has_mpi else "")
        yield Finding(here, "launch", WARN if has_mpi else FAIL, "pdsh is missing; deepspeed starts ranks with it", fix)
    if path is None and (chosen := os.environ.get("PDSH_RCMD_TYPE")) not in (None, "ssh"):
        yield Finding(here, "launch", WARN, f"PDSH_RCMD_TYPE={chosen}: deepspeed overrides it with ssh", "unset it")
