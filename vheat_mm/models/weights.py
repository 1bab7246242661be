"""Comparing the weights of a vHeat with a module's, and loading them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from mmengine.logging import print_log
from torch import Tensor, nn

from vheat_mm.checkpoint.io import StateDict, read_checkpoint
from vheat_mm.checkpoint.released import find_released
from vheat_mm.models.arch import ARCHS
from vheat_mm.models.find_weights import ANCHOR, Weights, find_weights
from vheat_mm.ops.freq_embed import NUM_STAGES, resize_freq_embed
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.text import first_line, format_shape, some_of

SOURCE = 'vheat_mm.source'  # key of a backbone's metadata in a state dict: what its weights were read from
_FREQ_EMBED = re.compile(r'(?:.+\.)?freq_embed\.\d')
_OUT_NORM = re.compile(r'(?:backbone\.)?outnorm\d\.')
_STAGE = re.compile(r'(?:layers|freq_embed)\.(\d)(?:\.|$)')
_DOWNSAMPLE = re.compile(r'layers\.\d\.\d+\.[01]\.(?:weight|bias)$')


@dataclass
class Comparison:
    """Differences between a state dict and the one of a module.

    Attributes:
        state: The state dict to load.
        own: The module's.
        missing: Keys of the module that the state dict lacks.
        left_over: Keys of the state dict that the module lacks, without those in ``unbuilt``.
        unbuilt: Keys of stages that the module does not build because of ``out_indices``.
        resized: FVEs of another grid, which are resized when they are loaded.
        reshaped: All other tensors of another shape.
    """

    state: StateDict
    own: StateDict
    missing: list[str]
    left_over: list[str]
    unbuilt: list[str]
    resized: list[str]
    reshaped: list[str]

    def without(self, optional: Callable[[str], object]) -> Comparison:
        """The same without missing and left over keys that are optional."""
        missing, left_over = ([key for key in keys if not optional(key)] for keys in (self.missing, self.left_over))
        return replace(self, missing=missing, left_over=left_over)

    @property
    def fits(self) -> bool:
        """Whether the state dict can be loaded as it is."""
        return not (self.missing or self.left_over or self.reshaped)

    @property
    def num_loaded(self) -> int:
        """Number of tensors that loading replaces."""
        return len(self.own.keys() & self.state.keys()) - len(self.reshaped)

    def __str__(self) -> str:
        """The differences that prevent loading, for an error message."""
        return (
            f'missing: {some_of(self.missing)}; left over: {some_of(self.left_over)}; '
            f'of another shape: {some_of(self._shapes(self.reshaped))}'
        )

    def report(self, mode: str = 'pad') -> str:
        """What loading does, for the log; ``mode`` is how FVEs are resized."""
        notes = {
            f'resized, {mode}': self._shapes(self.resized, '->'),
            'of another shape, not loaded': self._shapes(self.reshaped),
            'missing, left as initialised': self.missing,
            'of stages that are not built, dropped': self.unbuilt,
            'not of this model, dropped': self.left_over,
        }
        lines = [f'{self.num_loaded} of {len(self.own)} tensors loaded']
        lines += [f'  {note} ({len(keys)}): {some_of(keys)}' for note, keys in notes.items() if keys]
        return '\n'.join(lines)

    def _shapes(self, keys: list[str], relation: str = 'instead of') -> list[str]:
        shapes = {key: (format_shape(self.state[key].shape), format_shape(self.own[key].shape)) for key in keys}
        return [f'{key} {found} {relation} {own}' for key, (found, own) in shapes.items()]


def compare(state: StateDict, own: StateDict, backbone: str | None = None) -> Comparison:
    """Compare a state dict with the one of the module that is to load it.

    Args:
        state: The state dict to load.
        own: The module's.
        backbone: Prefix of a vHeat of which ``state`` may hold more stages than the module has; ``None`` for none.
    """
    only_there = [key for key in state if key not in own]
    unbuilt = {} if backbone is None else _unbuilt(only_there, own, backbone)
    differ = [key for key in own if key in state and state[key].shape != own[key].shape]
    resized = [key for key in differ if _is_other_grid(key, state[key], own[key])]
    return Comparison(
        state=state,
        own=own,
        missing=[key for key in own if key not in state],
        left_over=[key for key in only_there if key not in unbuilt],
        unbuilt=list(unbuilt),
        resized=resized,
        reshaped=[key for key in differ if key not in resized],
    )


def _is_other_grid(key: str, value: Tensor, own: Tensor) -> bool:
    return _FREQ_EMBED.fullmatch(key) is not None and value.ndim == own.ndim == 3 and value.shape[2] == own.shape[2]


def _unbuilt(keys: list[str], own: StateDict, prefix: str) -> dict[str, None]:
    """The keys, in order, of the stages after the last one that a vHeat has, and of the downsampling to them."""
    stages = [_STAGE.match(key.removeprefix(prefix)) for key in own if key.startswith(prefix)]
    last = max((int(stage.group(1)) for stage in stages if stage), default=NUM_STAGES - 1)

    def is_unbuilt(key: str) -> bool:
        stage = _STAGE.match(key)
        return stage is not None and int(stage.group(1)) >= (last if _DOWNSAMPLE.match(key) else last + 1)

    if last == NUM_STAGES - 1:
        return {}
    return dict.fromkeys(key for key in keys if key.startswith(prefix) and is_unbuilt(key.removeprefix(prefix)))


@dataclass(frozen=True)
class Variant:
    """The part of ``arch`` (see :class:`~vheat_mm.VHeat`) that can be read from a backbone's weights."""

    embed_dims: int
    depths: tuple[int, ...]
    layer_scale: bool
    deployed: bool

    @classmethod
    def of(cls, backbone: StateDict) -> Variant:
        """Read it from the keys and shapes of a backbone's state dict."""
        depths: dict[int, int] = {}
        for key in backbone:
            if found := re.match(r'layers\.(\d)\.(\d+)\.op\.dwconv\.weight$', key):
                stage, block = int(found.group(1)), int(found.group(2))
                depths[stage] = max(depths.get(stage, 0), block + 1)
        stem = backbone.get('patch_embed.conv2.weight')  # may be missing or damaged: compare() reports that by its key
        return cls(
            embed_dims=2 * backbone[ANCHOR].shape[0] if stem is None or not stem.ndim else stem.shape[0],
            depths=tuple(depths[stage] for stage in sorted(depths)),
            layer_scale='layers.0.0.gamma1' in backbone,
            deployed='layers.0.0.op.k_exp' in backbone,
        )

    @property
    def arch(self) -> str | None:
        """Name of the published variant that has these stages."""
        for name, arch in ARCHS.items():
            published = arch['embed_dims'], arch['layer_scale'] is not None, tuple(arch['depths'])[: len(self.depths)]
            if self.depths and published == (self.embed_dims, self.layer_scale, self.depths):
                return name
        return None

    @property
    def name(self) -> str:
        """``'vHeat-tiny'``, or ``'a vHeat'`` if it is not a published variant."""
        return f'vHeat-{self.arch}' if self.arch else 'a vHeat'

    def __str__(self) -> str:
        scale = 'layer scale' if self.layer_scale else 'no layer scale'
        return f'{self.name} with embed_dims={self.embed_dims}, depths={self.depths}, {scale}'


