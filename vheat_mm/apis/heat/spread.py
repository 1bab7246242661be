"""Heat from patches of a photograph: through time under constant k, and as each stage's learnt k lets it flow.

Heat conduction is linear: what flows from a patch is its response to heat 1 in that patch and 0 elsewhere. The stages'
responses are means over blocks and channels. Sums stay, as the decay of mode (0, 0) is 1. From k t = 1 on, no value
leaves the range of the start by more than 1e-3; below, the highest modes still stand, and an edge rings.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from vheat_mm.apis.heat.diffusivity import diffusivities
from vheat_mm.apis.heat.figures import FONT, HEAT, LINES, WIDTH, check_out, few, new_figure, save_figure
from vheat_mm.apis.heat.images import list_images, open_images
from vheat_mm.apis.heat.networks import add_network_arguments, load_vheat
from vheat_mm.models.vheat import VHeat
from vheat_mm.ops.reference import decay_of, heat_conduction
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMES = (0.0, 2.0, 8.0, 32.0, 128.0, 512.0)  # k t in pixels^2
GIF_SIDE = 256  # pixels
SIDE = 320  # pixels
PATCH = 32  # pixels: one position of the last stage
POWER = 0.5
Patch = tuple[float, float]
PATCHES: list[Patch] = [(0.3, 0.3), (0.7, 0.6)]


@dataclass(frozen=True)
class Response:
    """Heat (H, W) of a stage's map, a stride of pixels from position to position, from 1 in the chosen patches."""

    stage: int
    heat: np.ndarray
    start: np.ndarray
    stride: int

    @property
    def inside(self) -> float:
        """Share of the heat that is still in the patches."""
        return float(self.heat[self.start > 0].sum() / self.start.sum())


def conduct(start: np.ndarray, kt: float) -> np.ndarray:
    """Heat (H, W, C) after time t under constant k: ``kt`` in positions^2, float64."""
    x = torch.from_numpy(np.asarray(start, np.float64))
    return heat_conduction(x[None], decay_of(torch.full_like(x[..., :1], kt)))[0].numpy()


