"""Findings, their report as text and as a dict for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vheat_mm.datasets.checks.kinds import KINDS, Severity
from vheat_mm.utils.text import first_line

# Findings of a kind that are kept: a file whose every box is wrong would have a million.
KEPT = 10_000
_LONGEST = 300  # characters of a path or a value; names in files may hold anything


class Finding(NamedTuple):
    """One thing wrong with one file or annotation.

    Attributes:
        kind: Key of :data:`~vheat_mm.datasets.checks.kinds.KINDS`.
        path: File to look at: an image, a label map, an annotation file.
        value: What is wrong there.
        image_id: In a COCO file.
        annotation_id: In a COCO file.
    """

    kind: str
    path: str
    value: str = ''
    image_id: Any = None
    annotation_id: Any = None

    def __str__(self) -> str:
        place = [first_line(self.path, _LONGEST)]
        if self.image_id is not None:
            place.append(f'image {first_line(self.image_id)}')
        if self.annotation_id is not None:
            place.append(f'annotation {first_line(self.annotation_id)}')
        return ', '.join(place) + (f': {first_line(self.value, _LONGEST)}' if self.value else '')


@dataclass
class Report:
    """All findings of a check.

    Attributes:
        checked: Lines for the summary: what was checked.
        counts: Number of findings by kind; the first :data:`KEPT` of each kind are in ``kept``.
        many: Kinds on single entries that are too many in one of the data sets, or that end an evaluation.
    """

    checked: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    kept: dict[str, list[Finding]] = field(default_factory=dict)
    many: set[str] = field(default_factory=set)

    def add(self, finding: Finding) -> None:
        """Add a finding.

        Raises:
            KeyError: Its kind is not in the table.
        """
        KINDS[finding.kind]  # raises for a misspelt kind here, not in the report
        self.counts[finding.kind] += 1
        kept = self.kept.setdefault(finding.kind, [])
        if len(kept) < KEPT:
            kept.append(finding)

    def add_all(self, findings: Iterable[Finding]) -> None:
        """Add findings."""
        for finding in findings:
            self.add(finding)

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(number for kind, number in self.counts.items() if KINDS[kind].severity is severity)

    def ends_run(self, kind: str) -> bool:
        """Whether the start of a training or a test stops for a kind that has been found."""
        return KINDS[kind].severity is Severity.ERROR and (not KINDS[kind].is_single or kind in self.many)

    def failed(self, strict: bool) -> bool:
        """Whether there are errors; ``strict`` counts warnings, too."""
        return bool(self.count(Severity.ERROR) or (strict and self.counts))

    def render(self, show: int) -> str:
        """The findings as text, errors first, grouped by kind, then the summary.

        Args:
            show: Findings of a kind that are listed; 0 lists all that are kept.
        """
        numbers = [(self.count(severity), severity.value) for severity in Severity]
        total = ', '.join(f'{number} {name}{"" if number == 1 else "s"}' for number, name in numbers)
        blocks = [self._block(kind, show) for kind in KINDS if kind in self.counts]
        return '\n\n'.join([*blocks, '\n'.join([*self.checked, total])])

    def to_dict(self) -> dict[str, Any]:
        """The findings for a JSON file."""
        kinds = [
            dict(
                kind=kind,
                severity=about.severity.value,
                title=about.title,
                training=about.effect,
                remedy=about.remedy,
                count=self.counts[kind],
                findings=[finding._asdict() for finding in self._sorted(kind)],
            )
            for kind, about in KINDS.items()
            if kind in self.counts
        ]
        errors, warnings = self.count(Severity.ERROR), self.count(Severity.WARNING)
        return dict(checked=self.checked, errors=errors, warnings=warnings, kinds=kinds)

    def _sorted(self, kind: str) -> list[Finding]:
        return sorted(self.kept[kind], key=lambda finding: finding.path)

    def _block(self, kind: str, show: int) -> str:
        about, count, findings = KINDS[kind], self.counts[kind], self._sorted(kind)
        shown = findings[: show or None]
        lines = [f'{about.severity.value}: {about.title} [{kind}], {count} found']
        lines += [f'  training: {about.effect}', f'  remedy: {about.remedy}']
        lines += [f'    {finding}' for finding in shown]
        if count > len(shown):
            lines.append(f'    and {count - len(shown)} more (--show 0 --out FILE list up to {KEPT} of a kind)')
        return '\n'.join(lines)
