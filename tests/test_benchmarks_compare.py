"""benchmarks/compare.py: what it finds in result files, what it says of them, and when its gate holds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Compare = Callable[..., int]
CONDITIONS = {"machine": "x86_64", "cores": 2, "load_average": 0.5, "versions": {"torch": "2.13"}}


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compare:
    """Runs it on two contents (or texts of files) with further words; its exit code."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compare

    def run(old: Any, new: Any, *words: str) -> int:
        for name, content in (("old", old), ("new", new)):
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text)
        monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), *words])
        monkeypatch.setenv("COLUMNS", "200")
        return compare.main()

    return run


def spread(median: float, least: float | None = None, most: float | None = None) -> dict[str, float]:
    return {"median": median, "least": median if least is None else least, "most": median if most is None else most}


def line(output: str, name: str) -> list[str]:
    """The cells of a figure's row."""
    return next(
        cells for row in output.splitlines() if (cells := [c.strip() for c in row.split("│")[1:-1]])[:1] == [name]
    )


def test_figures_of_every_shape_stand_side_by_side(compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    """As throughput.py, startup.py, features.py and serve.py write them; the figures are computed by hand."""
    old = {
        **CONDITIONS,
        "clips_per_second": {"vidcls": spread(2.0, 1.9, 2.1)},
        "rates": {"frames": [100.0, 120.0, 110.0]},
        "rounds": [{"cold": {"seconds": 8.0}}, {"cold": {"seconds": 10.0}}],
        "rows": [{"what": "served", "rate": 50.0, "p50": 0.03, "p99": None}],
        "ratios": [{"name": "stall", "ratio": spread(0.02), "bar": None, "limit": 0.05}],
    }
    new = json.loads(json.dumps(old))
    new["clips_per_second"]["vidcls"] = spread(2.2, 2.1, 2.3)
    new["rates"]["frames"] = [88.0]
    new["rounds"] = [{"cold": {"seconds": 9.9}}]
    new["ratios"][0]["ratio"] = spread(0.04)
    assert compare(old, new) == 0
    output = capsys.readouterr().out
    expected = ["2 (1.9 to 2.1)", "2.2 (2.1 to 2.3)", "+10.0%", "more is better"]
    assert line(output, "clips_per_second / vidcls")[1:] == expected
    assert line(output, "rates / frames")[1:] == ["110 (100 to 120)", "88 (88 to 88)", "-20.0%", "more is better"]
    assert line(output, "rounds / cold / seconds")[1:] == [
        "9 (8 to 10)",
        "9.9 (9.9 to 9.9)",
        "+10.0%",
        "less is better",
    ]
    assert line(output, "rows / served / p50")[3:] == ["+0.0%", "less is better"]
    assert line(output, "ratios / stall")[3:] == ["+100.0%", "less is better"]
    assert "Conditions" not in output


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ({"rates": spread(100, 95, 105)}, {"rates": spread(90, 85, 94)}, 0),  # 1 % beyond the spreads
        ({"rates": spread(100, 95, 105)}, {"rates": spread(85, 82, 89)}, 1),  # 6 %
        ({"rates": spread(100)}, {"rates": spread(200)}, 0),
        ({"step_seconds": spread(10, 9, 11)}, {"step_seconds": spread(12, 11.4, 13)}, 0),  # 4 %
        ({"step_seconds": spread(10, 9, 11)}, {"step_seconds": spread(12, 11.6, 13)}, 1),  # 6 %
        ({"step_seconds": spread(10)}, {"step_seconds": spread(5)}, 0),
        ({"shares": spread(10)}, {"shares": spread(1)}, 0),  # nobody knows which way is better
        ({"lost_seconds": spread(0)}, {"lost_seconds": spread(1)}, 1),
    ],
)
def test_the_gate_counts_what_is_beyond_both_spreads(compare: Compare, old: dict, new: dict, code: int) -> None:
    assert compare({"figures": old}, {"figures": new}, "--gate", "0.05") == code
    assert compare({"figures": old}, {"figures": new}) == 0


@pytest.mark.parametrize(
    ("bar", "limit", "ratio", "code"),
    [(0.9, None, 0.5, 1), (0.9, None, 2.0, 0), (None, 0.9, 2.0, 1), (None, 0.9, 0.5, 0), (None, None, 0.5, 0)],
)
def test_bar_and_limit_say_which_way_a_ratio_is_better(
    compare: Compare, bar: float | None, limit: float | None, ratio: float, code: int
) -> None:
    old, new = ({"ratios": [{"name": "a / b", "ratio": spread(v), "bar": bar, "limit": limit}]} for v in (1.0, ratio))
    assert compare(old, new, "--gate", "0.05") == code


def test_conditions_that_differ_are_named(compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"rates": {"a": spread(1)}}
    old = {"conditions": CONDITIONS, "recipe": ["r.yaml", "seed=1", "dataset=/tmp/x/shards"], "clips": 5, **figures}
    new = {
        "conditions": {**CONDITIONS, "versions": {"torch": "2.14"}},
        "recipe": ["r.yaml", "seed=2", "dataset=/tmp/y/shards"],
        "clips": 6,
        "rates": {**figures["rates"], "b": spread(1)},
    }
    assert compare(old, new) == 0
    output = capsys.readouterr().out
    assert line(output, "versions.torch") == ["versions.torch", "2.13", "2.14"]
    assert line(output, "recipe.seed") == ["recipe.seed", "1", "2"]
    assert line(output, "clips") == ["clips", "5", "6"]
    assert "dataset" not in output
    assert "only in NEW: rates / b" in output


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ("no json", "no result file"),
        ([1.0], "holds list"),
        ({"clips_per_second": {"b": 1.0}}, "no figure in common: OLD has rates / a; NEW has clips_per_second / b"),
        ({"rates": {"a": float("nan")}}, "rates / a is [nan]"),
    ],
)
def test_what_cannot_be_compared_is_an_error(
    compare: Compare, capsys: pytest.CaptureFixture[str], new: Any, says: str
) -> None:
    assert compare({"rates": {"a": 1.0}}, new) == 2
    assert says in capsys.readouterr().err


def test_a_gate_must_be_a_share(compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare({}, {}, "--gate", "-1")
    assert "--gate: -1.0" in capsys.readouterr().err
