"""The published variants, checks of arguments of the network, and the depths of its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

from vheat_mm.ops.freq_embed import NUM_STAGES

ARCHS: dict[str, dict] = {
    'tiny': dict(embed_dims=96, depths=(2, 2, 6, 2), post_norm=False, layer_scale=None),
    'small': dict(embed_dims=96, depths=(2, 2, 18, 2), post_norm=True, layer_scale=1e-5),
    'base': dict(embed_dims=128, depths=(2, 2, 18, 2), post_norm=True, layer_scale=1e-5),
}


def read_arch(arch: str | Mapping) -> dict:
    """Check an ``arch`` argument and fill in its defaults; see :class:`~vheat_mm.VHeat`."""
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'unknown arch {arch!r}, expected one of {sorted(ARCHS)} or a dict')
        return dict(ARCHS[arch])
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch must be one of {sorted(ARCHS)} or a dict, got {arch!r}')
    fields = {'embed_dims', 'depths', 'post_norm', 'layer_scale'}
    unknown, missing = set(arch) - fields, {'embed_dims', 'depths'} - set(arch)
    if unknown or missing:
        raise ValueError(
            f'arch dict has unknown keys {sorted(unknown)} and lacks {sorted(missing)}; its keys are {sorted(fields)}'
        )
    checked: dict = dict(post_norm=False, layer_scale=None) | dict(arch)
    dims, depths, scale = checked['embed_dims'], checked['depths'], checked['layer_scale']
    if not _is_int(dims) or dims < 2 or dims % 2:
        raise ValueError(f'embed_dims must be an even int, the width of the first stage, got {dims!r}')
    if not isinstance(depths, Sequence) or len(depths) != NUM_STAGES or not all(_is_int(d) and d > 0 for d in depths):
        raise ValueError(f'depths must be {NUM_STAGES} positive ints, got {depths!r}')
    if scale is not None and not isinstance(scale, Real):
        raise ValueError(f'layer_scale must be a number or None, got {scale!r}')
    return checked | dict(depths=tuple(depths))


def check_numbers(in_channels: int, mlp_ratio: float, drop_path_rate: float, frozen_stages: int) -> None:
    """Check arguments of :class:`~vheat_mm.VHeat`; ValueError if one is no number or out of its range."""
    if not _is_int(in_channels) or in_channels < 1:
        raise ValueError(f'in_channels must be a positive int, the number of bands, got {in_channels!r}')
    if not isinstance(drop_path_rate, Real) or not 0.0 <= drop_path_rate < 1.0:
        raise ValueError(f'drop_path_rate must lie in [0, 1), got {drop_path_rate!r}')
    if not _is_int(frozen_stages) or not -1 <= frozen_stages <= NUM_STAGES:
        raise ValueError(f'frozen_stages must be an int in -1 .. {NUM_STAGES}, got {frozen_stages!r}')
    if not isinstance(mlp_ratio, Real) or not 0 < mlp_ratio < math.inf:
        raise ValueError(f'mlp_ratio must be a positive number, got {mlp_ratio!r}')


def read_pretrained(
    pretrained: str | bool | None, init_cfg: dict | list[dict] | None, arch: str | Mapping
) -> dict | list[dict] | None:
    """The arguments ``pretrained`` and ``init_cfg`` in one; see :class:`~vheat_mm.VHeat`."""
    if pretrained is None or pretrained is False:
        return init_cfg
    if init_cfg is not None:
        raise ValueError(f'both pretrained={pretrained!r} and init_cfg={init_cfg!r} are given: keep one')
    return dict(type='Pretrained', checkpoint=_published_weights(arch) if pretrained is True else pretrained)


def _published_weights(arch: str | Mapping) -> str:
    found = read_arch(arch)
    for name, published in ARCHS.items():
        if found == published:
            return f'vheat_{name}'
    raise ValueError(
        f'pretrained=True: no weights were published for arch={arch!r}; give the path of a checkpoint, or one of the '
        f'published variants, {", ".join(map(repr, ARCHS))}'
    )


def read_out_indices(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    """Check output indices and return the stages, 0 to 3, in ascending order."""
    given = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
    if not given or not all(_is_int(i) and -NUM_STAGES <= i < NUM_STAGES for i in given):
        raise ValueError(f'out_indices must be stages in {-NUM_STAGES} .. {NUM_STAGES - 1}, got {out_indices!r}')
    stages = sorted({i % NUM_STAGES for i in given})
    if len(stages) != len(given):
        raise ValueError(f'out_indices names a stage twice: {out_indices!r}')
    return tuple(stages)


def depth_of(name: str, depths: Sequence[int]) -> int:
    """Depth of a backbone's parameter for layer-wise learning-rate decay; see :meth:`vheat_mm.VHeat.get_layer_depth`.

    Args:
        name: In the backbone's ``named_parameters()``.
        depths: Blocks of each stage.
    """
    kind, *rest = name.split('.')
    if kind == 'patch_embed':
        return 0
    if kind == 'freq_embed':  # shared by a stage: as early as the stage's first block
        return sum(depths[: int(rest[0])]) + 1
    if kind == 'layers':
        stage, entry = int(rest[0]), int(rest[1])
        return sum(depths[:stage]) + min(entry, depths[stage] - 1) + 1  # downsampling goes with the block before it
    return sum(depths) + 1


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
