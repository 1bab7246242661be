"""Models by name, saving for the Hugging Face Hub, and the metafiles behind README's tables."""

import functools
import importlib
import json
import pickle
import re
import shutil
import socket
import sys
import types
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from vheat_mm import VHeat, create_model, list_models
from vheat_mm.apis.hub import hub_class
from vheat_mm.checkpoint.io import read_checkpoint
from vheat_mm.models.arch import ARCHS
from vheat_mm.models.classifier import VHeatClassifier
from vheat_mm.models.vheat import DropPath
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
        (dict(pretrained=True), 'path or URL.*True'),
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


def test_classifier_describes_its_features(narrow):
    model = create_model('vheat_tiny', img_size=64, num_classes=3)
    (info,) = model.feature_info
    assert info == dict(num_chs=32, reduction=32, module='backbone.outnorm3', index=3)
    assert isinstance(model.get_submodule(info['module']), nn.LayerNorm)
    assert model.forward_features(torch.zeros(1, 3, 70, 64)).shape == (1, 32, 3, 2)


def test_another_number_of_classes_gives_a_new_layer_and_a_warning(narrow, released, monkeypatch):
    path, numbers = released('vheat_tiny')
    lines = []
    monkeypatch.setattr('vheat_mm.apis.model_zoo.print_log', lambda text, **_: lines.append(text))
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


# ---- Hugging Face Hub -----------------------------------------------------------------------------------------------

ARCH = dict(embed_dims=4, depths=(1, 1, 2, 1), post_norm=True, layer_scale=0.3)


@pytest.fixture
def hub(monkeypatch):
    """:mod:`vheat_mm.hub`, without network."""
    pytest.importorskip('safetensors')
    constants = pytest.importorskip('huggingface_hub.constants')

    def refuse(*_: object) -> None:
        raise AssertionError('a test used the network')

    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    return importlib.import_module('vheat_mm.hub')


