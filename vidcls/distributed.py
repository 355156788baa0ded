"""Who am I, whom do I wait for, and how do I leave: the process group and everything that outlives a rank.

Runs under the deepspeed launcher (any number of hosts), under mpirun (ranks found through mpi4py), or as one plain
process. What needs the process group comes after `start`.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import hashlib
import importlib.metadata
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from vidcls.faults import guard
from vidcls.faults.causes import RankFailedError, RendezvousError
from vidcls.faults.processes import folder_of, hosts_of_launch, launchers, words_of
from vidcls.manifest import StorageError
from vidcls.ops import load_op

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
SHM_FOLDER = Path("/dev/shm")
SHM_PREFIX = "deepspeed_allreduce_buffer"
SHM_AGE = 60  # seconds; a younger one may belong to a rank that is about to map it
VERSIONED = ("torch", "deepspeed", "transformers", "peft", "safetensors", "numpy", "vidcls")
# Kinds of failure that stay what they are on every rank, because the command answers each in its own way.
CARRIED = (StorageError, ValueError)
_file_group: torch.distributed.ProcessGroup | None = None  # with the longer limit of `all_or_none`
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class LaunchError(RuntimeError):
    """The processes were started in a way that cannot work; the message says what to change."""


def check_hostfile() -> None:
    """DeepSpeed answers a wrong --hostfile path by training on this host alone, with exit code 0; refuse instead.

    Raises:
        LaunchError: the hostfile named on the launcher's command line is not a file.
    """
    for pid in launchers() or []:
        words = words_of(pid)
        for i, word in enumerate(words):
            name = None
            if word in ("--hostfile", "-H") and i + 1 < len(words):
                name = words[i + 1]
            elif word.startswith("--hostfile="):
                name = word.partition("=")[2]
            if name is not None and not Path(folder_of(pid), name).is_file():
                raise LaunchError(
                    f"--hostfile: {name!r} is not a file; DeepSpeed would train on this host alone. "
                    "An example is launch/hostfile.example"
                )


@contextlib.contextmanager
def joining(timeout_seconds: int, file_timeout_seconds: int) -> Iterator[None]:
    """Join the process group after a block of checks. What a check raises on some hosts only is raised on all ranks.

    On one host all ranks find the same mistake, and it is raised at once.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if not _on_several_hosts():
            raise
        failure = error
    try:
        start(timeout_seconds, file_timeout_seconds)
    except RendezvousError:
        if failure is not None:
            raise failure from None
        raise
    with all_or_none("checking recipe, data and model"):
        if failure is not None:
            raise failure


def start(timeout_seconds: int, file_timeout_seconds: int | None = None) -> None:
    """Join the process group; nothing happens when this process is in it already. All ranks must call it.

    Args:
        timeout_seconds: limit of every collective of the run, ZeRO's own groups included.
        file_timeout_seconds: limit of `all_or_none`, where ranks wait for what others read or write; by default the
            same.
    """
    global _file_group
    if torch.distributed.is_initialized():
        return
    import deepspeed
    import torch.distributed.distributed_c10d as c10d

    if not _is_launched():
        _become_single_process()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # DeepSpeed passes its timeout to the default group only; the groups ZeRO makes later take torch's default.
    c10d.default_pg_timeout = timeout
    c10d.default_pg_nccl_timeout = timeout
    if accelerator_name() == "cpu":
        _load_shared_memory_op()
    _unlink_dead_buffers()
    guard.phase("rendezvous")
    _rendezvous(timeout)
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", "1"))))
        _keep_freed_memory()
    else:
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # DeepSpeed's CPU backend maps a 69 MB buffer per rank in /dev/shm while it starts and leaves the file behind when
    # a rank is killed. Once every rank has mapped them (the barrier) the names are not needed any more.
    barrier()
    (SHM_FOLDER / _shm_name(rank())).unlink(missing_ok=True)
    file_timeout = datetime.timedelta(seconds=max(timeout_seconds, file_timeout_seconds or 0))
    # Of the default group's backend: gloo beside NCCL would ask more of the hosts' names and networks.
    _file_group = torch.distributed.new_group(timeout=file_timeout) if world_size() > 1 else None
    guard.joined(rank(), world_size(), gather_objects(uuid.uuid4().hex[:12])[0])
    _check_equal_versions()
    guard.phase("start")


