"""The table: the worst finding of a host's check fills its cell; what was not looked at stays empty."""

from __future__ import annotations

import json

from vidcls.doctor.findings import FAIL, WARN, Finding, Report


def test_cells_and_failure() -> None:
    report = Report(["a", "b"])
    assert report.cell("a", "memory") is None
    report.looked(["a", "b"], "memory")
    report.looked(["a"], "memory", [Finding("a", "memory", WARN, "little", "more")])
    assert (report.cell("a", "memory"), report.cell("b", "memory"), report.failed) == ("warn", "ok", False)
    report.looked(["a"], "memory", [Finding("a", "memory", FAIL, "none", "more"), Finding("b", "ssh", FAIL, "x", "y")])
    assert (report.cell("a", "memory"), report.cell("b", "ssh"), report.failed) == ("FAIL", "FAIL", True)
    assert len(report.findings) == 3
    report.looked(["a"], "memory", [Finding("a", "memory", FAIL, "none", "more")])
    assert len(report.findings) == 3
    told = json.loads(json.dumps(report.to_dict()))
    assert told["checks"] == {"a": {"memory": "FAIL"}, "b": {"ssh": "FAIL", "memory": "ok"}}
    assert told["findings"][0] == {"host": "a", "check": "memory", "level": "warn", "text": "little", "fix": "more"}
