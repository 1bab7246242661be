"""Checkpoints of every format are loaded completely or not at all, run no code, and are written atomically."""

import argparse
import errno
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import PretrainedInit
from mmengine.runner import load_checkpoint
from torch import nn

import interpolate4downstream
from vheat_mm import VHeat
from vheat_mm.checkpoint import io as checkpoint_module
from vheat_mm.checkpoint.io import read_checkpoint, save_atomically
from vheat_mm.models.find_weights import find_weights
from vheat_mm.models.weights import check_fit, load_pretrained
from vheat_mm.ops.freq_embed import grid_sizes, resize_freq_embed
from vheat_mm.utils.errors import CheckpointError


@pytest.fixture
def released(make_vheat) -> dict[str, torch.Tensor]:
    """State dict of a classifier in the release's spelling, 64 pixels, 5 classes."""
    torch.manual_seed(5)
    state = {key: torch.randn_like(value) for key, value in make_vheat(out_indices=3).state_dict().items()}
    state = {key.replace('outnorm3', 'classifier.0'): value for key, value in state.items()}
    return state | {'classifier.3.weight': torch.randn(5, 32), 'classifier.3.bias': torch.randn(5)}


def backbone_of(released: dict) -> dict:
    return {
        key.replace('classifier.0', 'outnorm3'): value for key, value in released.items() if 'classifier.3' not in key
    }


def mmengine_of(released: dict) -> dict:
    state = {f'backbone.{key}': value for key, value in backbone_of(released).items()}
    return state | {f'head.fc.{name}': released[f'classifier.3.{name}'] for name in ('weight', 'bias')}


def yacs_node() -> dict:
    """The ``config`` of a released checkpoint, made without yacs."""
    node = type('CfgNode', (dict,), {'__module__': 'yacs.config', '__qualname__': 'CfgNode'})
    module = type(sys)('yacs.config')
    module.CfgNode = node
    sys.modules.update({'yacs': type(sys)('yacs'), 'yacs.config': module})
    config = node(MODEL=node(TYPE='vheat'))
    config.__dict__['__immutable__'] = True
    return config


def write_formats(folder: Path, state: dict) -> dict[str, Path]:
    ema = {key: value + 1 for key, value in state.items()}
    history = HistoryBuffer([0.5, 0.25], [1, 1])
    formats = {
        'release': dict(model=state, model_ema=ema, epoch=3, config=yacs_node()),
        'mmengine': dict(
            meta=dict(epoch=1, iter=9, seed=0), state_dict=mmengine_of(state), message_hub=dict(loss=history)
        ),
        'timm': dict(state_dict=mmengine_of(state), args=argparse.Namespace(lr=0.1, betas=[0.9]), version=2),
        'bare': state,
        'wrapped': dict(model={f'module.{key}': value for key, value in state.items()}),
        'compiled': dict(state_dict={f'backbone._orig_mod.{k}': v for k, v in backbone_of(state).items()}),
    }
    for name, content in formats.items():
        torch.save(content, folder / f'{name}.pth')
    from safetensors.torch import save_file

    save_file(state, folder / 'safe.safetensors')
    for name in ('yacs', 'yacs.config'):
        del sys.modules[name]
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize('name', ['release', 'mmengine', 'timm', 'bare', 'wrapped', 'compiled', 'safe'])
def test_every_format_loads(tmp_path, released, make_vheat, name, caplog):
    path = write_formats(tmp_path, released)[name]
    kind = PretrainedInit if name == 'safe' else 'Pretrained'  # configs in pure Python hold the class
    model = make_vheat(img_size=128, init_cfg=dict(type=kind, checkpoint=str(path)))
    model.init_weights()
    loaded = model.state_dict()
    for key, value in backbone_of(released).items():
        expected = resize_freq_embed(value, loaded[key].shape[:2]) if 'freq_embed' in key else value
        assert torch.equal(loaded[key], expected), key
    assert torch.equal(loaded['outnorm0.weight'], torch.ones(4))


def test_report(tmp_path, released, make_vheat, monkeypatch):
    lines = []
    monkeypatch.setattr('vheat_mm.models.weights.print_log', lambda text, **_: lines.append(text))
    path = write_formats(tmp_path, released)['release']
    load_pretrained(make_vheat(img_size=128), path)
    report = lines[-1]
    assert "release.pth', entry 'model'" in report
    assert 'resized, pad (4): freq_embed.0 16x16x4 -> 32x32x4' in report
    assert 'missing, left as initialised (6): outnorm0.weight' in report
    assert report.endswith('\n  not of the backbone (2): head.fc.weight, head.fc.bias')
    assert 'dropped' not in report


