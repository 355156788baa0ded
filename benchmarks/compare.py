"""Two result files of one benchmark side by side: did anything become slower?

    python benchmarks/compare.py OLD.json NEW.json [--gate 0.05]

Figures that both files have, with their spread, and the change of the median; above them the conditions that differ:
machine, versions, options, recipe. Of a path only the last name counts, since the folders of a run are its own.

A figure is a number, a median with its extremes, a list of numbers, or one field of all the objects of a list (the
rounds). A ratio with a bar should be large, one with a limit small; of the others the name tells: rates should be
large, times and bytes small. Where neither is known, as of a ratio without a bar, a figure is shown and not judged.

--gate X: exit code 1 when a judged figure is worse by more than the share X of its old median even between the nearer
ends of both spreads: the best of NEW against the worst of OLD. Spreads that overlap are no loss, so that a file of
noisy rounds says little, and one of a single round is taken at its word.

Exit codes: 0 done, 1 the gate is not passed, 2 the files cannot be compared, or wrong options.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, Literal

from rounds import Spread, table

Better = Literal["more", "less"]
Figures = dict[str, tuple[Spread, Better | None]]

CONDITIONS = {"conditions", "machine", "cpu", "cores", "load_average", "versions"}
OPTIONS = {"options", "command", "recipe", "recipes", "settings", "frame_size"}
NAMES = ("name", "what", "interval", "every")  # fields that tell the objects of a list apart
MORE = re.compile(r"per_second|clips/s|rates?\b|goodput|useful")
LESS = re.compile(r"seconds|, s$|bytes|^(cpu|p\d\d|stalls|step|behind|save|cold|resume|restart|wall|gone)$")
COUNT = re.compile(r"(steps|saves|faults|ranks)$")


class NotComparableError(ValueError):
    """The files have nothing to compare; the message says why."""


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotComparableError(f"{path}: no result file of a benchmark: {error}") from error
    if not isinstance(content, dict):
        raise NotComparableError(f"{path}: holds {type(content).__name__}, not the object that a benchmark writes")
    return content


def figures_of(content: dict[str, Any], path: Path) -> Figures:
    """Name -> spread and better way. Plain numbers and texts on top are options, not figures."""
    nested = {key: value for key, value in content.items() if key not in CONDITIONS | OPTIONS and _is_nested(value)}
    found: dict[str, list[float]] = {}
    directions: dict[str, Better | None] = {}
    for names, values, better in _walk(nested, ()):
        name = " / ".join(names)
        if not all(map(math.isfinite, values)):
            raise NotComparableError(f"{path}: {name} is {values}, no finite number")
        found.setdefault(name, []).extend(values)
        directions[name] = better
    return {name: (Spread.of(values), directions[name]) for name, values in found.items()}


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _walk(value: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[float], Better | None]]:
    """Names, numbers and better way of every figure; one that stands several times is met as often."""
    if isinstance(value, bool | str) or value is None:
        return
    if isinstance(value, int | float):
        yield names, [value], _better(names)
    elif isinstance(value, list):
        for each in value:
            key = next((key for key in NAMES if isinstance(each, dict) and key in each), None)
            inner = names if key is None else (*names, str(each[key]))
            yield from _walk({k: v for k, v in each.items() if k != key} if key else each, inner)
    elif value.keys() == Spread.__annotations__.keys():
        yield names, [value["least"], value["median"], value["most"]], _better(names)
    elif isinstance(value.get("ratio"), dict):
        spread = value["ratio"]
        better: Better | None = "less" if value.get("limit") is not None else "more" if value.get("bar") else None
        yield names, [spread["least"], spread["median"], spread["most"]], better
    else:
        for key, each in value.items():
            yield from _walk(each, (*names, key))


def _better(names: tuple[str, ...]) -> Better | None:
    """By the last of the names that tells."""
    for name in reversed(names):
        if COUNT.search(name):
            return None
        if MORE.search(name):
            return "more"
        if LESS.search(name):
            return "less"
    return None


def conditions_of(content: dict[str, Any]) -> dict[str, str]:
    """Name -> value of everything that is no figure."""
    found: dict[str, str] = {}

    def add(value: Any, name: str) -> None:
        if isinstance(value, list) and value and all(isinstance(word, str) and "=" in word for word in value[1:]):
            value = {"file": value[0], **dict(word.split("=", 1) for word in value[1:])}
        if isinstance(value, dict):
            for key, each in value.items():
                add(each, f"{name}.{key}" if name else key)
        elif isinstance(value, list):
            found[name] = " ".join(_shown(word) for word in value)
        else:
            found[name] = _shown(value)

    for key, value in content.items():
        if key in CONDITIONS | OPTIONS or not _is_nested(value):
            add(value, "" if key == "conditions" else key)
    return found


def _shown(value: Any) -> str:
    return PurePath(value).name if isinstance(value, str) and value.startswith("/") else str(value)


def change(old: Spread, new: Spread) -> float:
    """Of the median, as a share of the old one; infinite when that is 0 and the new one is not."""
    return (new.median - old.median) / abs(old.median) if old.median else math.copysign(math.inf, new.median)


def loss(old: Spread, new: Spread, better: Better) -> float:
    """By what share of the old median NEW is worse beyond both spreads; 0 where they overlap."""
    gap = old.least - new.most if better == "more" else new.least - old.most
    if gap <= 0:
        return 0.0
    return gap / abs(old.median) if old.median else math.inf


def compare(old: Figures, new: Figures) -> list[tuple[str, Spread, Spread, Better | None]]:
    """Figures of both, in OLD's order. Raises NotComparableError when there are none."""
    both = [(name, spread, new[name][0], better) for name, (spread, better) in old.items() if name in new]
    if not both:
        few = [", ".join(list(figures)[:3]) or "none" for figures in (old, new)]
        raise NotComparableError(f"the files have no figure in common: OLD has {few[0]}; NEW has {few[1]}")
    return both


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD", help="result file of before")
    parser.add_argument("new", type=Path, metavar="NEW", help="result file of now")
    parser.add_argument("--gate", type=float, metavar="X", help="exit code 1 when worse by more than this share")
    args = parser.parse_args()
    if args.gate is not None and not 0 <= args.gate < math.inf:
        parser.error(f"--gate: {args.gate} is not a share of 0 or more, such as 0.05")
    try:
        contents = [read(path) for path in (args.old, args.new)]
        old, new = (figures_of(content, path) for content, path in zip(contents, (args.old, args.new), strict=True))
        both = compare(old, new)
    except NotComparableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    before, after = map(conditions_of, contents)
    differing = [name for name in before | after if before.get(name) != after.get(name)]
    if differing:
        rows = [(name, before.get(name, "-"), after.get(name, "-")) for name in differing]
        table("Conditions that differ", ("condition", "OLD", "NEW"), rows)
    lost = [
        name
        for name, first, second, better in both
        if args.gate is not None and better and loss(first, second, better) > args.gate
    ]
    shown = []
    for name, first, second, better in both:
        verdict = "not judged" if better is None else f"{better} is better" + (": LOST" if name in lost else "")
        shown.append((name, first, second, f"{change(first, second):+.1%}", verdict))
    table("Figures: median (least to most)", ("figure", "OLD", "NEW", "change", ""), shown)
    for title, here, there in (("OLD", old, new), ("NEW", new, old)):
        if alone := [name for name in here if name not in there]:
            print(f"only in {title}: {', '.join(alone)}")
    if lost:
        print(f"worse by more than {args.gate:.1%} beyond the spread: {', '.join(lost)}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
