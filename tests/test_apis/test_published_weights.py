"""Published weights by name in models, configs and tools; stand-ins take the place of the release."""

from pathlib import Path

import pytest
import torch
from config_models import load
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from stand_ins import write_release
from tool_runs import call, call_failing, write_config

from vheat_mm import VHeat, create_model
from vheat_mm.apis.config import apply_released
from vheat_mm.apis.interpolate4downstream import main as interpolate
from vheat_mm.apis.train_test import run_testing, run_training
from vheat_mm.checkpoint.released import find_released
from vheat_mm.models.find_weights import find_weights
from vheat_mm.models.resize_weights import Resized
from vheat_mm.utils.errors import CheckpointError

TINY = 'vheatcls/vHeat_tiny.pth'
DETECTOR, CLASSIFIER = 'mask-rcnn_vheat-t_fpn_1x_coco', 'vheat-t_16xb128_in1k'


@pytest.fixture(scope='module')
def release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp('release'), ('vheat_tiny', 'vheat_small'), ema=True)


@pytest.fixture
def weights(release, monkeypatch) -> dict[str, torch.Tensor]:
    """Those published as vheat_tiny."""
    monkeypatch.setenv('VHEAT_WEIGHTS', str(release))
    return torch.load(release / TINY, weights_only=True)['model']


class Whole(BaseModule):
    """A model as of the libraries, whose own init_cfg loads its backbone."""

    def __init__(self) -> None:
        super().__init__(init_cfg=dict(type='Pretrained', checkpoint='vheat_tiny'))
        self.backbone = VHeat('tiny')


@pytest.mark.parametrize(
    'make',
    [
        Whole,
        lambda: create_model('vheat_tiny', pretrained=True),
        lambda: create_model('vheat_tiny', 'vheat_tiny', features_only=True),
        lambda: VHeat('tiny', pretrained=True),
        lambda: VHeat(dict(embed_dims=96, depths=[2, 2, 6, 2]), pretrained=True),
        lambda: VHeat(init_cfg=dict(type='Pretrained', checkpoint='vheat_tiny')),
        lambda: MODELS.build(dict(type='MMDET_VHEAT', depths=(2, 2, 6, 2), post_norm=False, pretrained='vheat_tiny')),
    ],
    ids=['model.init_cfg', 'create_model', 'features', 'arch', 'custom arch', 'init_cfg', 'release'],
)
def test_models(weights, make):
    model = make()
    if hasattr(model, 'init_weights'):
        model.init_weights()
    model = getattr(model, 'backbone', model)
    assert torch.equal(model.freq_embed[2], weights['freq_embed.2'])
    assert torch.equal(model.outnorm3.bias, weights['classifier.0.bias'])


def test_the_classifier_comes_too(weights):
    model = create_model('vheat_tiny', pretrained=True)
    assert torch.equal(model.get_classifier().weight, weights['classifier.3.weight'])
    assert create_model('vheat_tiny', pretrained=False).num_classes == 1000


def test_which_weights_of_the_file(release, weights, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr('vheat_mm.models.weights.print_log', lambda text, *_, **__: lines.append(text))
    create_model('vheat_tiny', pretrained=True)
    average = torch.load(release / TINY, weights_only=True)['model_ema']
    model = create_model('vheat_tiny', pretrained=True, ema=True)
    assert torch.equal(model.backbone.freq_embed[0], average['freq_embed.0'])
    assert "entry 'model': " in lines[0]
    assert lines[0].endswith("their moving average, entry 'model_ema', is not taken: ema=True takes it")
    assert "entry 'model_ema': " in lines[1]
    assert 'not taken' not in lines[1]


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda: create_model(DETECTOR), rf"'{DETECTOR}' is the name of a config.*create_model\('vheat_tiny'\)"),
        (lambda: create_model('configs/classification/vheat-b_16xb128_in1k.py'), r"create_model\('vheat_base'\)"),
        (lambda: VHeat(dict(embed_dims=8, depths=(1, 1, 1, 1)), pretrained=True),
         r"pretrained=True: no weights were published for arch=\{'embed_dims': 8.*one of the published.*'tiny'"),
        (lambda: create_model('vheat_small', 'vheat_tiny'),
         r"'vheat_tiny' holds vHeat-tiny .*model is vHeat-small.*: set arch='tiny' or create_model\('vheat_tiny'\)"),
        (lambda: VHeat('small', init_cfg=dict(type='Pretrained', checkpoint='vheat_tiny')).init_weights(),
         r"create_model\('vheat_tiny'\), or take this model's weights, such as 'vheat_small'"),
        (lambda: VHeat(pretrained='vheat_tinyy').init_weights(), "'vheat_tinyy'.*did you mean 'vheat_tiny'"),
    ],
)  # fmt: skip
def test_wrong_names(weights, make, words):
    with pytest.raises((CheckpointError, ValueError), match=words) as error:
        make()
    assert str(error.value).isprintable()


