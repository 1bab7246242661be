"""model-index.yml and its metafiles: numbers, addresses, OpenMMLab's readers, and README's tables made from them."""

import functools
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from config_models import CONFIGS, load
from interop import interop_env
from mmengine.registry import MODELS

from vheat_mm.checkpoint.released import RELEASES
from vheat_mm.models.arch import ARCHS
from vheat_mm.utils.torchvision import ensure_torchvision

ROOT = CONFIGS.parent
# name -> published: params in M, FLOPs in G, then metrics; for classifiers with the re-parameterised counts and
# images a second. Typed from the reference's tables, not from the metafiles.
CLASSIFIERS = {
    'vheat-t_16xb128_in1k': (30.85, 29.56, 4.94, 4.59, 1514, 82.2),
    'vheat-s_16xb128_in1k': (52.22, 50.05, 9.17, 8.48, 945, 83.6),
    'vheat-b_16xb128_in1k': (92.13, 87.50, 16.16, 14.92, 661, 83.9),
    'swin-t_16xb64_in1k': (29, None, 4.5, None, 1244, 81.2),
    'swin-s_16xb64_in1k': (50, None, 8.7, None, 728, 83.0),
    'swin-b_16xb64_in1k': (89, None, 15.4, None, 458, 83.5),
}
DETECTORS = {
    'mask-rcnn_vheat-t_fpn_1x_coco': (52.74, 286.4, 45.1, 41.2),
    'mask-rcnn_vheat-s_fpn_1x_coco': (74.11, 376.5, 46.8, 42.3),
    'mask-rcnn_vheat-b_fpn_1x_coco': (114.69, 526.2, 47.7, 43.0),
    'mask-rcnn_swin-t_fpn_1x_coco': (48, 267, 42.7, 39.3),
    'mask-rcnn_swin-s_fpn_1x_coco': (69, 354, 44.8, 40.9),
    'mask-rcnn_swin-b_fpn_1x_coco': (107, 496, 46.9, 42.3),
    'mask-rcnn_vheat-t_fpn_ms-crop-3x_coco': (52.74, 286.4, 47.3, 42.5),
    'mask-rcnn_vheat-s_fpn_ms-crop-3x_coco': (74.11, 376.5, 48.8, 43.7),
    'mask-rcnn_swin-t_fpn_ms-crop-3x_coco': (48, 267, 46.0, 41.6),
    'mask-rcnn_swin-s_fpn_ms-crop-3x_coco': (69, 354, 48.2, 43.2),
}
# params and FLOPs counted on the release, then the paper's where it has others
SEGMENTORS = {
    'vheat-t_upernet_8xb2-160k_ade20k-512x512': (64.89, 968.7, 62, 948, 47.0),
    'vheat-s_upernet_8xb2-160k_ade20k-512x512': (86.26, 1062.2, 82, 1028, 49.0),
    'vheat-b_upernet_8xb2-160k_ade20k-512x512': (128.82, 1219.4, None, None, 49.6),
    'swin-t_upernet_8xb2-160k_ade20k-512x512': (60, 945, None, None, 44.4),
    'swin-s_upernet_8xb2-160k_ade20k-512x512': (81, 1039, None, None, 47.6),
    'swin-b_upernet_8xb2-160k_ade20k-512x512': (121, 1188, None, None, 48.1),
}
MEASURED = {'Parameters', 'Parameters (deployed)'}
RECIPE = {'Architecture', 'Training Data', 'Training Resources', 'Epochs', 'Iterations', 'Batch Size', 'Input Size'}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / '.dev_scripts'))
    return importlib.import_module('update_model_tables')


@pytest.fixture
def models(tables) -> dict:
    return {model['Name']: model for group in tables.read_index(ROOT).values() for model in group}


# --- what the metafiles say


def test_every_config_is_listed(models):
    leaves = {str(path.relative_to(ROOT)) for path in CONFIGS.glob('[!_]*/*.py')}
    assert {model['Config'] for model in models.values()} == leaves
    assert len(models) == len(leaves)


def test_weights_and_logs_are_the_released(models):
    listed = {name: (m['Weights'], m['Training Log']) for name, m in models.items() if 'Weights' in m}
    assert listed == {release.config: (release.url, release.log_url) for release in RELEASES}


