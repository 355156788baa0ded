"""Steps whose loss or gradient is not finite: DeepSpeed skips them; too many in a row end the run."""

from __future__ import annotations

from vidcls import distributed
from vidcls.faults.causes import DivergedError

KEYS_SHOWN = 12


class Patience:
    """Counts skipped steps in a row. DeepSpeed's verdict is the same on every rank, and so is this one's.

    most: so many in a row end the run.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.skipped_in_a_row = 0

    def after_step(self, done: int, *, applied: bool, suspects: tuple[str, ...]) -> str | None:
        """`done` steps are done; what to tell of a skipped one. All ranks must call it.

        Args:
            suspects: keys of this rank's clips whose own loss was not finite in this step.

        Raises:
            DivergedError: on every rank, at the limit; names the clips.
        """
        if applied:
            self.skipped_in_a_row = 0
            return None
        self.skipped_in_a_row += 1
        found = [key for part in distributed.gather_objects(suspects) for key in part]
        clips = ", ".join(found[:KEYS_SHOWN]) or "none by itself: only the gradient was not finite"
        told = f"step {done}: loss or gradient is not finite, the step was skipped; clips with such a loss: {clips}"
        if self.skipped_in_a_row >= self.most:
            raise DivergedError(
                f"{told}. max_nonfinite_steps: {self.skipped_in_a_row} such steps in a row: training has diverged; "
                "lower learning_rate, or go on from an earlier checkpoint"
            )
        return told
