"""What an examination ends in: for each host and check nothing, a warning or a failure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

WARN, FAIL = "warn", "FAIL"
CHECKS = (
    "ssh",
    "launch",
    "code",
    "clock",
    "port",
    "peers",
    "link",
    "folder",
    "data",
    "memory",
    "limits",
    "build",
    "slots",
)
"""In the order in which they are shown; docs/clusters.md says what each looks at."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong on a host. fix: what to do about it."""

    host: str
    check: str
    level: str
    text: str
    fix: str

    def __post_init__(self) -> None:
        assert self.check in CHECKS, self.check
        assert self.level in (WARN, FAIL), self.level


@dataclass
class Report:
    """hosts: in the hostfile's order. facts: what each host told, and what was measured of it, for programs."""

    hosts: list[str]
    findings: list[Finding] = field(default_factory=list)
    checked: set[tuple[str, str]] = field(default_factory=set)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def looked(self, hosts: Iterable[str], check: str, findings: Iterable[Finding] = ()) -> None:
        """Note that `check` was made on these hosts, and what it found."""
        self.checked.update((host, check) for host in hosts)
        for finding in findings:
            self.checked.add((finding.host, finding.check))
            if finding not in self.findings:
                self.findings.append(finding)

    def cell(self, host: str, check: str) -> str | None:
        """ "ok", "warn", "FAIL", or None where it was not looked at."""
        if (host, check) not in self.checked:
            return None
        levels = {finding.level for finding in self.findings if (finding.host, finding.check) == (host, check)}
        return next((level for level in (FAIL, WARN) if level in levels), "ok")

    @property
    def failed(self) -> bool:
        return any(finding.level == FAIL for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        table = {
            host: {check: cell for check in CHECKS if (cell := self.cell(host, check)) is not None}
            for host in self.hosts
        }
        return {
            "failed": self.failed,
            "checks": table,
            "findings": [asdict(finding) for finding in self.findings],
            "facts": self.facts,
        }
