"""Models by name, and the metafiles behind README's tables."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from vheat_mm import create_model, list_models
from vheat_mm.models.arch import ARCHS
from vheat_mm.ops.freq_embed import resize_freq_embed
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.torchvision import ensure_torchvision

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / 'tests' / 'data'
KINDS = {'vheat_tiny': 'prenorm', 'vheat_small': 'postnorm'}  # the golden files that the two fixtures below share


pytestmark = pytest.mark.usefixtures('own_scope')


@pytest.fixture
def narrow(monkeypatch):
    """The published names with the small widths of the golden files."""
    for arch, post_norm in (('tiny', False), ('small', True), ('base', True)):
        scale = 0.5 if post_norm else None
        width = 8 if arch == 'base' else 4
        narrowed = dict(embed_dims=width, depths=(1, 1, 2, 1), post_norm=post_norm, layer_scale=scale)
        monkeypatch.setitem(ARCHS, arch, narrowed)


@pytest.fixture
def released(golden, tmp_path):
    """Path of a classification checkpoint as released, 5 classes at 64 pixels, and its golden numbers."""

    def write(name: str, **entries: dict) -> tuple[Path, dict[str, torch.Tensor]]:
        numbers = golden(f'classifier_{KINDS[name]}.npz')
        state = {key[2:]: value.float() for key, value in numbers.items() if key.startswith('w.')}
        path = tmp_path / f'{name}.pth'
        torch.save(dict(model=state, **entries), path)
        return path, numbers

    return write


def assert_close(value: torch.Tensor, expected: torch.Tensor) -> None:
    assert value.shape == expected.shape
    assert ((value.double() - expected).norm() / expected.norm()).item() < 1e-4


# ---- names ----------------------------------------------------------------------------------------------------------


def test_names():
    assert list_models() == ['vheat_tiny', 'vheat_small', 'vheat_base']
    assert list_models('*s*') == ['vheat_small', 'vheat_base']
    assert list_models('resnet*') == []


@pytest.mark.parametrize('name', list_models())
def test_names_build_the_published_models(name):
    released = json.loads((DATA / f'state_dict_{name.removeprefix("vheat_")}.json').read_text())
    with torch.device('meta'):
        classifier, backbone = create_model(name), create_model(name, features_only=True, img_size=512)
    assert {key: list(value.shape) for key, value in backbone.state_dict().items()} == released['backbone_512']
    spelled = {'backbone.outnorm3': 'classifier.0', 'head.fc': 'classifier.3', 'backbone.': ''}
    keys = {}
    for key, value in classifier.state_dict().items():
        ours, theirs = next((a, b) for a, b in spelled.items() if key.startswith(a))
        keys[key.replace(ours, theirs, 1)] = list(value.shape)
    assert keys == released['classifier_224']


@pytest.mark.parametrize('given', ['vHeat-T', 'vheat-tiny', 'vheat_tinny', 'VHEAT_TINY'])
def test_misspelt_name(given):
    with pytest.raises(ValueError, match=rf"unknown model '{given}': did you mean 'vheat_tiny'.*\?"):
        create_model(given)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'resnet50': list_models\(\) names vheat_tiny, vheat_small, vheat_base"):
        create_model('resnet50')


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (dict(pretrained=False, ema=True), 'give its path as pretrained'),
        (dict(ema=True), 'give its path as pretrained'),
        (dict(prefix='teacher.'), 'give its path as pretrained'),
        (dict(features_only=True, num_classes=10), 'num_classes=10'),
        (dict(out_indices=(0, 1)), 'add features_only=True'),
        (dict(num_classes=-1), 'num_classes.*-1'),
        (dict(num_classes=True), 'num_classes.*True'),
        (dict(img_size=8), 'img_size.*8'),
    ],
)
def test_contradicting_arguments(narrow, arguments, words):
    with pytest.raises(ValueError, match=words):
        create_model('vheat_tiny', **arguments)


def test_unknown_argument():
    with pytest.raises(TypeError, match='in_chans'):
        create_model('vheat_tiny', in_chans=1)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', KINDS)
def test_released_classifier_gives_the_golden_logits(narrow, released, name):
    path, numbers = released(name)
    model = create_model(name, path, img_size=64).eval()
    assert model.num_classes == 5
    image = numbers['x'].float()
    with torch.no_grad():
        assert_close(model(image), numbers['logits'])
        pooled = create_model(name, path, img_size=64, num_classes=0).eval()(image)
    torch.testing.assert_close(model.head['fc'](pooled), model(image))


@pytest.mark.parametrize('name', KINDS)
def test_features_are_golden_and_described(narrow, golden, tmp_path, name):
    numbers = golden(f'backbone_{KINDS[name]}.npz')
    torch.save({key[2:]: value.float() for key, value in numbers.items() if key.startswith('w.')}, tmp_path / 'x.pth')
    model = create_model(name, tmp_path / 'x.pth', features_only=True, img_size=64, out_indices=(3, 1)).eval()
    hooked = {}
    for info in model.feature_info:
        hook = functools.partial(lambda index, *args: hooked.update({index: args[-1]}), info['index'])
        model.get_submodule(info['module']).register_forward_hook(hook)
    image = numbers['wide.x'].float()
    with torch.no_grad():
        outputs = model(image)
    assert [info['index'] for info in model.feature_info] == [1, 3]
    assert model.feature_info.channels() == [out.shape[1] for out in outputs]
    for stride, side in ((2, image.shape[2]), (3, image.shape[3])):
        assert [-(-side // info['reduction']) for info in model.feature_info] == [out.shape[stride] for out in outputs]
    assert model.feature_info.reduction() == [8, 32]
    assert model.feature_info.module_name() == ['outnorm1', 'outnorm3']
    for info, out in zip(model.feature_info, outputs, strict=True):
        assert_close(out, numbers[f'wide.out{info["index"]}'])
        assert torch.equal(hooked[info['index']].permute(0, 3, 1, 2), out)


def test_another_number_of_classes_gives_a_new_layer_and_a_warning(narrow, released, monkeypatch):
    path, numbers = released('vheat_tiny')
    lines = []
    monkeypatch.setattr('vheat_mm.models.classifier.print_log', lambda text, **_: lines.append(text))
    model = create_model('vheat_tiny', path, img_size=64, num_classes=7)
    assert model.head['fc'].weight.shape == (7, 32)
    assert torch.equal(model.backbone.freq_embed[0], numbers['w.freq_embed.0'].float())
    assert re.search(r'7 classes is new.*one of 5 classes', lines[-1])
    same = create_model('vheat_tiny', path, img_size=64, num_classes=5)
    assert torch.equal(same.head['fc'].bias, numbers['w.classifier.3.bias'].float())
    assert 'too (head.fc)' in lines[-1]


def test_checkpoint_without_classifier(narrow, tmp_path):
    torch.save(create_model('vheat_tiny', features_only=True, img_size=64).state_dict(), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'no classifier.*num_classes=N.*features_only=True'):
        create_model('vheat_tiny', tmp_path / 'x.pth', img_size=64)
    assert create_model('vheat_tiny', tmp_path / 'x.pth', img_size=64, num_classes=2).num_classes == 2


def test_incomplete_classifier(narrow, released, tmp_path):
    path, _ = released('vheat_tiny')
    state = torch.load(path, weights_only=True)['model']
    state['classifier.3.bias'] = state['classifier.3.bias'][:4]
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'bias 4 instead of 5'):
        create_model('vheat_tiny', tmp_path / 'x.pth', img_size=64)


def test_moving_average_and_other_grids(narrow, released):
    _, numbers = released('vheat_tiny')
    average = {key[2:]: value.float() + 1 for key, value in numbers.items() if key.startswith('w.')}
    path, _ = released('vheat_tiny', model_ema=average)
    model = create_model('vheat_tiny', path, img_size=128, ema=True, resize='bicubic')
    expected = resize_freq_embed(average['freq_embed.1'], (16, 16), 'bicubic')
    assert torch.equal(model.backbone.freq_embed[1], expected)
    assert torch.equal(model.head['fc'].bias, average['classifier.3.bias'])


@pytest.mark.parametrize('features_only', [False, True])
def test_checkpoint_of_another_variant(narrow, released, features_only):
    path, _ = released('vheat_small')
    words = r"vHeat-small.*but the model is vHeat-base.*set arch='small'.*create_model\('vheat_small'"
    with pytest.raises(CheckpointError, match=words):
        create_model('vheat_base', path, img_size=64, features_only=features_only)


def test_weights_go_to_mmpretrain_and_back(narrow, tmp_path):
    ensure_torchvision()
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(ROOT / 'configs/classification/vheat-t_16xb128_in1k.py')
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(img_size=64)
    cfg.model.head.update(num_classes=6, in_channels=32, topk=(1,))
    theirs, ours = MODELS.build(cfg.model).eval(), create_model('vheat_tiny', img_size=64, num_classes=6).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image, mode='tensor'), ours(image))
    torch.save(dict(state_dict=theirs.state_dict()), tmp_path / 'x.pth')
    again = create_model('vheat_tiny', tmp_path / 'x.pth', img_size=64)
    assert torch.equal(again.head['fc'].weight, ours.head['fc'].weight)
