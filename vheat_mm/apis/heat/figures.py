"""What all pictures share: colours, size and how they are written."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

HEAT = 'inferno'  # from black over red to yellow: its lightness alone tells the value, for all kinds of sight
WIDTH = 12.8  # inches, at 100 dots each
DPI = 100
FONT = 14  # points: 9 at the 800 pixels of a README
LINES = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')  # Okabe and Ito 2008


def new_figure(height: float) -> Figure:
    """A figure of README's width and a height in inches, without pyplot's state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout='constrained')


def few(name: str) -> Colormap:
    """A colour map in 64 steps: told apart as well, and fewer bytes of a PNG file."""
    from matplotlib import colormaps

    return colormaps[name].resampled(64)


def save_figure(figure: Figure, out: str | os.PathLike, palette: bool = False) -> None:
    """Write a PNG file, all of it or nothing; a ``palette`` of 256 colours takes a third of the bytes.

    Raises:
        ToolError: ``out`` does not end with .png.
    """
    target = check_out(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as content:
        figure.savefig(content, format='png', dpi=DPI)
        image = Image.open(content).convert('RGB')
    seven_bits = [
        min(255, (value + 1) // 2 * 2) for value in range(256)
    ]  # no eye sees it; a quarter less of a photograph
    image = image.quantize(256, dither=Image.Dither.NONE) if palette else image.point(seven_bits * 3)
    with atomic_file(target) as file:
        image.save(file, 'PNG', optimize=True)


def check_out(out: str | os.PathLike, suffixes: tuple[str, ...] = ('.png',)) -> Path:
    """A file to write; an unfit name is better told before the work than after it.

    Raises:
        ToolError: Another suffix, a folder, or a place where nothing can be written.
    """
    path = Path(out)
    if path.suffix.lower() not in suffixes or path.is_dir():
        raise ToolError(f'--out {out}: give the name of a file that ends with {" or ".join(suffixes)}')
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ToolError(f'--out {out}: nothing can be written in {folder}; choose another folder')
    return path