def test_interpolate(release, weights, tmp_path, capsys):
    assert interpolate(['--pt_pth', 'vheat_tiny', '--tg_pth', str(tmp_path / 'x.pth'), '--tg_size', '256']) == 0
    written = torch.load(tmp_path / 'x.pth')['model']
    assert torch.equal(written['freq_embed.0'][:56, :56], weights['freq_embed.0'])
    assert written['freq_embed.0'].shape == (64, 64, 96)
    before = (release / TINY).read_bytes()
    assert interpolate(['--pt_pth', 'vheat_tiny', '--tg_pth', str(release / TINY), '--tg_size', '256']) == 2
    assert 'is the input itself' in capsys.readouterr().err
    assert (release / TINY).read_bytes() == before


# --- tools, with narrow models of the demo tasks: their files and configs bear the published names


def publish(folder: Path, config: str, content: dict) -> Path:
    """A folder for VHEAT_WEIGHTS that holds the content as the checkpoint of that config."""
    (folder / 'mirror').mkdir()
    torch.save(content, folder / 'mirror' / Path(find_released(config).path).name)
    return folder / 'mirror'


def test_released_detector(detector, tmp_path, data, monkeypatch, capfd):
    content = torch.load(detector / 'run' / 'epoch_2.pth', weights_only=False)
    monkeypatch.setenv('VHEAT_WEIGHTS', str(publish(tmp_path, DETECTOR, content)))
    config = write_config(tmp_path, 'detection', data).rename(tmp_path / f'{DETECTOR}.py')
    for options in ([], ['--tta']):
        call(run_testing, config, 'released', '--work-dir', 'out', *options, cwd=tmp_path)
    log = next((tmp_path / 'out').rglob('*.log')).read_text()
    assert f'Released weights {DETECTOR}: ' in log
    assert 'SHA-256 ' in log
    assert 'coco/bbox_mAP' in log
    message = call_failing(capfd, run_testing, config.rename(tmp_path / 'mine.py'), 'released', cwd=tmp_path)
    assert "'released': no checkpoint was published for mine; give the path of one, or test one of vheat-t_" in message
    assert DETECTOR in message


@pytest.mark.parametrize('size', [224, 512])
def test_the_grid_of_the_published_embeddings(tmp_path, monkeypatch, size):
    """Padded to another grid they would be another function; one detector was published with 224 pixels."""
    state = {f'backbone.{key}': value for key, value in VHeat('tiny', img_size=size).state_dict().items()}
    monkeypatch.setenv('VHEAT_WEIGHTS', str(publish(tmp_path, DETECTOR, dict(state_dict=state))))
    cfg = load(f'detection/{DETECTOR}.py')
    apply_released(cfg, f'anywhere/{DETECTOR}.py')
    assert (cfg.load_from, cfg.model.backbone.img_size) == (DETECTOR, size)


def as_released(checkpoint: dict) -> dict[str, torch.Tensor]:
    return Resized(find_weights(checkpoint), []).released_keys()


def test_released_classifier(classifier, tmp_path, data, monkeypatch):
    """Its moving average, if there is one: here the weights themselves would be refused."""
    content = torch.load(classifier / 'work_dirs' / 'classification' / 'epoch_2.pth', weights_only=False)
    average = as_released(content)
    broken = {key: value for key, value in average.items() if 'layers.3.' not in key}
    monkeypatch.setenv('VHEAT_WEIGHTS', str(publish(tmp_path, CLASSIFIER, dict(model=broken, model_ema=average))))
    config = write_config(tmp_path, 'classification', data).rename(tmp_path / f'{CLASSIFIER}.py')
    call(run_testing, config, 'released', '--work-dir', 'out', cwd=tmp_path)
    log = next((tmp_path / 'out').rglob('*.log')).read_text()
    assert "the moving average of the weights is taken, entry 'model_ema'" in log


def test_load_from_a_name(classifier, tmp_path, data, monkeypatch):
    content = torch.load(classifier / 'work_dirs' / 'classification' / 'epoch_2.pth', weights_only=False)
    monkeypatch.setenv('VHEAT_WEIGHTS', str(publish(tmp_path, CLASSIFIER, dict(model=as_released(content)))))
    config = write_config(tmp_path, 'classification', data)
    call(
        run_training,
        config,
        '--work-dir',
        'out',
        '--cfg-options',
        'load_from=vheat_tiny',
        'train_cfg.max_epochs=1',
        cwd=tmp_path,
    )
    log = next((tmp_path / 'out').rglob('*.log')).read_text()
    assert 'Released weights vheat_tiny: ' in log
    assert "Weights from 'vheat_tiny': " in log
