"""Loading pretrained backbone weights: every key checked first, FVEs resized on the way in, one report logged."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch
from mmengine.logging import print_log

from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.models.arch import ARCHS
from vheat_mm.models.weights import ANCHOR, StateDict, Weights, find_weights
from vheat_mm.ops.freq_embed import NUM_STAGES, resize_freq_embed
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import some_of

if TYPE_CHECKING:
    from vheat_mm.models.vheat import VHeat

_FREQ_EMBED = re.compile(r'freq_embed\.\d$')
_OUT_NORM = re.compile(r'outnorm\d\.')


def load_pretrained(
    model: VHeat,
    checkpoint: str | os.PathLike,
    prefix: str | None = None,
    map_location: str = 'cpu',
    ema: bool = False,
    resize: str = 'pad',
) -> Weights:
    """Load backbone weights from a file, with FVEs of another grid resized, and log what was done.

    This is what ``init_cfg=dict(type='Pretrained', checkpoint=...)`` of :class:`~vheat_mm.VHeat` runs. Everything
    is checked before the first weight is written.

    Args:
        model: The backbone.
        checkpoint: Path or address; see :func:`read_checkpoint`.
        prefix: See :func:`find_weights`; ``None`` finds it.
        map_location: Accepted for MMEngine's sake: ``'cpu'``, from where weights are copied to the model's device.
        ema: See :func:`find_weights`.
        resize: How FVEs of another grid are brought to the model's: see :mod:`vheat_mm.ops.freq_embed`.

    Returns:
        What was found in the file.

    Raises:
        CheckpointError: Anything but output norms is missing, anything but a head is left over, or a shape differs.
    """
    if map_location != 'cpu':
        raise ValueError(f"map_location must be 'cpu', got {map_location!r}: weights are copied to the model's device")
    path = os.fspath(checkpoint)
    weights = find_weights(read_checkpoint(path), path, prefix, ema)
    own = model.state_dict()
    _check_variant(model, weights)

    state, resized, left_over = {}, [], []
    for key, value in weights.backbone.items():
        if key not in own:
            if not _OUT_NORM.match(key) and not _is_beyond_last_stage(key, model):
                left_over.append(key)
            continue
        if _FREQ_EMBED.match(key) and value.shape != own[key].shape:
            resized.append((key, value.shape, own[key].shape))
            value = resize_freq_embed(value, own[key].shape[:2], mode=resize)
        state[key] = value
    missing = [key for key in own if key not in state]
    wrong = [key for key in state if state[key].shape != own[key].shape]
    fatal = [key for key in missing if not _OUT_NORM.match(key)]
    if fatal or left_over or wrong:
        shapes = [f'{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}' for k in wrong]
        raise CheckpointError(
            f'{path!r} does not fit this VHeat ({_describe_model(model)}); missing: {some_of(fatal)}; '
            f'left over: {some_of(left_over)}; of another shape: {some_of(shapes)}. Nothing was loaded.'
        )
    model.load_state_dict(state, strict=False)
    dropped = [key for key in weights.backbone if key not in state] + list(weights.head)
    print_log(_report(weights, len(state), resized, missing, dropped, resize), logger='current')
    return weights


def resize_loaded_freq_embeds(model: VHeat, state_dict: dict, prefix: str, *_: object) -> None:
    """Load hook of :class:`~vheat_mm.VHeat`: pad or crop FVEs of another grid on their way in, and say so."""
    for index, own in enumerate(model.freq_embed or ()):
        key = f'{prefix}freq_embed.{index}'
        value = state_dict.get(key)
        if value is None or value.shape == own.shape or value.ndim != 3 or value.shape[2] != own.shape[2]:
            continue  # an error PyTorch reports by itself, or nothing to do
        state_dict[key] = resize_freq_embed(value, own.shape[:2], mode='pad')
        print_log(f'{key}: resized (pad) {_dims(value.shape)} -> {_dims(own.shape)}', logger='current')


def describe_weights(backbone: StateDict) -> dict[str, Any]:
    """Width, depths and layer scale of a backbone's weights, and the name of the ``arch`` that has them, if any."""
    depths: dict[int, int] = {}
    for key in backbone:
        if found := re.match(r'layers\.(\d)\.(\d+)\.op\.dwconv\.weight$', key):
            stage, block = int(found.group(1)), int(found.group(2))
            depths[stage] = max(depths.get(stage, 0), block + 1)
    stem = backbone.get('patch_embed.conv2.weight')  # missing from a damaged file, which the caller reports by key
    traits: dict[str, Any] = dict(
        embed_dims=2 * backbone[ANCHOR].shape[0] if stem is None else stem.shape[0],
        depths=tuple(depths[i] for i in sorted(depths)),
        layer_scale='layers.0.0.gamma1' in backbone,
        deployed='layers.0.0.op.k_exp' in backbone,
    )
    for name, arch in ARCHS.items():
        if _traits(arch) == (traits['embed_dims'], traits['depths'], traits['layer_scale']):
            traits['arch'] = name
    return traits