def disturb(model: nn.Module) -> nn.Module:
    """Change all weights at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.1)
    return model.eval()


def backbone_of(model: nn.Module) -> VHeat:
    return model if isinstance(model, VHeat) else model.backbone


def assert_equal(a: nn.Module, b: nn.Module, image: torch.Tensor) -> None:
    """The same class, settings, weights bit by bit, and outputs bit by bit."""
    assert type(a) is type(b)
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value, theirs[key]), key
    for name, parameter in a.named_parameters():
        assert b.get_parameter(name).requires_grad == parameter.requires_grad, name
    first, second = backbone_of(a), backbone_of(b)
    for name in ('arch', 'img_size', 'out_indices', 'frozen_stages', 'depths', 'num_features', 'feature_info'):
        assert getattr(first, name) == getattr(second, name), name
        assert type(getattr(first, name)) is type(getattr(second, name)), name
    rates = [[m.drop_prob for m in model.modules() if isinstance(m, DropPath)] for model in (a, b)]
    assert rates[0] == rates[1]
    with torch.no_grad():
        for one, other in zip(a(image), b(image), strict=True):
            assert torch.equal(one, other)


BUILDS = {
    'backbone': lambda hub: hub.HubVHeat(ARCH, (64, 96), 4, 3.0, 0.2, (1, -1), 1, True),
    'classifier': lambda hub: hub.HubVHeatClassifier(ARCH, 5, 64, in_channels=4, drop_path_rate=1 / 3),
    'pooled': lambda hub: hub.HubVHeatClassifier(ARCH, num_classes=0, img_size=64, in_channels=4),
    # arguments that JSON cannot hold, which the mixin does not record
    'mapping': lambda hub: hub.HubVHeat(types.MappingProxyType(dict(ARCH, layer_scale=None)), 64, 4),
    'init_cfg': lambda hub: hub.HubVHeat(ARCH, 64, 4, init_cfg=dict(type='Pretrained', checkpoint='mine.pth')),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('deployed', [None, (64, 100)])
@pytest.mark.parametrize('name', BUILDS)
def test_round_trip(hub, tmp_path, name, deployed, dtype):
    model = disturb(BUILDS[name](hub)).to(dtype)
    if deployed:
        backbone_of(model).switch_to_deploy(deployed)
    model.save_pretrained(tmp_path / 'a' / 'b')
    assert 'mine.pth' not in (tmp_path / 'a' / 'b' / 'config.json').read_text()
    again = type(model).from_pretrained(tmp_path / 'a' / 'b')
    assert not again.training
    assert_equal(model, again, torch.randn(1, 4, *(deployed or (70, 100)), dtype=dtype))


def test_created_models_save(hub, narrow, released, tmp_path):
    path, numbers = released('vheat_tiny')
    model = create_model('vheat_tiny', path, img_size=64, num_classes=9, hub=True).eval()
    model.save_pretrained(tmp_path / 'x')
    assert json.loads((tmp_path / 'x' / 'config.json').read_text())['arch'] == 'tiny'
    modes = {path.stat().st_mode for path in (tmp_path / 'x').iterdir()}
    assert len(modes) == 1  # who may read the config may read the weights
    assert type(pickle.loads(pickle.dumps(model))) is hub.HubVHeatClassifier
    again = hub.HubVHeatClassifier.from_pretrained(tmp_path / 'x')
    assert_equal(model, again, numbers['x'].float())
    # create_model loads a backbone from a classifier's folder
    features = create_model(
        'vheat_tiny', tmp_path / 'x' / 'model.safetensors', features_only=True, img_size=64, hub=True
    )
    assert torch.equal(features.layers[2][1].op.linear.weight, model.backbone.layers[2][1].op.linear.weight)
    features.save_pretrained(tmp_path / 'y')
    assert_equal(features.eval(), hub.HubVHeat.from_pretrained(tmp_path / 'y'), numbers['x'].float())


def test_new_classifier_is_saved_as_such(hub, tmp_path):
    model = BUILDS['classifier'](hub)
    model.reset_classifier(11)
    model.save_pretrained(tmp_path)
    assert hub.HubVHeatClassifier.from_pretrained(tmp_path).num_classes == 11


@pytest.mark.parametrize('deployed', [False, True])
def test_saving_over_what_was_loaded(hub, tmp_path, deployed):
    model = BUILDS['classifier'](hub)
    if deployed:
        model.backbone.switch_to_deploy()
    model.save_pretrained(tmp_path)
    for _ in range(2):
        model = disturb(hub.HubVHeatClassifier.from_pretrained(tmp_path))
        model.save_pretrained(tmp_path)
        assert_equal(model, hub.HubVHeatClassifier.from_pretrained(tmp_path), torch.randn(1, 4, 64, 64))


def test_loaded_model_does_not_share_memory_with_its_file(hub, tmp_path):
    """safetensors maps files into memory, and older versions of it save in place."""
    model = disturb(BUILDS['classifier'](hub))
    model.save_pretrained(tmp_path)
    again = hub.HubVHeatClassifier.from_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    with path.open('r+b') as file:
        file.write(bytes(path.stat().st_size))
    assert_equal(model, again, torch.randn(1, 4, 64, 64))


def test_arguments_replace_stored_ones(hub, tmp_path):
    model = disturb(BUILDS['backbone'](hub))
    model.save_pretrained(tmp_path)
    wider = hub.HubVHeat.from_pretrained(tmp_path, img_size=128, drop_path_rate=0.5)
    assert torch.equal(wider.freq_embed[1], resize_freq_embed(model.freq_embed[1], (16, 16), 'pad'))
    assert wider.layers[3][0].drop_path.drop_prob == 0.5
    with pytest.raises(
        CheckpointError, match=r'does not fit.*missing: outnorm0.weight, outnorm0.bias; left over: none'
    ):
        hub.HubVHeat.from_pretrained(tmp_path, out_indices=(0, 1, 3))
    with pytest.raises(CheckpointError, match=r"cannot build the model of.*unexpected keyword argument 'window_size'"):
        hub.HubVHeat.from_pretrained(tmp_path, window_size=7)
    with pytest.raises(ValueError, match='strict must be True'):
        hub.HubVHeat.from_pretrained(tmp_path, strict=False)


def change_head(model: nn.Module) -> None:
    model.head['fc'] = nn.Linear(32, 7)


def change_drop_path(model: nn.Module) -> None:
    model.backbone.layers[3][0].drop_path.drop_prob = 0.9


@pytest.mark.parametrize(
    ('change', 'words'),
    [(change_head, 'head.fc.weight, head.fc.bias'), (change_drop_path, r'layers.3.0.drop_path.drop_prob')],
)
def test_model_that_its_arguments_do_not_build_is_not_saved(hub, tmp_path, change, words):
    model = BUILDS['classifier'](hub)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(model)
    with pytest.raises(CheckpointError, match=f'different: .*{words}.*reset_classifier'):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / 'config.json'
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != 'removed'}))


def edit_weights(folder: Path, key: str, value: torch.Tensor | None) -> None:
    from safetensors.torch import save_file

    path = folder / 'model.safetensors'
    state = {name: tensor.clone() for name, tensor in read_checkpoint(path).items() if name != key}
    save_file(state if value is None else state | {key: value}, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_FOLDERS = {
    'nothing': (shutil.rmtree, r'x.*is not a folder \(working directory .*Hugging Face Hub failed: '),
    'no_config': (lambda folder: (folder / 'config.json').unlink(), r'there is no .*config\.json.*save_pretrained'),
    'truncated_config': (lambda folder: truncate(folder / 'config.json'), r'config\.json.*corrupt.*again'),
    'list': (lambda folder: (folder / 'config.json').write_text('[1]'), r"not written by.*'architecture' is None"),
    'foreign': (lambda folder: edit_config(folder, architecture='resnet50'), r"not written by.*'resnet50'"),
    'other_class': (
        lambda folder: edit_config(folder, architecture='VHeatClassifier'),
        r'describes a VHeatClassifier: load it with HubVHeatClassifier',
    ),
    'misspelt': (
        lambda folder: edit_config(folder, arch='removed', archs='tiny'),
        r'lacks arch and has unknown archs: it was edited',
    ),
    'arch': (
        lambda folder: edit_config(folder, arch='huge'),
        r"cannot build the model of.*config\.json.*unknown arch 'huge'",
    ),
    'deployed': (
        lambda folder: edit_config(folder, deployed=[8, 8]),
        r'cannot build the model of.*at least 32.*\[8, 8\]',
    ),
    'variant': (
        lambda folder: edit_config(folder, arch=dict(ARCH, embed_dims=8)),
        r'of another shape: patch_embed\.conv1\.weight 2x4x3x3 instead of 4x4x3x3',
    ),
    'no_weights': (lambda folder: (folder / 'model.safetensors').unlink(), r'no checkpoint at .*model\.safetensors'),
    'truncated': (lambda folder: truncate(folder / 'model.safetensors'), r'model\.safetensors.*corrupt'),
    'missing': (
        lambda folder: edit_weights(folder, 'outnorm3.bias', None),
        r'missing: outnorm3\.bias; left over: none',
    ),
    'left_over': (lambda folder: edit_weights(folder, 'neck.w', torch.ones(2)), r'missing: none; left over: neck\.w'),
    'shape': (
        lambda folder: edit_weights(folder, 'outnorm3.bias', torch.ones(3)),
        r'of another shape: outnorm3\.bias 3 instead of 32',
    ),
    'no_grid': (lambda folder: edit_weights(folder, 'freq_embed.1', torch.ones(8, 8)), r'freq_embed\.1 8x8 inst'),
}


@pytest.mark.parametrize('name', BAD_FOLDERS)
def test_bad_folder(hub, tmp_path, name):
    damage, words = BAD_FOLDERS[name]
    folder = tmp_path / 'x'
    BUILDS['backbone'](hub).save_pretrained(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        hub.HubVHeat.from_pretrained(folder)


def test_repository_on_the_hub(hub, tmp_path, monkeypatch):
    """Upload and download are one call of huggingface_hub each; both are replaced here."""
    import huggingface_hub
    from huggingface_hub import hub_mixin

    uploaded, asked = {}, {}

    class Api:
        def __init__(self, token: object) -> None:
            pass

        def create_repo(self, repo_id: str, **_: object) -> types.SimpleNamespace:
            return types.SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, **arguments: object) -> None:
            shutil.copytree(folder_path, tmp_path / 'hub')
            uploaded.update(arguments)

    def download(repo_id: str, **arguments: object) -> str:
        asked.update(arguments, repo_id=repo_id)
        return str(tmp_path / 'hub')

    monkeypatch.setattr(hub_mixin, 'HfApi', Api)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    model = disturb(BUILDS['classifier'](hub))
    model.push_to_hub('somebody/vheat')
    assert uploaded['repo_id'] == 'somebody/vheat'
    card = (tmp_path / 'hub' / 'README.md').read_text()
    assert all(word in card for word in ('library_name: vheat_mm', 'license: apache-2.0', '2405.16555'))
    again = hub.HubVHeatClassifier.from_pretrained('somebody/vheat', revision='v2')
    assert (asked['repo_id'], asked['revision']) == ('somebody/vheat', 'v2')
    assert asked['allow_patterns'] == ['config.json', 'model.safetensors']
    assert_equal(model, again, torch.randn(1, 4, 64, 64))


def test_without_huggingface_hub(narrow, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    monkeypatch.setattr('vheat_mm.apis.model_zoo.hub_class', hub_class.__wrapped__)  # the class may be in the cache
    assert isinstance(create_model('vheat_tiny', img_size=64), VHeatClassifier)
    with pytest.raises(ModuleNotFoundError, match=r"needs huggingface_hub.*pip install 'vheat_mm\[hub\]'"):
        create_model('vheat_tiny', img_size=64, hub=True)
