"""Configs, models and published weights by name in MMEngine, mmdet, mmseg and mmpretrain."""

import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config, get_model
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner.checkpoint import load_from_local
from stand_ins import released_checkpoint, write_release

import vheat_mm
from vheat_mm.apis.config import open_config
from vheat_mm.checkpoint.released import find_released
from vheat_mm.engine import fileio
from vheat_mm.models.find_weights import ANCHOR
from vheat_mm.utils.errors import CheckpointError, ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

PACKAGE = Path(vheat_mm.__file__).parent
ROOT = Path(__file__).resolve().parents[2]
DETECTOR, SEGMENTOR = 'mask-rcnn_vheat-t_fpn_1x_coco', 'vheat-t_upernet_8xb2-160k_ade20k-512x512'
CLASSIFIER = 'vheat-t_16xb128_in1k'
DETECTION = f'detection/{DETECTOR}.py'
ensure_torchvision()

pytestmark = pytest.mark.usefixtures('own_scope')


@pytest.fixture(scope='module')
def release(tmp_path_factory) -> Path:
    for library in ('mmdet', 'mmseg', 'mmpretrain'):
        pytest.importorskip(library)
    names = ['vheat_tiny', 'vheat_small', DETECTOR, SEGMENTOR]
    return write_release(tmp_path_factory.mktemp('release'), names, ema=True)


