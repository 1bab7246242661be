"""``MMDET_VHEAT`` and ``MMSEG_VHEAT``: the backbone under the reference release's names and arguments.

Configs written for the release need ``custom_imports`` only. They inherit mmdet's and mmseg's Swin baselines and merge
into their backbone, so they pass Swin's arguments too. Those listed below are dropped with a warning; any other unknown
argument is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from mmengine.registry import MODELS

from vheat_mm.models.vheat import VHeat

# Passed by mmdet's and mmseg's Swin base configs. (Two more, mlp_ratio and with_cp, mean the same in vHeat.)
_SWIN_ARGUMENTS = {
    *('embed_dims', 'num_heads', 'window_size', 'qkv_bias', 'qk_scale', 'drop_rate', 'attn_drop_rate', 'patch_norm'),
    *('convert_weights', 'pretrain_img_size', 'patch_size', 'strides', 'use_abs_pos_embed', 'act_cfg', 'norm_cfg'),
}
# The released tiny configs pass this beside Swin's ``drop_path_rate``; the release uses the latter, too.
_WITHOUT_EFFECT = {'drop_path'}


def _released_vheat(
    depths: Sequence[int] = (2, 2, 9, 2),
    dims: int | Sequence[int] = 96,
    post_norm: bool = True,
    layer_scale: float | None = None,
    drop_path_rate: float = 0.1,
    img_size: int = 224,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    use_checkpoint: bool = False,
    pretrained: str | None = None,
    mlp_ratio: float = 4.0,
    with_cp: bool = False,
    init_cfg: dict | None = None,
    **others: object,
) -> VHeat:
    """Build :class:`VHeat` from the release's arguments; defaults are the release's.

    Args:
        depths: Blocks of the four stages.
        dims: Width of the first stage, or all four, each twice the one before.
        post_norm: See :class:`VHeat`, as for ``layer_scale``, ``drop_path_rate``, ``img_size``, ``out_indices``.
        use_checkpoint: ``with_cp`` of :class:`VHeat`.
        pretrained: See :class:`VHeat`.
        mlp_ratio: See :class:`VHeat`.
        with_cp: Swin's name of ``use_checkpoint``; either turns it on.
        init_cfg: MMEngine's; one that loads Swin weights belongs to the Swin base config and is dropped.
        others: Swin's other arguments, which are dropped; any argument that is not Swin's is an error.
    """
    unknown = sorted(set(others) - _SWIN_ARGUMENTS - _WITHOUT_EFFECT)
    if unknown:
        raise TypeError(f'MMDET_VHEAT / MMSEG_VHEAT got unknown arguments {unknown}')
    dropped = sorted(others)
    if init_cfg and 'swin' in str(init_cfg.get('checkpoint', '')).lower():
        dropped.append(f'init_cfg (Swin weights {init_cfg["checkpoint"]})')
        init_cfg = None
    if dropped:
        warnings.warn(
            f'these arguments of Swin, or without effect in the release, are not used by vHeat: {", ".join(dropped)}',
            stacklevel=2,
        )
    return VHeat(
        arch=dict(
            embed_dims=_first_width(dims),
            depths=depths,
            post_norm=post_norm,
            layer_scale=layer_scale,
        ),
        img_size=img_size,
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        with_cp=use_checkpoint or with_cp,
        pretrained=pretrained,
        init_cfg=init_cfg,
    )


def _first_width(dims: int | Sequence[int]) -> int:
    if isinstance(dims, int):
        return dims
    if list(dims) != [dims[0] << i for i in range(4)]:
        raise ValueError(f'dims must be an int or four widths each twice the one before, got {dims!r}')
    return dims[0]


for _name in ('MMDET_VHEAT', 'MMSEG_VHEAT'):
    MODELS.register_module(name=_name, module=_released_vheat)
