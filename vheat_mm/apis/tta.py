"""``--tta``: the views of an image, and the model that merges their predictions."""

from __future__ import annotations

import copy
import math

from mmengine.config import Config, ConfigDict

from vheat_mm.utils.config_place import is_type, type_name
from vheat_mm.utils.errors import ToolError

FLIPS = (dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0))
SCALES = (1.0, 1.25)  # of detectors' images, relative to the test pipeline's
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of segmentors' images, as in mmseg's base configs
CROPS = ('center', 'top_left', 'top_right', 'bottom_left', 'bottom_right')
# Merging needs these keys; mmdet does not pack all of them by default, mmseg does.
_META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')


def apply_tta(cfg: Config) -> None:
    """Apply the config's ``tta_pipeline`` and ``tta_model``, or the defaults of this module; changes ``cfg``.

    Raises:
        ToolError: A concatenated data set; a ``tta_model`` that would merge the predictions wrongly.
    """
    scope = cfg.default_scope
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    if 'pipeline' not in dataset:
        raise ToolError(
            f'--tta: test_dataloader.dataset is a {type_name(dataset)} without a pipeline of its own, '
            'which augmentation would replace: test its data sets one by one'
        )
    if not cfg.get('tta_pipeline'):
        cfg.tta_pipeline = DEFAULT_VIEWS[scope](dataset.pipeline)
    dataset.pipeline = cfg.tta_pipeline
    tta_model = cfg.get('tta_model') or dict(type=DEFAULT_MODELS[scope])
    if is_type(tta_model, 'DetTTAModel') and predicts_masks(cfg.model):
        raise ToolError(
            "--tta: tta_model.type='DetTTAModel' merges boxes only, and this detector predicts masks: "
            "set tta_model.type='InstanceSegTTAModel' with the same tta_cfg, or remove tta_model"
        )
    if is_type(tta_model, 'SegTTAModel') and _has_one_channel(cfg.model):
        raise ToolError(
            "--tta: mmseg's SegTTAModel takes the sigmoid of a head with out_channels=1 twice, so that every pixel "
            'would be foreground: drop --tta, or set a tta_model of your own'
        )
    cfg.model = ConfigDict(**tta_model, module=cfg.model)


DEFAULT_MODELS = dict(mmdet='InstanceSegTTAModel', mmseg='SegTTAModel', mmpretrain='ClsTTAModel')


def _has_one_channel(model: dict) -> bool:
    """Whether a segmentor's (last) head predicts foreground by one number a pixel."""
    head = model.get('decode_head') or {}
    head = head[-1] if isinstance(head, (list, tuple)) else head
    return (head.get('out_channels') or head.get('num_classes')) == 1


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
    scaled = [_scaled(steps[resize], factor) for factor in SCALES]
    return _split(steps[:resize], [scaled, list(FLIPS)], [*steps[resize + 1 :], pack])


def segmentor_views(pipeline: list[dict]) -> list[dict]:
    """mmseg's test pipeline with views at each of :data:`RATIOS` of its size, plain and flipped.

    Annotations are loaded last: merging compares the label map of the first view with the whole image.
    """
    *steps, pack = copy.deepcopy(pipeline)
    if 'meta_keys' in pack:
        pack['meta_keys'] = tuple(dict.fromkeys((*pack['meta_keys'], *_META_KEYS)))
    annotate = [step for step in steps if type_name(step).startswith('Load') and 'Annotation' in type_name(step)]
    steps = [step for step in steps if step not in annotate]
    named = ('Resize', 'scale'), ('Resize', 'scale_factor'), ('ResizeShortestEdge', 'scale')
    resize = next((place for name, key in named if (place := _find(steps, name, key)) is not None), None)
    if resize is None:
        place = _find(steps, 'Pad')
        place = len(steps) if place is None else place
        own, before, after = dict(type='Resize', scale_factor=1.0, keep_ratio=True), steps[:place], steps[place:]
    else:
        own, before, after = steps[resize], steps[:resize], steps[resize + 1 :]
    scaled = [_scaled(own, ratio) for ratio in RATIOS]
    return _split(before, [scaled, list(FLIPS)], [*after, *annotate, pack])


def classifier_views(pipeline: list[dict]) -> list[dict]:
    """mmpretrain's test pipeline with views plain and flipped, and five crops if it crops."""
    *steps, pack = copy.deepcopy(pipeline)
    crop = _find(steps, 'CenterCrop', 'crop_size')
    if crop is None:
        return _split(steps, [list(FLIPS)], [pack])
    crops = [dict(type='CropAt', crop_size=steps[crop]['crop_size'], position=position) for position in CROPS]
    return _split(steps[:crop], [crops, list(FLIPS)], [*steps[crop + 1 :], pack])


DEFAULT_VIEWS = dict(mmdet=detector_views, mmseg=segmentor_views, mmpretrain=classifier_views)


def _scaled(resize: dict, factor: float) -> dict:
    """A resizing step whose images are ``factor`` times as large."""

    def times(size: float) -> float:
        return round(size * factor) if math.isfinite(size) else size  # an infinite side is no limit

    step = dict(resize)
    if step.get('scale_factor') is not None:
        own = step['scale_factor']
        step['scale_factor'] = tuple(x * factor for x in own) if isinstance(own, (list, tuple)) else own * factor
    if step.get('scale') is not None:
        both = step['scale'] if isinstance(step['scale'], (list, tuple)) else (step['scale'],) * 2
        step['scale'] = tuple(times(side) for side in both)
    if step.get('max_size') is not None:
        step['max_size'] = times(step['max_size'])
    return step


def _split(before: list[dict], choices: list[list[dict]], after: list[dict]) -> list[dict]:
    return [*before, dict(type='TestTimeAug', transforms=[*choices, *([step] for step in after)])]


def _find(steps: list[dict], name: str, key: str | None = None) -> int | None:
    """Index of the first step of that type that has the key."""
    for place, step in enumerate(steps):
        if is_type(step, name) and (key is None or step.get(key) is not None):
            return place
    return None
