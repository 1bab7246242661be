"""The check of a config's data sets, its report and its command."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import corrupt_data
import pytest
from data_checks import CLASSIFICATION, DETECTION, SEGMENTATION, check, dataset
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from vheat_mm.datasets.checks.check import show_progress
from vheat_mm.datasets.checks.kinds import KINDS, Severity
from vheat_mm.datasets.checks.report import KEPT, Finding, Report

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / 'tools' / 'misc'))
from check_dataset import main  # noqa: E402


@pytest.mark.parametrize('name', corrupt_data.LABEL_FAULTS)
def test_labels(folders, name):
    data = dataset(CLASSIFICATION, folders[name])
    report = check('mmpretrain', model=dict(head=dict(num_classes=2)), train=data)
    assert set(report.counts) == corrupt_data.LABEL_FAULTS[name][1]
    lined = [finding for kind in report.kept if kind != 'label-contradiction' for finding in report.kept[kind]]
    assert all('line 9' in finding.value for finding in lined)


def test_boxes_of_other_formats(tmp_path, coco):
    """Data sets read by their own methods, here MMEngine's own format: left, top, right, bottom."""
    instances = [
        dict(bbox=[8, 8, 40, 32], bbox_label=0, ignore_flag=0),
        dict(bbox=[8, 8, float('nan'), 32], bbox_label=0, ignore_flag=0),
        dict(bbox=[40, 8, 8, 32], bbox_label=0, ignore_flag=0),
        dict(bbox=[8, 8, 8, 32], bbox_label=2, ignore_flag=0),
    ]
    path = str(coco['good'].parent.parent / 'images' / 'good_0.jpg')
    entries = [dict(img_path=path, height=48, width=64, instances=part) for part in (instances, [])]
    (tmp_path / 'x.json').write_text(json.dumps(dict(metainfo=dict(classes=corrupt_data.CLASSES), data_list=entries)))
    data = dict(type='BaseDetDataset', ann_file=str(tmp_path / 'x.json'), pipeline=[])
    kinds = {'box-not-finite', 'box-negative', 'box-degenerate', 'label-out-of-range', 'image-without-annotation'}
    assert set(check('mmdet', train=data).counts) == kinds | {'duplicate-file'}


def test_own_data_sets_of_pytorch(monkeypatch):
    """They have samples only; a training on one is not held up."""
    monkeypatch.setitem(DATASETS.module_dict, 'OwnNumbers', type('OwnNumbers', (Dataset,), {}))
    assert not check('mmdet', train=dict(type='mmengine.OwnNumbers')).counts


def test_each_file_once_however_many_name_it(coco):
    data = dataset(DETECTION, coco['good'])
    other = dataset(DETECTION, coco['image_missing'])
    mixed = dict(
        type='MultiImageMixDataset',
        dataset=dict(type='RepeatDataset', times=3, dataset=dict(type='ConcatDataset', datasets=[data, other])),
        pipeline=[dict(type='Resize', scale=(64, 64), keep_ratio=True)],
    )
    balanced = dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=data)
    report = check('mmdet', ('train', 'val', 'test'), train=mixed, val=balanced, test=data)
    assert report.checked[0].startswith('train/val/test: 4 samples (CocoDataset, train_dataloader.dataset.dataset.')
    assert report.checked[1].startswith('train: 5 samples (CocoDataset')
    assert report.checked[2].startswith('5 files decoded')
    assert report.counts == {'file-missing': 1, 'image-in-two-splits': 4}
    assert report.kept['image-in-two-splits'][0].value == 'test, train, val'


def test_bands_that_the_model_does_not_take(coco):
    for mean, found in (([1.0] * 4, 4), ([1.0] * 3, 0), ([1.0], 0)):
        model = dict(data_preprocessor=dict(mean=mean))
        report = check('mmdet', model=model, train=dataset(DETECTION, coco['good']))
        assert report.counts == ({'bands-differ': found} if found else {})


def test_data_sets_that_cannot_be_read(tmp_path, coco):
    absent = dataset(DETECTION, tmp_path / 'a' / 'absent.json')
    assert list(check('mmdet', train=absent).counts) == ['file-missing']
    assert list(check('mmdet', train=dataset(DETECTION, coco['no_images'])).counts) == ['dataset-empty']
    empty = dataset(SEGMENTATION, None, tmp_path)
    (tmp_path / 'images').mkdir()
    assert list(check('mmseg', train=empty).counts) == ['dataset-empty']
    no_list = dict(type='BaseDetDataset', ann_file=str(coco['good']), pipeline=[])
    assert list(check('mmdet', train=no_list).counts) == ['dataset-unreadable']