@pytest.fixture(autouse=True)
def _loaders(monkeypatch):
    """MMEngine's, as ``import vheat_mm`` leaves them: the helpers of the tests install those of the tools."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    CheckpointLoader.register_scheme(fileio._RELEASED, fileio.load_from_release, force=True)
    CheckpointLoader.register_scheme('', fileio._prepared(load_from_local), force=True)


@pytest.fixture
def weights(release, monkeypatch):
    """The state dict in a stand-in for published weights, which come from there."""
    monkeypatch.setenv('VHEAT_WEIGHTS', str(release))

    def read(path: str, entry: str = 'model_ema') -> dict[str, torch.Tensor]:
        checkpoint = torch.load(release / path)
        return checkpoint.get(entry, checkpoint.get('state_dict'))  # the average has the published accuracy

    return read


def assert_same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in own)


def run(code: str, *arguments: object, **environment: str) -> str:
    """Output of Python code in a process that has imported nothing."""
    variables = os.environ | dict(PYTHONPATH=str(PACKAGE.parent), OMP_NUM_THREADS='1') | environment
    command = [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write(folder: Path, base: str, rest: str = '') -> Path:
    path = folder / 'mine.py'
    path.write_text(f'_base_ = {base}\n{rest}')
    return path


TYPED = re.findall(
    r'^\| (.+) \| `(.+vheat[-_]t.+)` \|$', (ROOT / 'README.md').read_text(encoding='utf-8'), re.MULTILINE
)


@pytest.mark.parametrize('line', [pytest.param(line, id=user) for user, line in TYPED])
def test_lines_of_readme(weights, line):
    assert len(TYPED) == 8
    module = re.match(r'(?:([\w.]+)\.)?\w+\(', line)[1] or 'vheat_mm'
    library = module.split('.')[0]
    pytest.importorskip(library)
    importlib.import_module(module)
    model = eval(line.replace('PATH/TO/THE/CLONE', str(ROOT)), {library: sys.modules[library]})
    entry = 'model_ema'
    if isinstance(model, dict):  # starts a training
        entry = 'model'
        model = MODELS.build(model)
        model.init_weights()
    path = next(released.path for name in re.findall(r'[\w-]+', line) if (released := find_released(name)))
    found, expected = (
        [v for k, v in state.items() if k.endswith(ANCHOR)]
        for state in (getattr(model, 'model', model).state_dict(), weights(path, entry))
    )
    assert torch.equal(found[0], expected[0])


def test_a_base_by_name(tmp_path):
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(write(tmp_path, [f'vheat_mm::{DETECTION}'], 'hooks = _base_.default_hooks\n'))
    plain = Config.fromfile(vheat_mm.config_path(DETECTION))
    assert cfg.model == plain.model
    assert cfg.hooks.checkpoint == plain.default_hooks.checkpoint  # without a scope, which MMEngine could not import
    assert cfg.hooks.timer['_scope_'] == 'mmdet'  # of the base of the base, as ever


@pytest.mark.parametrize(
    ('name', 'remedy'),
    [
        (f'{DETECTOR}.py', f"did you mean '{DETECTION}'"),
        (DETECTION.replace('vheat-t', 'vheat-l'), "did you mean 'detection/mask-rcnn_vheat-"),
        ('../../pyproject.toml', 'vheat_mm has no config'),
    ],
)
def test_a_wrong_name_of_a_config(tmp_path, name, remedy):
    with pytest.raises(FileNotFoundError, match=remedy):
        Config.fromfile(write(tmp_path, repr(f'vheat_mm::{name}')))
    with pytest.raises(FileNotFoundError, match=remedy):
        vheat_mm.config_path(name)


@pytest.mark.parametrize(
    ('name', 'remedy'),
    [
        (DETECTOR, f"there is no config '{DETECTOR}', did you mean 'vheat_mm::{DETECTION}'"),
        ('epoch_1.pth', 'CONFIG comes before CHECKPOINT'),
    ],
)
def test_remedies_for_a_config_of_the_tools(tmp_path, monkeypatch, name, remedy):
    monkeypatch.chdir(tmp_path)
    Path('epoch_1.pth').touch()
    with pytest.raises(ToolError, match=remedy):
        open_config(name)


def test_a_config_that_a_foreign_tool_reads_before_the_import(tmp_path):
    """The form for it, in a process that imports MMEngine alone, also written and read again as a run does."""
    pytest.importorskip('mmdet')
    base = f"__import__('vheat_mm').config_path({DETECTION!r})"
    config = write(tmp_path, base, 'model = dict(backbone=dict(drop_path_rate=0.2))\n')
    pure = tmp_path / 'pure.py'
    pure.write_text(
        f'from mmengine.config import Config\n\nbase = Config.fromfile({base})\nmodel = base.model\n'
        "model.backbone.drop_path_rate = 0.2\ndefault_scope = 'mmdet'\ndel base\n"
    )
    code = """
        import sys
        from mmengine.config import Config
        assert 'vheat_mm' not in sys.modules
        cfg = Config.fromfile(sys.argv[1])
        assert cfg.model.backbone.type == 'VHeat' and cfg.model.backbone.drop_path_rate == 0.2
        cfg.dump(sys.argv[1] + '.dumped.py')
        assert Config.fromfile(sys.argv[1] + '.dumped.py').to_dict() == cfg.to_dict()
        assert Config.fromfile(sys.argv[2]).model == cfg.model
    """
    run(code, config, pure)


def test_a_base_of_another_package_without_pkg_resources(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    assert get_config('vheat_mm::_base_/vheat-t.py').vheat.type == 'VHeat'
    with pytest.raises(ImportError, match=r"to find 'mmdet::.*': pip install 'setuptools<81'"):
        get_config(f'vheat_mm::{DETECTION}')


def test_hub(weights):
    cfg = get_config(f'vheat_mm::{DETECTION}', pretrained=True)
    assert cfg.model_path == 'https://github.com/MzeroMiko/vHeat/releases/download/vheatdet/vHeat_tiny_det.pth'
    assert_same(get_model(f'vheat_mm::{DETECTION}', pretrained=True), weights('vheatdet/vHeat_tiny_det.pth'))
    model = get_model(f'vheat_mm::classification/{CLASSIFIER}.py', pretrained=True)
    published = weights('vheatcls/vHeat_tiny.pth')
    assert torch.equal(model.head.fc.weight, published['classifier.3.weight'])
    assert torch.equal(model.backbone.outnorm3.weight, published['classifier.0.weight'])
    with pytest.raises(
        CheckpointError, match=r'no weights are published for .*retinanet.*others are: .*mask-rcnn_vheat-t'
    ):
        get_model('vheat_mm::detection/retinanet_vheat-t_fpn_1x_coco.py', pretrained=True)


def test_detector(weights, monkeypatch):
    apis = pytest.importorskip('mmdet.apis')
    monkeypatch.delitem(sys.modules, 'mmseg', raising=False)
    names = apis.DetInferencer.list_models('mmdet')
    assert DETECTOR in names
    assert DETECTOR.replace('vheat', 'swin') not in names  # mmdet has its own
    assert 'mmseg' not in sys.modules  # another library is not imported for its place
    published = weights('vheatdet/vHeat_tiny_det.pth')
    assert_same(apis.DetInferencer(DETECTOR, device='cpu').model, published)
    model = apis.init_detector(vheat_mm.config_path(DETECTION), DETECTOR, device='cpu')
    assert_same(model, published)
    with pytest.raises(CheckpointError, match=r'no released weights have that name.*mask-rcnn_vheat-t_fpn_1x_coco'):
        apis.init_detector(vheat_mm.config_path(DETECTION), DETECTOR.replace('1x', '2x'), device='cpu')


def test_a_detector_without_published_weights(monkeypatch):
    apis = pytest.importorskip('mmdet.apis')
    said: list[str] = []
    monkeypatch.setattr('vheat_mm.engine.by_name.print_log', lambda text, **_: said.append(text))
    apis.DetInferencer('retinanet_vheat-t_fpn_1x_coco', device='cpu')
    text = "No weights are published for 'retinanet_vheat-t_fpn_1x_coco': pass weights=PATH, or its answers are random."
    assert said == [text]


def test_segmentor(weights):
    apis = pytest.importorskip('mmseg.apis')
    assert SEGMENTOR in apis.MMSegInferencer.list_models('mmseg')
    assert DETECTOR not in apis.MMSegInferencer.list_models('mmseg')
    published = weights('vheatseg/vHeat_tiny_seg.pth')
    model = apis.MMSegInferencer(SEGMENTOR, device='cpu').model
    assert_same(model, published)
    assert len(model.dataset_meta['classes']) == 150  # those of ADE20K, which the file does not name


def test_weights_of_another_variant_by_name(weights):
    """MMEngine would log a warning, and go on with random weights."""
    model = MODELS.build(get_config(f'vheat_mm::classification/{CLASSIFIER}.py').model)
    with pytest.raises(CheckpointError, match=r"'vheat_small' holds vHeat-small .* but the model is vHeat-tiny"):
        load_checkpoint(model, 'vheat_small')


def test_a_classifier_in_the_format_of_the_release_by_its_path(tmp_path):
    """MMEngine would load nothing of it. A path is not the name of what was published: its average is not taken."""
    pytest.importorskip('mmpretrain')
    torch.save(released_checkpoint('vheat_tiny', ema=True), tmp_path / 'mine.pth')
    weights = torch.load(tmp_path / 'mine.pth')['model']
    model = MODELS.build(get_config(f'vheat_mm::classification/{CLASSIFIER}.py').model)
    load_checkpoint(model, str(tmp_path / 'mine.pth'))
    assert torch.equal(model.head.fc.weight, weights['classifier.3.weight'])


def test_classifier(release):
    """With mmpretrain imported first; tests/test_package/test_names.py has the other order."""
    code = f"""
        import sys
        import numpy as np
        import torch
        import mmpretrain
        import vheat_mm
        from vheat_mm.utils.torchvision import ensure_torchvision
        ensure_torchvision()
        name = {CLASSIFIER!r}
        assert name in mmpretrain.list_models('*vheat*') and len(mmpretrain.list_models('vheat*')) == 6
        assert 'swin-tiny_16xb64_in1k' in mmpretrain.list_models()
        assert 'swin-t_16xb64_in1k' not in mmpretrain.list_models()
        weights = torch.load(sys.argv[1])['model_ema']
        model = mmpretrain.get_model(name, pretrained=True)
        assert torch.equal(model.head.fc.weight, weights['classifier.3.weight'])
        assert torch.equal(model.backbone.outnorm3.weight, weights['classifier.0.weight'])
        image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        inferencer = mmpretrain.ImageClassificationInferencer(name)
        assert torch.equal(inferencer.model.head.fc.weight, weights['classifier.3.weight'])
        result = inferencer(image)[0]
        assert result['pred_class'] == mmpretrain.inference_model(name, image)['pred_class']
        assert mmpretrain.FeatureExtractor(name)(image)[0][0].shape == (768,)
    """
    run(code, release / 'vheatcls/vHeat_tiny.pth', VHEAT_WEIGHTS=str(release))
