"""The ordered class names of a data set, and the fingerprint by which shards, checkpoints and exports agree on them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any


class LabelSpaceError(ValueError):
    """Class names that cannot be used, or two sets of class names that are not the same."""


@dataclass(frozen=True)
class LabelSpace:
    """Class names in label order: `names[i]` is the class with label i."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.names, tuple) or not self.names:
            raise LabelSpaceError(f"names = {self.names!r}: must be a tuple with at least one class name")
        seen: dict[str, int] = {}
        for label, name in enumerate(self.names):
            if not isinstance(name, str) or not name.strip():
                raise LabelSpaceError(f"names[{label}] = {name!r}: a class name must be text that is not blank")
            if name in seen:
                raise LabelSpaceError(f"names[{label}] = {name!r}: already the name of class {seen[name]}")
            seen[name] = label

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of the JSON list of the names: changes with any name and with their order."""
        return hashlib.sha256(json.dumps(self.names, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def _label_of(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.names)}

    def index(self, name: str) -> int:
        """The label of class `name`; LabelSpaceError if there is no such class."""
        if name not in self._label_of:
            raise LabelSpaceError(f"class {name!r} is unknown: the {len(self)} classes are {_listed(self.names)}")
        return self._label_of[name]

    def check_same(self, other: "LabelSpace", what: str, other_what: str) -> None:
        """LabelSpaceError unless both are the same names in the same order; `what` names self, `other_what` other."""
        if self.names == other.names:
            return
        label, ours, theirs = next(
            (label, *pair) for label, pair in enumerate(zip_longest(self.names, other.names)) if pair[0] != pair[1]
        )
        raise LabelSpaceError(
            f"{what} and {other_what} do not have the same classes: {len(self)} classes, fingerprint "
            f"{self.fingerprint}, against {len(other)} classes, fingerprint {other.fingerprint}; "
            f"the first difference is class {label}: {_shown(ours)} against {_shown(theirs)}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"names": list(self.names), "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, stored: Any) -> "LabelSpace":
        """The inverse of `to_dict`; LabelSpaceError if the stored fingerprint is not that of the stored names."""
        if not isinstance(stored, dict) or set(stored) != {"names", "fingerprint"}:
            raise LabelSpaceError('a stored label space must have exactly the fields "names" and "fingerprint"')
        if not isinstance(stored["names"], list):
            raise LabelSpaceError(f"names = {stored['names']!r}: must be a list of class names")
        labels = cls(tuple(stored["names"]))
        if labels.fingerprint != stored["fingerprint"]:
            raise LabelSpaceError(
                f"fingerprint = {stored['fingerprint']!r}: the stored names have fingerprint {labels.fingerprint}; "
                "the names or their order were changed by hand"
            )
        return labels

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "LabelSpace":
        """Reads what `save` wrote; LabelSpaceError names the file."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:  # LabelSpaceError, and JSON or UTF-8 that cannot be read
            raise LabelSpaceError(f"{path}: {error}") from error


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _shown(name: str | None) -> str:
    return "no such class" if name is None else repr(name)
