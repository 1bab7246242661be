"""Diffusivity k and decay exp(-w k) of every mode, as each block has learnt them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from vheat_mm.apis.heat.figures import FONT, LINES, few, new_figure, save_figure
from vheat_mm.apis.heat.networks import UNTRAINED, add_network_arguments, load_vheat
from vheat_mm.models.vheat import Stage, VHeat
from vheat_mm.ops.freq_embed import grid_sizes
from vheat_mm.ops.reference import decay_of, fit_freq_embed
from vheat_mm.utils.errors import ToolError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONSTANT = 0.05  # k that varies less over the modes, relative to its mean, is called nearly constant
NOISE = 0.2  # correlation of neighbouring modes below which a map is called noise


@dataclass(frozen=True)
class Diffusivity:
    """What a block has learnt, mean over its channels.

    Attributes:
        stage: From 1, as is ``block``.
        k: (H, W), in positions^2 of the stage's map; mode (n, m) has n half waves over the height.
        decay: (H, W), 0 to 1.
        stride: Pixels from one position to the next.
    """

    stage: int
    block: int
    k: np.ndarray
    decay: np.ndarray
    stride: int

    @property
    def name(self) -> str:
        """Stage and block, as 'stage 3, block 2'."""
        return f'stage {self.stage}, block {self.block}'

    @property
    def reach(self) -> float:
        """Pixels that heat flows along an axis, sqrt(2 k): the standard deviation of the heat kernel of the mean k."""
        return math.sqrt(2 * float(self.k.mean())) * self.stride

    def doubt(self) -> str:
        """Why the map shows little: nearly constant, or noise; else nothing."""
        spread = float(self.k.std() / max(self.k.mean(), 1e-30))
        if spread < CONSTANT:
            return f'nearly constant ({spread:.1%} of the mean)'
        return 'as random: neighbouring modes do not agree' if self.correlation() < NOISE else ''

    def correlation(self) -> float:
        """Correlation of neighbouring modes over both axes: 1 for smooth maps, about 0 for noise."""
        pairs = [(self.k[1:], self.k[:-1]), (self.k[:, 1:], self.k[:, :-1])]
        first, second = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in range(2))
        return float(np.corrcoef(first, second)[0, 1]) if first.size > 1 and first.std() * second.std() > 0 else 0.0


@torch.no_grad()
def diffusivities(network: VHeat, size: tuple[int, int]) -> list[Diffusivity]:
    """k and decay of every block for images of ``size`` (height, width) in pixels."""
    found = []
    for index, embed in enumerate(network.freq_embed or ()):
        stage = cast(Stage, network.layers[index])
        fitted = fit_freq_embed(embed, grid_sizes(size)[index])
        for number, block in enumerate(stage.blocks, 1):
            k = block.op.to_k(fitted)
            k_mean, decay = (x.mean(-1).double().cpu().numpy() for x in (k, decay_of(k)))
            found.append(Diffusivity(index + 1, number, k_mean, decay, stride=4 << index))
    return found


def diffusivity_figure(blocks: Sequence[Diffusivity], label: str) -> Figure:
    """A column for each stage: k and decay of its last block, below them the decay of all blocks along n = m."""
    heading = '\n'.join(
        filter(None, ['Diffusivity k and decay of every mode, means over channels', label, warn_of(blocks, label)])
    )
    stages = sorted({block.stage for block in blocks})
    figure = new_figure(10.4 + 0.4 * heading.count('\n'))
    axes = figure.subplots(3, len(stages), squeeze=False)
    for stage, column in zip(stages, axes.T, strict=True):
        own = [block for block in blocks if block.stage == stage]
        last = own[-1]
        maps = [(last.k, f'k, {last.k.mean():.2g} positions$^2$', None), (last.decay, 'decay exp(-wk)', (0, 1))]
        for axis, (values, title, limits) in zip(column, maps, strict=False):
            low, high = limits or (float(values.min()), float(values.max()))
            drawn = axis.imshow(
                values, cmap=few('viridis'), vmin=low, vmax=high, origin='lower', interpolation='nearest'
            )
            head = f'{last.name}\n' if axis is column[0] else ''
            axis.set_title(head + title, fontsize=FONT)
            bar = figure.colorbar(drawn, ax=axis, location='bottom', shrink=0.9, ticks=np.linspace(low, high, 3))
            bar.ax.set_xticklabels([f'{tick:.2g}' for tick in np.linspace(low, high, 3)], fontsize=FONT - 1)
            axis.set_xticks([0, values.shape[1] - 1])
            axis.set_yticks([0, values.shape[0] - 1])
        for number, block in enumerate(own):
            n = min(block.decay.shape)
            style = dict(color=LINES[number % len(LINES)], linestyle=['-', '--', ':'][number // len(LINES) % 3])
            label_of = f'block {block.block}' if len(own) <= 6 or number in (0, len(own) - 1) else None
            column[2].plot(np.arange(n) / n, np.diagonal(block.decay), linewidth=2, label=label_of, **style)
        column[2].set(xlim=(0, 1), ylim=(0, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        column[2].set_xlabel('n / N = m / N', fontsize=FONT)
        column[2].set_title('decay along n = m', fontsize=FONT)
        column[2].legend(fontsize=FONT - 1, loc='lower left', frameon=False)
    for axis in axes.flat:
        axis.tick_params(labelsize=FONT - 1)
    axes[0, 0].set_ylabel('half waves n, height', fontsize=FONT)
    axes[1, 0].set_ylabel('half waves n, height', fontsize=FONT)
    axes[1, 0].set_xlabel('half waves m, width', fontsize=FONT)
    figure.suptitle(heading, fontsize=FONT + 1)
    return figure


def warn_of(blocks: Sequence[Diffusivity], label: str) -> str:
    """What keeps maps of k from being read as something learnt; empty if nothing does, or the label says so."""
    doubtful = [block for block in blocks if block.doubt()]
    if not doubtful or UNTRAINED in label:
        return ''
    return (
        f'k looks random or nearly constant over the modes in {len(doubtful)} of {len(blocks)} blocks: '
        'read its mean there, not its map'
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the kind ``diffusivity``."""
    add_network_arguments(parser)
    parser.add_argument('--size', type=int, help='side of the images in pixels (that of the embeddings)')


def run(args: argparse.Namespace) -> None:
    """Draw the kind ``diffusivity``."""
    if args.size is not None and args.size < 32:
        raise ToolError(f'--size {args.size}: give at least 32 pixels')
    model, label = load_vheat(args)
    blocks = diffusivities(model, (args.size, args.size) if args.size else model.img_size)
    for block in blocks:
        note = f'; {block.doubt()}' if block.doubt() else ''
        print(
            f'{block.name}: k {block.k.mean():.3g} ({block.k.min():.3g} to {block.k.max():.3g}) positions^2, heat '
            f'flows {block.reach:.1f} px, highest mode keeps {block.decay[-1, -1]:.3f}, neighbours correlate '
            f'{block.correlation():.2f}{note}'
        )
    print(warn_of(blocks, label) or label)
    save_figure(diffusivity_figure(blocks, label), args.out, palette=True)
