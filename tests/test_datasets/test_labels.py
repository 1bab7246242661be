"""Labels that training would accept and learn wrongly: numbers of classes, label maps, ignored values."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import corrupt_data
import numpy as np
import pytest
from data_checks import CLASSIFICATION, SEGMENTATION, check, dataset
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from vheat_mm.datasets.checks import label_maps
from vheat_mm.datasets.checks.check import check_datasets, check_labels
from vheat_mm.datasets.checks.report import Report
from vheat_mm.engine.hooks.annotation_check_hook import Head, check_classes
from vheat_mm.utils.errors import AnnotationError


def at_start(scope: str, splits: tuple[str, ...] = ('train', 'val'), **cfg) -> Report:
    """The check that a training runs at its start."""
    init_default_scope(scope)
    return check_labels(Config(dict(dict(model={}), **cfg)), splits)


def write_folders(root: Path, **splits: str) -> dict[str, dict]:
    """A data set for each split, with one image for each folder; a letter names a folder."""
    loaders = {}
    for split, names in splits.items():
        for name in names.split():
            corrupt_data.write_good(root / split / name)
        loaders[f'{split}_dataloader'] = dict(dataset=dataset(CLASSIFICATION, None, root, data_prefix=split))
    return loaders


@pytest.mark.parametrize(
    ('train', 'val', 'kinds'),
    [
        ('a b c', 'a b c', set()),
        ('a b c', 'b c', {'classes-differ'}),
        ('a b c', 'a b', {'classes-fewer'}),
        ('a b', 'a b c', {'classes-differ'}),
        ('a b c', 'a b c aa', {'classes-differ'}),
        ('a b', 'A b', {'classes-differ'}),
        ('.ipynb_checkpoints a b', 'a b', {'classes-differ', 'class-folder-hidden'}),
        ('a b .x', 'a b .x', {'class-folder-hidden'}),
        ('cat Cat', 'cat Cat', {'classes-alike'}),
        ('a', 'a', {'label-of-all'}),
    ],
)
def test_class_folders(tmp_path, train, val, kinds):
    pytest.importorskip('mmpretrain')
    report = at_start('mmpretrain', **write_folders(tmp_path, train=train, val=val))
    assert set(report.counts) == kinds
    if (train, val) == ('a b c', 'b c'):
        text = 'train_dataloader.dataset has [a, b, c]; val_dataloader.dataset has [b, c]: the latter lacks a'
        assert report.kept['classes-differ'][0].value == text


def test_an_empty_folder_keeps_the_numbers(tmp_path):
    pytest.importorskip('mmpretrain')
    loaders = write_folders(tmp_path, train='a b c', val='b c')
    (tmp_path / 'val' / 'a').mkdir()
    assert not at_start('mmpretrain', **loaders).counts


def test_lists_number_the_folders(tmp_path):
    """Without class names, the labels that a list gives to folders are compared."""
    pytest.importorskip('mmpretrain')
    loaders = write_folders(tmp_path, train='a b', val='a b')
    for first, kinds in (('a', set()), ('b', {'classes-differ'})):
        lines = [f'{name}/good_0.jpg {int(name != first)}' for name in 'ab']
        (tmp_path / 'val.txt').write_text('\n'.join(lines))
        loaders['val_dataloader']['dataset'].update(ann_file='val.txt')
        report = at_start('mmpretrain', **loaders)
        assert set(report.counts) == kinds
    assert 'folder a is label 1 in val_dataloader.dataset, and 0' in report.kept['classes-differ'][0].value


def test_names_in_another_order_than_folders(tmp_path):
    pytest.importorskip('mmpretrain')
    loaders = write_folders(tmp_path, train='a b')
    for classes, kinds in ((('b', 'a'), ['classes-order']), (('ant', 'bee'), [])):
        loaders['train_dataloader']['dataset'].update(metainfo=dict(classes=classes))
        assert list(at_start('mmpretrain', ('train',), **loaders).counts) == kinds


def write_maps(root: Path, values: list[list[int]], split: str = 'train', suffix: str = '.png') -> dict:
    """A data set of one map for each list of values; classes are ground and box."""
    for kind in ('images', 'annotations'):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for number, found in enumerate(values):
        labels = np.resize(np.array(found, np.uint8), (20, 20))
        Image.fromarray(labels).save(root / 'annotations' / split / f'{number}{suffix}', quality=100)
        Image.fromarray(labels).convert('RGB').save(root / 'images' / split / f'{number}.jpg')
    prefix = dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}')
    fields = dict(data_prefix=prefix, reduce_zero_label=False, seg_map_suffix=suffix)
    return dict(dataset=dataset(SEGMENTATION, None, root, **fields))


@pytest.mark.parametrize(
    ('values', 'kinds'),
    [
        ([[0, 255]] * 3, {'maps-without-classes'}),
        ([[0, 0]] * 3, {'maps-without-classes'}),
        ([[255, 255]], {'maps-without-classes', 'map-all-ignored'}),
        ([[0, 1, 255]] * 3, set()),
        ([[0, 0], [1, 1]], set()),
        ([[0, 2]], {'map-values'}),
    ],
)
def test_maps_together(tmp_path, values, kinds):
    """Masks of 0 and 255 are learned to mIoU 100; the start of a training finds it, and so does the whole check."""
    pytest.importorskip('mmseg')
    loader = write_maps(tmp_path, values)
    whole = check('mmseg', train=loader['dataset'])
    assert {kind for kind in whole.counts if not kind.startswith('image')} == kinds
    first = at_start('mmseg', ('train',), train_dataloader=loader)
    assert set(first.counts) == kinds - {'map-all-ignored'}
    if kinds == {'maps-without-classes'}:
        assert whole.kept['maps-without-classes'] == first.kept['maps-without-classes']


@pytest.mark.parametrize(
    ('values', 'kinds'),
    [
        ([[0, 0]] * 2, {'maps-of-one-class'}),
        ([[0, 255]] * 2, {'maps-without-classes'}),
        ([[0, 0], [0, 128]], {'map-values'}),
    ],
)
def test_maps_to_test_on(tmp_path, values, kinds):
    """A few of them may hold no object; a faulty one is named as the cause."""
    pytest.importorskip('mmseg')
    train, val = write_maps(tmp_path, [[0, 1]] * 2), write_maps(tmp_path, values, 'val')
    assert set(at_start('mmseg', train_dataloader=train, val_dataloader=val).counts) == kinds


def test_start_reads_no_more_maps_than_show_two_classes(tmp_path, monkeypatch):
    pytest.importorskip('mmseg')
    loader = write_maps(tmp_path, [[0, 255]] * 60 + [[0, 1]] * 20)
    read = []
    original = label_maps.examine_file
    monkeypatch.setattr(label_maps, 'examine_file', lambda *args: read.append(args[0]) or original(*args))
    assert not at_start('mmseg', ('train',), train_dataloader=loader).counts
    assert 1 < len(read) < 20


def test_maps_as_jpeg(tmp_path):
    pytest.importorskip('mmseg')
    report = check('mmseg', train=write_maps(tmp_path, [[0, 1]], suffix='.jpg')['dataset'])
    assert report.counts['map-lossy'] == 1


@pytest.mark.parametrize(
    ('says', 'kinds'),
    [
        (('data', 'decode', 'auxiliary', 'metric'), set()),
        (('decode', 'auxiliary', 'metric'), {'ignore-index-unsaid'}),
        (('data', 'auxiliary', 'metric'), {'ignore-index-differs', 'padding-learned'}),
        (('data', 'decode', 'auxiliary'), {'ignore-index-differs'}),
        (('data',), {'ignore-index-differs'}),
        ((), {'map-values'}),
    ],
)
def test_ignored_value(tmp_path, says, kinds):
    """CamVid as published: what is unlabelled has the value after the last class."""
    pytest.importorskip('mmseg')
    train, val = (write_maps(tmp_path, [[0, 1, 2]] * 2, split) for split in ('train', 'val'))
    index = {name: dict(ignore_index=2) if name in says else {} for name in ('data', 'decode', 'auxiliary', 'metric')}
    for loader in (train, val):
        loader['dataset'].update(index['data'])
    cfg = dict(
        model=dict(
            data_preprocessor=dict(seg_pad_val=2 if 'decode' in says else 255),
            decode_head=dict(num_classes=2, **index['decode']),
            auxiliary_head=[index['auxiliary']],
        ),
        val_evaluator=[dict(type='IoUMetric', **index['metric'])],
        train_dataloader=train,
        val_dataloader=val,
    )
    init_default_scope('mmseg')
    report = check_datasets(Config(cfg), ('train', 'val'), workers=1)
    assert {kind for kind in report.counts if not kind.startswith('image')} == kinds
    if says == ('data', 'decode', 'auxiliary'):
        text = 'ignored by the data set, model.decode_head, model.auxiliary_head[0], not by val_evaluator[0]'
        assert text in report.kept['ignore-index-differs'][0].value


def test_shifted_labels(tmp_path):
    pytest.importorskip('mmseg')
    train, val = (write_maps(tmp_path, [[1, 2], [0, 1]], split) for split in ('train', 'val'))
    train['dataset'].update(reduce_zero_label=True)
    report = at_start('mmseg', train_dataloader=train, val_dataloader=val)
    assert list(report.counts) == ['classes-shifted']
    assert 'train_dataloader.dataset: reduce_zero_label=True' in report.kept['classes-shifted'][0].value


# --- Pascal VOC


def write_voc(root: Path, *names: str) -> dict:
    """A data set of one image for each argument, with an object for each of its words."""
    for kind in ('JPEGImages', 'Annotations'):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for number, words in enumerate(names):
        (root / 'JPEGImages' / f'{number}.jpg').write_bytes(corrupt_data.encode(corrupt_data.picture(), 'JPEG'))
        box = '<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>40</xmax><ymax>32</ymax></bndbox>'
        objects = ''.join(f'<object><name>{word}</name>{box}</object>' for word in words.split())
        size = '<size><width>64</width><height>48</height></size>'
        (root / 'Annotations' / f'{number}.xml').write_text(f'<annotation>{size}{objects}</annotation>')
    (root / 'train.txt').write_text('\n'.join(map(str, range(len(names)))))
    fields = dict(data_root=str(root), ann_file='train.txt', data_prefix=dict(sub_data_root=''), pipeline=[])
    return dict(type='XMLDataset', metainfo=dict(classes=corrupt_data.CLASSES), **fields)


@pytest.mark.parametrize(
    ('names', 'kinds'),
    [
        (('box disc', 'box'), set()),
        (('box disc', 'Box box'), {'names-unknown'}),
        (('Box Disc', 'Box'), {'names-unknown', 'image-without-annotation'}),
        (('box disk', 'box'), {'names-unknown', 'class-without-samples'}),
        (('box disc', 'box', 'cup box'), {'names-left-out'}),
        (('box disc', 'cup cup cup'), {'names-unknown', 'image-without-annotation'}),
    ],
)
def test_names_in_voc_files(tmp_path, names, kinds):
    pytest.importorskip('mmdet')
    report = at_start('mmdet', ('train',), train_dataloader=dict(dataset=write_voc(tmp_path, *names)))
    assert set(report.counts) == kinds
    if names[1] == 'Box box':
        text = report.kept['names-unknown'][0].value
        assert text.startswith("'Box' (1 objects, first in ")
        assert 'Annotations/1.xml); metainfo.classes: [box, disc]' in text


def test_names_of_voc_that_are_left_out(tmp_path):
    pytest.importorskip('mmdet')
    data = dict(write_voc(tmp_path, 'car cat cat', 'car'), type='VOCDataset', metainfo=dict(classes=('car',)))
    assert not at_start('mmdet', ('train',), train_dataloader=dict(dataset=data)).counts


def test_voc_files_that_cannot_be_read(tmp_path):
    pytest.importorskip('mmdet')
    data = write_voc(tmp_path, 'box', 'box disc', 'box', 'box')
    (tmp_path / 'Annotations' / '0.xml').unlink()
    (tmp_path / 'Annotations' / '2.xml').write_text('<annotation>')
    (tmp_path / 'Annotations' / '3.xml').write_text('<annotation><object><name>box</name></object></annotation>')
    report = at_start('mmdet', ('train',), train_dataloader=dict(dataset=data))
    assert report.counts == {'xml-malformed': 3}
    assert report.kept['xml-malformed'][0].path.endswith('Annotations/0.xml')
    texts = [finding.value for finding in report.kept['xml-malformed']]
    assert 'No such file' in texts[0]
    assert texts[2].startswith('an object lacks name, bndbox')


def test_voc_files_without_sizes(tmp_path):
    pytest.importorskip('mmdet')
    data = write_voc(tmp_path, 'box disc')
    path = tmp_path / 'Annotations' / '0.xml'
    path.write_text(path.read_text().replace('<width>64', '<width>0'))
    report = at_start('mmdet', ('train',), train_dataloader=dict(dataset=data))
    assert [finding.value for finding in report.kept['size-not-positive']] == ['0 x 48']


def test_sets_with_own_palettes(tmp_path):
    """mmdet then has a list of metainfo, one of each set."""
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    data = write_voc(tmp_path, 'box disc')
    parts = [
        dict(data, metainfo=dict(classes=names, palette=[(1, i, 1)])) for i, names in enumerate([('box', 'disc')] * 2)
    ]
    both = DATASETS.build(dict(type='ConcatDataset', datasets=parts))
    assert isinstance(both.metainfo, list)
    heads = dict(gt_instances=Head('bbox_head', 2, 255))
    runner = SimpleNamespace(logger=SimpleNamespace(warning=pytest.fail))
    check_classes(both, heads, runner)
    with pytest.raises(AnnotationError, match='num_classes=1'):
        check_classes(both, dict(gt_instances=Head('bbox_head', 1, 255)), runner)
    assert not at_start(
        'mmdet', ('train',), train_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=parts))
    ).counts
    parts[1]['metainfo']['classes'] = ('disc', 'box')
    report = at_start('mmdet', ('train',), train_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=parts)))
    assert list(report.counts) == ['classes-differ']
