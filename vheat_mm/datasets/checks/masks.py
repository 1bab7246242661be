"""Instance masks of COCO's format: polygons and run-length encodings."""

from __future__ import annotations

from typing import Any

import numpy as np

# Beyond it pycocotools asks for gigabytes: it draws each edge pixel by pixel, also outside the image.
FAR = 100_000
_NUMBERS = {int, float}


class MaskTable:
    """Masks of many annotations, kept as one row of numbers each.

    Attributes:
        faults: Row of an annotation -> kind of finding that its mask alone shows, and text.
        sizes: Row of an annotation with an RLE -> (width, height) that the RLE states.
    """

    def __init__(self) -> None:
        self.faults: dict[int, tuple[str, str]] = {}
        self.sizes: dict[int, tuple[int, int]] = {}
        self._extents: list[np.ndarray] = []
        self._count = 0
        self._numbers: list[float] = []
        self._starts: list[int] = []
        self._rows: list[int] = []
        self._first = 0  # row that the batch being filled begins with

    def add(self, mask: Any) -> None:
        """Take the next annotation's ``segmentation`` in; ``None`` where it has none."""
        row = self._count
        self._count += 1
        if not mask:  # mmdet takes an empty one for none
            self.faults[row] = ('mask-missing', '' if mask is None else f'segmentation is {mask!r}')
        elif isinstance(mask, list):
            self._add_polygons(row, mask)
        elif isinstance(mask, dict):
            self._add_rle(row, mask)
        else:
            self.faults[row] = ('mask-malformed', f'a {type(mask).__name__}')

    def flush(self) -> None:
        """Turn what has been added into arrays; call it now and then, and once at the end."""
        extents = np.full((self._count - self._first, 4), np.nan)
        if self._rows:
            points = np.array(self._numbers, dtype=np.float64).reshape(-1, 2)
            with np.errstate(invalid='ignore'):  # NaN spreads, as it should
                low = np.minimum.reduceat(points, self._starts)
                high = np.maximum.reduceat(points, self._starts)
            rows = np.array(self._rows)
            extents[rows - self._first] = np.concatenate([low, high], axis=1)
            far = ~(np.isfinite(low) & np.isfinite(high) & (np.abs(low) < FAR) & (np.abs(high) < FAR)).all(axis=1)
            for row, box in zip(rows[far].tolist(), extents[rows[far] - self._first].tolist(), strict=True):
                self.faults[row] = ('mask-not-finite', f'x {box[0]} .. {box[2]}, y {box[1]} .. {box[3]}')
        self._extents.append(extents)
        self._first = self._count
        self._numbers, self._starts, self._rows = [], [], []

    def extents(self) -> np.ndarray:
        """(N, 4) left, top, right and bottom of each annotation's polygons, NaN where it has none."""
        return np.concatenate([*self._extents, np.zeros((0, 4))])

    def _add_polygons(self, row: int, polygons: list) -> None:
        start = len(self._numbers)
        for polygon in polygons:
            if not isinstance(polygon, list) or not set(map(type, polygon)) <= _NUMBERS:
                text = 'numbers' if set(map(type, polygons)) <= _NUMBERS else 'something else'
                self.faults[row] = ('mask-malformed', f'a list of {text}, expected lists of numbers')
                del self._numbers[start:]
                return
            if len(polygon) % 2 or len(polygon) < 6:
                self.faults[row] = ('polygon-dropped', f'a polygon of {len(polygon)} numbers')
            else:
                self._numbers += polygon
        if len(self._numbers) > start:
            self._starts.append(start // 2)
            self._rows.append(row)

    def _add_rle(self, row: int, rle: dict) -> None:
        size, counts = rle.get('size'), rle.get('counts')
        if size is None or not isinstance(counts, str | list):
            self.faults[row] = ('rle-without-size', f'its keys: {", ".join(map(str, rle)) or "none"}')
            return
        if not isinstance(size, list) or len(size) != 2 or set(map(type, size)) != {int} or min(size) < 1:
            self.faults[row] = ('mask-malformed', f'an RLE of size {size!r}, expected [height, width]')
            return
        try:
            runs = run_lengths(counts) if isinstance(counts, str) else counts
            total = sum(runs)
            if min(runs, default=0) < 0 or not set(map(type, runs)) <= {int}:
                raise ValueError('runs that are no lengths')
        except (TypeError, ValueError) as error:
            self.faults[row] = ('mask-malformed', f'an RLE with {error}')
            return
        self.sizes[row] = (size[1], size[0])
        if total != size[0] * size[1]:
            self.faults[row] = ('rle-sum', f'runs add up to {total}, height {size[0]} x width {size[1]}')


def run_lengths(counts: str) -> list[int]:
    """Run lengths of COCO's compressed form: six bits a character; from the fourth on, less the last run but one.

    Raises:
        ValueError: No such text.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f'the character {character!r} in its counts')
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError('counts that are cut off')
    return runs
