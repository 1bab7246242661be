"""From a listed input to its images."""

from __future__ import annotations

from collections.abc import Iterator

from vheat_mm.apis.inference.types import Item, Sample


def read(item: Item, max_pixels: int | None = None) -> Iterator[Sample]:
    """The images of an input; those of an image file are left to the pipeline, which decodes them as in a test."""
    if item.is_video:
        yield Sample(item, error=f'{item.source}: videos cannot be read yet')
    else:
        yield Sample(item)
