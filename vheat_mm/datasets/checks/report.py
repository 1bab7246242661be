"""Findings: their kinds, what they do to a training, and how they are written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vheat_mm.datasets.checks.kinds import KINDS, Severity

# Findings of a kind that are kept. A file whose every box is wrong has a million; the first ones tell as much.
KEPT = 10_000


class Finding(NamedTuple):
    """One thing wrong with one file or annotation.

    Attributes:
        kind: Key of :data:`~vheat_mm.datasets.checks.kinds.KINDS`.
        path: File to look at: an image, a label map, an annotation file.
        value: What is wrong there.
        image_id: In a COCO file; with its file name where it has one.
        annotation_id: In a COCO file.
    """

    kind: str
    path: str
    value: str = ''
    image_id: Any = None
    annotation_id: Any = None

    def __str__(self) -> str:
        place = [self.path]
        if self.image_id is not None:
            place.append(f'image {self.image_id}')
        if self.annotation_id is not None:
            place.append(f'annotation {self.annotation_id}')
        return ', '.join(place) + (f': {self.value}' if self.value else '')


@dataclass
class Report:
    """All findings of a check.

    Attributes:
        checked: What was looked at, as lines for the summary.
        counts: Findings by kind, of which :data:`KEPT` each are in ``kept``.
    """

    checked: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    kept: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Take a finding in.

        Raises:
            KeyError: Its kind is not in the table.
        """
        KINDS[finding.kind]  # a misspelt kind must not wait for the user who meets it
        self.counts[finding.kind] += 1
        kept = self.kept.setdefault(finding.kind, [])
        if len(kept) < KEPT:
            kept.append(finding)

    def add_all(self, findings: Iterable[Finding]) -> None:
        """Take findings in."""
        for finding in findings:
            self.add(finding)

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(number for kind, number in self.counts.items() if KINDS[kind].severity is severity)

    def failed(self, strict: bool) -> bool:
        """Whether training would be harmed; ``strict`` counts warnings, too."""
        return bool(self.count(Severity.ERROR) or (strict and self.counts))

    def render(self, show: int) -> str:
        """The findings as text, errors first, grouped by kind, then the summary.

        Args:
            show: Findings of a kind that are listed; 0 lists all that are kept.
        """
        blocks = [self._block(kind, show) for severity in Severity for kind in self._kinds(severity)]
        errors, warnings = self.count(Severity.ERROR), self.count(Severity.WARNING)
        summary = [*self.checked, f'{_number(errors, "error")}, {_number(warnings, "warning")}']
        return '\n\n'.join([*blocks, '\n'.join(summary)])

    def to_dict(self) -> dict[str, Any]:
        """The findings for a JSON file."""
        kinds = [
            dict(
                kind=kind,
                severity=KINDS[kind].severity.value,
                title=KINDS[kind].title,
                training=KINDS[kind].harm,
                remedy=KINDS[kind].remedy,
                count=self.counts[kind],
                findings=[finding._asdict() for finding in sorted(self.kept[kind], key=lambda f: f.path)],
            )
            for severity in Severity
            for kind in self._kinds(severity)
        ]
        errors, warnings = self.count(Severity.ERROR), self.count(Severity.WARNING)
        return dict(checked=self.checked, errors=errors, warnings=warnings, kinds=kinds)

    def _kinds(self, severity: Severity) -> list[str]:
        return [kind for kind in KINDS if kind in self.counts and KINDS[kind].severity is severity]

    def _block(self, kind: str, show: int) -> str:
        about, count, kept = KINDS[kind], self.counts[kind], self.kept[kind]
        shown = sorted(kept, key=lambda finding: finding.path)[: show or len(kept)]
        lines = [f'{about.severity.value}: {about.title} [{kind}], {count} found']
        lines += [f'  training: {about.harm}', f'  remedy: {about.remedy}']
        lines += [f'    {finding}' for finding in shown]
        if count > len(shown):
            lines.append(f'    and {count - len(shown)} more (--show 0 --out FILE list up to {KEPT} of a kind)')
        return '\n'.join(lines)


def _number(count: int, noun: str) -> str:
    return f'{count} {noun}{"" if count == 1 else "s"}'
