"""Effective receptive field: how much each pixel of the input moves the last map's centre.

Luo et al., Understanding the Effective Receptive Field in Deep Convolutional Neural Networks, NeurIPS 2016. As Ding et
al., Scaling Up Your Kernels to 31x31 (RepLKNet), CVPR 2022, measure it: the positive values of all channels at the
centre are summed (the plain sum behind a LayerNorm is constant, so that its gradient would be rounding errors), and the
area ratio is that of the smallest square around the centre which holds a share of the field.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from mmengine.logging import print_log

from vheat_mm.apis.heat.figures import FONT, WIDTH, few, new_figure, save_figure
from vheat_mm.apis.heat.images import list_images, open_images
from vheat_mm.apis.heat.networks import Network, add_network_arguments, load_network
from vheat_mm.utils.errors import ToolError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.2, 0.3, 0.5, 0.99)
ENOUGH = 50  # images
POWER = 0.2  # values span orders of magnitude: log10(x + 1) of values far below 1 would stay black


@dataclass(frozen=True)
class Field:
    """The field (H, W) of a network, not negative, and the number of images that it is the mean of."""

    label: str
    values: np.ndarray
    images: int


def measure(network: Network, images: Iterable[np.ndarray]) -> Field:
    """Mean over images (H, W, 3) uint8 RGB of one size of |gradient|, summed over channels.

    Raises:
        ToolError: The centre does not depend on the images.
    """
    total, count = np.zeros(()), 0
    for image in images:
        x = network.prepare(image).requires_grad_()
        with torch.enable_grad():
            last = network.last_map(x)
            centre = last[:, :, last.shape[2] // 2, last.shape[3] // 2].relu().sum()
            (gradient,) = torch.autograd.grad(centre, x)
        total, count = total + gradient.abs().sum((0, 1)).double().cpu().numpy(), count + 1
    if not total.any() or not np.isfinite(total).all():
        raise ToolError(f'{network.label}: the centre of the last map has no finite gradient on {count} images')
    return Field(network.label, total / count, count)


def peak(field: np.ndarray) -> tuple[float, float]:
    """Row and column that a field (H, W) lies around, to half a pixel: the mean position, weighed by its squares.

    A position of the last map need not lie in the middle of the image: number i of vHeat, whose convolutions reach over
    the border, is around pixel 32 i, that of Swin and ConvNeXt, which cut patches, around 32 i + 15.5.
    """
    weights = np.square(field / field.max())
    middles = ((weights.sum(1 - axis) * np.arange(n)).sum() / weights.sum() for axis, n in enumerate(field.shape))
    row, column = (round(2 * float(middle)) / 2 for middle in middles)
    return row, column


def area_ratios(field: np.ndarray, shares: Sequence[float] = SHARES) -> list[float]:
    """Share of the area (0 to 1) of the smallest square around :func:`peak` with each share of a field (H, W)."""
    row, column = peak(field)
    rows, columns = (np.abs(np.arange(n) - middle) for n, middle in zip(field.shape, (row, column), strict=True))
    rings = np.floor(np.maximum(rows[:, None], columns)).astype(int)
    held = np.bincount(rings.ravel(), field.ravel()).cumsum() / field.sum()
    area = np.bincount(rings.ravel()).cumsum() / field.size
    return [float(area[np.argmax(held >= share - 1e-9)]) for share in shares]


def erf_figure(fields: Sequence[Field]) -> Figure:
    """A panel for each field, with its area ratios below."""
    columns = len(fields) if len(fields) <= 4 else 3
    rows = -(-len(fields) // columns)
    side = WIDTH / 4
    figure = new_figure(rows * (side + 1.35) + 1.1)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for field, axis in zip(fields, axes.flat, strict=False):
        drawn = axis.imshow(
            (field.values / field.values.max()) ** POWER, cmap=few('cividis'), vmin=0, vmax=1, interpolation='nearest'
        )
        axis.set_title(field.label.replace(', ', '\n', 1), fontsize=FONT)
        areas = '   '.join(f'{area:.1%}' for area in area_ratios(field.values))
        axis.text(0.5, -0.03, areas, transform=axis.transAxes, ha='center', va='top', fontsize=FONT)
    height, width = fields[0].values.shape
    bar = figure.colorbar(drawn, ax=axes, location='bottom', shrink=0.5, aspect=45, pad=0.06)
    bar.set_label(f'(|gradient| / its largest value)^{POWER}', fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    shares = ', '.join(f'{share:.0%}' for share in SHARES)
    figure.suptitle(
        f"Effective receptive field of the last map's centre, mean of {fields[0].images} images, {height} x {width}\n"
        f'below: area of the square around the centre that holds {shares} of it',
        fontsize=FONT + 1,
    )
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the kind ``erf``."""
    add_network_arguments(parser)
    parser.add_argument('--images', nargs='+', required=True, metavar='IMAGE', help='images, folders, globs')
    parser.add_argument('--before', action='store_true', help='also the network with random weights')
    parser.add_argument(
        '--beside', nargs='+', action='append', default=[], metavar=('NETWORK', 'CHECKPOINT'), help='another network'
    )
    parser.add_argument('--number', type=int, default=ENOUGH, help=f'images to take, the first ({ENOUGH})')
    parser.add_argument('--size', type=int, default=224, help='side they are resized to, a multiple of 32 (224)')


def run(args: argparse.Namespace) -> None:
    """Draw the kind ``erf``."""
    if args.size < 64 or args.size % 32:
        raise ToolError(f'--size {args.size}: give a multiple of 32, from 64 on')
    if args.number < 1:
        raise ToolError(f'--number {args.number}: give 1 or more')
    if any(len(other) > 2 for other in args.beside):
        raise ToolError('--beside takes a network and its checkpoint: repeat it for each network')
    if args.before and not args.checkpoint:
        raise ToolError('--before compares with a CHECKPOINT: give one, or drop it')
    wanted = [[args.network]] if args.before or not args.checkpoint else []
    wanted += [[args.network, args.checkpoint]] if args.checkpoint else []
    size = (args.size, args.size)
    opened = open_images(list_images(args.images)[: args.number])
    images = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in opened]
    if len(images) < ENOUGH:
        print_log(f'{len(images)} images: the field is noisy, {ENOUGH} are usual', logger='current', level=30)
    fields = []
    print('area ratio at ' + ', '.join(f'{share:.0%}' for share in SHARES) + f' of the field, {len(images)} images')
    for name, *checkpoint in wanted + args.beside:
        network = load_network(name, next(iter(checkpoint), None), args.size, args.device)
        fields.append(field := measure(network, images))
        print(f'{field.label}: ' + ', '.join(f'{area:.1%}' for area in area_ratios(field.values)))
    save_figure(erf_figure(fields), args.out, palette=True)