def test_published_numbers(models):
    published = {
        name: {key: value for key, value in model['numbers'].items() if key not in MEASURED | RECIPE}
        for name, model in models.items()
    }
    expected = {name: {} for name in models}
    for name, (params, deployed, flops, deployed_flops, speed, top1) in CLASSIFIERS.items():
        expected[name] = {
            'Parameters (published)': params * 1e6,
            'FLOPs': flops * 1e9,
            'Images per Second (A100)': speed,
            'Top 1 Accuracy': top1,
        }
        if deployed:
            expected[name] |= {
                'Parameters (published, deployed)': deployed * 1e6,
                'FLOPs (deployed)': deployed_flops * 1e9,
            }
    for name, (params, flops, box, mask) in DETECTORS.items():
        expected[name] = {'Parameters (published)': params * 1e6, 'FLOPs': flops * 1e9, 'box AP': box, 'mask AP': mask}
    for name, (params, flops, paper, paper_flops, miou) in SEGMENTORS.items():
        expected[name] = {'Parameters (published)': params * 1e6, 'FLOPs': flops * 1e9, 'mIoU': miou}
        if paper:
            expected[name] |= {'Parameters (paper)': paper * 1e6, 'FLOPs (paper)': paper_flops * 1e9}
    assert published.keys() == expected.keys()
    for name, numbers in published.items():
        assert numbers == pytest.approx(expected[name]), name


@pytest.fixture
def meta_device(monkeypatch):
    """Build without memory. (Swin computes its drop path rates with tensors, which then must be real ones.)"""
    monkeypatch.setattr(torch, 'linspace', functools.partial(torch.linspace, device='cpu'))
    with torch.device('meta'):
        yield


@pytest.mark.parametrize('config', sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob('[!_]*/*.py')))
def test_counted_parameters_and_recipe(models, own_scope, meta_device, config):
    """A metafile agrees with its config and with the model that the config builds."""
    ensure_torchvision()
    for package in ('mmdet', 'mmseg', 'mmpretrain'):
        pytest.importorskip(package)
    cfg, model = load(config), models[Path(config).stem]
    built, metadata = MODELS.build(cfg.model), model['Metadata']
    assert metadata['Parameters'] == sum(p.numel() for p in built.parameters())
    if 'Parameters (deployed)' in metadata:
        with torch.device('cpu'):
            backbone = MODELS.build(cfg.model.backbone)
        backbone.switch_to_deploy()
        count = sum(p.numel() for part in (backbone, built.head) for p in part.parameters())
        assert metadata['Parameters (deployed)'] == count
    length = metadata.get('Epochs') or metadata['Iterations']
    assert length == cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters'))
    family, size = metadata['Architecture'][0].split('-')
    assert type(built.backbone).__name__ == dict(vHeat='VHeat', Swin='SwinTransformer')[family]
    if size == 'demo':
        return
    assert metadata['Batch Size'] == cfg.auto_scale_lr.base_batch_size
    if family == 'vHeat':
        assert next(arch for arch in ARCHS if ARCHS[arch] == built.backbone.arch)[0].upper() == size
    else:
        depths = {'T': (96, 6), 'S': (96, 18), 'B': (128, 18)}[size]
        assert (built.backbone.num_features[0], len(built.backbone.stages[2].blocks)) == depths


# --- OpenMMLab's readers


@pytest.fixture
def load_index():
    pytest.importorskip('modelindex')
    return importlib.import_module('modelindex.load_model_index').load


def test_fields_are_those_of_the_format(load_index):
    from modelindex.models.Model import Model

    index = load_index(str(ROOT / 'model-index.yml'))
    assert index.check(silent=True) == []
    for model in index.models:
        assert set(model.data) <= {*Model.COMMON_FIELDS, 'Training Log'}
        assert all(type(value) in (int, str, list) for value in model.metadata.data.values())


def test_names_are_none_of_the_libraries(load_index, models):
    ensure_torchvision()
    for package in ('mmdet', 'mmseg', 'mmpretrain'):
        folder = Path(pytest.importorskip(package).__file__).parent
        theirs = {model.name for model in load_index(str(folder / '.mim' / 'model-index.yml')).models}
        assert len(theirs) > 100
        assert not theirs & models.keys()


def test_mmpretrain_registers_the_index(monkeypatch, models):
    ensure_torchvision()
    pytest.importorskip('mmpretrain')
    from mmpretrain import list_models
    from mmpretrain.apis import ModelHub

    theirs = set(list_models()) - models.keys()  # the package registers its classifiers at import
    monkeypatch.setattr(ModelHub, '_models_dict', {name: ModelHub._models_dict[name] for name in theirs})
    ModelHub.register_model_index(ROOT / 'model-index.yml', config_prefix=ROOT)
    assert set(list_models()) == theirs | models.keys()
    assert ModelHub.get('vheat-s_16xb128_in1k').config.model.backbone.arch == 'small'


MIM_SEARCH = """
import json, sys
from mim.commands import search
from modelindex.load_model_index import load

search.load_metadata = lambda *_: load(sys.argv[1])  # of the source tree, not of the installed package
find = search.get_model_info
found = dict(
    small=find('vheat_mm', filter_conditions='epochs<=12,parameters<40000000'),
    accurate=find('vheat_mm', filter_conditions='top_1_accuracy>83', sorted_fields=['top_1_accuracy']),
    head=find('vheat_mm', models=['Mask2Former'], training_datasets=['ADE20K']),
    row=find('vheat_mm', configs=['vheat-t_16xb128_in1k'], shown_fields=['weight', 'input_size']),
)
print(json.dumps({key: list(frame.index) for key, frame in found.items()} | dict(row=found['row'].to_dict('index'))))
"""