def stop() -> None:
    """Leave the process group; safe to call twice. All ranks should call it."""
    global _file_group
    if torch.distributed.is_initialized():
        # Engines are cycles that hold process groups; collected only while the interpreter shuts down, one can take
        # the process with it ("terminate called without an active exception", exit code -6, after all work is done).
        gc.collect()
        _file_group = None
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Leave the process group at the end of a block. After an error nobody waits for the others, who may be gone."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        stop()
        raise
    stop()


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


def synchronize() -> None:
    """Wait until the device has done all it was given. Needs no process group."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()


def seed_everything(seed: int) -> None:
    """Seed torch's generators, the accelerator's included (dropout; never the order of samples)."""
    # Not torch.manual_seed, which looks for every kind of accelerator: half a millisecond.
    torch.default_generator.manual_seed(seed)
    if device().type != "cpu":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().manual_seed_all(seed)


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over ranks, in place. All ranks must call it with equal shapes."""
    if world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def gather_objects(value: object, group: torch.distributed.ProcessGroup | None = None) -> list:
    """Every rank's value, in rank order, on every rank. Only between trusted ranks of one run."""
    if world_size() == 1:
        return [value]
    gathered: list = [None] * world_size()
    torch.distributed.all_gather_object(gathered, value, group=group)
    return gathered


@contextlib.contextmanager
def all_or_none(what: str, group: torch.distributed.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block on every rank; if it raises anywhere, it raises everywhere, with the first rank's reason.

    Without this, one rank that fails alone (a full disk, a damaged file) leaves the others waiting in a collective.
    group: to meet over, for a thread that has one of its own.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    kind = next((cls for cls in CARRIED if isinstance(failure, cls)), RankFailedError)
    outcomes = gather_objects(None if failure is None else (kind, str(failure)), group or _file_group)
    if failure is not None:
        raise failure
    for index, outcome in enumerate(outcomes):
        if outcome is not None:
            kind, reason = outcome
            raise kind(f"{what} failed on rank {index}: {reason}")


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of giving it back to the system, as allocators of GPUs do.

    Every step asks for the same activations and buckets again, and the page faults of fresh memory take longer than
    many an operation on it. Other C libraries are left alone, and so are settings from the environment.
    """
    if sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)  # the largest M_MMAP_THRESHOLD is 32 MB, and ZeRO's buckets are larger


def _on_several_hosts() -> bool:
    """Before the process group exists. Where another launcher than DeepSpeed's started this rank, there may be."""
    return _is_launched() and hosts_of_launch() != 1


def _is_launched() -> bool:
    return any(name in os.environ for name in ("RANK", *MPI_VARIABLES))


def _rendezvous(timeout: datetime.timedelta) -> None:
    """Meet the other ranks.

    Raises:
        RendezvousError: they, or the place to meet at, cannot be reached.
    """
    import deepspeed

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    where = f"MASTER_ADDR {address}, MASTER_PORT {port}"
    if address is not None:
        try:
            socket.getaddrinfo(address, port)
        except OSError as error:
            raise RendezvousError(
                f"{where}: {socket.gethostname()} cannot resolve the address ({error.strerror}); give one that all "
                "hosts know: deepspeed --master_addr"
            ) from None
    try:
        deepspeed.init_distributed(timeout=timeout, verbose=False)
    except (RuntimeError, OSError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "the other ranks did not come, or a firewall is between the hosts"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            hint = "another process has taken the port; give a free one: deepspeed --master_port"
        raise RendezvousError(f"{where}: the ranks could not meet: {hint} ({text})") from error


def _check_equal_versions() -> None:
    """Ranks that compute with other versions give other numbers, or none. All ranks must call it.

    Raises:
        LaunchError: on every rank; names hosts, packages and versions.
    """
    mine = {name: importlib.metadata.version(name) for name in VERSIONED}
    mine |= {"python": platform.python_version(), "vidcls's sources": _sources_digest()}
    found = gather_objects((socket.gethostname(), mine))
    differing = [
        f"{name} is {versions[name]} on {host} (rank {index}) and {found[0][1][name]} on {found[0][0]} (rank 0)"
        for index, (host, versions) in enumerate(found)
        for name in mine
        if versions[name] != found[0][1][name]
    ]
    if differing:
        raise LaunchError(f"versions differ between ranks: {'; '.join(differing[:6])}; install the same on all hosts")


def _sources_digest() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


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
