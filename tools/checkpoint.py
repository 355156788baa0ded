"""Look into checkpoints: what is in one, whether it is whole, and how two differ. Reads them, and writes nothing.

python tools/checkpoint.py show runs/ucf101                 # all checkpoints of a run: whole, or damaged and why
python tools/checkpoint.py show runs/ucf101/checkpoint-500  # step, layout, versions, files, tensors
python tools/checkpoint.py verify runs/ucf101/checkpoint-500
python tools/checkpoint.py diff runs/a/checkpoint-500 runs/b/checkpoint-500
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidcls.command import user_errors

if TYPE_CHECKING:
    from vidcls.training.sharded_state import StoredState


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="what a checkpoint holds, or which checkpoints an output_dir has")
    show.add_argument("path", type=Path, help="a checkpoint, best/, or an output_dir")
    verify = commands.add_parser("verify", help="read every byte; exit 0: whole; 1: every fault is listed")
    verify.add_argument("path", type=Path, help="a checkpoint, or best/")
    diff = commands.add_parser("diff", help="recipe, clips and tensors of two; exit 0: equal; 1: they differ")
    diff.add_argument("a", type=Path, help="a checkpoint")
    diff.add_argument("b", type=Path, help="another")
    return parser.parse_args(words)


def show(path: Path) -> int:
    from vidcls.training.folders import list_checkpoints

    if list_checkpoints(path):
        print("\n".join(_table(path)))
    else:
        print("\n".join(_about(path)))
    return 0


def verify(path: Path) -> int:
    from vidcls.manifest import faults

    found = faults(path)
    print("\n".join(found) if found else f"{path} is whole")
    return 1 if found else 0


def diff(a: Path, b: Path) -> int:
    from vidcls.training.folders import read_config
    from vidcls.training.sharded_state import StoredState, differences, read_state

    lines = [
        *_differing("recipe", differences(read_config(a), read_config(b))),
        *_differing("stream", differences(read_state(a).stream, read_state(b).stream)),
    ]
    first, second = StoredState.open(a), StoredState.open(b)
    equal = not lines
    for kind in sorted(_kinds(first) | _kinds(second)):
        line, same = _compare(first.kind(kind), second.kind(kind))
        lines.append(f"tensors  {kind}: {line}")
        equal = equal and same
    print("\n".join(lines))
    return 0 if equal else 1


def _differing(what: str, pairs: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"{what:8} {name}: {then!r} in the first, {now!r} in the second" for name, (then, now) in pairs.items()]


def _compare(first: StoredState, second: StoredState) -> tuple[str, bool]:
    """What is to be said of one kind's tensors, and whether they are all equal."""
    apart = [name for name in first.keys() | second.keys() if first.shapes.get(name) != second.shapes.get(name)]
    furthest, worst, unequal = 0.0, "", 0
    for name in sorted((first.keys() & second.keys()) - set(apart)):
        one, other = first[name], second[name]
        if one.equal(other):
            continue
        unequal += 1
        distance = (one.double() - other.double()).abs().max().item()
        if not worst or not distance <= furthest:  # a NaN is the furthest of all
            furthest, worst = distance, name
    words = []
    if apart:
        words.append(f"{len(apart)} in one of the two only, or of another shape, such as {sorted(apart)[0]}")
    if unequal:
        words.append(f"{unequal} of {len(first)} differ, by {furthest:.3g} at most ({worst})")
    return "; ".join(words) or f"all {len(first)} are equal", not words


def _kinds(stored: StoredState) -> set[str]:
    return {name.partition("/")[0] for name in stored}


def _table(output_dir: Path) -> Iterator[str]:
    """A line for each checkpoint of a run, and best/."""
    from vidcls.manifest import faults
    from vidcls.training.folders import list_checkpoints

    folders = [*list_checkpoints(output_dir), *(path for path in [output_dir / "best"] if path.is_dir())]
    for folder in folders:
        found = faults(folder)
        verdict = "whole" if not found else f"damaged: {found[0]}"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        yield f"{folder.name:20} {_size(folder):>10}  {verdict}{more}"
    for leftover in sorted(output_dir.glob("checkpoint.tmp-*")):
        yield f"{leftover.name:20} {_size(leftover):>10}  half-written by a run that was killed, or is writing now"


def _about(folder: Path) -> Iterator[str]:
    """Everything about one checkpoint, without its tensors' values."""
    from vidcls.manifest import CheckpointError, faults, read_manifest
    from vidcls.training.sharded_state import STATE_NAME, StoredState, read_state_file

    manifest = read_manifest(folder)
    found = faults(folder)
    verdict = "damaged" if found else "whole"
    yield f"{folder}: {verdict}, {_bytes(_total(manifest))} in {len(manifest['files'])} files"
    yield from (f"  {each}" for each in found)
    if (folder / STATE_NAME).is_file():
        try:
            yield from _state(read_state_file(folder))
            stored = StoredState.open(folder)
            for kind in sorted(_kinds(stored)):
                shapes = stored.kind(kind).shapes.values()
                yield f"tensors   {kind}: {len(shapes)}, {_numbers(shapes)} numbers"
        except CheckpointError as error:
            yield f"  {error}"
    else:
        yield "state     none: it can be evaluated and not resumed"
    yield from (f"file      {name}: {_bytes(entry['bytes'])}" for name, entry in manifest["files"].items())


def _state(content: dict[str, Any]) -> Iterator[str]:
    schedule, layout = content["schedule"], content["layout"]
    rate = schedule["next_learning_rate"]
    yield f"step      {content['step']} of {schedule['steps']}, {content['adam_steps']} of them applied"
    yield f"schedule  {schedule['type']}, next learning rate {'none' if rate is None else format(rate, '.3g')}"
    divided = f"{layout['micro_batch']} x {layout['accumulation']} accumulation"
    if limit := layout.get("max_tokens_per_batch"):  # checkpoints of earlier versions have none
        divided = f"{layout['micro_batch']} (at most {limit} tokens a forward)"
    yield (
        f"layout    {layout['ranks']} ranks, ZeRO-{layout['zero_stage']}, {layout['global_batch']} clips = {divided} x "
        f"{layout['ranks']} ranks"
    )
    yield f"versions  {', '.join(f'{name} {version}' for name, version in content['versions'].items())}"
    yield from (f"classes   head {head}: {fingerprint}" for head, fingerprint in content["label_spaces"].items())
    yield from (f"stream    {name}: {value}" for name, value in content["stream"].items())


def _numbers(shapes: Any) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _total(manifest: dict[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


def _size(folder: Path) -> str:
    return _bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


if __name__ == "__main__":
    arguments = parse()
    with user_errors():
        if arguments.command == "diff":
            sys.exit(diff(arguments.a, arguments.b))
        sys.exit({"show": show, "verify": verify}[arguments.command](arguments.path))