def corners(patches: Sequence[Patch], size: tuple[int, int]) -> list[tuple[int, int]]:
    """First row and column, in pixels, of the square of ``PATCH`` pixels that each (x, y) lies in."""
    height, width = size
    return [
        (min(int(y * height), height - 1) // PATCH * PATCH, min(int(x * width), width - 1) // PATCH * PATCH)
        for x, y in patches
    ]


def patch_map(patches: Sequence[Patch], size: tuple[int, int], stride: int = 1) -> np.ndarray:
    """1 within the patches (x, y), 0 outside: (H, W) for ``size`` (height, width) in pixels over ``stride``."""
    height, width = size
    start = np.zeros((-(-height // stride), -(-width // stride)))
    for row, column in corners(patches, size):
        start[row // stride : (row + PATCH) // stride, column // stride : (column + PATCH) // stride] = 1
    return start


def responses(network: VHeat, patches: Sequence[Patch], size: tuple[int, int]) -> list[Response]:
    """How heat flows from patches within unit time, in each stage of a network for images of ``size``."""
    found = []
    blocks = diffusivities(network, size)
    for stage in sorted({block.stage for block in blocks}):
        own = [block for block in blocks if block.stage == stage]
        start = patch_map(patches, size, own[0].stride)
        decay = torch.from_numpy(np.mean([block.decay for block in own], 0))[..., None]
        heat = heat_conduction(torch.from_numpy(start)[None, ..., None], decay)[0, ..., 0]
        found.append(Response(stage, heat.numpy(), start, own[0].stride))
    return found


def spread_figure(image: np.ndarray, patches: Sequence[Patch], found: Sequence[Response], label: str) -> Figure:
    """The photograph (H, W, 3) uint8 through time, heat from its patches through time, and each stage's responses."""
    from matplotlib.patches import Rectangle

    size = (image.shape[0], image.shape[1])
    start = patch_map(patches, size)
    panel = WIDTH / len(TIMES) * size[0] / size[1]
    large = WIDTH / len(found) * size[0] / size[1]
    upper, lower = 2 * panel + 1.7, large + 2.2
    figure = new_figure(upper + lower)
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[upper, lower])[:, 0]
    axes = parts[0].subplots(2, len(TIMES))
    for kt, column in zip(TIMES, axes.T, strict=True):
        column[0].imshow(conduct(image / 255, kt).clip(0, 1))
        column[0].set_title(f'k t = {kt:g}', fontsize=FONT)
        heat = conduct(start[..., None], kt)[..., 0].clip(0)
        column[1].imshow((heat / heat.max()) ** POWER, cmap=few(HEAT), vmin=0, vmax=1, interpolation='nearest')
        column[1].set_title(f'largest {heat.max():.2f}', fontsize=FONT)
    parts[0].suptitle(
        f'Heat equation with constant k, insulated borders, k t in pixels$^2$\n{size[1]} x {size[0]} pixels, sums '
        f'stay; below: heat 1 in {len(patches)} patches of {PATCH} pixels',
        fontsize=FONT + 1,
    )
    places = parts[1].subplots(1, len(found), squeeze=False)[0]
    for response, axis in zip(found, places, strict=True):
        heat = response.heat.clip(0)
        drawn = axis.imshow((heat / heat.max()) ** POWER, cmap=few(HEAT), vmin=0, vmax=1, interpolation='nearest')
        height, width = heat.shape
        axis.set_title(f'stage {response.stage}, {height} x {width}\n{response.inside:.0%} stay inside', fontsize=FONT)
        for row, column in corners(patches, size):
            place = (column / response.stride - 0.5, row / response.stride - 0.5)
            side = PATCH / response.stride
            axis.add_patch(Rectangle(place, side, side, fill=False, edgecolor=LINES[5], linewidth=2))
    title = f'Through one block with its own k, mean of blocks and channels\n{label}'
    parts[1].suptitle(title, fontsize=FONT + 1)
    bar = parts[1].colorbar(drawn, ax=places, location='bottom', shrink=0.5, aspect=45)
    bar.set_label(f'(heat / largest)^{POWER}, as above; blue: the patches', fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    for axis in [*axes.flat, *places]:
        axis.set(xticks=[], yticks=[])
    return figure


def write_gif(image: np.ndarray, out: str | Path, frames: int = 14) -> None:
    """The photograph (H, W, 3) uint8 from k t = 0 to the last of ``TIMES``, steps of equal ratio, as an endless GIF."""
    pictures = []
    for kt in (0.0, *np.geomspace(1, TIMES[-1], frames - 1)):
        picture = Image.fromarray((conduct(image / 255, kt).clip(0, 1) * 255).round().astype(np.uint8))
        picture.thumbnail((GIF_SIDE, GIF_SIDE))
        ImageDraw.Draw(picture).text((4, 4), f'k t = {kt:.0f}', 'white', stroke_width=1, stroke_fill='black')
        pictures.append(picture.quantize(256, dither=Image.Dither.NONE))
    durations = [800, *[150] * (frames - 2), 1500]  # milliseconds
    target = check_out(out, ('.gif',))
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as file:
        pictures[0].save(file, 'GIF', save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def crop_to_patches(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """An image (H, W, 3) uint8 with ``side`` pixels on the longer side; the shorter is cut to whole patches."""
    height, width = image.shape[:2]
    size = [max(1, round(each * side / max(height, width) / PATCH)) * PATCH for each in (width, height)]
    return np.asarray(ImageOps.fit(Image.fromarray(image), (size[0], size[1]), Image.Resampling.LANCZOS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the kind ``spread``."""
    add_network_arguments(parser)
    parser.add_argument('--image', required=True, help='a photograph')
    parser.add_argument(
        '--patches', nargs='+', type=_patch, default=PATCHES, metavar='X,Y', help='centres, shares of width and height'
    )
    parser.add_argument('--size', type=int, default=SIDE, help=f'longer side in pixels, a multiple of {PATCH} ({SIDE})')
    parser.add_argument('--gif', metavar='FILE', help='also write the photograph through time')


def run(args: argparse.Namespace) -> None:
    """Draw the kind ``spread``."""
    if args.gif:
        check_out(args.gif, ('.gif',))
    if args.size < PATCH or args.size % PATCH:
        raise ToolError(f'--size {args.size}: give a multiple of {PATCH}')
    items = list_images([args.image])
    if len(items) != 1:
        raise ToolError(f'--image {args.image}: {len(items)} images, give one')
    (image,) = map(functools.partial(crop_to_patches, side=args.size), open_images(items))
    size = image.shape[0], image.shape[1]
    model, label = load_vheat(args)
    start = patch_map(args.patches, size)[..., None]
    for name, first in (('photograph', image / 255), ('patches', start)):
        for kt in TIMES:
            heat = conduct(first, kt)
            low = round(heat.min(), 4) + 0.0  # no -0.0000
            print(f'{name}, k t = {kt:g}: sum {heat.sum():.4f}, values {low:.4f} to {heat.max():.4f}')
    found = responses(model, args.patches, size)
    for response in found:
        print(
            f'stage {response.stage}: sum {response.start.sum():.4f} -> {response.heat.sum():.4f}, '
            f'{response.inside:.1%} stays in the patches'
        )
    save_figure(spread_figure(image, args.patches, found, label), args.out)
    if args.gif:
        write_gif(image, args.gif)


def _patch(text: str) -> Patch:
    try:
        x, y = map(float, text.split(','))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f'{text}: give X,Y as shares of width and height, such as 0.3,0.5')
    return x, y
