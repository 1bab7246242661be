"""The vHeat backbone in a checkpoint: found, compared with a model, loaded."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from vheat_mm.checkpoint.io import StateDict
from vheat_mm.ops.freq_embed import NUM_STAGES
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line, some_of

ANCHOR = 'patch_embed.conv1.weight'  # present in every vHeat state dict, whatever the task


_ANCHOR_KERNEL = (3, 3, 3)  # its shape but for the channels it makes, half the network's width


MAX_GRID = 1 << 12  # entries a side of an FVE: images of 16384 pixels


_MAX_WIDTH = 1 << 12


# released key -> ours, inside the backbone; and released key -> mmpretrain's, outside of it
_OUT_NORM_OF_CLASSIFIER = ('classifier.0.', 'outnorm3.')


_HEAD_OF_CLASSIFIER = ('classifier.3.', 'head.fc.')


@dataclass
class Weights:
    """Backbone and head weights found in a checkpoint.

    Attributes:
        path: Where they come from.
        entry: The checkpoint's entry they were in, ``'file'`` for a bare state dict.
        prefix: What stood before the backbone's keys.
        backbone: Backbone weights under :class:`~vheat_mm.VHeat`'s keys.
        head: All other weights of the entry, under MMEngine's keys (``head.fc.*`` for a classifier's linear layer) and
            without what wraps the whole model (``module.`` before ``backbone.``).
    """

    path: str
    entry: str
    prefix: str
    backbone: StateDict = field(default_factory=dict)
    head: StateDict = field(default_factory=dict)

    def to_mmengine(self) -> StateDict:
        """The weights as an MMEngine model holds them: ``backbone.`` before the backbone's keys."""
        return {f'backbone.{key}': value for key, value in self.backbone.items()} | self.head


def find_weights(
    checkpoint: dict[str, Any],
    path: str = 'checkpoint',
    prefix: str | None = None,
    ema: bool = False,
) -> Weights:
    """Find the vHeat backbone in a checkpoint of any supported format.

    Args:
        checkpoint: What :func:`read_checkpoint` returns.
        path: Named in errors.
        prefix: What stands before the backbone's keys, where a file holds several backbones.
        ema: Take the exponential moving average. (In MMEngine's files ``state_dict`` holds it already.)

    Raises:
        CheckpointError: No or several vHeat backbones; ``ema`` asked of a file without one; FVEs that are no grid;
            weights that are no plain floating-point numbers.
    """
    entry, state = _select_entry(checkpoint, path, ema)
    prefixes = sorted(key.removesuffix(ANCHOR) for key in state if key.endswith(ANCHOR))
    if prefix is not None:
        prefix = prefix if not prefix or prefix.endswith('.') else f'{prefix}.'
        prefixes = [p for p in prefixes if p == prefix]
    if len(prefixes) > 1:
        raise CheckpointError(
            f'{path!r} holds several vHeat backbones, under {some_of(prefixes)}: choose one with prefix=...'
        )
    if not prefixes:
        wanted = f'{prefix or ""}{ANCHOR}'
        raise CheckpointError(
            f'{path!r} holds no vHeat backbone: none of the {len(state)} keys in its entry {entry!r} '
            f'{"is" if prefix else "ends in"} {wanted!r}; the first are {some_of(list(state), 3)}'
        )
    weights = Weights(path=path, entry=entry, prefix=prefixes[0])
    wrapper = re.sub(r'(?<![^.])(backbone\.)?(_orig_mod\.)?$', '', weights.prefix)
    for key, value in state.items():
        inner = key.removeprefix(weights.prefix)
        if weights.prefix and inner == key:
            weights.head[key.removeprefix(wrapper)] = value
        elif inner.startswith(_HEAD_OF_CLASSIFIER[0]):
            weights.head[inner.replace(*_HEAD_OF_CLASSIFIER, 1)] = value
        else:
            weights.backbone[inner.replace(*_OUT_NORM_OF_CLASSIFIER, 1)] = value
    _check_values(weights)
    return weights


