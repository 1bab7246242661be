"""Backbones by config or by name, for pictures that compare them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import MODELS
from torch import Tensor, nn

from vheat_mm.apis.config import open_config
from vheat_mm.apis.heat.cam import to_nchw
from vheat_mm.apis.inference.model import check_device, load_model
from vheat_mm.apis.model_zoo import create_model, list_models
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.models.vheat import HeatConduction2d, VHeat
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.text import first_line, some_of
from vheat_mm.utils.torchvision import ensure_torchvision

TIMM = 'timm:'
UNTRAINED = 'UNTRAINED: random values, nothing learnt'


@dataclass
class Network:
    """A backbone in evaluation mode.

    Attributes:
        backbone: Batch (1, 3, H, W) -> one or several maps.
        label: Config or name, and checkpoint or 'untrained'.
        preprocessor: MMEngine's, which makes a batch of images in BGR order.
    """

    backbone: nn.Module
    label: str
    preprocessor: nn.Module

    def last_map(self, batch: Tensor) -> Tensor:
        """Batch (1, 3, H, W) of :meth:`prepare` -> last map (1, C, h, w), also of channels-last networks."""
        maps = self.backbone(batch)
        last = maps[-1] if isinstance(maps, (tuple, list)) else maps
        return to_nchw(last, (batch.shape[-2], batch.shape[-1]))

    def prepare(self, image: np.ndarray) -> Tensor:
        """Image (H, W, 3) uint8 RGB -> batch (1, 3, H, W), normalised."""
        bgr = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)
        return self.preprocessor(dict(inputs=bgr[None], data_samples=None), False)['inputs']


def load_network(name: str, checkpoint: str | None = None, size: int = 224, device: str | None = None) -> Network:
    """Build a backbone.

    Args:
        name: Config of MMDetection, MMSegmentation or MMPreTrain; ``vheat_tiny``, ``vheat_small`` or ``vheat_base``; or
            ``timm:`` and the name of a timm model.
        checkpoint: File, address, published name or ``'released'``; without it weights are random, the same each time.
        size: Side of the images in pixels, which some models of timm are built for.
        device: By default the accelerator that MMEngine finds, else the CPU.

    Raises:
        ToolError: Unknown name, or timm is not installed; a checkpoint of timm does not fit.
        CheckpointError: The checkpoint does not fit.
    """
    ensure_torchvision()
    place = check_device(device)
    short = f'{name.removeprefix(TIMM)} (timm)' if name.startswith(TIMM) else Path(name).stem
    label = f'{short}, {Path(checkpoint).name if checkpoint else "untrained"}'
    preprocessor: nn.Module = ImgDataPreprocessor((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), bgr_to_rgb=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name.startswith(TIMM):
            backbone, preprocessor = _timm(name.removeprefix(TIMM), checkpoint, size)
        elif name in list_models():
            backbone = create_model(name, True if checkpoint == 'released' else checkpoint, features_only=True)
        else:
            model: Any = load_model(name, checkpoint, place).model if checkpoint else _untrained(name)
            backbone, preprocessor = model.backbone, model.data_preprocessor
    backbone.train(False)  # not chained: mmdet's Swin returns None
    return Network(backbone.to(place), label, preprocessor.to(place))


def _untrained(name: str) -> nn.Module:
    cfg = open_config(name)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))  # as the Runner does
    for part in (cfg.model, cfg.model.backbone):
        for key in ('init_cfg', 'pretrained'):  # published weights would be loaded
            part.pop(key, None)
    model = MODELS.build(cfg.model)
    if not isinstance(model.backbone, VHeat):  # it is initialised when built
        model.backbone.init_weights()
    return model


def _timm(name: str, checkpoint: str | None, size: int) -> tuple[nn.Module, nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise ToolError(f"{TIMM}{name} needs timm: pip install 'vheat_mm[timm]'") from error
    if not timm.is_model(name):
        raise ToolError(f'timm has no model {name!r}; timm.list_models() lists them')
    arguments: dict[str, Any] = dict(num_classes=0, pretrained=checkpoint == 'released')
    try:
        try:
            model: Any = timm.create_model(name, img_size=size, **arguments)
        except TypeError:  # most convolutional networks are built for no size
            model = timm.create_model(name, **arguments)
    except Exception as error:
        raise ToolError(f'cannot build {TIMM}{name}: {first_line(error)}') from error
    if checkpoint and not arguments['pretrained']:
        content = read_checkpoint(checkpoint)
        state = content.get('state_dict') or content.get('model') or content
        own = model.state_dict()
        if lacking := [key for key, value in own.items() if getattr(state.get(key), 'shape', None) != value.shape]:
            raise ToolError(f'{checkpoint!r} does not fit {TIMM}{name}: it lacks {some_of(lacking, 3)}, or their size')
        model.load_state_dict({key: state[key] for key in own})
    model.forward = model.forward_features
    means = ([255 * value for value in model.pretrained_cfg[key]] for key in ('mean', 'std'))
    return model, ImgDataPreprocessor(*means, bgr_to_rgb=True)


def load_vheat(args: argparse.Namespace) -> tuple[VHeat, str]:
    """The vHeat that :func:`add_network_arguments` name, see :func:`vheat_of`."""
    network = load_network(args.network, args.checkpoint, device=args.device)
    return vheat_of(network.backbone, network.label)


def vheat_of(backbone: nn.Module, label: str) -> tuple[VHeat, str]:
    """A backbone as a vHeat with frequency value embeddings, and its label, which says if it is untrained.

    It is where every bias of ``to_k`` is 0, as it was drawn; no training leaves that so.

    Raises:
        ToolError: It is another network, or deployed for one resolution.
    """
    if not isinstance(backbone, VHeat) or backbone.freq_embed is None:
        what = 'is deployed for one resolution' if isinstance(backbone, VHeat) else f'has a {type(backbone).__name__}'
        raise ToolError(f'{label} {what}: give a vHeat with frequency value embeddings')
    blocks = (module for module in backbone.modules() if isinstance(module, HeatConduction2d))
    learnt = any(cast(nn.Linear, block.to_k[0]).bias.any() for block in blocks)
    return backbone, label if learnt else f'{label}\n{UNTRAINED}'


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``network``, ``checkpoint`` and ``--device``."""
    parser.add_argument('network', help=f"config, vheat_tiny (..._small, ..._base), or '{TIMM}' and a name of timm")
    parser.add_argument('checkpoint', nargs='?', help="file, address, name or 'released'; without it random weights")
    parser.add_argument('--device', help='such as cpu or cuda:1')
