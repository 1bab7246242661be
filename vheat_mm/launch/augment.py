"""``--tta``: which views of an image are taken, and what merges their predictions."""

from __future__ import annotations

import copy

from mmengine.config import Config, ConfigDict

from .errors import ToolError

FLIPS = (dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0))
SCALES = (1.0, 1.25)  # of detectors' images, against the test pipeline's
CROPS = ('center', 'top_left', 'top_right', 'bottom_left', 'bottom_right')
# What merging takes to know of a view, and mmdet does not pack by default.
_META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')


def apply_tta(cfg: Config) -> None:
    """``--tta``, in place: the config's ``tta_pipeline`` and ``tta_model``, or ours where it has none.

    Raises:
        ToolError: Segmentation without ``tta_pipeline``; a model that merges boxes only under a mask head.
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
    if not cfg.get('tta_pipeline'):
        cfg.tta_pipeline = (detector_views if scope == 'mmdet' else classifier_views)(dataset.pipeline)
    dataset.pipeline = cfg.tta_pipeline
    tta_model = cfg.get('tta_model') or dict(type=DEFAULT_MODELS[scope])
    if str(tta_model.get('type')).split('.')[-1] == 'DetTTAModel' and predicts_masks(cfg.model):
        raise ToolError(
            "--tta: tta_model.type='DetTTAModel' merges boxes only, and this detector predicts masks: "
            "set tta_model.type='InstanceSegTTAModel' with the same tta_cfg, or leave tta_model out"
        )
    cfg.model = ConfigDict(**tta_model, module=cfg.model)


DEFAULT_MODELS = dict(mmdet='InstanceSegTTAModel', mmseg='SegTTAModel', mmpretrain='AverageClsScoreTTA')


def predicts_masks(node: object) -> bool:
    """Whether a (nested) model config has a head for masks."""
    if isinstance(node, (list, tuple)):
        return any(map(predicts_masks, node))
    if not isinstance(node, dict):
        return False
    heads = ('mask_head', 'panoptic_head', 'panoptic_fusion_head')
    return any(node.get(name) is not None for name in heads) or any(map(predicts_masks, node.values()))


def detector_views(pipeline: list[dict]) -> list[dict]:
    """A test pipeline of mmdet whose images are seen at :data:`SCALES`, as they are and mirrored."""
    *steps, pack = copy.deepcopy(pipeline)
    pack['meta_keys'] = tuple(dict.fromkeys((*pack.get('meta_keys', ()), *_META_KEYS)))
    resize = next((i for i, step in enumerate(steps) if step.get('type') == 'Resize' and 'scale' in step), None)
    if resize is None:
        return [*steps, dict(type='TestTimeAug', transforms=[list(FLIPS), [pack]])]
    own = steps[resize]
    scaled = [dict(own, scale=tuple(round(side * factor) for side in own['scale'])) for factor in SCALES]
    rest = [[step] for step in (*steps[resize + 1 :], pack)]
    return [*steps[:resize], dict(type='TestTimeAug', transforms=[scaled, list(FLIPS), *rest])]


def classifier_views(pipeline: list[dict]) -> list[dict]:
    """A test pipeline of mmpretrain: middle and corners of the image where it crops, as they are and mirrored."""
    *steps, pack = copy.deepcopy(pipeline)
    crop = next((i for i, step in enumerate(steps) if step.get('type') == 'CenterCrop'), None)
    if crop is None:
        return [*steps, dict(type='TestTimeAug', transforms=[list(FLIPS), [pack]])]
    crops = [dict(type='CropAt', crop_size=steps[crop]['crop_size'], position=position) for position in CROPS]
    rest = [[step] for step in (*steps[crop + 1 :], pack)]
    return [*steps[:crop], dict(type='TestTimeAug', transforms=[crops, list(FLIPS), *rest])]
