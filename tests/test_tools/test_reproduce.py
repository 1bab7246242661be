"""tools/analysis_tools/reproduce.py: published results against those of checkpoints that stand in for the release."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tool_runs import REPO, weights, write_config

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


def write_index(root: Path, results: dict[str, dict[str, float]]) -> None:
    """An index of models: name -> published results."""
    models = [
        dict(Name=name, Config=f'{name}.py', Weights='https://x/y.pth', Results=[dict(Metrics=metrics)])
        for name, metrics in results.items()
    ]
    (root / 'metafile.yml').write_text(yaml.safe_dump(dict(Models=models)))
    (root / 'model-index.yml').write_text(yaml.safe_dump(dict(Import=['metafile.yml'])))


def test_agreement_refusal_and_failure(tool, classifier, detector, data, tmp_path, monkeypatch, capfd):
    """A segmentor that the mirror lacks, a moving average, a detector."""
    trained = weights(classifier / 'work_dirs' / 'classification' / 'epoch_2.pth')
    average = released_keys({key: value for key, value in trained.items() if not key.startswith('ema ')})
    other = {key: value for key, value in average.items() if 'mlp' not in key}  # cannot be loaded
    release = tmp_path / 'release'
    release.mkdir()
    torch.save(dict(model=other, model_ema=average), release / 'vHeat_tiny.pth')
    (release / 'vHeat_tiny_det.pth').write_bytes((detector / 'run' / 'epoch_2.pth').read_bytes())
    monkeypatch.setenv('VHEAT_WEIGHTS', str(release))

    root = tmp_path / 'root'
    root.mkdir()
    for task, name in dict(classification=CLASSIFIER, detection=DETECTOR, segmentation=SEGMENTOR).items():
        write_config(root, task, data, '\ndel pipeline[1]' * (name == CLASSIFIER)).rename(root / f'{name}.py')
    results = {SEGMENTOR: {'mIoU': 49.6}, CLASSIFIER: {'Top 1 Accuracy': 1}, DETECTOR: {'box AP': 99, 'mask AP': 99.1}}
    write_index(root, results)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert tool.main(['--out', 'table.md'], root) == 1
    table = (tmp_path / 'table.md').read_text()
    assert table in capfd.readouterr().out
    rows = {tuple(cells[1:3]): cells[3:-1] for cells in map(split, table.splitlines()) if cells[0] == ''}
    *numbers, note = rows[SEGMENTOR, 'mIoU']
    assert numbers == ['49.6', '', '']
    assert note.startswith('not measured: VHEAT_WEIGHTS=')
    logged = [json.loads(log.read_text()) for log in Path('work_dirs', 'reproduce').glob('*/*/*.json')]
    found = {name: value for metrics in logged for name, value in metrics.items()}
    top1 = found['accuracy/top1']
    for (name, metric), value in {
        (CLASSIFIER, 'Top 1 Accuracy'): top1,
        (DETECTOR, 'box AP'): 100 * found['coco/bbox_mAP'],
        (DETECTOR, 'mask AP'): 100 * found['coco/segm_mAP'],
    }.items():
        published = results[name][metric]
        measured = [f'{published:g}', f'{value:.2f}', f'{value - published:+.2f}']
        assert rows[name, metric] == [*measured, '**refused: more than 0.2 points**']
    for word in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain', 'vheat_mm'):
        assert f'{word} ' in table
    assert 'reproduce.py --out table.md' in table

    # the same checkpoint, with almost what it gave as the published result
    write_index(root, {CLASSIFIER: {'Top 1 Accuracy': top1 + 0.2}})
    assert tool.main(['vheat_tiny', '--nproc', '2'], root) == 0, capfd.readouterr()
    assert f'| {top1 + 0.2:g} | {top1:.2f} | -0.20 |  |' in capfd.readouterr().out


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.split('|')]


@pytest.mark.parametrize(('measured', 'refused'), [(45.3, False), (44.9, False), (45.31, True), (44.8, True)])
def test_difference_that_is_refused(tool, measured, refused):
    row = tool.Row('x', 'box AP', 45.1, measured)
    assert row.note == ('**refused: more than 0.2 points**' if refused else '')
    assert str(row).startswith(f'| x | box AP | 45.1 | {measured:.2f} | {measured - 45.1:+.2f} |')


def test_default_is_every_published_model(tool):
    models = tool.read_models(REPO)
    names = tool.parse_args([], models).models
    assert names == tool.parse_args(list(NAMES), models).models
    assert all(tool.published(models[name]) for name in names)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        ([UNPUBLISHED], rf"no checkpoint of '{UNPUBLISHED}' is published.*; there are those of vheat_tiny, "),
        ([f'{CLASSIFIER}s'], rf"did you mean '{CLASSIFIER}'\?"),
        (['--nproc', '0'], r'--nproc 0: expected a number of at least 1'),
        (['--out', 'gone/table.md'], r"--out gone/table\.md: there is no folder 'gone'"),
    ],
)
def test_wrong_command_line(tool, capsys, arguments, words):
    with pytest.raises(SystemExit, match='2'):
        tool.main(arguments)
    assert re.search(words, capsys.readouterr().err)
