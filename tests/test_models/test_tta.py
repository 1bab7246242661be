"""Test-time augmentation: identities that hold without trained weights."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

from vheat_mm.apis.tta import CROPS, SCALES, apply_tta, classifier_views, detector_views
from vheat_mm.models.tta import CropAt, InstanceSegTTAModel
from vheat_mm.models.tta.boxes import merge_boxes
from vheat_mm.models.tta.queries import _merge
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
pytest.importorskip('mmdet')
CONFIGS = Path(__file__).parents[2] / 'configs'
SIZES = [(60, 80), (72, 50)]  # of the two images of a batch


@pytest.fixture(autouse=True)
def detection(own_scope):
    init_default_scope('mmdet')


def detector(kind: str) -> torch.nn.Module:
    """A small untrained detector with predictions of several classes."""
    torch.manual_seed(0)
    cfg = Config.fromfile(CONFIGS / 'demo' / 'mask-rcnn_vheat-demo_coins.py').model
    cfg.backbone.arch = dict(embed_dims=8, depths=(1, 1, 1, 1), post_norm=False, layer_scale=None)
    cfg.neck.in_channels = [8, 16, 32, 64]
    cfg.test_cfg.rcnn.update(score_thr=0.0, max_per_img=8)
    heads = cfg.roi_head
    heads.bbox_head.num_classes = heads.mask_head.num_classes = 2
    heads.bbox_head.fc_out_channels = 16
    if kind == 'cascade':
        base = Config.fromfile(CONFIGS / 'detection' / 'cascade-mask-rcnn_vheat-t_fpn_1x_coco.py').model
        base.roi_head.mask_head = heads.mask_head
        for extractor in (base.roi_head.bbox_roi_extractor, base.roi_head.mask_roi_extractor):
            extractor.out_channels = 64
        for head in base.roi_head.bbox_head:
            head.update(in_channels=64, fc_out_channels=16, num_classes=2)
        base.test_cfg.rcnn.update(score_thr=0.0, max_per_img=8)
        cfg.roi_head, cfg.train_cfg, cfg.test_cfg = base.roi_head, base.train_cfg, base.test_cfg
    if kind == 'boxes':
        heads.mask_head = heads.mask_roi_extractor = None
    model = MODELS.build(cfg).eval()
    for name, parameter in model.named_parameters():
        if 'norm' not in name and not name.startswith('backbone'):
            torch.nn.init.normal_(parameter, std=0.02 if '_reg' in name or 'cls' in name else 0.15)
    heads = getattr(model.roi_head, 'mask_head', None) or []
    for head in heads if isinstance(heads, torch.nn.ModuleList) else [heads] if heads else []:
        # about half of each box belongs to the mask
        head.conv_logits.register_forward_hook(lambda _m, _x, logits: logits - logits.mean((2, 3), keepdim=True))
    return model


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    small = [torch.rand(1, 3, h // 6, w // 6, generator=generator) for h, w in SIZES]
    resize = torch.nn.functional.interpolate
    return [255 * resize(x, size=size, mode='bicubic')[0].clamp(0, 1) for x, size in zip(small, SIZES, strict=True)]


def view(pictures: list[torch.Tensor], direction: str | None = None, factor: float = 1.0) -> dict[str, list]:
    """Both images, rescaled and flipped, as the pipeline packs them."""
    from mmdet.structures import DetDataSample

    axes = dict(horizontal=[-1], vertical=[-2], diagonal=[-2, -1])
    inputs, samples = [], []
    for i, picture in enumerate(pictures):
        size = [round(side * factor) for side in picture.shape[-2:]]
        x = torch.nn.functional.interpolate(picture[None], size=size, mode='bilinear')[0]
        inputs.append(x.flip(axes[direction]) if direction else x)
        meta = dict(img_path=f'{i}.jpg', img_id=i, ori_shape=tuple(picture.shape[-2:]), img_shape=tuple(size))
        scale = (size[1] / picture.shape[-1], size[0] / picture.shape[-2])
        meta.update(scale_factor=scale, flip=direction is not None, flip_direction=direction)
        samples.append(DetDataSample(metainfo=meta))
    return dict(inputs=inputs, data_samples=samples)


def stack(*views: dict[str, list]) -> dict[str, list]:
    return {key: [v[key] for v in views] for key in views[0]}


def found(samples: list) -> list[InstanceData]:
    return [sample.pred_instances for sample in samples]


def assert_same(result: InstanceData, expected: InstanceData, atol: float = 1e-2) -> None:
    """Same objects in the same order, masks up to pixels on edges."""
    assert len(result) == len(expected) > 0
    assert torch.equal(result.labels, expected.labels)
    torch.testing.assert_close(result.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.bboxes, expected.bboxes, rtol=0, atol=atol)
    assert ('masks' in result) == ('masks' in expected)
    if 'masks' in expected:
        assert result.masks.shape == expected.masks.shape
        assert result.masks.dtype == torch.bool
        assert (result.masks != expected.masks).float().mean() < 2e-3
        assert 0.003 < result.masks.float().mean() < 0.98  # neither empty nor full


@pytest.mark.parametrize('kind', ['mask', 'cascade', 'boxes'])
def test_identical_views_give_the_result_of_one(kind):
    model = detector(kind)
    with torch.no_grad():
        expected = found(model.test_step(view(images())))
    results = found(InstanceSegTTAModel(model).test_step(stack(*(view(images()) for _ in range(3)))))
    for result, one in zip(results, expected, strict=True):
        assert_same(result, one)


@pytest.mark.parametrize('direction', ['horizontal', 'vertical', 'diagonal'])
@pytest.mark.parametrize('kind', ['mask', 'cascade', 'boxes'])
def test_flipped_image_gives_flipped_result(kind, direction):
    """An image and its flipped image have the same two views, in reverse order."""
    from mmdet.structures.bbox import bbox_flip

    axes = dict(horizontal=[-1], vertical=[-2], diagonal=[-2, -1])[direction]
    tta = InstanceSegTTAModel(detector(kind))
    plain = found(tta.test_step(stack(view(images()), view(images(), direction))))
    inputs = [x.flip(axes) for x in images()]
    flipped = found(tta.test_step(stack(view(inputs), view(inputs, direction))))
    for result, one, size in zip(flipped, plain, SIZES, strict=True):
        result.bboxes = bbox_flip(result.bboxes, size, direction)
        if 'masks' in result:
            result.masks = result.masks.flip(axes)
        assert_same(result, one)


def test_scaled_views_find_the_same_objects():
    """A detector with fixed boxes: views of all sizes and flips merge into these boxes."""
    model = detector('mask')
    tta = InstanceSegTTAModel(model)
    boxes = [torch.tensor([[10.0, 5, 40, 45], [30, 20, 55, 50]]), torch.tensor([[4.0, 4, 44, 60]])]

    def constant(_features, metas, *_args, **_kwargs):
        from mmdet.structures.bbox import bbox_flip

        return [
            InstanceData(
                bboxes=bbox_flip(box, m['ori_shape'], m['flip_direction']) if m['flip'] else box.clone(),
                scores=torch.linspace(0.9, 0.5, len(box)),
                labels=torch.zeros(len(box), dtype=torch.long),
            )
            for box, m in zip(boxes, metas, strict=True)
        ]

    model.roi_head.predict_bbox = constant
    views = [view(images(), d, f) for f in (0.7, 1.0, 1.6) for d in (None, 'horizontal', 'vertical')]
    for result, expected in zip(found(tta.test_step(stack(*views))), boxes, strict=True):
        torch.testing.assert_close(result.bboxes, expected)


def test_masks_are_averaged_as_probabilities():
    """0.9, 0.4 and 0.4 are 0.57 on average; a majority vote would give no mask."""
    model = detector('mask')
    tta = InstanceSegTTAModel(model)
    left = [0.9, 0.4, 0.4]  # on the image's left half, 0.1 on the right; the second view is flipped
    calls = []

    def heads(rois):
        i = len(calls)
        calls.append(i)
        p = torch.full((len(rois), 2, 28, 28), 0.1)
        p[..., 14:] = left[i]
        return torch.logit(p if i == 1 else p.flip(-1))

    model.roi_head.mask_head.forward = heads
    result = found(tta.test_step(stack(view(images()[:1]), view(images()[:1], 'horizontal'), view(images()[:1]))))[0]
    assert calls == [0, 1, 2]
    for mask, box in zip(result.masks, result.bboxes, strict=True):
        x1, y1, x2, y2 = box.tolist()
        middle = (x1 + x2) / 2
        rows, columns = mask.nonzero(as_tuple=True)
        if x2 - x1 < 8 or y2 - y1 < 8:
            continue
        assert len(rows) > 0.8 * (middle - x1) * (y2 - y1) - 2 * (y2 - y1)
        assert columns.max() <= middle + 1


def test_no_objects():
    model = detector('mask')
    model.roi_head.test_cfg.score_thr = 2.0
    for result, size in zip(found(InstanceSegTTAModel(model).test_step(stack(view(images())))), SIZES, strict=True):
        assert len(result) == 0
        assert result.masks.shape == (0, *size)


def test_memory_does_not_grow_with_views():
    model = detector('mask')
    features = []
    most = 0
    extract = model.extract_feat

    def recording(inputs):
        nonlocal most
        gc.collect()
        most = max(most, sum(f() is not None for f in features))
        out = extract(inputs)
        features.append(weakref.ref(out[0]))
        return out

    model.extract_feat = recording
    InstanceSegTTAModel(model).test_step(stack(*(view(images()) for _ in range(5))))
    assert len(features) == 10
    assert most <= 1


def boxes_of(scores, boxes, labels) -> InstanceData:
    return InstanceData(
        scores=torch.tensor(scores), bboxes=torch.tensor(boxes, dtype=torch.float32), labels=torch.tensor(labels)
    )


def test_merge_boxes():
    square, near, far = [0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40]
    first = boxes_of([0.9, 0.3, 0.2], [square, near, far], [0, 0, 1])
    second = boxes_of([0.8, 0.6], [near, far], [0, 0])
    merged = merge_boxes([first, second], iou_threshold=0.5, max_per_img=10)
    # 0.9 suppresses 0.8 of the other view, but not 0.3 of its own view, nor other classes
    assert merged.scores.tolist() == pytest.approx([0.9, 0.6, 0.3, 0.2])
    assert merged.labels.tolist() == [0, 0, 0, 1]
    assert merge_boxes([first, second], 0.5, 2).scores.tolist() == pytest.approx([0.9, 0.6])
    nothing = boxes_of([], torch.zeros(0, 4).tolist(), torch.zeros(0, dtype=torch.long).tolist())
    nothing.bboxes, nothing.labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert len(merge_boxes([nothing, nothing], 0.5, 2)) == 0
    assert merge_boxes([nothing, first], 0.5, 9).scores.tolist() == pytest.approx([0.9, 0.3, 0.2])


def test_queries_are_matched_and_averaged():
    masks = torch.zeros(3, 8, 8)
    masks[0, :4], masks[1, 4:] = 0.9, 0.8
    classes = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    order = torch.tensor([2, 0, 1])
    merged = _merge((classes, masks, torch.ones(3)), (classes[order], masks[order]))
    torch.testing.assert_close(merged[0], classes)
    torch.testing.assert_close(merged[1], masks)
    # an object that only the second view shows replaces a query without object
    other = masks.clone()
    other[2, :, :2] = 0.7
    sure = classes.clone()
    sure[2] = torch.tensor([0.6, 0.2, 0.2])
    merged = _merge((classes, masks, torch.ones(3)), (sure, other * 0.5))
    torch.testing.assert_close(merged[0][2], sure[2])
    torch.testing.assert_close(merged[1][2], other[2] * 0.5)


def mask_transformer(panoptic: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    suffix = '-panoptic' if panoptic else ''
    cfg = Config.fromfile(CONFIGS / 'detection' / f'mask2former_vheat-t_8xb2-lsj-50e_coco{suffix}.py').model
    arch = dict(embed_dims=8, depths=(1, 1, 1, 1), post_norm=False, layer_scale=None)
    cfg.backbone.update(arch=arch, img_size=64, init_cfg=None)
    head = cfg.panoptic_head
    head.update(in_channels=[8, 16, 32, 64], num_queries=6)
    head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 1
    cfg.test_cfg.update(max_per_image=5, object_mask_thr=0.0)
    model = MODELS.build(cfg).eval()
    torch.nn.init.normal_(model.panoptic_head.query_feat.weight, std=3)
    torch.nn.init.normal_(model.panoptic_head.cls_embed.weight, std=0.1)
    return model


@pytest.mark.parametrize('direction', [None, 'horizontal', 'vertical'])
@pytest.mark.parametrize('panoptic', [False, True], ids=['instance', 'panoptic'])
def test_mask_transformers(panoptic, direction):
    """Identical views, or flipped views with exactly flipped predictions, give the result of one view."""
    model = mask_transformer(panoptic)
    with torch.no_grad():
        expected = model.test_step(view(images()))
    predict = model.panoptic_head.predict

    def knows(features, samples):
        """The predictions for the plain image, flipped as the view is, with the queries in another order."""
        if not samples[0].flip:
            return predict(features, samples)
        axes = dict(horizontal=[-1], vertical=[-2])[samples[0].flip_direction]
        data = model.data_preprocessor(view(images()), False)
        classes, masks = predict(model.extract_feat(data['inputs']), data['data_samples'])
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        for i, (h, w) in enumerate(SIZES):
            masks[i, :, :h, :w] = masks[i, :, :h, :w].flip(axes)
        return classes[:, order], masks[:, order]

    model.panoptic_head.predict = knows
    data = stack(view(images()), view(images(), direction), view(images()))
    for result, one in zip(InstanceSegTTAModel(model).test_step(data), expected, strict=True):
        if panoptic:
            found_map, map_of_one = result.pred_panoptic_seg.sem_seg, one.pred_panoptic_seg.sem_seg
            assert len(map_of_one.unique()) > 1
            assert (found_map != map_of_one).float().mean() < 1e-2
        else:
            assert_same(result.pred_instances, one.pred_instances, atol=1.5)


@pytest.mark.parametrize('key', ['flip', 'scale_factor', 'ori_shape'])
def test_missing_metadata_is_named(key):
    data = stack(view(images()), view(images(), 'horizontal'))
    sample = data['data_samples'][1][0]
    meta = {k: v for k, v in view(images(), 'horizontal')['data_samples'][0].metainfo.items() if k != key}
    data['data_samples'][1][0] = type(sample)(metainfo=meta)
    with pytest.raises(ValueError, match=rf'view 1 of 0\.jpg lacks {key}.*meta_keys'):
        InstanceSegTTAModel(detector('mask')).test_step(data)


def test_unknown_options_and_heads_are_refused():
    model = detector('boxes')
    with pytest.raises(TypeError, match="tta_cfg takes nms and max_per_img, got \\['score_thr'\\]"):
        InstanceSegTTAModel(model, tta_cfg=dict(score_thr=0.1))
    with pytest.raises(TypeError, match=r"tta_cfg.nms=\{'type': 'soft_nms'\}"):
        InstanceSegTTAModel(model, tta_cfg=dict(nms=dict(type='soft_nms')))
    kind = type('RTMDetInsHead', (torch.nn.Identity,), {})
    model.bbox_head = kind()
    with pytest.raises(TypeError, match='cannot merge the masks of MaskRCNN'):
        InstanceSegTTAModel(model)
    del model.bbox_head
    model.mask_head = torch.nn.Identity()
    with pytest.raises(TypeError, match='cannot merge the masks of MaskRCNN'):
        InstanceSegTTAModel(model)


def test_views_of_pipelines():
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(100, 80), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape')),
    ]
    load, augment = detector_views(pipeline)
    resize, flips, annotate, (pack,) = augment['transforms']
    assert load == pipeline[0]
    assert [step['scale'] for step in resize] == [(round(100 * f), round(80 * f)) for f in SCALES]
    assert [step['prob'] for step in flips] == [0.0, 1.0]
    assert annotate == [pipeline[2]]
    assert set(pack['meta_keys']) >= {'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction'}
    assert pipeline[3]['meta_keys'] == ('img_id', 'ori_shape')  # the config's own is untouched

    pipeline = [dict(type='LoadImageFromFile'), dict(type='CenterCrop', crop_size=224), dict(type='PackInputs')]
    _, augment = classifier_views(pipeline)
    assert [step['position'] for step in augment['transforms'][0]] == list(CROPS)


def test_views_of_unusual_pipelines():
    """Flips come before padding; scale may be one number, and types may be classes or have a scope."""
    pad, pack = dict(type='Pad', size_divisor=32), dict(type='PackDetInputs')
    first, augment = detector_views([dict(type='Resize', scale_factor=1.0), pad, pack])
    assert first['type'] == 'Resize'
    assert [step[0]['type'] for step in augment['transforms']] == ['RandomFlip', 'Pad', 'PackDetInputs']
    for kind in ('mmdet.Resize', type('Resize', (), {})):
        [augment] = detector_views([dict(type=kind, scale=640), pack])
        assert [step['scale'] for step in augment['transforms'][0]] == [(640, 640), (800, 800)]


@pytest.mark.parametrize('name', sorted(p.name for p in (CONFIGS / 'detection').glob('*vheat-t*.py')))
def test_every_detector_config(name):
    """``--tta`` with the config as it is and a narrow model: one prediction from four views."""
    from config_models import narrow

    cfg = Config.fromfile(CONFIGS / 'detection' / name)
    own = cfg.get('tta_pipeline')  # mmdet's RetinaNet has one
    apply_tta(cfg)
    augment = cfg.test_dataloader.dataset.pipeline[-1]
    assert own or [len(choices) for choices in augment.transforms[:2]] == [2, 2]
    narrow(cfg.model)
    tta = MODELS.build(cfg.model).eval()
    views = [view(images(), direction, factor) for factor in (1.0, 1.25) for direction in (None, 'horizontal')]
    for sample in tta.test_step(stack(*views)):
        if 'pred_panoptic_seg' in sample:
            assert sample.pred_panoptic_seg.sem_seg.shape[-2:] == sample.ori_shape
            continue
        result = sample.pred_instances
        assert ('masks' in result) == ('mask' in name)
        assert len(result) <= 300
        if 'masks' in result:
            assert result.masks.shape == (len(result), *sample.ori_shape)


def test_one_image_of_a_batch_without_objects():
    model = detector('mask')
    predict = model.roi_head.predict_bbox
    model.roi_head.predict_bbox = lambda *args, **kwargs: [
        r[:0] if i else r for i, r in enumerate(predict(*args, **kwargs))
    ]
    first, second = found(InstanceSegTTAModel(model).test_step(stack(view(images()), view(images()))))
    assert first.masks.any()
    assert second.masks.shape == (0, *SIZES[1])


def test_labels_of_classifiers_follow_the_average():
    pytest.importorskip('mmpretrain')
    from mmpretrain.structures import DataSample

    from vheat_mm.models.tta import ClsTTAModel

    class Model(torch.nn.Module):
        def test_step(self, data):
            return data

    views = [
        DataSample().set_pred_score(torch.tensor(score)).set_pred_label(label).set_gt_label(1)
        for score, label in (([0.6, 0.4], 0), ([0.1, 0.9], 1))
    ]
    [merged] = ClsTTAModel(Model()).merge_preds([views])
    assert merged.pred_score.tolist() == pytest.approx([0.35, 0.65])
    assert merged.pred_label.tolist() == [1]
    assert merged.gt_label.tolist() == [1]


def test_crop_at():
    image = np.arange(5 * 7).reshape(5, 7, 1)
    assert CropAt((3, 3), 'bottom_right')(dict(img=image))['img'][-1, -1, 0] == 34
    assert CropAt(3, 'top_left')(dict(img=image))['img'][0, 0, 0] == 0
    middle = CropAt(3)(dict(img=image))
    assert middle['img'][1, 1, 0] == image[2, 3, 0]
    assert middle['img_shape'] == (3, 3)
    assert CropAt(6)(dict(img=image))['img'].shape == (5, 6, 1)
    with pytest.raises(ValueError, match="position='left'"):
        CropAt(3, 'left')
    with pytest.raises(ValueError, match='crop_size=0'):
        CropAt(0)


def test_concatenated_data_sets_are_refused():
    cfg = Config.fromfile(CONFIGS / 'demo' / 'mask-rcnn_vheat-demo_coins.py')
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[cfg.test_dataloader.dataset])
    with pytest.raises(ToolError, match='ConcatDataset without a pipeline'):
        apply_tta(cfg)


def test_dettta_is_refused_for_detectors_with_masks():
    cfg = Config.fromfile(CONFIGS / 'demo' / 'mask-rcnn_vheat-demo_coins.py')
    cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(max_per_img=10))
    with pytest.raises(ToolError, match=r"tta_model\.type='InstanceSegTTAModel'"):
        apply_tta(cfg)
