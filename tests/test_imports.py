"""Imports point one way, and heavy packages come in through few doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("vidcls", "launch", "tools", "benchmarks")
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for part in PARTS
    for path in sorted((ROOT / part).rglob("*.py"))
    if path.name != "__init__.py"
}
# Each part may import those of the rows above it and itself; parts of one row never import each other.
ROWS = (
    ("vidcls.options",),
    ("vidcls.registry", "vidcls.prompts", "vidcls.batch_plan"),
    ("vidcls.consistency",),
    ("vidcls.config", "vidcls.geometry", "vidcls.manifest", "vidcls.ops", "vidcls.hosts"),
    ("vidcls.faults",),
    ("vidcls.distributed", "vidcls.command", "vidcls.progress"),
    ("vidcls.data", "vidcls.model"),
    (
        "vidcls.evaluation",
        "vidcls.sharding",
        "vidcls.inspection",
        "vidcls.doctor",
        "vidcls.supervision",
        "vidcls.planning",
    ),
    ("vidcls.report",),
    ("vidcls.training",),
    ("vidcls.export", "vidcls.predict"),
    ("vidcls.serve",),
    ("launch", "tools"),
    ("benchmarks",),
)
# DeepSpeed is known where processes are made, where its compiled ops are used, and to training.
DEEPSPEED = {"vidcls.ops", "vidcls.distributed", "vidcls.training"}
PEFT = {"benchmarks.usual_way", "vidcls.model.adapters", "vidcls.model.tuning", "vidcls.export"}
HEAVY = ("torch", "numpy", "transformers", "deepspeed", "peft", "av", "decord", "PIL")


def imports(path: Path) -> Iterator[str]:
    """Every module an import statement of the file names, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def row_of(name: str) -> tuple[int, str]:
    """The row and the part that a module belongs to."""
    return next((row, part) for row, parts in enumerate(ROWS) for part in parts if is_below(name, part))


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module: str) -> None:
    row, part = row_of(module)
    ours = [name for name in imports(SOURCES[module]) if name.split(".")[0] in PARTS]
    wrong = [name for name in ours if not (row_of(name)[0] < row or row_of(name)[1] == part)]
    assert wrong == []


@pytest.mark.parametrize(("package", "doors"), [("deepspeed", DEEPSPEED), ("peft", PEFT)])
def test_heavy_packages_have_few_doors(package: str, doors: set[str]) -> None:
    found = {m for m, path in SOURCES.items() if any(is_below(name, package) for name in imports(path))}
    assert {m for m in found if not any(is_below(m, door) for door in doors)} == set()


def test_configuration_imports_nothing_heavy() -> None:
    """Not by another module either: a typing mistake is answered before the seconds those cost."""
    program = f"import sys, vidcls.config, vidcls.command; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_planning_imports_no_torch() -> None:
    """NumPy at most, for the shards' index: a plan is answered in a moment."""
    program = f"import sys, tools.plan; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"


@pytest.mark.parametrize("command", [name for name in SOURCES if name.startswith("launch.")])
def test_commands_import_nothing_heavy_before_they_have_read_their_arguments(command: str) -> None:
    program = f"import sys, {command}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
