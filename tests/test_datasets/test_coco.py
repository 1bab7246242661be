"""COCO annotation files, each with one fault."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import corrupt_data
import numpy as np
import pytest
from data_checks import DETECTION, check, dataset
from mmengine.config import Config
from mmengine.registry import init_default_scope

from vheat_mm.datasets.checks import masks
from vheat_mm.datasets.checks.check import check_labels
from vheat_mm.datasets.checks.coco import judge_coco, read_coco
from vheat_mm.datasets.checks.kinds import KINDS
from vheat_mm.datasets.checks.report import Report

ANNOTATIONS = {name: kinds for name, (_, kinds) in corrupt_data.ANNOTATION_FAULTS.items()} | {'good': set()}


def names_by_effect(words: str) -> list[str]:
    return [name for name, kinds in ANNOTATIONS.items() if any(words in KINDS[kind].effect for kind in kinds)]


@pytest.mark.parametrize('name', ANNOTATIONS)
def test_annotations(coco, name):
    content = read_coco(str(coco[name]))
    findings = list(judge_coco(content, corrupt_data.CLASSES, trains=True, with_mask=True))
    assert {finding.kind for finding in findings} == ANNOTATIONS[name]
    Report().add_all(findings)
    if name.startswith(('box_', 'area', 'polygon', 'mask', 'rle', 'category')):
        assert (findings[0].image_id, findings[0].annotation_id) == (1, 1)


def test_boxes_in_parts_of_the_image(tmp_path):
    content = corrupt_data.coco_content({name: Path(f'{name}.jpg') for name in corrupt_data.GOOD})
    for annotation in content['annotations']:
        annotation['bbox'] = [0.2, 0.2, 0.5, 0.5]
    (tmp_path / 'x.json').write_text(json.dumps(content))
    kinds = {
        finding.kind for finding in judge_coco(read_coco(str(tmp_path / 'x.json')), corrupt_data.CLASSES, True, True)
    }
    assert kinds == {'boxes-normalised', 'box-degenerate', 'no-usable-annotation'}


def test_class_without_objects(coco):
    content = read_coco(str(coco['good']))
    content.category_index[:] = 0
    (finding,) = judge_coco(content, corrupt_data.CLASSES, trains=True, with_mask=True)
    assert (finding.kind, finding.value) == ('class-without-samples', 'box')


@pytest.mark.parametrize(
    ('name', 'evaluator', 'kinds'),
    [
        ('crowd_missing', {}, {'iscrowd-unusable'}),
        ('crowd_missing', dict(ann_file=None), {'iscrowd-missing'}),
        ('crowd_missing', dict(format_only=True), {'iscrowd-missing'}),
        ('mask_missing', {}, set()),
        ('mask_missing', dict(metric=['bbox', 'segm']), {'mask-missing'}),
        ('good', dict(ann_file='good_too.json'), {'evaluator-file'}),
    ],
)
def test_what_pycocotools_reads(coco, name, evaluator, kinds):
    """It needs more than mmdet, and is first called after an epoch."""
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    cfg = dict(
        model={},
        val_dataloader=dict(dataset=dataset(DETECTION, coco[name], pipeline=pipeline)),
        val_evaluator=dict(dict(type='CocoMetric', metric='bbox', ann_file=str(coco[name])), **evaluator),
    )
    assert set(check_labels(Config(cfg), ('val',)).counts) == kinds


def test_each_evaluator_reads_the_file_of_its_data_set(coco):
    """The test set often is the validation set, but each split has an evaluator."""
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    loader = dict(dataset=dataset(DETECTION, coco['good']))
    cfg = dict(model={}, val_dataloader=loader, test_dataloader=loader)
    for split, name in (('val', 'size_zero'), ('test', 'good')):
        cfg[f'{split}_evaluator'] = dict(type='CocoMetric', metric='bbox', ann_file=str(coco[name]))
    assert list(check_labels(Config(cfg), ('val', 'test')).counts) == ['evaluator-file']


def test_annotations_that_mmdet_ignores(tmp_path):
    content = corrupt_data.coco_content({name: Path(f'{name}.jpg') for name in corrupt_data.GOOD})
    content['annotations'][0].update(ignore=1, bbox=[8, 8, -5, -5], segmentation=[])
    (tmp_path / 'x.json').write_text(json.dumps(content))
    assert list(judge_coco(read_coco(str(tmp_path / 'x.json')), corrupt_data.CLASSES, True, True)) == []


def test_findings_name_their_annotation(tmp_path):
    content = corrupt_data.coco_content({f'n{i}': tmp_path / f'n{i}.jpg' for i in range(50)})
    for i in (6, 7, 48):
        content['annotations'][i]['bbox'] = [8, 8, -1, 5]
        content['annotations'][i + 1]['segmentation'] = [[1, 1, 5, 5, 500, 9]]
    (tmp_path / 'x.json').write_text(json.dumps(content))
    findings = list(judge_coco(read_coco(str(tmp_path / 'x.json')), corrupt_data.CLASSES, True, True))
    assert sorted((f.kind, f.annotation_id) for f in findings) == [
        ('box-negative', 7),
        ('box-negative', 8),
        ('box-negative', 49),
        ('mask-beyond-edge', 9),
        ('mask-beyond-edge', 50),
    ]


def test_sizes_and_files_named_twice(coco):
    for name, kind, text in (
        ('size_wrong', 'size-differs', '128 x 96 stated, 64 x 48 decoded'),
        ('size_swapped', 'size-differs', '48 x 64 stated, 64 x 48 decoded'),
        ('duplicate_file', 'duplicate-file', 'images 1, 50'),
    ):
        report = check('mmdet', train=dataset(DETECTION, coco[name]))
        assert [finding.value for finding in report.kept[kind]] == [text]


def test_masks_matter_only_where_they_are_loaded(coco):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    report = check('mmdet', train=dataset(DETECTION, coco['mask_missing'], pipeline=pipeline))
    assert not report.counts


def test_images_without_objects_matter_in_training_only(coco):
    data = dataset(DETECTION, coco['no_annotations'])
    assert set(check('mmdet', train=data).counts) == ANNOTATIONS['no_annotations']
    assert not check('mmdet', splits=('test',), test=data).counts


@pytest.mark.parametrize(
    ('classes', 'kind'),
    [(('disc', 'box'), 'classes-order'), (('box', 'Disc'), 'classes-missing'), (('box',), 'names-left-out')],
)
def test_class_names(coco, classes, kind):
    findings = judge_coco(read_coco(str(coco['good'])), classes, trains=True, with_mask=True)
    assert [finding.kind for finding in findings] == [kind]


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('json_cut', r'line \d+, at the end of the file'),
        ('json_comma', r'line 41, column 4: '),
        ('json_list', 'line 1, column 1: expected an object'),
        ('json_zero_bytes', 'line 1, at the end of the file'),
    ],
)
def test_malformed_json(coco, name, text):
    report = check('mmdet', train=dataset(DETECTION, coco[name]))
    assert list(report.counts) == ['json-malformed']
    assert re.match(text, report.kept['json-malformed'][0].value)


def build_coco(ann_file: Path, filter_cfg: dict | None):
    cocos = pytest.importorskip('mmdet.datasets.coco')
    init_default_scope('mmdet')
    fields = {key: DETECTION[key] for key in ('metainfo', 'data_prefix')}
    return cocos.CocoDataset(ann_file=str(ann_file), filter_cfg=filter_cfg, **fields)


@pytest.mark.parametrize('name', ['no_images', *names_by_effect('builds'), *corrupt_data.TEXT_FAULTS])
def test_mmdet_stops_where_the_table_says_so(coco, name, capsys):
    with pytest.raises((KeyError, ValueError, TypeError, AssertionError)):
        build_coco(coco[name], dict(filter_empty_gt=True))


@pytest.mark.parametrize('name', names_by_effect('learned as background'))
def test_mmdet_drops_boxes_where_the_table_says_so(coco, name, capsys):
    assert build_coco(coco[name], None).get_data_info(0)['instances'] == []


def test_run_lengths_are_those_of_pycocotools():
    coder = pytest.importorskip('pycocotools.mask')
    rng = np.random.default_rng(0)
    for scale, first in itertools.product((1, 7, 40), (0, 1)):
        mask = np.kron(rng.integers(0, 2, (60 // scale + 1, 90 // scale + 1)), np.ones((scale, scale)))[:60, :90]
        mask = mask if mask[0, 0] == first else 1 - mask
        flat = mask.astype(np.uint8).flatten(order='F')
        changes = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *changes, flat.size]).tolist()
        expected = runs if flat[0] == 0 else [0, *runs]
        rle = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert masks.run_lengths(rle['counts'].decode()) == expected
