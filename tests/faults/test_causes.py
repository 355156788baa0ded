"""Every kind of end has its exit code, taken from errors as they really come."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from vidcls.data.index import ShardError
from vidcls.data.reading import LoaderError
from vidcls.faults.causes import DivergedError, RankFailedError, RendezvousError, exit_of
from vidcls.faults.exits import MEANINGS, Exit
from vidcls.faults.lock import InUseError
from vidcls.manifest import CheckpointError, StorageError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RankFailedError("saving failed on rank 1: x"), Exit.PEER_LOST),
        (torch.distributed.DistBackendError("NCCL error"), Exit.PEER_LOST),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), Exit.PEER_LOST),
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"), Exit.PEER_LOST),
        (RuntimeError("[x/gloo/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation"), Exit.PEER_LOST),
        (DivergedError("loss is nan"), Exit.DIVERGED),
        (RendezvousError("port taken"), Exit.LAUNCH),
        (StorageError("full"), Exit.STORAGE),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Exit.STORAGE),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), Exit.STORAGE),
        (MemoryError(), Exit.OUT_OF_MEMORY),
        (RuntimeError("std::bad_alloc"), Exit.OUT_OF_MEMORY),  # torch's word for one in C++ code
        (torch.OutOfMemoryError("CUDA out of memory"), Exit.OUT_OF_MEMORY),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), Exit.OUT_OF_MEMORY),
        (ShardError("shard-000000.tar: a: damaged"), Exit.DATA),
        (LoaderError("a loader worker failed"), Exit.DATA),
        (InUseError("output_dir is in use"), Exit.USER_ERROR),
        (CheckpointError("of another model"), Exit.USER_ERROR),
        (RuntimeError("shape mismatch"), Exit.FAILED),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), Exit.FAILED),
    ],
)
def test_errors_have_the_code_of_their_kind(error: BaseException, code: Exit) -> None:
    assert exit_of(error) == code


def test_memory_that_torch_cannot_get() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert exit_of(caught.value) == Exit.OUT_OF_MEMORY


def test_losing_a_peer_is_the_lowest_of_the_codes_that_follow_from_one_another() -> None:
    """The highest of all hosts' codes is what pdsh gives back."""
    assert min(code for code in Exit if code > Exit.USER_ERROR) == Exit.PEER_LOST
    assert {*MEANINGS} == {*Exit}


def test_the_codes_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert all(f"| {int(code)} |" in text for code in Exit)
