"""The same global batch on the hosts that are there: how many ranks, and how each step is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vidcls.batch_plan import BatchPlan


@dataclass(frozen=True)
class Layout:
    """hosts: name -> ranks, in the hostfile's order."""

    hosts: Mapping[str, int]
    plan: BatchPlan

    @property
    def ranks(self) -> int:
        return sum(self.hosts.values())


def fit(hosts: Mapping[str, int], global_batch: int, micro: int) -> Layout:
    """The most ranks on `hosts` (name -> slots) that divide the global batch, each with at most `micro` clips at once.

    A rank's memory is never asked for more than the user's own micro-batch takes.
    """
    available = sum(hosts.values())
    ranks = max(n for n in range(1, available + 1) if global_batch % n == 0)
    share = global_batch // ranks
    size = max(m for m in range(1, micro + 1) if share % m == 0)
    return Layout(trim(hosts, ranks), BatchPlan(size, share // size, global_batch))


def trim(hosts: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Take slots away, from the fullest host first and among equals from the last, until `ranks` are left."""
    left = dict(hosts)
    assert 0 < ranks <= sum(left.values()), (hosts, ranks)
    while sum(left.values()) > ranks:
        fullest = max(reversed(left), key=lambda host: left[host])
        left[fullest] -= 1
    return {host: slots for host, slots in left.items() if slots}
