"""Instance masks of COCO's format: polygons and run-length encodings (RLE)."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np

from vheat_mm.utils.text import some_of

# pycocotools draws each edge pixel by pixel, also outside the image: from here on it takes gigabytes.
MAX_COORDINATE = 100_000
_NUMBERS = {int, float}
_MAX_SHIFT = 30  # bits of a run length; pycocotools has 32
_NO_EXTENT = (math.nan,) * 4


class MaskTable:
    """Masks, reduced to one row of numbers each. The first row is that of annotations without one.

    Attributes:
        faults: Row -> kind of finding that the mask alone shows, and text.
        rle_sizes: Row of an RLE -> (width, height) that it states.
    """

    def __init__(self) -> None:
        self.faults: dict[int, tuple[str, str]] = {}
        self.rle_sizes: dict[int, tuple[int, int]] = {}
        self._extents = array('d')
        self._count = 0
        self.add(None)

    def add(self, mask: Any) -> int:
        """Add an annotation's ``segmentation``; returns its row."""
        extent: tuple[float, ...] = _NO_EXTENT
        if not mask:  # mmdet treats an empty one as none
            self._report('mask-missing', '' if mask is None else f'segmentation is {mask!r}'[:100])
        elif isinstance(mask, list):
            extent = self._extent(mask)
        elif isinstance(mask, dict):
            self._add_rle(mask)
        else:
            self._report('mask-malformed', f'a {type(mask).__name__}')
        self._extents.extend(extent)
        self._count += 1
        return self._count - 1

    def extents(self) -> np.ndarray:
        """(rows, 4) left, top, right and bottom in pixels of polygons, NaN where there are none."""
        return np.array(self._extents).reshape(-1, 4)

    def _report(self, kind: str, text: str) -> None:
        self.faults[self._count] = (kind, text)

    def _extent(self, polygons: list) -> tuple[float, ...]:
        numbers: list[float] = []
        for polygon in polygons:
            if not isinstance(polygon, list) or not set(map(type, polygon)) <= _NUMBERS:
                text = 'numbers' if set(map(type, polygons)) <= _NUMBERS else 'something else'
                self._report('mask-malformed', f'a list of {text}, expected lists of numbers')
                return _NO_EXTENT
            if len(polygon) % 2 or len(polygon) < 6:
                self._report('polygon-dropped', f'a polygon of {len(polygon)} numbers')
            else:
                numbers += polygon
        if not numbers:
            return _NO_EXTENT
        x, y = numbers[::2], numbers[1::2]
        extent = min(x), min(y), max(x), max(y)
        if max(map(abs, extent)) < MAX_COORDINATE and not math.isnan(sum(numbers)):  # min and max may miss NaN
            return extent
        wrong = next(number for number in numbers if not abs(number) < MAX_COORDINATE)
        self._report('mask-not-finite', f'coordinate {wrong!s:.20}')
        return _NO_EXTENT

    def _add_rle(self, rle: dict) -> None:
        size, counts = rle.get('size'), rle.get('counts')
        if size is None or not isinstance(counts, str | list):
            self._report('rle-without-size', f'its keys: {some_of(list(rle))}')
            return
        if (
            not isinstance(size, list)
            or len(size) != 2
            or set(map(type, size)) != {int}
            or not 1 <= min(size) <= max(size) < 2**31
        ):
            self._report('mask-malformed', f'an RLE of size {size!r:.80}, expected [height, width]')
            return
        try:
            runs = run_lengths(counts) if isinstance(counts, str) else counts
            if not set(map(type, runs)) <= {int} or not 0 <= min(runs, default=0) <= max(runs, default=0) < 2**32:
                raise ValueError('counts that are no run lengths')
        except (TypeError, ValueError) as error:
            self._report('mask-malformed', f'an RLE with {error}')
            return
        self.rle_sizes[self._count] = (size[1], size[0])
        if (total := sum(runs)) != size[0] * size[1]:
            self._report('rle-sum', f'runs add up to {total}, height {size[0]} x width {size[1]}')


def run_lengths(counts: str) -> list[int]:
    """Run lengths of COCO's compressed form: six bits a character; from the fourth on, less the last run but one.

    Raises:
        ValueError: The text is not of this form.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > _MAX_SHIFT:
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
        raise ValueError('truncated counts')
    return runs