def _traits(arch: dict[str, Any]) -> tuple:
    return arch['embed_dims'], tuple(arch['depths']), arch['layer_scale'] is not None


def _check_variant(model: VHeat, weights: Weights) -> None:
    found = describe_weights(weights.backbone)
    if found['deployed'] != (model.freq_embed is None):
        remedy = (
            'call switch_to_deploy() on the model before loading'
            if found['deployed']
            else 'load into a model before its switch_to_deploy()'
        )
        kind = 're-parameterised' if found['deployed'] else 'not re-parameterised'
        raise CheckpointError(f'{weights.path!r} is {kind} and the model is the opposite: {remedy}')
    embed_dims, depths, layer_scale = _traits(model.arch)
    built = depths[: len(model.layers)]
    if (found['embed_dims'], found['depths'][: len(built)], found['layer_scale']) != (
        embed_dims,
        built,
        layer_scale,
    ):
        name = found.get('arch')
        raise CheckpointError(
            f'{weights.path!r} holds {"vHeat-" + name if name else "a vHeat"} with embed_dims={found["embed_dims"]}, '
            f'depths={found["depths"]}, {"" if found["layer_scale"] else "no "}layer scale, but the model is '
            f'{_describe_model(model)}: '
            + (f"set arch={name!r}, or take this model's checkpoint" if name else 'set arch to match')
        )


def _describe_model(model: VHeat) -> str:
    name = next((name for name, arch in ARCHS.items() if arch == model.arch), 'a custom arch')
    embed_dims, depths, layer_scale = _traits(model.arch)
    return f'{name}: embed_dims={embed_dims}, depths={depths}, {"" if layer_scale else "no "}layer scale'


def _is_beyond_last_stage(key: str, model: VHeat) -> bool:
    """Whether a key belongs to what ``out_indices`` leaves unbuilt: later stages and the downsampling to them."""
    last = len(model.layers) - 1
    if found := re.match(r'(?:layers|freq_embed)\.(\d)', key):
        stage = int(found.group(1))
        return stage > last or (last < NUM_STAGES - 1 and key.startswith(f'layers.{last}.{model.depths[last]}.'))
    return False


def _report(weights: Weights, loaded: int, resized: list, missing: list[str], dropped: list[str], mode: str) -> str:
    name = describe_weights(weights.backbone).get('arch')
    lines = [
        f'Weights of {"vHeat-" + name if name else "a vHeat"} from {weights.path!r}, entry {weights.entry!r}:',
        f'  loaded      {loaded:4d} tensors',
        f'  resized     {len(resized):4d}  (mode {mode}, counted above)',
        *(f'                    {key}: {_dims(old)} -> {_dims(new)}' for key, old, new in resized),
        f'  missing     {len(missing):4d}  (left as initialised) {some_of(missing)}',
        f'  unexpected  {len(dropped):4d}  (heads and unused outputs, none of the backbone) {some_of(dropped)}',
    ]
    return '\n'.join(lines)


def _dims(shape: torch.Size) -> str:
    return 'x'.join(map(str, shape))