def is_counter(key: str) -> bool:
    """Whether a key is of the number of batches that BatchNorm counts; files of other programs lack it."""
    return key.endswith('num_batches_tracked')


def check_fit(state: StateDict, own: StateDict, path: str, finetune: bool) -> str:
    """Check the weights of a whole model, of which those of the backbone start with ``backbone.``.

    Args:
        state: The checkpoint's weights.
        own: The model's state dict.
        path: Named in messages.
        finetune: Whether heads and output norms may differ.

    Returns:
        What loading will do, for the log.

    Raises:
        CheckpointError: Weights would be left out.
    """
    found = wrong = compare(state, own, 'backbone.').without(is_counter)
    if finetune:
        backbone = compare(_backbone_of(state), _backbone_of(own), 'backbone.')
        wrong = backbone.without(lambda key: is_counter(key) or _OUT_NORM.match(key))
    if not wrong.fits or not found.num_loaded:
        release = find_released(path)
        config = f'its config, {release.config}' if release else 'the config that the checkpoint was trained with'
        raise CheckpointError(
            f'{path!r} does not fit the model{_describe_variants(state, own)}; {wrong}. '
            f'Take {config}, or a checkpoint of this config.'
        )
    return f'Weights from {path!r}: {found.report()}'


def _backbone_of(state: StateDict) -> StateDict:
    return {key: value for key, value in state.items() if key.startswith('backbone.')}


def _describe_variants(state: StateDict, own: StateDict) -> str:
    """``': it holds vHeat-small ..., the model is vHeat-tiny ...'`` where both are a vHeat, and different."""
    backbones = [{key.removeprefix('backbone.'): value for key, value in _backbone_of(s).items()} for s in (state, own)]
    if not all(ANCHOR in backbone for backbone in backbones):
        return ''
    found, expected = map(Variant.of, backbones)
    return f': it holds {found}, the model is {expected}' if found != expected else ''


