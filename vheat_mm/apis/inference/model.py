"""A trained model with what its checkpoint and config say about it: task, classes, colours, threshold."""

from __future__ import annotations

import colorsys
import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS
from torch import Tensor, nn

from vheat_mm.apis.config import apply_released, open_config
from vheat_mm.apis.tta import apply_tta
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.engine.hooks.annotation_check_hook import class_heads
from vheat_mm.models.pretrained_init import to_mmengine
from vheat_mm.models.weights import check_fit, load_fitting
from vheat_mm.utils.config_place import describe_building, type_name
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import ArgumentError, ToolError, VHeatError
from vheat_mm.utils.text import first_line

TASKS = dict(mmdet='detection', mmseg='segmentation', mmpretrain='classification')
_LABELS = dict(mmdet='gt_instances', mmseg='gt_sem_seg', mmpretrain='gt_label')  # kind of label -> its heads
DEFAULT_SCORE_THR = 0.3

Palette = list[tuple[int, int, int]]


@dataclass
class LoadedModel:
    """A model to predict with.

    Attributes:
        model: In evaluation mode, on its device; inside its wrapper with test-time augmentation.
        cfg: Its config.
        task: 'detection', 'segmentation' or 'classification'.
        classes: Their names.
        palette: A colour (red, green, blue) for each.
        score_thr: Score from which the config shows a detection.
    """

    model: nn.Module
    cfg: Config
    task: str
    classes: tuple[str, ...]
    palette: Palette
    score_thr: float


def load_model(
    config: str | os.PathLike | Config,
    checkpoint: str | os.PathLike,
    device: str | torch.device | None = None,
    cfg_options: dict[str, Any] | None = None,
    tta: bool = False,
) -> LoadedModel:
    """Build the model of a config and load all of its weights.

    Args:
        config: See :func:`~vheat_mm.apis.config.open_config`.
        checkpoint: Path, address or name of published weights; ``'released'`` for those of the config.
        device: By default the accelerator that MMEngine finds, else the CPU.
        cfg_options: Values of the config to replace, by their places.
        tta: Wrap it for test-time augmentation, and change the config's test pipeline accordingly.

    Raises:
        ToolError: The config is not for testing, or is of a panoptic model; unknown device; the class names are not as
            many as the model's classes.
        CheckpointError: The checkpoint is unreadable or of another config.
    """
    cfg = open_config(config, cfg_options)
    name = str(cfg.filename or 'the config')
    if cfg.get('test_dataloader') is None:
        raise ToolError(f'{name!r} defines no test_dataloader, whose pipeline prepares the images')
    _refuse_panoptic(cfg.model)
    path = os.fspath(checkpoint)
    if path == 'released':
        apply_released(cfg, name)
        path = cfg.load_from
    place = check_device(device)
    content = read_checkpoint(path)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))  # as the Runner does
    if tta:
        apply_tta(cfg)
    try:
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    except VHeatError:
        raise
    except Exception as error:
        raise ToolError(f'cannot build the model of {name!r}: {describe_building(error)}') from error

    plain = unwrap(model)
    own = {key: value for key, value in plain.state_dict().items() if isinstance(value, Tensor)}
    # As tools/test.py: all of it must fit, and of published weights given by name the average is taken.
    state = to_mmengine(content, own, path, ema=None)
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    print_log(check_fit(state, own, path, finetune=False), logger='current')
    load_fitting(plain, state)
    model.to(place).eval()

    task = TASKS[cfg.default_scope]
    classes, palette = find_classes(content, cfg, plain, path)
    threshold = (cfg.get('default_hooks', {}).get('visualization') or {}).get('score_thr')
    return LoadedModel(model, cfg, task, classes, palette, DEFAULT_SCORE_THR if threshold is None else threshold)


def check_device(name: str | torch.device | None) -> torch.device:
    """A device by name.

    Raises:
        ArgumentError: There is no such device, or PyTorch cannot use it.
    """
    try:
        name = get_device() if name is None else name
        found = torch.device(name)
        torch.zeros(1).to(found)
    except Exception as error:  # each backend has its own
        reason = f"cannot be used: {first_line(error)}; 'cpu' can be used on any machine"
        raise ArgumentError('device', str(name), reason) from error
    return found


def find_classes(
    checkpoint: dict[str, Any], cfg: Config, model: nn.Module, path: str
) -> tuple[tuple[str, ...], Palette]:
    """Names and colours of a model's classes: the checkpoint's, else those of the data set that the config tests.

    Args:
        checkpoint: What :func:`~vheat_mm.checkpoint.read_checkpoint` returns.
        cfg: The model's config.
        model: Without wrappers.
        path: Of the checkpoint, for messages.

    Raises:
        ToolError: There is another number of names than of classes.
    """
    head = class_heads(model).get(_LABELS[cfg.default_scope])
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    kept = meta.get('dataset_meta') or {key: meta[key] for key in ('CLASSES', 'PALETTE') if key in meta}
    found = {str(key).lower(): value for key, value in kept.items()} if isinstance(kept, dict) else {}
    source = f'the checkpoint {path!r}'
    if not found.get('classes'):
        found, source = dataset_metainfo(cfg), 'the data set of the config (test_dataloader.dataset)'
    names = found.get('classes')
    names = (names,) if isinstance(names, str) else tuple(map(str, names or ()))
    if not names and head is not None:
        names = tuple(f'class {number}' for number in range(head.num_classes))
        print_log(f'{path!r} and the config name no classes: they are numbered', logger='current')
    if head is not None and len(names) != head.num_classes:
        raise ToolError(
            f'{source} names {len(names)} classes, but model.{head.name}.num_classes={head.num_classes}: take the '
            'config that the checkpoint was trained with'
        )
    palette = found.get('palette')
    if not isinstance(palette, list | tuple) or len(palette) < len(names):
        palette = distinct_colours(len(names))
    return names, [(int(red), int(green), int(blue)) for red, green, blue in palette[: len(names)]]


def distinct_colours(count: int) -> Palette:
    """Colours (red, green, blue) that differ from their neighbours: hues at steps of the golden ratio."""
    hues = (0.6180339887 * number % 1 for number in range(count))
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, 0.9)) for hue in hues]  # type: ignore[misc]


def dataset_metainfo(cfg: Config) -> dict[str, Any]:
    """What the data set that a config tests says of its classes; of several sets, the first."""
    dataset = cfg.test_dataloader.dataset
    found: dict[str, Any] = {}
    while isinstance(dataset, dict):
        kind = dataset.get('type')
        if not inspect.isclass(kind):
            with DATASETS.switch_scope_and_registry(None) as registry:
                kind = registry.get(kind)
        found = {**(getattr(kind, 'METAINFO', None) or {}), **(dataset.get('metainfo') or {}), **found}
        dataset = dataset.get('dataset') or next(iter(dataset.get('datasets') or ()), None)
    return found


def _refuse_panoptic(model: dict[str, Any]) -> None:
    if model.get('panoptic_fusion_head') is not None and (model.get('test_cfg') or {}).get('panoptic_on', True):
        raise ToolError(
            f'{type_name(model)} predicts panoptic maps, which are not written here: take the instance config of the '
            'same model, or model.test_cfg.panoptic_on=False with instance_on=True where it has these'
        )