def _check_values(weights: Weights) -> None:
    """Refuse what would be converted in silence or resized without end, and report what is no number."""
    path, width = weights.path, 2 * weights.backbone[ANCHOR].numel() // math.prod(_ANCHOR_KERNEL)
    if width > _MAX_WIDTH:
        raise CheckpointError(f'{path!r} is damaged: {ANCHOR} makes the network {width} channels wide')
    for key, value in weights.backbone.items():
        if not value.is_floating_point():
            raise CheckpointError(
                f'{path!r} is damaged, or no vHeat: {first_line(key)} holds {value.dtype}, and weights are '
                'floating-point numbers'
            )
        stage = re.match(r'freq_embed\.(\d)$', key)
        if stage is None:
            continue
        if value.ndim != 3 or not value.numel():
            raise CheckpointError(f'{path!r} is damaged: {key} has shape {tuple(value.shape)} instead of (H, W, C)')
        if max(value.shape[:2]) > MAX_GRID or value.shape[2] != width << int(stage.group(1)):
            raise CheckpointError(
                f'{path!r} is damaged: {key} has shape {tuple(value.shape)}, and a network {width} channels wide has '
                f'(H, W, {width << int(stage.group(1))}) there, with grids of at most {MAX_GRID}'
            )
    broken = [key for key, value in weights.backbone.items() if not _is_finite(value)]
    if broken:
        print_log(f'{path!r} holds NaN or infinity in {some_of(broken)}', logger='current', level=logging.WARNING)


def _is_finite(value: Tensor) -> bool:
    if value.is_meta or value.layout != torch.strided:  # of a caller's own making; files hold none
        return True
    for dim, stride in enumerate(value.stride()):
        if stride == 0:  # one number for all: reading it once will do
            value = value.narrow(dim, 0, min(1, value.shape[dim]))
    if value.numel() == 0 or value.dtype.itemsize == 1:  # PyTorch finds no extremes of 8-bit floats
        return True
    return all(math.isfinite(extreme) for extreme in torch.stack(torch.aminmax(value)).tolist())


def to_mmengine(checkpoint: dict[str, Any], path: str = 'checkpoint') -> StateDict:
    """State dict of any supported checkpoint in MMEngine's spelling; MMEngine's own passes through unchanged."""
    state = checkpoint.get('state_dict')
    if isinstance(state, dict) and any(str(key).endswith(f'backbone.{ANCHOR}') for key in state):
        return state
    return find_weights(checkpoint, path).to_mmengine()


def freq_embed_grids(backbone: StateDict) -> list[tuple[int, int]]:
    """Grids (H, W) of the FVEs in a backbone's weights, stage by stage."""
    return [
        (value.shape[0], value.shape[1])
        for i in range(NUM_STAGES)
        if (value := backbone.get(f'freq_embed.{i}')) is not None
    ]


def _select_entry(checkpoint: dict[str, Any], path: str, ema: bool) -> tuple[str, StateDict]:
    plain = [name for name in ('model', 'state_dict') if isinstance(checkpoint.get(name), dict)]
    averaged = [name for name in ('model_ema', 'state_dict_ema') if isinstance(checkpoint.get(name), dict)]
    if 'ema_state_dict' in checkpoint and 'state_dict' in plain:
        averaged.append('state_dict')  # MMEngine's EMAHook saves the average there, the raw weights as ema_state_dict
    if ema and not averaged:
        raise CheckpointError(
            f'{path!r} holds no moving average of the weights; its entries are {some_of(list(checkpoint))}. Drop ema.'
        )
    if averaged and not ema and not plain:
        raise CheckpointError(f'{path!r} holds a moving average only ({averaged[0]!r}): ask for it with ema=True')
    names = averaged if ema else plain
    entry, state = (names[0], checkpoint[names[0]]) if names else ('file', checkpoint)
    found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if wrong := [key for key in found if not isinstance(key, str)]:
        raise CheckpointError(
            f'{path!r} is no checkpoint of a model: its tensors are called {wrong[0]!r}, not by names'
        )
    return entry, found
