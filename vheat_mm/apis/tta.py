"""``--tta``: the views of an image, and the model that merges their predictions."""

from __future__ import annotations

import copy

from mmengine.config import Config, ConfigDict

from vheat_mm.utils.config_place import is_type, type_name
from vheat_mm.utils.errors import ToolError

FLIPS = (dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0))
SCALES = (1.0, 1.25)  # of detectors' images, relative to the test pipeline's
CROPS = ('center', 'top_left', 'top_right', 'bottom_left', 'bottom_right')
# Merging needs these keys; mmdet does not pack all of them by default.
_META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')


def apply_tta(cfg: Config) -> None:
    """Apply the config's ``tta_pipeline`` and ``tta_model``, or the defaults of this module; changes ``cfg``.

    Raises:
        ToolError: Segmentation without ``tta_pipeline``; a concatenated data set; ``DetTTAModel`` around a detector
            with masks.
    """
    scope = cfg.default_scope
    if scope == 'mmseg' and not cfg.get('tta_pipeline'):
        raise ToolError(
            '--tta: the config has no tta_pipeline; define one as in mmseg::_base_/datasets/ade20k.py, '
            'with the scales and flips to average over'
        )
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    if 'pipeline' not in dataset:
        raise ToolError(
            f'--tta: test_dataloader.dataset is a {type_name(dataset)} without a pipeline of its own, '
            'which augmentation would replace: test its data sets one by one'
        )
    if not cfg.get('tta_pipeline'):
        cfg.tta_pipeline = (detector_views if scope == 'mmdet' else classifier_views)(dataset.pipeline)
    dataset.pipeline = cfg.tta_pipeline
    tta_model = cfg.get('tta_model') or dict(type=DEFAULT_MODELS[scope])
    if is_type(tta_model, 'DetTTAModel') and predicts_masks(cfg.model):
        raise ToolError(
            "--tta: tta_model.type='DetTTAModel' merges boxes only, and this detector predicts masks: "
            "set tta_model.type='InstanceSegTTAModel' with the same tta_cfg, or remove tta_model"
        )
    cfg.model = ConfigDict(**tta_model, module=cfg.model)


DEFAULT_MODELS = dict(mmdet='InstanceSegTTAModel', mmseg='SegTTAModel', mmpretrain='ClsTTAModel')


def predicts_masks(node: object) -> bool:
    """Whether a (nested) model config has a head for masks."""
    if isinstance(node, (list, tuple)):
        return any(map(predicts_masks, node))
    if not isinstance(node, dict):
        return False
    heads = ('mask_head', 'panoptic_head', 'panoptic_fusion_head')
    named = any(node.get(name) is not None for name in heads) or type_name(node).startswith('RTMDetIns')
    return named or any(map(predicts_masks, node.values()))


def detector_views(pipeline: list[dict]) -> list[dict]:
    """mmdet's test pipeline with views at each of :data:`SCALES`, plain and flipped."""
    *steps, pack = copy.deepcopy(pipeline)
    pack['meta_keys'] = tuple(dict.fromkeys((*pack.get('meta_keys', ()), *_META_KEYS)))
    resize = _find(steps, 'Resize', 'scale')
    if resize is None:
        place = _find(steps, 'Pad')  # flipping after padding would move the padding to the left
        place = len(steps) if place is None else place
        return _split(steps[:place], [list(FLIPS)], [*steps[place:], pack])
    own = steps[resize]
    sides = (own['scale'],) * 2 if isinstance(own['scale'], int) else own['scale']
    scaled = [dict(own, scale=tuple(round(side * factor) for side in sides)) for factor in SCALES]
    return _split(steps[:resize], [scaled, list(FLIPS)], [*steps[resize + 1 :], pack])


def classifier_views(pipeline: list[dict]) -> list[dict]:
    """mmpretrain's test pipeline with views plain and flipped, and five crops if it crops."""
    *steps, pack = copy.deepcopy(pipeline)
    crop = _find(steps, 'CenterCrop', 'crop_size')
    if crop is None:
        return _split(steps, [list(FLIPS)], [pack])
    crops = [dict(type='CropAt', crop_size=steps[crop]['crop_size'], position=position) for position in CROPS]
    return _split(steps[:crop], [crops, list(FLIPS)], [*steps[crop + 1 :], pack])


def _split(before: list[dict], choices: list[list[dict]], after: list[dict]) -> list[dict]:
    return [*before, dict(type='TestTimeAug', transforms=[*choices, *([step] for step in after)])]


def _find(steps: list[dict], name: str, key: str | None = None) -> int | None:
    """Index of the first step of that type that has the key."""
    for place, step in enumerate(steps):
        if is_type(step, name) and (key is None or step.get(key) is not None):
            return place
    return None