def load_pretrained(
    model: nn.Module,
    checkpoint: str | os.PathLike,
    prefix: str | None = None,
    map_location: str = 'cpu',
    ema: bool | None = False,
    resize: str = 'pad',
) -> Weights:
    """Load backbone weights from a file, with FVEs of another grid resized, and log what was done.

    This is what ``init_cfg=dict(type='Pretrained', checkpoint=...)`` of :class:`~vheat_mm.VHeat` runs. Everything
    is checked before the first weight is written.

    Args:
        model: A :class:`~vheat_mm.VHeat`.
        checkpoint: Path or URL; see :func:`~vheat_mm.checkpoint.read_checkpoint`.
        prefix: See :func:`find_weights`; ``None`` finds it.
        map_location: Only ``'cpu'``, MMEngine's default; weights are copied to the model's device.
        ema: See :func:`find_weights`.
        resize: How FVEs are resized to the model's grid: see :mod:`vheat_mm.ops.freq_embed`.

    Returns:
        What was found in the file.

    Raises:
        CheckpointError: Anything but output norms is missing, anything but a head is left over, or a shape differs.
    """
    if map_location != 'cpu':
        raise ValueError(f"map_location must be 'cpu', got {map_location!r}: weights are copied to the model's device")
    content = read_checkpoint(checkpoint)
    path = os.fspath(checkpoint)
    weights = find_weights(content, path, prefix, ema)
    own = model.state_dict()
    variant = check_variant(weights.backbone, own, repr(path))
    backbone, note = adapt_bands(weights.backbone, own, path)
    found = compare(backbone, own, backbone='')
    wrong = found.without(_OUT_NORM.match)
    if not wrong.fits:
        raise CheckpointError(f'{path!r} does not fit this model, {variant}; {wrong}. Nothing was loaded.')
    try:
        state = dict(backbone)
        for key in found.resized:
            state[key] = resize_freq_embed(state[key], (own[key].shape[0], own[key].shape[1]), mode=resize)
        load_fitting(model, state)
    except RuntimeError as error:  # memory, and types of numbers without interpolation or conversion
        raise CheckpointError(f'{path!r} cannot be loaded: {first_line(error)}') from error
    if weights.head:
        note += f'\n  not of the backbone ({len(weights.head)}): {some_of(weights.head)}'
    text = f'Weights of {variant.name} from {path!r}, {weights.choice}: {found.report(resize)}{note}'
    print_log(text, logger='current')
    return weights


def adapt_bands(state: StateDict, own: StateDict, path: str, key: str = ANCHOR) -> tuple[StateDict, str]:
    """Fit a first convolution of three bands to images of another number, as timm does; a note for the log.

    One band gets the sum of the three. More get copies of them in turn, scaled so that the output keeps its range.
    """
    weight, bands = state.get(key), own[key].shape[1]
    if not isinstance(weight, Tensor) or weight.ndim != 4 or weight.shape[1] != 3 or bands == 3:
        return state, ''
    if weight.dtype.itemsize == 1:
        raise CheckpointError(f'{path!r} cannot be fitted to {bands} bands: {key} holds {weight.dtype}')
    if bands == 1:
        adapted, how = weight.sum(dim=1, keepdim=True), 'their sum'
    else:
        adapted = weight[:, [band % 3 for band in range(bands)]] * (3 / bands)
        how = f'repeated in turn, times 3/{bands}'
    return {**state, key: adapted}, f'\n  {key} adapted from 3 bands to {bands}: {how}'


def load_fitting(module: nn.Module, state: StateDict) -> None:
    """Load the tensors that the module has in that shape, or FVEs of another grid."""
    found = compare(state, module.state_dict())
    module.load_state_dict({k: v for k, v in state.items() if k in found.own and k not in found.reshaped}, strict=False)


def resize_loaded_freq_embeds(
    model: nn.Module, state_dict: dict, prefix: str, local_metadata: dict, *_: object
) -> None:
    """Load hook of :class:`~vheat_mm.VHeat`: pad or crop FVEs of another grid, and log it.

    Raises:
        CheckpointError: Published weights, whose name a loader wrote into the metadata, are another variant's: MMEngine
            would leave out what does not fit.
    """
    if SOURCE in local_metadata:
        backbone = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        check_variant(backbone, model.state_dict(), repr(local_metadata[SOURCE]))
    for name, own in model.named_parameters():
        key = f'{prefix}{name}'
        value = state_dict.get(key)
        if value is None or value.shape == own.shape or not _is_other_grid(name, value, own):
            continue
        state_dict[key] = resize_freq_embed(value, (own.shape[0], own.shape[1]), mode='pad')
        print_log(f'{key}: resized (pad) {format_shape(value.shape)} -> {format_shape(own.shape)}', logger='current')


def check_variant(backbone: StateDict, own: StateDict, source: str) -> Variant:
    """Refuse a backbone of another variant than the model's, which is returned."""
    found, expected = Variant.of(backbone), Variant.of(own)
    if found.deployed != expected.deployed:
        raise CheckpointError(
            f'{source} is re-parameterised and the model is not: call switch_to_deploy() on it before loading'
            if found.deployed
            else f'{source} is not re-parameterised and the model is: load before calling switch_to_deploy()'
        )
    same_stages = found.depths[: len(expected.depths)] == expected.depths
    if (found.embed_dims, found.layer_scale) != (expected.embed_dims, expected.layer_scale) or not same_stages:
        own_name = f", such as 'vheat_{expected.arch}'" if expected.arch else ''
        same = f"arch={found.arch!r} or create_model('vheat_{found.arch}')" if found.arch else 'arch to match'
        raise CheckpointError(
            f"{source} holds {found}, but the model is {expected}: set {same}, or take this model's weights{own_name}"
        )
    return expected
