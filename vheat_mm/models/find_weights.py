"""Finding the vHeat backbone in a checkpoint of any supported format."""

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
from vheat_mm.checkpoint.released import find_released
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line, some_of

ANCHOR = 'patch_embed.conv1.weight'  # a key of every vHeat state dict, whatever the task
MAX_GRID = 1 << 12  # entries per side of an FVE: images of 16384 pixels
_MAX_WIDTH = 1 << 12
AVERAGE = 'model_ema'  # the release's entry with the moving average

# key of the released classifier -> key of mmpretrain's ImageClassifier: inside the backbone, and outside of it
_OUT_NORM_OF_CLASSIFIER = ('classifier.0.', 'outnorm3.')
_HEAD_OF_CLASSIFIER = ('classifier.3.', 'head.fc.')


@dataclass
class Weights:
    """Backbone and head weights found in a checkpoint.

    Attributes:
        path: The file.
        entry: The checkpoint's entry that holds them, ``'file'`` for a bare state dict.
        has_average: Whether the checkpoint is one of the release with a moving average.
        prefix: Prefix of the backbone's keys in that entry.
        backbone: Backbone weights under :class:`~vheat_mm.VHeat`'s keys.
        head: All other weights of the entry, under MMEngine's keys (``head.fc.*`` for a classifier's linear layer) and
            without a prefix of the whole model (``module.`` before ``backbone.``).
    """

    path: str
    entry: str
    prefix: str
    has_average: bool = False
    backbone: StateDict = field(default_factory=dict)
    head: StateDict = field(default_factory=dict)

    @property
    def choice(self) -> str:
        """Which of a checkpoint's weights these are, for the log."""
        note = ', the moving average' if self.entry == AVERAGE else f', not the moving average {AVERAGE!r} (ema=True)'
        return f'entry {self.entry!r}{note if self.has_average else ""}'

    def to_mmengine(self) -> StateDict:
        """State dict of an MMEngine model: the backbone's keys start with ``backbone.``."""
        return {f'backbone.{key}': value for key, value in self.backbone.items()} | self.head


def find_weights(
    checkpoint: dict[str, Any], path: str = 'checkpoint', prefix: str | None = None, ema: bool | None = False
) -> Weights:
    """Find the vHeat backbone in a checkpoint of any supported format.

    Args:
        checkpoint: What :func:`~vheat_mm.checkpoint.read_checkpoint` returns.
        path: Path, address or name that the user gave.
        prefix: Prefix of the backbone's keys, needed where a file holds several backbones.
        ema: Take the exponential moving average. ``None``, for a model to use: if ``path`` is the name (or address in
            the release) of published weights, and there is one, because the published accuracy is the average's.
            ``False``, for a model to train: the release starts from the other weights. (In MMEngine's files
            ``state_dict`` is the average already.)

    Raises:
        CheckpointError: No or several vHeat backbones; ``ema`` asked of a file without one; FVEs that are not a grid;
            weights that are not plain floating-point numbers.
    """
    entry, state = _select_entry(checkpoint, path, ema)
    prefixes = sorted(key.removesuffix(ANCHOR) for key in state if key.endswith(ANCHOR))
    if prefix is not None:
        prefix = prefix if not prefix or prefix.endswith('.') else f'{prefix}.'
        prefixes = [p for p in prefixes if p == prefix]
    if len(prefixes) > 1:
        raise CheckpointError(
            f'{path!r} holds several vHeat backbones, under {some_of(map(repr, prefixes))}: choose one with prefix=...'
        )
    if not prefixes:
        wanted = f'{prefix or ""}{ANCHOR}'
        raise CheckpointError(
            f'{path!r} holds no vHeat backbone: none of the {len(state)} keys in its entry {entry!r} '
            f'{"is" if prefix else "ends in"} {wanted!r}; the first are {some_of(state, 3)}'
        )
    weights = Weights(path=path, entry=entry, prefix=prefixes[0], has_average=AVERAGE in checkpoint)
    wrapper = re.sub(r'(?<![^.])(backbone\.)?(_orig_mod\.)?$', '', weights.prefix)
    sources: dict[tuple[bool, str], str] = {}  # (of the head, key) -> key in the file
    for key, value in state.items():
        inner = key.removeprefix(weights.prefix)
        of_head = bool(weights.prefix and inner == key) or inner.startswith(_HEAD_OF_CLASSIFIER[0])
        if weights.prefix and inner == key:
            inner = key.removeprefix(wrapper)
        elif of_head:
            inner = inner.replace(*_HEAD_OF_CLASSIFIER, 1)
        elif inner.startswith(_OUT_NORM_OF_CLASSIFIER[0]):
            inner = inner.replace(*_OUT_NORM_OF_CLASSIFIER, 1)
        if (other := sources.setdefault((of_head, inner), key)) != key:
            raise CheckpointError(
                f'{path!r} holds both {first_line(other)} and {first_line(key)}, which are the same weights of the '
                'model: remove one of them'
            )
        (weights.head if of_head else weights.backbone)[inner] = value
    _check_values(weights)
    return weights


