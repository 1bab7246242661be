"""Backbones by config or by name, for pictures that compare them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from vheat_mm.apis.config import open_config
from vheat_mm.apis.heat.cam import to_nchw
from vheat_mm.apis.inference.model import check_device, load_model
from vheat_mm.apis.inference.reading import decoding, read
from vheat_mm.apis.inference.sources import list_items
from vheat_mm.apis.model_zoo import create_model
from vheat_mm.models.arch import ARCHS
from vheat_mm.models.vheat import HeatConduction2d, VHeat
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.text import first_line
from vheat_mm.utils.torchvision import ensure_torchvision

TIMM = 'timm:'
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, RGB


@dataclass
class Network:
    """A backbone in evaluation mode.

    Attributes:
        backbone: Image (1, 3, H, W) -> one or several maps.
        label: Config or name, and checkpoint or 'untrained'.
        trained: Whether weights were loaded.
        mean: Of the three bands that it takes, in their order, as for ``std``.
        to_rgb: Whether the first band is red.
    """

    backbone: nn.Module
    label: str
    trained: bool
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    to_rgb: bool = True

    def last_map(self, image: Tensor) -> Tensor:
        """Image (1, 3, H, W) of :func:`normalised` -> last map (1, C, h, w), also of channels-last networks."""
        maps = self.backbone(image)
        last = maps[-1] if isinstance(maps, (tuple, list)) else maps
        return to_nchw(last, (image.shape[-2], image.shape[-1]))

    def normalised(self, image: np.ndarray) -> Tensor:
        """Image (H, W, 3) uint8 RGB -> input (1, 3, H, W)."""
        bands = torch.from_numpy(image if self.to_rgb else image[..., ::-1].copy()).float()
        device = next(self.backbone.parameters()).device
        return ((bands - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)[None].to(device)


def load_network(
    name: str, checkpoint: str | None = None, size: int = 224, device: str | None = None, seed: int = 0
) -> Network:
    """Build a backbone.

    Args:
        name: Config of MMDetection, MMSegmentation or MMPreTrain; ``vheat_tiny``, ``vheat_small`` or ``vheat_base``; or
            ``timm:`` and the name of a timm model.
        checkpoint: File, address, published name or ``'released'``; without it weights are random.
        size: Side of the images in pixels, which some models of timm are built for.
        device: By default the accelerator that MMEngine finds, else the CPU.
        seed: Of random weights.

    Raises:
        ToolError: Unknown name, or timm is not installed.
        CheckpointError: The checkpoint does not fit.
    """
    ensure_torchvision()
    place = check_device(device)
    short = f'{name.removeprefix(TIMM)} (timm)' if name.startswith(TIMM) else Path(name).stem
    label = f'{short}, {Path(checkpoint).name if checkpoint else "untrained"}'
    means: tuple[Any, ...] = ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith(TIMM):
            backbone = _timm(name.removeprefix(TIMM), checkpoint, size)
        elif name in {f'vheat_{arch}' for arch in ARCHS}:
            backbone = create_model(name, True if checkpoint == 'released' else checkpoint, features_only=True)
        elif checkpoint:
            loaded = load_model(name, checkpoint, place)
            backbone, means = loaded.model.get_submodule('backbone'), _means(loaded.model.data_preprocessor)
        else:
            backbone, means = _untrained(name)
    backbone.to(place)
    backbone.train(False)  # not chained: mmdet's Swin returns None
    return Network(backbone, label, bool(checkpoint), *means)


def _untrained(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    cfg = open_config(name)
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    config = dict(cfg.model.backbone)
    config.pop('init_cfg', None)  # pretrained weights would be loaded
    config.pop('pretrained', None)
    backbone = MODELS.build(config)
    if not isinstance(backbone, VHeat):  # it is initialised when built
        backbone.init_weights()
    to_rgb = bool(preprocessor.get('bgr_to_rgb') or preprocessor.get('to_rgb'))
    return backbone, (preprocessor.get('mean', MEAN), preprocessor.get('std', STD), to_rgb)


def _means(preprocessor: Any) -> tuple[Any, ...]:
    if getattr(preprocessor, 'mean', None) is None:
        return ()
    to_rgb = bool(getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'to_rgb', False)))
    to_rgb = to_rgb or bool(getattr(preprocessor, 'channel_conversion', False))
    return preprocessor.mean.flatten().tolist(), preprocessor.std.flatten().tolist(), to_rgb


def _timm(name: str, checkpoint: str | None, size: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ToolError(f"{TIMM}{name} needs timm: pip install 'vheat_mm[timm]'") from error
    if not timm.is_model(name):
        raise ToolError(f'timm has no model {name!r}; timm.list_models() lists them')
    weights: dict[str, Any] = dict(pretrained=bool(checkpoint))
    if checkpoint and checkpoint != 'released':
        weights |= dict(pretrained_cfg_overlay=dict(file=str(Path(checkpoint).expanduser())))
    try:
        try:
            return timm.create_model(name, features_only=True, img_size=size, **weights)
        except TypeError:  # most convolutional networks are built for no size
            return timm.create_model(name, features_only=True, **weights)
    except Exception as error:
        raise ToolError(f'cannot build {TIMM}{name}: {first_line(error)}') from error


def vheat_of(network: Network) -> VHeat:
    """The vHeat in a network, with its frequency value embeddings.

    Raises:
        ToolError: It is another network, or deployed for one resolution.
    """
    found = network.backbone
    if not isinstance(found, VHeat) or found.freq_embed is None:
        what = 'is deployed for one resolution' if isinstance(found, VHeat) else f'has a {type(found).__name__}'
        raise ToolError(f'{network.label} {what}: give a vHeat with frequency value embeddings')
    return found


def has_initial_values(network: VHeat) -> bool:
    """Whether the diffusivities are as they were drawn: every bias of ``to_k`` is 0, which no training leaves so."""
    blocks = (module for module in network.modules() if isinstance(module, HeatConduction2d))
    return all(not cast(nn.Linear, block.to_k[0]).bias.any() for block in blocks)


def open_images(sources: Sequence[str], size: tuple[int, int] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels (H, W, 3) uint8 RGB of images, resized to ``size`` (height, width).

    Raises:
        ToolError: There are none, or one cannot be read.
    """
    for item in list_items(list(sources)):
        if item.is_video:
            raise ToolError(f'{item.source} is a video: give images')
        for sample in read(item):
            if sample.error:
                raise ToolError(f'{item.path}: {sample.error}')
            with decoding():
                image = cv2.imdecode(np.fromfile(item.path, np.uint8), cv2.IMREAD_COLOR)
            if image is None:
                raise ToolError(f'{item.path} cannot be decoded')
            if size is not None:
                image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
            yield first_line(item.name), np.ascontiguousarray(image[..., ::-1])


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``network``, ``checkpoint`` and ``--device``."""
    parser.add_argument('network', help=f"config, vheat_tiny (..._small, ..._base), or '{TIMM}' and a name of timm")
    parser.add_argument('checkpoint', nargs='?', help="file, address, name or 'released'; without it random weights")
    parser.add_argument('--device', help='such as cpu or cuda:1')