def test_report_limits_the_findings_of_a_kind():
    report = Report()
    report.add_all(Finding('box-outside', 'a.json', f'box {i}', 1, i) for i in range(KEPT + 5))
    assert report.counts['box-outside'] == KEPT + 5
    assert len(report.kept['box-outside']) == KEPT
    text = report.render(show=2)
    assert 'a.json, image 1, annotation 1: box 1' in text
    assert f'and {KEPT + 3} more' in text
    with pytest.raises(KeyError):
        report.add(Finding('box-otside', 'a.json'))


def test_every_kind_is_documented_and_in_use():
    page = (REPO / 'docs' / 'data_checks.md').read_text(encoding='utf-8')
    code = ''.join(
        path.read_text() for path in (REPO / 'vheat_mm' / 'datasets' / 'checks').glob('*.py') if path.stem != 'kinds'
    )
    for kind, about in KINDS.items():
        assert f'`{kind}`' in page
        assert f"'{kind}'" in code
        line = next(line for line in page.splitlines() if f'`{kind}`' in line and line.startswith('|'))
        assert f'| {about.severity.value} |' in line


def write_config(path: Path, data: dict, scope: str = 'mmdet') -> str:
    path.write_text(f'default_scope = {scope!r}\nmodel = dict()\ntrain_dataloader = dict(dataset={data!r})\n')
    return str(path)


def test_exit_status(tmp_path, coco, capsys):
    pytest.importorskip('mmdet')
    clean = write_config(tmp_path / 'clean.py', dataset(DETECTION, coco['good']))
    assert main([clean]) == 0
    assert '0 errors, 0 warnings' in capsys.readouterr().out
    assert main([clean, '--cfg-options', f'train_dataloader.dataset.ann_file={coco["image_missing"]}']) == 1
    assert 'images/missing.jpg, image 5' in capsys.readouterr().out
    gray = write_config(tmp_path / 'gray.py', dataset(DETECTION, coco['image_grayscale']))
    assert main([gray]) == 0
    assert main([gray, '--strict']) == 1
    assert main([gray, '--strict', '--limit', '4']) == 0


def test_wrong_use(tmp_path, coco, capsys):
    pytest.importorskip('mmdet')
    clean = write_config(tmp_path / 'clean.py', dataset(DETECTION, coco['good']))
    unknown = write_config(tmp_path / 'unknown.py', dataset(DETECTION, coco['good'], type='CocoDatset'))
    for argv, words in (
        ([str(tmp_path / 'none.py')], 'there is no config'),
        ([clean, '--split', 'val'], 'defines no val_dataloader'),
        ([clean, '--out', str(tmp_path / 'no' / 'x.json')], '--out'),
        ([unknown], 'train_dataloader.dataset: '),
    ):
        assert main(argv) == 2
        errors = capsys.readouterr().err
        assert errors.startswith('error: ')
        assert words in errors
    with pytest.raises(SystemExit, match='2'):
        main([clean, '--workers', '0'])


def test_findings_in_a_file(tmp_path, coco, capsys):
    pytest.importorskip('mmdet')
    config = write_config(tmp_path / 'c.py', dataset(DETECTION, coco['box_nan']))
    assert main([config, '--out', str(tmp_path / 'x.json')]) == 1
    report = json.loads((tmp_path / 'x.json').read_text())
    assert (report['errors'], report['warnings']) == (1, 0)
    (kind,) = report['kinds']
    assert (kind['kind'], kind['severity'], kind['count']) == ('box-not-finite', Severity.ERROR.value, 1)
    assert kind['findings'][0]['annotation_id'] == 1
    assert 'Traceback' not in capsys.readouterr().err


def test_short_runs_print_no_progress(tmp_path, coco, capfd):
    """What decoders write to stderr is captured, too."""
    pytest.importorskip('mmdet')
    config = write_config(tmp_path / 'c.py', dataset(DETECTION, coco['images']))
    assert main([config]) == 1
    assert capfd.readouterr().err == ''


def test_progress_lines_where_stderr_is_a_file(monkeypatch):
    times = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr('vheat_mm.datasets.checks.check.time.monotonic', lambda: next(times))
    monkeypatch.setattr('sys.stderr', io.StringIO())
    assert list(show_progress(range(4), 100, 'images')) == [0, 1, 2, 3]
    assert sys.stderr.getvalue().splitlines() == [
        'checked 2 of 100 images, 0 a second',
        'checked 4 of 100 images, 0 a second',
    ]


def test_progress_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr('sys.stderr', io.StringIO())
    monkeypatch.setattr('sys.stderr.isatty', lambda: True)
    assert list(show_progress(range(4), 4, 'images')) == [0, 1, 2, 3]
    assert 'checking images' in sys.stderr.getvalue()