def test_mim_searches_the_index():
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', MIM_SEARCH, str(ROOT / 'model-index.yml')],
        env=interop_env(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found['small'] == ['mask-rcnn_vheat-demo_coins', 'mask-rcnn_swin-demo_coins', 'vheat-demo_textures']
    assert found['accurate'] == ['swin-b_16xb64_in1k', 'vheat-s_16xb128_in1k', 'vheat-b_16xb128_in1k']
    assert found['head'] == ['vheat-t_mask2former_8xb2-160k_ade20k-512x512']
    weights = next(release.url for release in RELEASES if release.name == 'vheat_tiny')
    assert found['row'] == {'vheat-t_16xb128_in1k': dict(weight=weights, input_size='224x224')}


# --- README's tables


@pytest.fixture
def copy(tmp_path) -> Path:
    """The repository's index, configs and README, to be damaged."""
    for name in ('model-index.yml', 'README.md'):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(CONFIGS, tmp_path / 'configs')
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ('file', 'old', 'new'),
    [
        ('README.md', '| 82.2 |', '| 82.3 |'),
        ('configs/classification/metafile.yml', 'Accuracy: 82.2', 'Accuracy: 82.3'),
        ('configs/detection/metafile.yml', 'Parameters: 52744368', 'Parameters: 62744368'),
        ('configs/segmentation/metafile.yml', 'vHeat_tiny_seg.log', 'vHeat_tiny_seg.txt'),
    ],
)
def test_check_notices_a_stale_readme(tables, copy, capsys, file, old, new):
    arguments = ['--check', '--root', str(copy)]
    assert tables.main(arguments) == 0
    replace(copy / file, old, new)
    before = (copy / 'README.md').read_text()
    assert tables.main(arguments) == 1
    assert 'run python .dev_scripts/update_model_tables.py' in capsys.readouterr().err
    assert (copy / 'README.md').read_text() == before
    assert tables.main(['--root', str(copy)]) == 0
    assert tables.main(arguments) == 0


def test_makefile_checks_the_tables():
    lint = (ROOT / 'Makefile').read_text().split('\nlint:')[1].split('\n\n')[0]
    assert '.dev_scripts/update_model_tables.py --check' in lint


def test_rows_link_config_weights_and_log(tables):
    text = (ROOT / 'README.md').read_text()
    for release in RELEASES:
        (row,) = [line for line in text.splitlines() if line.startswith('| [') and f'/{release.config}.py)' in line]
        assert row.endswith(f'| [weights]({release.url}), [log]({release.log_url}) |')


T_1X = 'mask-rcnn_vheat-t_fpn_1x_coco'
BAD_METAFILES = {
    'config': ('Config: configs/detection/mask', 'Config: configs/gone/mask', rf"model '{T_1X}': Config .* must be a"),
    'renamed': (f'Name: {T_1X}', 'Name: other', r"model 'other': Config .* called as the model"),
    'twice': ('Name: mask-rcnn_vheat-s_fpn_1x_coco', f'Name: {T_1X}', rf"model '{T_1X}': this name is taken"),
    'no_name': (f'  - Name: {T_1X}\n    In', '  - In', r"model 1: lacks 'Name'"),
    'no_number': ('      FLOPs: 286400000000\n', '', rf"model '{T_1X}': 'FLOPs' is None"),
    'text': ('Parameters: 52744368', 'Parameters: 52.74 M', r"'Parameters' is '52.74 M'; give a positive number"),
    'yaml': ('Models:\n', 'Models: [\n', r'metafile.yml: while parsing'),
    'no_models': ('Models:\n', 'Modelle:\n', r"metafile.yml: lacks 'Models'"),
}


@pytest.mark.parametrize('name', BAD_METAFILES)
def test_bad_metafile_is_one_message(tables, copy, capsys, name):
    old, new, words = BAD_METAFILES[name]
    replace(copy / 'configs/detection/metafile.yml', old, new)
    assert tables.main(['--root', str(copy)]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert re.search(r'^error: configs/detection/metafile\.yml: .*', message)
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ('file', 'old', 'new', 'words'),
    [
        ('model-index.yml', 'detection/metafile', 'gone/metafile', r'configs/gone/metafile\.yml: .*No such file'),
        ('model-index.yml', 'Import:', 'Imports:', r"model-index\.yml: lacks 'Import'"),
        ('README.md', '<!-- end of the tables -->', '', r'README\.md: expected one line.*put them back'),
    ],
)
def test_bad_index_and_markers(tables, copy, capsys, file, old, new, words):
    replace(copy / file, old, new)
    assert tables.main(['--check', '--root', str(copy)]) == 2
    assert re.search(words, capsys.readouterr().err)
