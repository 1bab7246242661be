"""Frequency value embeddings before and after resizing, and what each mode of resizing does to the frequencies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vheat_mm.apis.heat.figures import FONT, LINES, few, new_figure, save_figure
from vheat_mm.apis.heat.networks import add_network_arguments, load_vheat
from vheat_mm.ops.freq_embed import NUM_STAGES, RESIZE_MODES, grid_sizes, resize_freq_embed, to_pair
from vheat_mm.utils.errors import ToolError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Resizing:
    """What a mode of resizing does.

    Attributes:
        mode: One of ``RESIZE_MODES``, or 'as learnt'.
        size: Root mean square over the channels of each mode, (H, W).
        half_waves: Root mean square error of the lowest quarter of modes along each axis against the embedding learnt
            for the same number of half waves across the map, over the root mean square of what was learnt.
        frequency: The same against the embedding learnt for the same angular frequency per position, the nearest.
        empty: Share of modes whose embedding is 0: there k is what the bias alone gives.
    """

    mode: str
    size: np.ndarray
    half_waves: float
    frequency: float
    empty: float


def resizings(embed: Tensor, target: tuple[int, int], modes: Sequence[str] = RESIZE_MODES) -> list[Resizing]:
    """Compare embeddings (H, W, C) as learnt with each mode of resizing to a grid ``target`` (H', W')."""
    embed = embed.detach().double().cpu()
    results = [('as learnt', embed), *((mode, resize_freq_embed(embed, target, mode)) for mode in modes)]
    found = []
    for mode, values in results:
        # Along an axis: mode n of N is the frequency pi n / N, that is entry n N' / N of the new grid.
        low = [torch.arange(max(1, min(n, new) // 4)) for n, new in zip(embed.shape, values.shape[:2], strict=False)]
        same = [(n.double() * values.shape[i] / embed.shape[i]).round().long() for i, n in enumerate(low)]
        same = [n.clamp(max=values.shape[i] - 1) for i, n in enumerate(same)]
        learnt = embed[low[0]][:, low[1]]
        half_waves, frequency = (
            float((values[n][:, m] - learnt).square().mean().sqrt() / learnt.square().mean().sqrt().clamp(min=1e-30))
            for n, m in (low, same)
        )
        size = values.square().mean(-1).sqrt().numpy()
        found.append(Resizing(mode, size, half_waves, frequency, empty=float((size == 0).mean())))
    return found


def embeddings_figure(found: Sequence[Resizing], stage: int, label: str) -> Figure:
    """Maps of the embeddings' size, and their profiles over both measures of frequency."""
    figure = new_figure(9.6)
    maps, profiles = figure.subfigures(2, 1, squeeze=False, height_ratios=[5, 4.2])[:, 0]
    limit = float(np.quantile(found[0].size, 0.995))
    axes = maps.subplots(1, len(found))
    for one, axis in zip(found, axes, strict=True):
        height, width = one.size.shape
        drawn = axis.imshow(one.size, cmap=few('viridis'), vmin=0, vmax=limit, origin='lower', interpolation='nearest')
        axis.set_title(f'{one.mode}\n{height} x {width}', fontsize=FONT)
        axis.set(xticks=[0, width - 1], yticks=[0, height - 1])
        axis.tick_params(labelsize=FONT - 1)
        axis.set_xlabel('half waves m', fontsize=FONT)
    axes[0].set_ylabel('half waves n', fontsize=FONT)
    bar = maps.colorbar(drawn, ax=axes, location='bottom', shrink=0.5, aspect=45)
    bar.set_label('root mean square over channels', fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    title = f'Frequency value embeddings of stage {stage} before and after resizing\n{label}'
    maps.suptitle(title, fontsize=FONT + 1)
    places = profiles.subplots(1, 2, sharey=True)
    for number, one in enumerate(found):
        low = min(found[0].size.shape[1], one.size.shape[1]) // 4  # modes that every way of resizing keeps
        profile = one.size[:, : max(low, 1)].mean(1)
        n = np.arange(len(profile))
        style = dict(
            color=('#000000', *LINES)[number], linewidth=4 if number == 0 else 2, alpha=0.5 + 0.5 * (number > 0)
        )
        places[0].plot(n, profile, label=one.mode, **style)
        places[1].plot(n / len(profile), profile, **style)
    places[0].set_xlabel('half waves n across the map', fontsize=FONT)
    places[1].set_xlabel('frequency n / N (1: a half wave per position)', fontsize=FONT)
    places[0].set_ylabel('root mean square,\nmean over low m', fontsize=FONT)
    places[0].legend(fontsize=FONT - 1, frameon=False)
    for axis in places:
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=FONT - 1)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the kind ``embeddings``."""
    add_network_arguments(parser)
    parser.add_argument('--to', type=int, nargs='+', required=True, metavar='PIXELS', help='image size: H W, or a side')
    parser.add_argument('--stage', type=int, default=1, choices=range(1, NUM_STAGES + 1), help='stage to draw (1)')


def run(args: argparse.Namespace) -> None:
    """Draw the kind ``embeddings``."""
    try:
        size = to_pair(args.to[0] if len(args.to) == 1 else args.to, '--to')
    except ValueError as error:
        raise ToolError(str(error)) from error
    model, label = load_vheat(args)
    embeds = list(model.freq_embed or ())
    if args.stage > len(embeds):
        raise ToolError(f'--stage {args.stage}: the network has {len(embeds)} stages')
    for stage, (embed, target) in enumerate(zip(embeds, grid_sizes(size), strict=False), 1):
        found = resizings(embed, target)
        height, width = embed.shape[:2]
        print(f'stage {stage}: {height} x {width} -> {target[0]} x {target[1]}, lowest quarter of modes')
        for one in found[1:]:
            print(
                f'  {one.mode}: error by half waves {one.half_waves:.1%}, by frequency {one.frequency:.1%}; '
                f'{one.empty:.0%} of the modes have no embedding'
            )
        if stage == args.stage:
            save_figure(embeddings_figure(found, stage, label), args.out, palette=True)