def _select_entry(checkpoint: dict[str, Any], path: str, ema: bool | None) -> tuple[str, StateDict]:
    plain = [name for name in ('model', 'state_dict') if isinstance(checkpoint.get(name), dict)]
    averaged = [name for name in (AVERAGE, 'state_dict_ema') if isinstance(checkpoint.get(name), dict)]
    if 'ema_state_dict' in checkpoint and 'state_dict' in plain:
        averaged.append('state_dict')  # MMEngine's EMAHook saves the average there, the raw weights as ema_state_dict
    ema = bool(averaged) and find_released(path) is not None if ema is None else ema
    if ema and not averaged:
        raise CheckpointError(
            f'{path!r} holds no moving average of the weights; its entries are {some_of(checkpoint)}. Drop ema.'
        )
    if averaged and not ema and not plain:
        raise CheckpointError(f'{path!r} holds a moving average only ({averaged[0]!r}): ask for it with ema=True')
    names = averaged if ema else plain
    entry, state = (names[0], checkpoint[names[0]]) if names else ('file', checkpoint)
    found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    require_names(found, path)
    return entry, found


def require_names(state: dict[Any, Any], path: str) -> None:
    """Raise CheckpointError if keys of a state dict are not names."""
    if wrong := [key for key in state if not isinstance(key, str)]:
        raise CheckpointError(
            f'{path!r} is not a checkpoint of a model: the keys of its tensors are not names but {wrong[0]!r}'
        )


def _check_values(weights: Weights) -> None:
    """Refuse weights of the wrong type and FVEs too large to resize; log a warning for NaN and infinity."""
    path, stem = weights.path, weights.backbone[ANCHOR]
    if stem.ndim != 4:
        raise CheckpointError(
            f'{path!r} is corrupt: {ANCHOR} has shape {tuple(stem.shape)} instead of (C / 2, 3, 3, 3)'
        )
    width = 2 * stem.shape[0]
    if width > _MAX_WIDTH:
        raise CheckpointError(f'{path!r} is corrupt: by the shape of {ANCHOR} the network is {width} channels wide')
    for key, value in weights.backbone.items():
        if not value.is_floating_point():
            raise CheckpointError(
                f'{path!r} is corrupt or not a vHeat: {first_line(key)} holds {value.dtype} instead of '
                'floating-point numbers'
            )
        stage = re.match(r'freq_embed\.(\d)$', key)
        if stage is None:
            continue
        if value.ndim != 3 or not value.numel():
            raise CheckpointError(f'{path!r} is corrupt: {key} has shape {tuple(value.shape)} instead of (H, W, C)')
        if max(value.shape[:2]) > MAX_GRID or value.shape[2] != width << int(stage.group(1)):
            raise CheckpointError(
                f'{path!r} is corrupt: {key} has shape {tuple(value.shape)}; a network {width} channels wide has '
                f'(H, W, {width << int(stage.group(1))}) there, with H and W of at most {MAX_GRID}'
            )
    broken = [key for key, value in weights.backbone.items() if not _is_finite(value)]
    if broken:
        print_log(f'{path!r} holds NaN or infinity in {some_of(broken)}', logger='current', level=logging.WARNING)


def _is_finite(value: Tensor) -> bool:
    if value.is_meta or value.layout != torch.strided:  # made by the caller; read_checkpoint refuses both
        return True
    for dim, stride in enumerate(value.stride()):
        if stride == 0:  # an expanded tensor repeats its values: read them once
            value = value.narrow(dim, 0, min(1, value.shape[dim]))
    if value.numel() == 0:
        return True
    if value.dtype.itemsize == 1:  # aminmax does not take 8-bit floats
        value = value.float()
    return all(math.isfinite(extreme) for extreme in torch.stack(torch.aminmax(value)).tolist())
