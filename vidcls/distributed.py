"""Who am I, whom do I wait for, and how do I leave: the process group and everything that outlives a rank.

Runs under the deepspeed launcher (any number of hosts), under mpirun (ranks found through mpi4py), or as one plain
process. What needs the process group comes after `start`.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from vidcls.ops import load_op

SHM_FOLDER = Path("/dev/shm")
SHM_PREFIX = "deepspeed_allreduce_buffer"
SHM_AGE = 60  # seconds; a younger one may belong to a rank that is about to map it
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class LaunchError(RuntimeError):
    """The processes were started in a way that cannot work; the message says what to change."""


def rank_from_environment() -> int:
    """This process's rank before the process group exists (0 when there is no launcher)."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def launcher_processes() -> list[psutil.Process]:
    """The deepspeed commands this process descends from on this host, nearest first."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if any(Path(w).name == "deepspeed" or w.startswith("deepspeed.launcher") for w in words[:5]):
                    found.append(process)
    return found


def check_hostfile() -> None:
    """DeepSpeed answers a wrong --hostfile path by training on this host alone, with exit code 0; refuse instead.

    Raises:
        LaunchError: the hostfile named on the launcher's command line is not a file.
    """
    for process in launcher_processes():
        words = process.cmdline()
        for i, word in enumerate(words):
            name = None
            if word in ("--hostfile", "-H") and i + 1 < len(words):
                name = words[i + 1]
            elif word.startswith("--hostfile="):
                name = word.partition("=")[2]
            if name is not None and not Path(process.cwd(), name).is_file():
                raise LaunchError(
                    f"--hostfile: {name!r} is not a file; DeepSpeed would train on this host alone. "
                    "An example is launch/hostfile.example"
                )


def start(timeout_seconds: int) -> None:
    """Join the process group; nothing happens when this process is in it already. All ranks must call it.

    Args:
        timeout_seconds: limit of every collective of the run, ZeRO's own groups included.
    """
    if torch.distributed.is_initialized():
        return
    import deepspeed
    import torch.distributed.distributed_c10d as c10d

    if "RANK" not in os.environ and not any(name in os.environ for name in MPI_VARIABLES):
        _become_single_process()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # DeepSpeed passes its timeout to the default group only; the groups ZeRO makes later take torch's default.
    c10d.default_pg_timeout = timeout
    c10d.default_pg_nccl_timeout = timeout
    if accelerator_name() == "cpu":
        _load_shared_memory_op()
    _unlink_dead_buffers()
    _watch_launcher()
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", "1"))))
    else:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # DeepSpeed's CPU backend maps a 69 MB buffer per rank in /dev/shm while it starts and leaves the file behind when
    # a rank is killed. Once every rank has mapped them (the barrier) the names are not needed any more.
    barrier()
    (SHM_FOLDER / _shm_name(rank())).unlink(missing_ok=True)


def stop() -> None:
    """Leave the process group; safe to call twice. All ranks should call it."""
    if torch.distributed.is_initialized():
        # Engines are cycles that hold process groups; collected only while the interpreter shuts down, one can take
        # the process with it ("terminate called without an active exception", exit code -6, after all work is done).
        gc.collect()
        torch.distributed.destroy_process_group()


def rank() -> int:
    return torch.distributed.get_rank()


def world_size() -> int:
    return torch.distributed.get_world_size()


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """The device this rank computes on. Needs no process group."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def accelerator_name() -> str:
    """What DeepSpeed computes on here, such as "cpu" or "cuda". Needs no process group."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name()


def seed_everything(seed: int) -> None:
    """Seed torch's generators, the accelerator's included (dropout; never the order of samples)."""
    from deepspeed.accelerator import get_accelerator

    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over ranks, in place. All ranks must call it with equal shapes."""
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def gather_objects(value: object) -> list:
    """Every rank's value, in rank order, on every rank. Only between trusted ranks of one run."""
    if world_size() == 1:
        return [value]
    gathered: list = [None] * world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
    """Run a block on every rank; if it raises anywhere, it raises everywhere, with the first rank's reason.

    Without this, one rank that fails alone (a full disk, a damaged file) leaves the others waiting in a collective.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    outcomes = gather_objects(None if failure is None else (isinstance(failure, ValueError), str(failure)))
    if failure is not None:
        raise failure
    for index, outcome in enumerate(outcomes):
        if outcome is not None:
            is_users, reason = outcome
            # A user's mistake stays one on every rank, so that it is answered without a traceback.
            raise (ValueError if is_users else RuntimeError)(f"{what} failed on rank {index}: {reason}")


def _become_single_process() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def _load_shared_memory_op() -> None:
    """Load what init_distributed would load on CPU, or tell it to do without where it cannot be compiled."""
    import deepspeed

    try:
        load_op("ShareMemCommBuilder")
    except Exception:  # whatever a compiler run raises; only single-host inference collectives use this op
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _shm_name(of_rank: int) -> str:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    return f"{SHM_PREFIX}_{os.getuid()}_{address}_{port}_{of_rank}"


def _unlink_dead_buffers() -> None:
    """Remove this user's DeepSpeed buffers that no process has mapped any more: their rank was killed as it started."""
    old = [p for p in SHM_FOLDER.glob(f"{SHM_PREFIX}_{os.getuid()}_*") if time.time() - p.stat().st_mtime > SHM_AGE]
    if not old:
        return
    mapped: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            mapped.update(Path(region.path).name for region in process.memory_maps() if SHM_PREFIX in region.path)
    for path in old:
        if path.name not in mapped:
            path.unlink(missing_ok=True)


def _watch_launcher() -> None:
    """End this rank when a launcher above it is gone: a killed launcher leaves its ranks training on as orphans."""
    watched = launcher_processes()
    if not watched:
        return

    def watch() -> None:
        while True:
            time.sleep(1.0)
            for process in watched:
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    print(
                        f"vidcls: rank {rank_from_environment()} leaves: its launcher (pid {process.pid}) is gone",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