def test_moving_average(tmp_path, released, make_vheat):
    files = write_formats(tmp_path, released)
    model = make_vheat(out_indices=3)
    load_pretrained(model, files['release'], ema=True)
    assert torch.equal(model.freq_embed[0], released['freq_embed.0'] + 1)
    with pytest.raises(CheckpointError, match=r'no moving average.*state_dict'):
        load_pretrained(model, files['mmengine'], ema=True)
    averaged = dict(state_dict=mmengine_of(released), ema_state_dict={'steps': torch.tensor(3)})
    assert find_weights(averaged, ema=True).entry == 'state_dict'  # where MMEngine's hook puts the average
    with pytest.raises(CheckpointError, match='ask for it with ema=True'):
        find_weights(dict(model_ema=released))


def test_classifier_has_mmpretrains_keys(released):
    assert find_weights(dict(model=released)).to_mmengine().keys() == mmengine_of(released).keys()
    assert find_weights(dict(state_dict=mmengine_of(released))).to_mmengine().keys() == mmengine_of(released).keys()


def test_several_backbones_need_a_choice(released, make_vheat, tmp_path):
    state = {f'{who}.{key}': value for who in ('teacher', 'student') for key, value in mmengine_of(released).items()}
    state |= {f'teacher.{key}': value + 1 for key, value in mmengine_of(released).items()}
    torch.save(dict(state_dict=state), tmp_path / 'x.pth')
    model = make_vheat(out_indices=3)
    with pytest.raises(CheckpointError, match=r'student.backbone.*teacher.backbone.*prefix'):
        load_pretrained(model, tmp_path / 'x.pth')
    load_pretrained(model, tmp_path / 'x.pth', prefix='teacher.backbone')
    assert torch.equal(model.freq_embed[0], released['freq_embed.0'] + 1)


def test_subset_of_stages(tmp_path, released, make_vheat):
    model = make_vheat(out_indices=(0, 1))
    load_pretrained(model, write_formats(tmp_path, released)['release'])
    assert torch.equal(model.layers[1][0].op.linear.weight, released['layers.1.0.op.linear.weight'])


def test_released_reparameterised_weights(tmp_path, make_vheat):
    source = make_vheat()
    source.switch_to_deploy()
    torch.save(dict(model=source.state_dict()), tmp_path / 'x.pth')
    model = make_vheat()
    with pytest.raises(CheckpointError, match=r're-parameterised.*switch_to_deploy'):
        load_pretrained(model, tmp_path / 'x.pth')
    model.switch_to_deploy()
    load_pretrained(model, tmp_path / 'x.pth')


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


