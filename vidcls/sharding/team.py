"""The processes that make one data set together: this one alone, or the ranks of an MPI job."""

import os
import sys
import time
from typing import Any, Protocol

MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")  # of Open MPI, and of MPICH and Intel MPI
POLL_SECONDS = 0.1


class Team(Protocol):
    """This is process `rank` of `size`."""

    rank: int
    size: int

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank; all must call it."""

    def wait(self) -> None:
        """Until all ranks are here; all must call it."""

    def end(self, code: int) -> None:
        """Ends the other ranks too, with this exit code: they would wait for this one for ever."""


class Alone:
    rank, size = 0, 1

    def share(self, value: Any) -> Any:
        return value

    def wait(self) -> None:
        pass

    def end(self, code: int) -> None:
        pass


class MpiTeam:
    """All ranks of an MPI job."""

    def __init__(self) -> None:
        from mpi4py import MPI  # starts MPI

        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def share(self, value: Any) -> Any:
        return self._world.bcast(value, root=0)

    def wait(self) -> None:
        # Asking now and then: MPI's own barrier spins, on a core that the workers need.
        request = self._world.Ibarrier()
        while not request.Test():
            time.sleep(POLL_SECONDS)

    def end(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._world.Abort(code)


def join_team() -> Team:
    """The MPI job that this process was started in, if it was."""
    return MpiTeam() if any(int(os.environ.get(name, 1)) > 1 for name in MPI_VARIABLES) else Alone()
