"""The published models in timm's registry; imported when timm is, see :mod:`vheat_mm`.

timm's own functions then work with them (``timm.create_model('vheat_tiny')``, its training script), and so do the
libraries that take timm's models by name. Weights go through :func:`vheat_mm.checkpoint.read_checkpoint`.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import is_scriptable
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import FeatureGetterNet
from torch import nn

from vheat_mm.checkpoint.io import StateDict
from vheat_mm.checkpoint.released import find_released
from vheat_mm.models.arch import ARCHS
from vheat_mm.models.classifier import VHeatClassifier
from vheat_mm.models.find_weights import find_weights
from vheat_mm.models.vheat import VHeat

register_notrace_module(VHeat)  # a leaf of torch.fx graphs: what it runs depends on sizes, and caches decays


def _cfg(name: str) -> dict[str, Any]:
    released = find_released(name)
    assert released is not None
    return dict(
        url=released.url,
        file=name,  # comes before the address: the name, which VHEAT_WEIGHTS may redirect
        custom_load=True,  # by VHeatClassifier.load_pretrained
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv='backbone.patch_embed.conv1',
        classifier='head.fc',
        origin_url='https://github.com/MzeroMiko/vHeat',
        paper_name='vHeat: Building Vision Models upon Heat Conduction',
        paper_ids='arXiv:2405.16555',
    )


default_cfgs = generate_default_cfgs({f'vheat_{arch}.in1k': _cfg(f'vheat_{arch}') for arch in ARCHS})


def _create(arch: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if not isinstance(pretrained, bool):
        raise ValueError(
            f'pretrained must be True or False, got {pretrained!r}: timm takes the path or address of a checkpoint as '
            'pretrained_cfg_overlay=dict(file=...)'
        )
    overlay = dict(kwargs.pop('pretrained_cfg_overlay', None) or {})
    if overlay.get('url') or overlay.get('hf_hub_id'):
        overlay.setdefault('file', overlay.get('url'))  # not the one of the table, which would come first
    if overlay.get('file'):
        overlay.setdefault('custom_load', True)
    return build_model_with_cfg(
        functools.partial(_build, arch),
        f'vheat_{arch}',
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_to_own_keys,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', (0, 1, 2, 3)), feature_cls=_Maps),
        **kwargs,
    )


class _Maps(FeatureGetterNet):
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        cast(VHeatClassifier, self.model).set_grad_checkpointing(enable)


def _build(
    arch: str,
    in_chans: int = 3,
    output_stride: int = 32,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> VHeatClassifier:
    if output_stride != 32:
        raise ValueError(f'output_stride must be 32, got {output_stride!r}: heat conduction has no dilated form')
    if is_scriptable():
        raise ValueError('scriptable=True: torch.jit.script cannot compile vHeat; trace or export it instead')
    with contextlib.nullcontext() if device is None else torch.device(device):
        return VHeatClassifier(arch, in_channels=in_chans, **arguments).to(dtype=dtype)


def _to_own_keys(state: StateDict, model: nn.Module) -> StateDict:
    """Weights that timm has read, from the Hugging Face Hub or a folder of :func:`timm.models.save_for_hf`."""
    return find_weights(state).to_mmengine()


@register_model
def vheat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """vHeat-T, 30.9 M parameters, 82.2 % top-1 on ImageNet-1K."""
    return _create('tiny', pretrained, **kwargs)


@register_model
def vheat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """vHeat-S, 52.2 M parameters, 83.6 % top-1 on ImageNet-1K."""
    return _create('small', pretrained, **kwargs)


@register_model
def vheat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """vHeat-B, 92.1 M parameters, 83.9 % top-1 on ImageNet-1K."""
    return _create('base', pretrained, **kwargs)
