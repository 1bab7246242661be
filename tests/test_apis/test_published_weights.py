"""Published weights by name in models, configs and tools; stand-ins take the place of the release."""

from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from stand_ins import write_release
from tool_runs import call, call_failing, write_config

from vheat_mm import VHeat, create_model
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
    """Those published as vheat_tiny, from which trainings start."""
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
        lambda: VHeat('tiny', pretrained=True),
        lambda: VHeat(dict(embed_dims=96, depths=[2, 2, 6, 2]), pretrained=True),
        lambda: VHeat(init_cfg=dict(type='Pretrained', checkpoint='vheat_tiny')),
        lambda: MODELS.build(dict(type='MMDET_VHEAT', depths=(2, 2, 6, 2), post_norm=False, pretrained='vheat_tiny')),
    ],
    ids=['model.init_cfg', 'arch', 'custom arch', 'init_cfg', 'release'],
)
def test_models_to_train(weights, make):
    model = make()
    model.init_weights()
    model = getattr(model, 'backbone', model)
    assert torch.equal(model.freq_embed[2], weights['freq_embed.2'])
    assert torch.equal(model.outnorm3.bias, weights['classifier.0.bias'])


@pytest.mark.parametrize(
    ('ways', 'entry'),
    [
        (dict(pretrained=True), 'model_ema'),
        (dict(pretrained='vheat_tiny'), 'model_ema'),
        (dict(pretrained=CLASSIFIER), 'model_ema'),
        (dict(pretrained=True, features_only=True), 'model_ema'),
        (dict(pretrained=True, ema=False), 'model'),
        (dict(pretrained=TINY), 'model'),
        (dict(pretrained=TINY, ema=True), 'model_ema'),
    ],
)
def test_published_models_have_the_average(release, weights, monkeypatch, ways, entry):
    """Its accuracy is the published one; a path is a file like any other. The log says so, and nothing else."""
    lines: list[str] = []
    for module in ('weights', 'classifier'):
        monkeypatch.setattr(f'vheat_mm.models.{module}.print_log', lambda text, *_, **__: lines.append(text))
    monkeypatch.chdir(release)
    model = create_model('vheat_tiny', **ways)
    state = torch.load(TINY, weights_only=True)[entry]
    head = 'not of the backbone (2): head.fc.weight, head.fc.bias'
    source = ways['pretrained'] if isinstance(ways['pretrained'], str) else 'vheat_tiny'
    which = 'the moving average' if entry == 'model_ema' else "not the moving average 'model_ema' (ema=True)"
    assert lines[0].startswith(f'Weights of vHeat-tiny from {source!r}, entry {entry!r}, {which}: ')
    assert lines[0].endswith(f' tensors loaded\n  {head}') or 'features_only' in ways
    if 'features_only' not in ways:
        assert torch.equal(model.get_classifier().weight, state['classifier.3.weight'])
        assert lines[1:] == [f'The classifier of 1000 classes comes from {source!r} too (head.fc).']
        model = model.backbone
    assert torch.equal(model.freq_embed[2], state['freq_embed.2'])
    assert torch.equal(model.outnorm3.bias, state['classifier.0.bias'])


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
    assert "'released': no checkpoint was published for mine; give the path of one, or the name of one that" in message
    assert DETECTOR in message


def as_released(checkpoint: dict) -> dict[str, torch.Tensor]:
    return Resized(find_weights(checkpoint), [], []).released_keys()


def test_released_classifier(classifier, tmp_path, data, monkeypatch):
    """Its moving average, by either name: here the weights themselves would be refused."""
    content = torch.load(classifier / 'work_dirs' / 'classification' / 'epoch_2.pth', weights_only=False)
    average = as_released(content)
    broken = {key: value for key, value in average.items() if 'layers.3.' not in key}
    monkeypatch.setenv('VHEAT_WEIGHTS', str(publish(tmp_path, CLASSIFIER, dict(model=broken, model_ema=average))))
    config = write_config(tmp_path, 'classification', data).rename(tmp_path / f'{CLASSIFIER}.py')
    for name in ('released', 'vheat_tiny'):
        call(run_testing, config, name, '--work-dir', name, cwd=tmp_path)
        log = next((tmp_path / name).rglob('*.log')).read_text()
        assert "Weights from 'vheat_tiny': entry 'model_ema', the moving average" in log


def test_load_from_a_name(classifier, tmp_path, data, monkeypatch):
    """A training starts from the weights that the release starts from: here the average would be refused."""
    content = torch.load(classifier / 'work_dirs' / 'classification' / 'epoch_2.pth', weights_only=False)
    weights = as_released(content)
    broken = {key: value for key, value in weights.items() if 'layers.3.' not in key}
    monkeypatch.setenv('VHEAT_WEIGHTS', str(publish(tmp_path, CLASSIFIER, dict(model=weights, model_ema=broken))))
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
    assert "Weights from 'vheat_tiny': entry 'model', not the moving average" in log
