"""tools/analysis_tools/reproduce.py: published results against those of checkpoints that stand in for the release."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tool_runs import REPO, call, weights, write_config

from vheat_mm.apis.train_test import run_testing
from vheat_mm.checkpoint.released import NAMES

CLASSIFIER, DETECTOR = 'vheat-t_16xb128_in1k', 'mask-rcnn_vheat-t_fpn_1x_coco'
SEGMENTOR, UNPUBLISHED = 'vheat-b_upernet_8xb2-160k_ade20k-512x512', 'vheat-s_upernet_8xb2-160k_ade20k-512x512'


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / 'tools' / 'analysis_tools'))
    return importlib.import_module('reproduce')


def released_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A classifier's weights as in the release."""
    spelled = {'backbone.outnorm3': 'classifier.0', 'head.fc': 'classifier.3', 'backbone.': ''}
    return {re.sub('|'.join(spelled), lambda found: spelled[found[0]], key): state[key] for key in state}


def write_index(root: Path, results: dict[str, tuple[str, str, dict[str, float]]]) -> None:
    """An index of models: name -> config, data set, published results."""
    models = [
        dict(Name=name, Config=config, Weights='https://x/y.pth', Results=[dict(Dataset=data, Metrics=metrics)])
        for name, (config, data, metrics) in results.items()
    ]
    (root / 'metafile.yml').write_text(yaml.safe_dump(dict(Models=models)))
    (root / 'model-index.yml').write_text(yaml.safe_dump(dict(Import=['metafile.yml'])))


def test_agreement_refusal_and_failure(tool, classifier, detector, data, tmp_path, monkeypatch, capfd):
    """A moving average on its data, a detector on data of another place, a segmentor without data."""
    trained = weights(classifier / 'work_dirs' / 'classification' / 'epoch_2.pth')
    average = released_keys({key: value for key, value in trained.items() if not key.startswith('ema ')})
    other = {key: value for key, value in average.items() if 'mlp' not in key}  # cannot be loaded
    release = tmp_path / 'release'
    release.mkdir()
    torch.save(dict(model=other, model_ema=average), release / 'vHeat_tiny.pth')
    (release / 'vHeat_tiny_det.pth').write_bytes((detector / 'run' / 'epoch_2.pth').read_bytes())
    torch.save(dict(state_dict={'backbone.' + key: average[key] for key in average}), release / 'vHeat_base_seg.pth')
    monkeypatch.setenv('VHEAT_WEIGHTS', str(release))

    root = tmp_path / 'root'
    root.mkdir()
    no_flips = '\ndel pipeline[1]'
    config = write_config(root, 'classification', data, no_flips).rename(root / f'{CLASSIFIER}.py')
    checkpoint = classifier / 'work_dirs' / 'classification' / 'epoch_2.pth'
    call(run_testing, config, checkpoint, '--work-dir', tmp_path / 'direct', cwd=tmp_path)
    (log,) = (tmp_path / 'direct').glob('*/*.json')
    top1 = json.loads(log.read_text())['accuracy/top1']
    detection = write_config(root, 'detection', data).rename(root / f'{DETECTOR}.py')
    detection.write_text(detection.read_text().replace(repr(str(data)), "'gone'"))
    write_config(root, 'segmentation', tmp_path / 'no_data').rename(root / f'{SEGMENTOR}.py')
    results = {
        CLASSIFIER: (f'{CLASSIFIER}.py', 'ImageNet-1k', {'Top 1 Accuracy': top1 + 0.2}),
        DETECTOR: (f'{DETECTOR}.py', 'COCO', {'box AP': 99.0, 'mask AP': 99.1}),
        SEGMENTOR: (f'{SEGMENTOR}.py', 'ADE20K', {'mIoU': 49.6}),
    }
    write_index(root, results)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert tool.main(['--data-root', f'coco={data}', '--out', 'table.md'], root) == 1
    table = (tmp_path / 'table.md').read_text()
    assert table in capfd.readouterr().out
    rows = {tuple(cells[1:3]): cells[3:-1] for cells in map(split, table.splitlines()) if cells[0] == ''}
    assert rows[CLASSIFIER, 'Top 1 Accuracy'] == [f'{top1 + 0.2:g}', f'{top1:.2f}', '-0.20', '']
    for metric in ('box AP', 'mask AP'):
        published, measured, difference, note = rows[DETECTOR, metric]
        assert float(measured) - float(published) == pytest.approx(float(difference))
        assert note == '**refused: more than 0.2 points**'
    *numbers, note = rows[SEGMENTOR, 'mIoU']
    assert numbers == ['49.6', '', '']
    assert note.startswith('not measured: ')
    for word in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain', 'vheat_mm'):
        assert f'{word} ' in table
    assert f'reproduce.py --data-root coco={data} --out table.md' in table

    # the same checkpoint, with what it gave as the published result
    write_index(root, {CLASSIFIER: (f'{CLASSIFIER}.py', 'ImageNet-1k', {'Top 1 Accuracy': top1})})
    assert tool.main(['vheat_tiny', '--nproc', '2'], root) == 0, capfd.readouterr()


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.split('|')]


@pytest.mark.parametrize(('measured', 'refused'), [(45.3, False), (44.9, False), (45.31, True), (44.8, True)])
def test_difference_that_is_refused(tool, measured, refused):
    row = tool.Row('x', 'box AP', 45.1, measured)
    assert row.note == ('**refused: more than 0.2 points**' if refused else '')
    assert str(row).startswith(f'| x | box AP | 45.1 | {measured:.2f} | {measured - 45.1:+.2f} |')


def test_models_without_weights_and_results(tool, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv('VHEAT_WEIGHTS', str(tmp_path))
    assert tool.main([UNPUBLISHED, 'mask2former_vheat-t_8xb2-lsj-50e_coco', 'vheat_tiny']) == 1
    rows = [line for line in capfd.readouterr().out.splitlines() if line.startswith('| ') and 'metric' not in line]
    assert [row.split('|')[1].strip() for row in rows] == [
        UNPUBLISHED,
        'mask2former_vheat-t_8xb2-lsj-50e_coco',
        CLASSIFIER,
    ]
    assert rows[0].startswith(f'| {UNPUBLISHED} | mIoU | 49 |  |  | not measured: no checkpoint is published')
    assert 'no checkpoint is published' in rows[1]
    assert 'vHeat_tiny.pth' in rows[2]


def test_default_is_every_published_model(tool):
    models = tool.read_models(REPO)
    names = tool.parse_args([], models).models
    assert names == tool.parse_args(list(NAMES), models).models
    assert all(tool.published(models[name]) for name in names)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['vheat_tinny'], r"unknown model 'vheat_tinny'.*published are vheat-t_16xb128_in1k, "),
        ([f'{CLASSIFIER}s'], rf"did you mean '{CLASSIFIER}'\?"),
        (['--data-root', 'cocoo=/data'], r'--data-root cocoo: expected KEY=DIR, with a key of imagenet, coco, ade20k'),
        (['--data-root', 'coco'], r'--data-root coco: expected KEY=DIR'),
        (['--nproc', '0'], r'--nproc 0: expected a number of at least 1'),
        (['--out', 'gone/table.md'], r"--out gone/table\.md: there is no folder 'gone'"),
    ],
)
def test_wrong_command_line(tool, capsys, arguments, words):
    with pytest.raises(SystemExit, match='2'):
        tool.main(arguments)
    assert re.search(words, capsys.readouterr().err)
