"""What the commands in launch/ share: arguments as the launcher passes them, and errors as users read them."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import warnings
from collections.abc import Iterator

from vidcls.faults.exits import Exit
from vidcls.faults.processes import hosts_of_launch

SPIN_COUNT = "10000"
# torch, peft and transformers tell each other of names they will drop: on every rank, and no user can act on it.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\b")


def command_arguments() -> list[str]:
    """sys.argv without what the deepspeed launcher adds for each rank."""
    return [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import torch, transformers and DeepSpeed inside: of their millions of objects none is ever garbage.

    Looking for some costs a second of every start, and again later whenever Python collects its oldest generation,
    between the steps of a training.

    On a CPU torch's threads wait for each other awake, for libgomp's 300,000 looks: some 10 ms, in which whoever they
    wait for, or a loader's worker, may want the core. Fewer looks are as good where nothing else runs
    (docs/performance.md). libgomp reads this when torch loads it; settings of the user's own win.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Answer a user's mistake (ValueError, LaunchError) with its message alone, once, and exit code 2.

    The first rank of each host speaks: all ranks find the same mistake, but a host may lack a file that others have.
    VIDCLS_TRACEBACK=1 shows where it was found.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("VIDCLS_TRACEBACK") or not _is_users(error):
            raise
        if os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")) == "0":
            host = "" if hosts_of_launch() in (None, 1) else f"{socket.gethostname()}: "
            print(f"{host}error: {error}", file=sys.stderr, flush=True)
        sys.exit(Exit.USER_ERROR)


def _is_users(error: Exception) -> bool:
    return isinstance(error, ValueError) or type(error).__name__ == "LaunchError"
