"""Whether a run that was killed and resumed is the run that was never stopped: rows, order, tensors, checkpoints.

Each check returns what is wrong, in words; an empty list is a pass. What vidcls says of itself is not asked: digests
are taken by hashlib, and the clips of a data set are handed in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

NUMBERS = ("loss", "grad_norm", "lr", "top1")  # of a row of train_log.jsonl, what no clock measured
RESUMING = re.compile(r"^resuming  (\S+) at step (\d+)$", re.MULTILINE)
PASSED_OVER = re.compile(r"^vidcls: checkpoint passed over: (.*)$", re.MULTILINE)
TRAINED = re.compile(r"^step \d+/\d+ ", re.MULTILINE)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a kill may have cut; [] when it is not there."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def log_rows(run: Path) -> list[dict[str, Any]]:
    """step and NUMBERS of each row of a run's log."""
    return [{key: row.get(key) for key in ("step", *NUMBERS)} for row in json_lines(run / "train_log.jsonl")]


def row_faults(run: Path, straight: Path) -> list[str]:
    """Rows of `run` that are not those of `straight` bit for bit, or not in their order, one for each step."""
    expected = {row["step"]: row for row in log_rows(straight)}
    rows = log_rows(run)
    differing = [(row, expected.get(row["step"])) for row in rows if row != expected.get(row["step"])]
    faults = [f"row of step {row['step']}: {row}, straight {other}" for row, other in differing]
    faults += [f"row of step {row['step']} has no {key}" for row in rows for key in NUMBERS if row[key] is None]
    steps = [row["step"] for row in rows]
    if steps != list(range(1, len(steps) + 1)):
        faults.append(f"rows are of steps {steps}, not of 1, 2, 3, ...")
    return faults


def completeness_faults(run: Path, steps: int) -> list[str]:
    """Whether a finished run logged its last step, and says that it finished."""
    faults = []
    logged = len(log_rows(run))
    if logged != steps:
        faults.append(f"{logged} rows are logged of {steps} steps")
    path = run / "outcome.json"
    outcome = json.loads(path.read_text()) if path.is_file() else {}
    if (outcome.get("outcome"), outcome.get("step")) != ("finished", steps):
        faults.append(f"outcome.json says {outcome or 'nothing'}, not that step {steps} finished")
    return faults


def read_order(run: Path, ranks: int) -> tuple[list[dict[int, list[str]]], list[str]]:
    """For each rank, the clips of each step by the order log; and the steps that were done again with other clips."""
    order: list[dict[int, list[str]]] = []
    faults = []
    for rank in range(ranks):
        found: dict[int, list[str]] = {}
        for row in json_lines(run / "order" / f"rank-{rank:05d}.jsonl"):
            keys = found.setdefault(row["step"], row["keys"])
            if keys != row["keys"]:
                faults.append(f"rank {rank} took {row['keys']} when it did step {row['step']} again, first {keys}")
        order.append(found)
    return order, faults


def stream(order: Sequence[dict[int, list[str]]], steps: Iterable[int]) -> list[str]:
    """The clips of all ranks in the order of the stream: a rank's are a contiguous part of its step's."""
    return [key for step in steps for rank in order for key in rank.get(step, [])]


def order_faults(order: Sequence[dict[int, list[str]]], straight: Sequence[dict[int, list[str]]]) -> list[str]:
    """Steps that were done with other clips than in the straight run, on the same ranks."""
    return [
        f"rank {rank} took {keys} in step {step}, in the straight run {straight[rank].get(step)}"
        for rank, found in enumerate(order)
        for step, keys in found.items()
        if keys != straight[rank].get(step)
    ]


def epoch_faults(order: Sequence[dict[int, list[str]]], clips: Sequence[str], steps: int, batch: int) -> list[str]:
    """Whether `steps` steps of `batch` clips took each of `clips` exactly once in every epoch; in the last one, which
    may be a part, at most once."""
    taken = stream(order, range(steps))
    faults = [] if len(taken) == steps * batch else [f"{len(taken)} clips were taken in {steps} steps of {batch}"]
    for first in range(0, len(taken), len(clips)):
        epoch, counts = first // len(clips), Counter(taken[first : first + len(clips)])
        faults += [f"epoch {epoch}: {key} was taken {n} times" for key, n in counts.items() if n > 1]
        faults += [f"epoch {epoch}: {key} is no clip of the data set" for key in counts.keys() - set(clips)]
        if len(taken) - first >= len(clips):
            faults += [f"epoch {epoch}: {key} was not taken" for key in sorted(set(clips) - counts.keys())]
    return faults


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint's safetensors, by file and name; the training state, whose files are one for each
    rank, by name alone."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        is_state = path.name.startswith("training_state-")
        file = "training_state" if is_state else path.relative_to(checkpoint).as_posix()
        found.update({f"{file}: {name}": tensor for name, tensor in load_file(path).items()})
    return found


def tensor_faults(checkpoint: Path, straight: Path) -> list[str]:
    """Tensors that differ in any bit, and those that only one of the two has."""
    ours, expected = tensors(checkpoint), tensors(straight)
    faults = [f"{name} is in one checkpoint only" for name in sorted(ours.keys() ^ expected.keys())]
    if not expected:
        faults.append(f"{straight} has no tensors")
    for name in sorted(ours.keys() & expected.keys()):
        a, b = ours[name], expected[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype) or not torch.equal(_bits(a), _bits(b)):
            faults.append(f"{name} differs")
    return faults


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: each file must have the digest that the manifest has for it, the manifest that
    in COMPLETE. None: it is whole."""
    manifest, complete = checkpoint / "MANIFEST.json", checkpoint / "COMPLETE"
    if not (manifest.is_file() and complete.is_file()):
        return "it has no MANIFEST.json and COMPLETE"
    if _digest(manifest) != complete.read_text(errors="replace").strip():
        return "COMPLETE has another digest than MANIFEST.json"
    for name, entry in json.loads(manifest.read_text())["files"].items():
        if not (checkpoint / name).is_file() or _digest(checkpoint / name) != entry["sha256"]:
            return f"{name} is not what MANIFEST.json says"
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoints(run: Path) -> dict[int, str | None]:
    """By step, newest first, what is wrong with each checkpoint."""
    found = {int(path.name.partition("-")[2]): path for path in run.glob("checkpoint-*") if path.name[11:].isdigit()}
    return {step: damage(found[step]) for step in sorted(found, reverse=True)}


def choice_faults(said: str, run: Path, before: dict[int, str | None]) -> list[str]:
    """Whether a life went on from the newest whole one of the checkpoints that were there `before` it, and passed over
    the damaged ones above it and no other; by what it `said`, as far as it came."""
    newest = next((step for step, wrong in before.items() if wrong is None), None)
    skipped = [step for step in before if newest is None or step > newest]
    faults = []
    resumed = [(path, int(step)) for path, step in RESUMING.findall(said)]
    right = [(str(run / f"checkpoint-{newest}"), newest)] if newest is not None else []
    if resumed != right and (resumed or TRAINED.search(said)):
        faults.append(f"went on from {resumed or 'nothing'}; the newest whole checkpoint was {newest}")
    passed = PASSED_OVER.findall(said)
    names = [str(run / f"checkpoint-{step}") for step in skipped]
    unmatched = [line for line in passed if not any(f"{name}/" in f"{line}/".replace(" ", "/") for name in names)]
    faults += [f"passed over, and is whole: {line}" for line in unmatched]
    if resumed and len(passed) != len(names):
        faults.append(f"passed over {len(passed)} checkpoints; damaged were {names}")
    return faults
