"""Segmentations as PNG files whose pixels are class ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vheat_mm.apis.inference.parts import result_file
from vheat_mm.apis.inference.types import Item, Prediction

_UNLABELLED = (255, 255, 255)  # colour of ids that are no class's, such as 255, which mmseg ignores


class LabelMapWriter:
    """Writes label maps: of up to 256 classes with a palette, so that viewers show colours, else with 16 bits a pixel.

    Ids are the model's, from 0 for its first class. In ADE20K's own files 0 is unlabelled and the first class is 1: add
    1 to compare. Pillow and mmseg read ids from a file with a palette; OpenCV reads the colours.

    Args:
        folder: Where label maps are mirrored.
        name_of: The name in ``folder`` of an image's label map, and of the folder of a video's frames.
        palette: Red, green and blue of each class.
    """

    def __init__(self, folder: Path, name_of: Callable[[Item], str], palette: Sequence[tuple[int, int, int]]) -> None:
        self._folder, self._name_of = folder, name_of
        colours = [*palette[:256], *[_UNLABELLED] * (256 - len(palette))]
        self._palette = [int(value) for colour in colours for value in colour]

    def write(self, prediction: Prediction) -> None:
        """Write the label map of an image or frame; nothing of one with an error.

        Raises:
            ToolError: The disk is full; nothing of the label map is left.
        """
        from PIL import Image

        if prediction.label_map is None:
            return
        target = self._folder / self._name_of(prediction.item)
        if prediction.frame is not None:
            target = target / f'{prediction.frame:06d}.png'
        image = Image.fromarray(np.ascontiguousarray(prediction.label_map))
        if prediction.label_map.dtype == np.uint8:
            image.putpalette(self._palette)
        with result_file(target) as file:
            image.save(file, 'PNG')

    def close(self) -> None:
        """Nothing is open between two calls."""
