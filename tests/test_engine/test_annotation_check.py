"""The check of annotation files at the start of training and testing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import corrupt_data
import pytest
import torch
from data_checks import DETECTION, dataset
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import init_default_scope

from vheat_mm.datasets.checks.check import check_datasets
from vheat_mm.engine.hooks import AnnotationCheckHook
from vheat_mm.engine.hooks.annotation_check_hook import check_annotations, check_bands, count_bands
from vheat_mm.utils.errors import AnnotationError


@pytest.fixture(scope='module')
def coco(tmp_path_factory) -> dict[str, Path]:
    return corrupt_data.make_corrupt_coco(tmp_path_factory.mktemp('coco'))


@pytest.fixture(autouse=True)
def _scope(own_scope):
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')


def make_runner(path: Path, hook: AnnotationCheckHook) -> SimpleNamespace:
    """What the hook needs of a runner whose data sets are not built yet."""
    loader = dict(dataset=dataset(DETECTION, path))
    cfg = Config(dict(model={}, train_dataloader=loader, val_dataloader=loader))
    return SimpleNamespace(cfg=cfg, logger=logging.getLogger('test'), hooks=[hook])


def test_an_error_names_file_and_remedy(coco, caplog):
    runner = make_runner(coco['box_text'], AnnotationCheckHook())
    with pytest.raises(
        AnnotationError, match=r"box_text.json, image 1, annotation 1: bbox \['8', '8'.*write \[x, y"
    ) as caught:
        check_annotations(runner, ['train', 'val'])
    assert 'allow=' not in str(caught.value)  # mmdet could not build the data set
    runner = make_runner(coco['box_negative_size'], AnnotationCheckHook())
    with pytest.raises(AnnotationError, match=r"allow=\['box-negative'\]"):
        check_annotations(runner, ['train', 'val'])


def test_the_cause_stands_first(tmp_path):
    """That no annotation can be used follows from it."""
    content = corrupt_data.coco_content({'good_0': Path('good_0.jpg')})
    content['annotations'][0]['bbox'] = ['8', '8', '9', '9']
    (tmp_path / 'x.json').write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=r'annotation 1: bbox .*\[box-malformed\]'):
        check_annotations(make_runner(tmp_path / 'x.json', AnnotationCheckHook()), ['train'])


def test_other_ranks_read_no_file_and_stop_as_well(coco, monkeypatch):
    hooks = 'vheat_mm.engine.hooks.annotation_check_hook'
    monkeypatch.setattr(f'{hooks}.get_rank', lambda: 1)
    monkeypatch.setattr(f'{hooks}.check_labels', lambda *_: pytest.fail('read'))
    monkeypatch.setattr(f'{hooks}.broadcast_object_list', lambda text: text.__setitem__(0, 'x.json: wrong'))
    with pytest.raises(AnnotationError, match='wrong'):
        check_annotations(make_runner(coco['good'], AnnotationCheckHook()), ['train'])


def test_same_findings_as_the_whole_check(coco, caplog):
    caplog.set_level(logging.INFO)
    for name in ('json_cut', 'box_negative_size', 'category_unknown', 'no_annotations', 'box_zero_size'):
        runner = make_runner(coco[name], AnnotationCheckHook())
        kinds = set(check_datasets(runner.cfg, ('train',), 1, limit=1).counts)
        caplog.clear()
        try:
            check_annotations(runner, ['train'])
            said = caplog.text
        except AnnotationError as error:
            said = caplog.text + str(error)
        assert kinds
        assert all(f'[{kind}]' in said for kind in kinds)
        assert 'annotations checked in' in caplog.text


def test_findings_that_are_allowed(coco, caplog):
    with pytest.raises(ValueError, match='box-negativ'):
        AnnotationCheckHook(allow=['box-negativ'])
    runner = make_runner(coco['box_negative_size'], AnnotationCheckHook(allow=['box-negative']))
    check_annotations(runner, ['train', 'val'])
    assert '[box-negative]' in caplog.text


@pytest.mark.parametrize(
    ('faulty', 'fields', 'splits', 'ends'),
    [
        (2, dict(bbox=[500, 8, 32, 24]), ['train', 'val'], False),
        (3, dict(bbox=[500, 8, 32, 24]), ['train', 'val'], True),
        (2, dict(segmentation='?'), ['train'], False),
        (2, dict(segmentation='?'), ['train', 'val'], True),
        (1, dict(id=9), ['train'], True),
    ],
)
def test_a_few_faulty_entries_do_not_end_a_training(tmp_path, caplog, faulty, fields, splits, ends):
    """COCO, LVIS and others hold some, as published; in validation, each sample must be loaded."""
    content = corrupt_data.coco_content({f'n{i}': Path(f'n{i}.jpg') for i in range(200)})
    for annotation in content['annotations'][:faulty]:
        annotation.update(fields)
    (tmp_path / 'x.json').write_text(json.dumps(content))
    runner = make_runner(tmp_path / 'x.json', AnnotationCheckHook())
    if ends:
        with pytest.raises(AnnotationError, match='annotation'):
            check_annotations(runner, splits)
    else:
        check_annotations(runner, splits)
        assert 'x.json, image 1, annotation 1: ' in caplog.text
        assert f'({faulty} of this kind)' in caplog.text
    assert check_datasets(runner.cfg, splits, 1, limit=1).failed(strict=False)


@pytest.mark.parametrize(('bands', 'ends'), [((3, 3), False), ((3, 1), False), ((3, 4), True)])
def test_bands_of_a_batch(bands, ends):
    model = torch.nn.Module()
    model.data_preprocessor = BaseDataPreprocessor()
    model.data_preprocessor.register_buffer('mean', torch.zeros(3, 1, 1))
    samples = [SimpleNamespace(metainfo=dict(img_path=f'{number}.tif')) for number in bands]
    batch = dict(inputs=[torch.zeros(number, 2, 2) for number in bands], data_samples=samples)
    if ends:
        with pytest.raises(AnnotationError, match=r'4.tif: 4 bands, model.data_preprocessor.mean has 3 .*in_channels'):
            check_bands(batch, count_bands(model))
    else:
        check_bands(batch, count_bands(model))


def test_files_are_read_once(coco, monkeypatch):
    calls = []
    monkeypatch.setattr('vheat_mm.datasets.checks.samples.read_coco', lambda path, _: calls.append(path) or 1 / 0)
    runner = make_runner(coco['good'], AnnotationCheckHook())
    with pytest.raises(ZeroDivisionError):
        check_annotations(runner, ['train', 'val'])
    check_annotations(runner, ['train', 'val'])
    check_annotations(make_runner(coco['good'], AnnotationCheckHook(files=False)), ['train', 'val'])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ('classes', 'outcome'),
    [(('a', 'b'), 'fine'), (('b', 'a'), 'error'), (('a', 'b', 'c'), 'error'), (('x', 'y'), 'warning'), (None, 'fine')],
)
def test_classes_of_the_weights(classes, outcome):
    """Classes of other names may be the same in other words; those of the same names are shifted."""
    hook, warnings = AnnotationCheckHook(), []
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes=classes)))
    logger = SimpleNamespace(warning=warnings.append)
    runner = SimpleNamespace(cfg={}, test_dataloader=loader, logger=logger)
    hook.after_load_checkpoint(runner, dict(meta=dict(dataset_meta=dict(classes=('a', 'b')))))
    if outcome == 'error':
        with pytest.raises(AnnotationError, match=r'the weights have learned \[a, b\]'):
            hook.before_test(runner)
    else:
        hook.before_test(runner)
    assert len(warnings) == (outcome == 'warning')
