"""Clips that could not be read while training went on without them."""

from __future__ import annotations

import torch

from vidcls import distributed


class BadSamples:
    """The different clips that no rank could read, since the run was started or resumed.

    A clip counts once, however often it fails. More of them than `share` of the data set's `samples` end the run.
    """

    def __init__(self, samples: int, share: float) -> None:
        self.limit = int(share * samples + 1e-9)  # 0.29 * 100 is 28.999...
        self._here: dict[str, str] = {}
        self._new: list[tuple[str, str]] = []
        self._all: dict[str, str] = {}

    def add(self, bad: tuple[tuple[str, str], ...]) -> None:
        """(data set and key, reason) of clips that this rank could not read; each is said once."""
        for key, reason in bad:
            if key not in self._here:
                self._here[key] = reason
                self._new.append((key, reason))
                print(f"vidcls: rank {distributed.rank()}: clip skipped: {reason}", flush=True)

    def collect(self) -> int:
        """How many there are on all ranks together. All ranks must call it.

        Raises:
            RuntimeError: on every rank, when there are more than the limit.
        """
        new = distributed.all_sum(torch.tensor(len(self._new), device=distributed.device()))
        if new.item():
            for part in distributed.gather_objects(self._new):
                self._all.update(part)
            self._new = []
        if len(self._all) > self.limit:
            last = "; ".join(list(self._all.values())[-3:])
            raise RuntimeError(
                f"{len(self._all)} clips could not be read, max_bad_samples allows {self.limit} of this data set; "
                f"the last: {last}"
            )
        return len(self._all)