BAD_FILES = {
    'missing': (None, 'no checkpoint at .*missing'),
    'empty': (lambda path, state: path.touch(), 'empty'),
    'folder': (lambda path, state: path.mkdir(), 'not a file but a folder without model.safetensors'),
    'text': (lambda path, state: path.write_text('hello'), 'corrupt'),
    'truncated': (
        lambda path, state: (torch.save(dict(model=state), path), os.truncate(path, path.stat().st_size // 2)),
        'truncated',
    ),
    'hostile': (lambda path, state: torch.save(dict(model=state, x=Hostile(path.parent / 'ran')), path), 'system'),
    'object': (lambda path, state: torch.save(dict(model=state, x=nn.Linear(2, 2)), path), 'torch.nn.modules.linear'),
    'list': (lambda path, state: torch.save([1, 2], path), 'list'),
    'no_vheat': (lambda path, state: torch.save(dict(model={'conv.weight': torch.ones(3)}), path), 'no vHeat backbone'),
    'incomplete': (
        lambda path, state: torch.save(dict(model=without(state, 'layers.2.1.mlp.fc1.bias')), path),
        'missing: layers.2.1.mlp.fc1.bias',
    ),
    'extra': (lambda path, state: torch.save(dict(model=state | {'neck.w': torch.ones(2)}), path), 'left over: neck.w'),
    'shape': (
        lambda path, state: torch.save(dict(model=state | {'layers.0.0.norm1.bias': torch.ones(7)}), path),
        r'norm1.bias 7 instead of 4',
    ),
    'width': (
        lambda path, state: torch.save(dict(model=state | {'patch_embed.conv2.weight': torch.ones(8, 2, 3, 3)}), path),
        'embed_dims=8.*embed_dims=4',
    ),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_file_is_refused_and_nothing_loaded(tmp_path, released, make_vheat, name):
    write, words = BAD_FILES[name]
    path = tmp_path / f'{name}.pth'
    if write is not None:
        write(path, released)
    model = make_vheat()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(model, path)
    assert not (tmp_path / 'ran').exists()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_other_variant_is_named(make_vheat, tmp_path):
    with torch.device('meta'):
        state = VHeat('small').state_dict()
    torch.save({key: torch.zeros(1).expand(value.shape) for key, value in state.items()}, tmp_path / 'small.pth')
    with torch.device('meta'):
        model = VHeat('tiny')
    with pytest.raises(CheckpointError, match=r"vHeat-small.*2, 2, 18, 2.*model is vHeat-tiny.*set arch='small'"):
        load_pretrained(model, tmp_path / 'small.pth')


def test_load_state_dict_resizes_embeddings(golden, make_vheat):
    numbers = golden('interpolate.npz')
    small, large = make_vheat(), make_vheat(img_size=128)
    state = small.state_dict() | {f'freq_embed.{i}': numbers[f'src{i}'].float() for i in range(4)}
    large.load_state_dict(state)
    for i in range(4):
        assert torch.equal(large.freq_embed[i], numbers[f'pad128_{i}'].float())
    load_checkpoint_like = nn.ModuleDict({'backbone': make_vheat(img_size=128)})
    load_checkpoint_like.load_state_dict({f'backbone.{key}': value for key, value in state.items()})
    assert torch.equal(load_checkpoint_like['backbone'].freq_embed[0], large.freq_embed[0])


def test_resize_modes(golden):
    numbers = golden('interpolate.npz')
    for i, grid in enumerate(grid_sizes((96, 160))):
        source = numbers[f'src{i}'].float()
        bicubic = resize_freq_embed(source, grid, 'bicubic')
        torch.testing.assert_close(bicubic, numbers[f'bicubic_24x40_{i}'].float(), rtol=1e-5, atol=1e-6)
    ramp = torch.arange(8.0)[:, None, None].expand(8, 8, 1)
    halved = resize_freq_embed(ramp, (4, 8), 'bilinear')[:, 0, 0]
    torch.testing.assert_close(halved, torch.tensor([0.5, 2.5, 4.5, 6.5]))
    assert torch.equal(resize_freq_embed(ramp, (3, 5), 'pad'), ramp[:3, :5])  # shrinking drops the highest modes
    with pytest.raises(ValueError, match="'cubic'"):
        resize_freq_embed(ramp, (4, 4), 'cubic')


# --- whole models


def backbone_state(**kwargs) -> dict[str, torch.Tensor]:
    arch = dict(embed_dims=8, depths=(1, 1, 1, 1)) | kwargs.pop('arch', {})
    model = VHeat(arch=arch, **dict(img_size=32) | kwargs)
    return {f'backbone.{key}': value for key, value in model.state_dict().items()}


HEAD = {'head.fc.weight': torch.zeros(2, 64), 'head.fc.bias': torch.zeros(2)}


def test_complete_checkpoint_fits():
    own = backbone_state() | HEAD
    report = check_fit(dict(own), own, 'x.pth', finetune=False)
    assert report == f"Weights from 'x.pth': {len(own)} of {len(own)} tensors loaded"
    other_grid = backbone_state(img_size=64) | HEAD
    assert 'resized, pad (4): backbone.freq_embed.0 16x16x8 -> 8x8x8' in check_fit(other_grid, own, 'x.pth', False)


@pytest.mark.parametrize(
    ('change', 'word'),
    [
        (lambda s: s.pop('head.fc.bias'), 'missing: head.fc.bias'),
        (lambda s: s.pop('backbone.outnorm0.bias'), 'missing: backbone.outnorm0.bias'),
        (lambda s: s.update(extra=torch.zeros(1)), 'left over: extra'),
        (lambda s: s.update({'head.fc.bias': torch.zeros(5)}), 'head.fc.bias 5 instead of 2'),
        (lambda s: s.update({'backbone.freq_embed.0': torch.zeros(8, 8, 9)}), '8x8x9 instead of 8x8x8'),
    ],
)
def test_testing_takes_complete_checkpoints_only(change, word):
    own = backbone_state() | HEAD
    state = dict(own)
    change(state)
    with pytest.raises(CheckpointError, match=word):
        check_fit(state, own, 'x.pth', finetune=False)


def test_fine_tuning_takes_other_heads_but_a_complete_backbone():
    own = backbone_state() | HEAD
    state = {k: v for k, v in own.items() if 'outnorm' not in k and k != 'head.fc.weight'}
    state |= {'head.fc.bias': torch.zeros(9), 'decode_head.w': torch.zeros(1)}
    report = check_fit(state, own, 'x.pth', finetune=True)
    assert 'not loaded (1): head.fc.bias 9 instead of 2' in report
    assert 'left as initialised (9): ' in report
    assert 'dropped (1): decode_head.w' in report
    for key in ('backbone.freq_embed.0', 'backbone.layers.0.0.mlp.fc1.bias'):
        with pytest.raises(CheckpointError, match=f'missing: {key}'):
            check_fit({k: v for k, v in state.items() if k != key}, own, 'x.pth', finetune=True)
    with pytest.raises(CheckpointError, match='does not fit'):  # a model without backbone, and nothing in common
        check_fit({'a': torch.zeros(1)}, {'b': torch.zeros(1)}, 'x.pth', finetune=True)


def test_other_variant_of_a_whole_model_is_named():
    deeper = backbone_state(arch=dict(depths=(1, 1, 2, 1)))
    with pytest.raises(CheckpointError, match=r'depths=\(1, 1, 2, 1\), .*the model is .* depths=\(1, 1, 1, 1\)'):
        check_fit(deeper, backbone_state(), 'x.pth', finetune=True)


def test_stages_that_are_not_built_may_be_left_over():
    report = check_fit(backbone_state(), backbone_state(out_indices=(0, 1)), 'x.pth', finetune=True)
    assert 'not of this model, dropped (4): backbone.outnorm2.weight' in report
    assert 'not built, dropped' in report


# --- interpolate4downstream.py


@pytest.fixture
def run(tmp_path, released, capsys):
    files = write_formats(tmp_path, released)

    def call(*arguments: object, source: str = 'release') -> tuple[int, str]:
        status = interpolate4downstream.main(['--pt_pth', str(files[source]), '--pt_size', '64', *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.mark.parametrize('source', ['release', 'mmengine', 'bare', 'wrapped', 'safe'])
def test_tool_output(run, tmp_path, released, golden, make_vheat, source):
    target = tmp_path / 'out.pth'
    status, text = run('--tg_pth', target, '--tg_size', 128, source=source)
    assert status == 0
    assert '16 x 16' in text
    assert '32 x 32' in text
    content = torch.load(target, weights_only=True)
    assert content['model'].keys() == released.keys()
    assert torch.equal(content['model']['freq_embed.0'][:16, :16], released['freq_embed.0'])
    assert not content['model']['freq_embed.0'][16:].any()
    plain = {key for key in released if 'freq' not in key}
    assert all(torch.equal(content['model'][key], released[key]) for key in plain)
    classifier = nn.ModuleDict({'backbone': make_vheat(out_indices=3, img_size=128)})
    classifier['head'] = nn.ModuleDict({'fc': nn.Linear(32, 5)})
    load_checkpoint(classifier, str(target), strict=True)
    assert torch.equal(classifier['head']['fc'].bias, released['classifier.3.bias'])
    one_copy = sum(value.numel() * 4 for value in content['model'].values())
    assert target.stat().st_size < 1.5 * one_copy + 200_000  # the two spellings share their storage


def test_tool_matches_the_release(run, tmp_path, golden, released):
    """Zero padding at the high-frequency end, bit by bit."""
    numbers = golden('interpolate.npz')
    released |= {f'freq_embed.{i}': numbers[f'src{i}'].float() for i in range(4)}
    torch.save(dict(model=released), tmp_path / 'golden.pth')
    arguments = ['--pt_pth', str(tmp_path / 'golden.pth'), '--pt_size', '64', '--tg_size', '128']
    assert interpolate4downstream.main([*arguments, '--tg_pth', str(tmp_path / 'out.pth')]) == 0
    content = torch.load(tmp_path / 'out.pth', weights_only=True)['model']
    for i in range(4):
        assert torch.equal(content[f'freq_embed.{i}'], numbers[f'pad128_{i}'].float())


def test_tool_sizes_modes_and_ema(run, tmp_path, released):
    target = tmp_path / 'out.safetensors'
    assert run('--tg_pth', target, '--tg_size', 33, 70, '--mode', 'bicubic', '--ema')[0] == 0
    state = read_checkpoint(target)
    assert [tuple(state[f'freq_embed.{i}'].shape[:2]) for i in range(4)] == [(9, 18), (5, 9), (3, 5), (2, 3)]
    expected = resize_freq_embed(released['freq_embed.0'] + 1, (9, 18), 'bicubic')
    assert torch.equal(state['freq_embed.0'], expected)


def test_dry_run_writes_nothing(run, tmp_path):
    before = sorted(tmp_path.iterdir())
    status, text = run('--tg_pth', tmp_path / 'out.pth', '--dry-run')
    assert (status, 'nothing written' in text) == (0, True)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--tg_pth', '{tmp}/release.pth'], 'the input itself'),
        (['--tg_pth', '{tmp}/link.pth'], 'the input itself'),
        (['--tg_pth', '{tmp}/x.pth', '--tg_size', '16'], 'at least 32.*16'),
        (['--tg_pth', '{tmp}/x.pth', '--pt_size', '224'], 'of images of 64x64.*--pt_size 64 64'),
        (['--tg_pth', '{tmp}/nowhere/x.pth'], 'no folder'),
        (['--tg_pth', '{tmp}/x.pth', '--pt_pth', '{tmp}/nothing.pth'], 'no checkpoint at'),
    ],
)
def test_tool_refuses(run, tmp_path, arguments, words):
    (tmp_path / 'link.pth').symlink_to(tmp_path / 'release.pth')
    before = (tmp_path / 'release.pth').read_bytes()
    status, text = run(*[argument.format(tmp=tmp_path) for argument in arguments])
    assert status == 2
    assert text.startswith('error: ')
    assert text.count('\n') == 1
    assert re.search(words, text)
    assert (tmp_path / 'release.pth').read_bytes() == before
    assert not (tmp_path / 'x.pth').exists()


def test_disk_full_leaves_the_old_file(run, tmp_path, monkeypatch):
    target = tmp_path / 'out.pth'
    target.write_bytes(b'old')

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(checkpoint_module.os, 'fsync', full)
    status, text = run('--tg_pth', target)
    assert status == 2
    assert 'No space left on device' in text
    assert target.read_bytes() == b'old'
    assert not list(tmp_path.glob('.*'))


def test_written_file_has_ordinary_permissions(tmp_path):
    save_atomically({'x': torch.ones(2)}, tmp_path / 'x.pth')
    (tmp_path / 'plain').touch()
    assert (tmp_path / 'x.pth').stat().st_mode == (tmp_path / 'plain').stat().st_mode
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_atomically({'x': lambda: 0}, tmp_path / 'y.pth')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['plain', 'x.pth']


@pytest.mark.parametrize('bands', [1, 4, 6])
def test_images_of_other_bands(tmp_path, released, make_vheat, bands, monkeypatch):
    """As timm does. On one band, or six alike, the first convolution computes the same as on three of them."""
    lines = []
    monkeypatch.setattr('vheat_mm.models.weights.print_log', lambda text, **_: lines.append(text))
    path = write_formats(tmp_path, released)['release']
    three, other = make_vheat(out_indices=3), make_vheat(out_indices=3, in_channels=bands)
    load_pretrained(three, path)
    load_pretrained(other, path)
    image = torch.rand(1, 1, 32, 32)
    weight, adapted = three.patch_embed.conv1.weight, other.patch_embed.conv1.weight
    with torch.no_grad():
        convolved = (
            conv(image.repeat(1, conv.in_channels, 1, 1)) for conv in (three.patch_embed.conv1, other.patch_embed.conv1)
        )
        if bands == 4:
            torch.testing.assert_close(adapted[:, 3], weight[:, 0] * 0.75)
        else:
            torch.testing.assert_close(*convolved)
    assert f'patch_embed.conv1.weight adapted from 3 bands to {bands}' in lines[-1]
    torch.save(other.state_dict(), tmp_path / 'own.pth')
    again = make_vheat(out_indices=3, in_channels=bands)
    load_pretrained(again, tmp_path / 'own.pth')
    assert torch.equal(again.patch_embed.conv1.weight, other.patch_embed.conv1.weight)
    with pytest.raises(CheckpointError, match=r'patch_embed.conv1.weight .* instead of'):
        load_pretrained(three, tmp_path / 'own.pth')
