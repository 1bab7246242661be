"""The models in timm, by what timm's own tests ask of every model, and in libraries that build on timm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interop import interop_env
from stand_ins import released_state, write_release

from vheat_mm import create_model
from vheat_mm.models.arch import ARCHS
from vheat_mm.models.classifier import VHeatClassifier
from vheat_mm.models.vheat import DropPath
from vheat_mm.ops.freq_embed import resize_freq_embed
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
timm = pytest.importorskip('timm')  # after vheat_mm; before it in the subprocess below

ROOT = Path(__file__).resolve().parents[2]
NAMES = ['vheat_tiny', 'vheat_small', 'vheat_base']
KINDS = ['vheat_tiny', 'vheat_small']  # pre-norm, and post-norm with layer scale
MAPS = [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]  # (C, H, W) of images of 64 x 96 pixels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def narrow(monkeypatch):
    """The published names at width 8."""
    for arch in ARCHS:
        scale = None if arch == 'tiny' else 0.5
        narrowed = dict(embed_dims=8, depths=(1, 2, 1, 2), post_norm=arch != 'tiny', layer_scale=scale)
        monkeypatch.setitem(ARCHS, arch, narrowed)


@pytest.fixture
def release(tmp_path, monkeypatch) -> Path:
    """Stand-ins of the published classifiers, in the place of the release."""
    monkeypatch.setenv('VHEAT_WEIGHTS', str(tmp_path / 'release'))
    return write_release(tmp_path / 'release', NAMES, ema=True)


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 64, 96)


def shapes(maps) -> list[tuple[int, ...]]:
    return [tuple(x.shape[1:]) for x in maps]


# ---- the registry ----


def test_timm_knows_the_models():
    assert sorted(timm.list_models('vheat*')) == sorted(timm.list_models(module='vheat')) == sorted(NAMES)
    assert sorted(timm.list_pretrained('vheat*')) == [f'{name}.in1k' for name in sorted(NAMES)]
    for name in NAMES:
        assert timm.is_model(name)
        cfg = timm.get_pretrained_cfg(name)
        file = f'vHeat_{name.removeprefix("vheat_")}.pth'
        assert cfg.url == f'https://github.com/MzeroMiko/vHeat/releases/download/vheatcls/{file}'
        with torch.device('meta'):
            model = timm.create_model(name)
        assert type(model) is VHeatClassifier
        assert {f'{cfg.first_conv}.weight', f'{cfg.classifier}.weight'} <= set(model.state_dict())
        config = timm.data.resolve_data_config({}, model=model)
        assert (config['input_size'], config['interpolation'], config['crop_pct']) == ((3, 224, 224), 'bicubic', 0.875)
        assert config['mean'] == (0.485, 0.456, 0.406)


def test_misspelt_arguments_are_refused(narrow):
    with pytest.raises(TypeError, match='drop_paths'):
        timm.create_model('vheat_tiny', drop_paths=0.1)
    with pytest.raises(ValueError, match=r"got 'x\.pth': .*pretrained_cfg_overlay=dict\(file"):
        timm.create_model('vheat_tiny', pretrained='x.pth')
    with pytest.raises(ValueError, match='output_stride must be 32, got 16'):
        timm.create_model('vheat_tiny', features_only=True, output_stride=16)
    with pytest.raises(ValueError, match=r'scriptable=True: .*trace or export'):
        timm.create_model('vheat_tiny', scriptable=True)


def test_device_and_dtype(narrow):
    model = timm.create_model('vheat_tiny', img_size=64, device='meta', dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.float64)}
    half = timm.create_model('vheat_tiny', img_size=64, device='cpu', dtype=torch.bfloat16, features_only=True).eval()
    with torch.no_grad():
        maps = half(images().bfloat16())
    assert shapes(maps) == MAPS
    assert {x.dtype for x in maps} == {torch.bfloat16}


# ---- classifier ----


@pytest.mark.parametrize('name', KINDS)
def test_classifier_pooling_and_their_removal(narrow, name):
    """timm's test_model_default_cfgs."""
    model = timm.create_model(name, img_size=64).eval()
    cfg, x = model.default_cfg, torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (1, model.num_features, *cfg['pool_size'])
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (1, model.head_hidden_size)
        assert torch.equal(model.get_classifier()(pooled), model(x))
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert torch.equal(model(x), pooled)
        model.reset_classifier(0, '')
        assert torch.equal(model(x), features)
        model.reset_classifier(7, 'max')
        torch.testing.assert_close(model(x), model.get_classifier()(features.flatten(2).max(2).values))
    built = timm.create_model(name, img_size=64, num_classes=0, global_pool='').eval()
    assert shapes([built(images())]) == [MAPS[3]]
    built.reset_classifier(2)
    assert not built.get_classifier().training
    with pytest.raises(ValueError, match=r"global_pool='' leaves a map"):
        built(images())
    built.reset_classifier(2, 'avg')
    assert built(images()).shape == (2, 2)
    with pytest.raises(ValueError, match=r'global_pool must be one of'):
        timm.create_model(name, img_size=64, global_pool='mean')


def test_another_input_size(narrow):
    model = timm.create_model('vheat_small', img_size=64).requires_grad_(False).eval()
    with torch.no_grad():
        x = images()
        before = model(x)  # fills the cache of decays
        other = timm.create_model('vheat_small', img_size=(64, 96)).eval()
        other.load_state_dict(model.state_dict())  # resizes
        model.set_input_size((64, 96))
        assert torch.equal(model(x), other(x))
        assert not torch.equal(model(x), before)
    assert not any(p.requires_grad for p in model.parameters())
    model.backbone.switch_to_deploy()
    with pytest.raises(RuntimeError, match='deployed for one size'):
        model.set_input_size(64)


@pytest.mark.parametrize('name', KINDS)
def test_every_parameter_gets_a_gradient_also_with_drop_path(narrow, name):
    """timm's test_model_backward."""
    model = timm.create_model(name, img_size=64, num_classes=42, drop_rate=0.1, drop_path_rate=0.2).train()
    assert max(m.drop_prob for m in model.modules() if isinstance(m, DropPath)) == pytest.approx(0.2)
    out = model(torch.randn(16, 3, 64, 64))
    assert out.shape == (16, 42)
    (out * torch.randn(42)).mean().backward()
    missing = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not missing
    assert model.head['drop'].p == 0.1


# ---- maps ----


@pytest.mark.parametrize('name', KINDS)
def test_maps_of_the_stages(narrow, name):
    """timm's test_model_forward_features and test_model_forward_intermediates."""
    model, x = timm.create_model(name, img_size=64).eval(), images()
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert shapes(maps) == MAPS
        assert torch.equal(final, model.forward_features(x))
        norm = model.backbone.outnorm3
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert all(map(torch.equal, normed[:3], maps[:3]))
        assert torch.equal(normed[3], final)
        torch.testing.assert_close(norm(maps[3].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), final)
        for indices, stages in ((2, [2, 3]), ((1, -2), [1, 2]), ([3, 0], [0, 3]), ((-4,), [0])):
            got = model.forward_intermediates(x, indices, intermediates_only=True)
            assert all(map(torch.equal, got, [maps[i] for i in stages]))
            assert len(got) == len(stages)
        later = model.backbone.layers[2].register_forward_hook(lambda *_: pytest.fail('a later stage has run'))
        early, (second,) = model.forward_intermediates(x, [1], stop_early=True)
        later.remove()
        assert torch.equal(early, second)
        assert torch.equal(model.forward_intermediates(x, [1])[0], final)

        wrapped = timm.create_model(name, features_only=True, img_size=64, out_indices=(0, 2)).eval()
        assert 'model.backbone.layers.3' not in dict(wrapped.named_modules())
        assert wrapped.feature_info.channels() == [8, 32]
        assert wrapped.feature_info.reduction() == [4, 16]
        assert not wrapped.model.load_state_dict(model.state_dict(), strict=False).missing_keys
        outputs = wrapped(x)
        assert all(map(torch.equal, outputs, [maps[0], maps[2]]))
    for info, stage in zip(model.feature_info, maps, strict=True):
        assert (info['num_chs'], 64 // info['reduction']) == tuple(stage.shape[1:3])
        seen = []
        hook = model.get_submodule(info['module']).register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        model(x)
        hook.remove()
        torch.testing.assert_close(seen[0].permute(0, 3, 1, 2), stage)
    for wrong in (5, 0, (4,), (-5,), ()):
        with pytest.raises(ValueError, match=r'indices must be stages in -4 \.\. 3'):
            model.forward_intermediates(x, wrong)
    with pytest.raises(ValueError, match=r"output_fmt must be 'NCHW', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt='NHWC')


def test_a_feature_extractor_has_no_unused_parameters(narrow):
    model = timm.create_model('vheat_small', features_only=True, img_size=64, out_indices=(1, 2))
    sum(x.mul(torch.randn_like(x)).sum() for x in model(images())).backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    assert not any('outnorm' in key or 'head' in key for key in model.state_dict())


def test_pruning_keeps_what_is_asked_for(narrow):
    model, x = timm.create_model('vheat_tiny', img_size=64).eval(), images()
    with torch.no_grad():
        logits, features = model(x), model.forward_features(x)
        assert model.prune_intermediate_layers([-1], prune_head=False) == [3]
        assert torch.equal(model(x), logits)
        model.prune_intermediate_layers(1)
        assert torch.equal(model(x), features)
        stages = model.forward_intermediates(x, intermediates_only=True)
        assert model.prune_intermediate_layers((0, -2)) == [0, 2]
        assert model.num_features == model.head_hidden_size == 32
        assert torch.equal(model(x), stages[2])
        assert len(model.backbone.freq_embed) == len(model.backbone.layers) == 3
        model.reset_classifier(5, 'avg')
        assert model(x).shape == (2, 5)


# ---- training ----


@pytest.mark.parametrize('name', KINDS)
def test_checkpointing_gives_the_same_gradients(narrow, name):
    model, x, gradients = timm.create_model(name, img_size=64, num_classes=3), images(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert all(stage.with_cp is enable for stage in model.backbone.layers)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters()})
    torch.testing.assert_close(*gradients)
    maps = timm.create_model(name, img_size=64, features_only=True)
    maps.set_grad_checkpointing()
    assert all(stage.with_cp for stage in maps.model.backbone.layers)


def test_layer_decay_groups_by_depth(narrow):
    """timm's groups are those of our own layer decay, for every parameter."""
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay

    model = timm.create_model('vheat_small', img_size=64)
    depths = group_parameters(model, model.group_matcher(), reverse=True)
    assert depths == {key: model.backbone.get_layer_depth(key, 'backbone.')[0] for key, _ in model.named_parameters()}
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert sorted(set(coarse.values())) == [0, 1, 2, 3, 4, 5]
    assert coarse['backbone.freq_embed.2'] == coarse['backbone.layers.2.1.0.weight'] == 3
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    grouped = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert {p.ndim > 1 for group in groups if group['weight_decay'] for p in group['params']} == {True}


def test_average_of_weights_and_deployment(narrow):
    """What timm's scripts do to any model: ModelEmaV3, reparameterize_model."""
    model, x = timm.create_model('vheat_tiny', img_size=64).eval(), torch.randn(1, 3, 64, 64)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        expected, embed = model(x), model.backbone.freq_embed[0].clone()
        torch.testing.assert_close(average.module(x), expected)
        model.backbone.freq_embed[0].add_(1)
        average.update(model)
        torch.testing.assert_close(average.module.backbone.freq_embed[0], embed + 0.5)
        deployed = timm.utils.reparameterize_model(average.module)
        assert deployed.backbone.freq_embed is None
        torch.testing.assert_close(deployed(x), average.module(x))


def test_tracing(narrow):
    model, x = timm.create_model('vheat_tiny', img_size=64).eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        extractor = timm.models.GraphExtractNet(model, ['head.fc'])  # by torch.fx, with the backbone as a leaf
        torch.testing.assert_close(extractor(x), model(x))
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


# ---- weights ----


def expected_state(name: str, entry: str = 'model_ema') -> dict[str, torch.Tensor]:
    keys = {'classifier.0.': 'backbone.outnorm3.', 'classifier.3.': 'head.fc.'}
    return {
        next((new + key[len(old) :] for old, new in keys.items() if key.startswith(old)), f'backbone.{key}'): value
        for key, value in released_state(name, seed=int(entry == 'model_ema')).items()
    }


@pytest.mark.parametrize('way', ['name', 'tag', 'overlay', 'checkpoint_path'])
def test_released_weights(release, way):
    """By name, and by timm's own reader of paths, the average; by our reader of paths the entry ``model``."""
    path = str(release / 'vheatcls' / 'vHeat_tiny.pth')
    arguments = dict(
        name=dict(model_name='vheat_tiny', pretrained=True),
        tag=dict(model_name='vheat_tiny.in1k', pretrained=True),
        overlay=dict(model_name='vheat_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=path)),
        checkpoint_path=dict(model_name='vheat_tiny', checkpoint_path=path),
    )
    model = timm.create_model(**arguments[way])
    expected = expected_state('vheat_tiny', 'model' if way == 'overlay' else 'model_ema')
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_weights_fit_other_channels_classes_and_sizes(release):
    """timm's test_model_load_pretrained, with the numbers of its rule."""
    expected = expected_state('vheat_tiny')
    conv = 'backbone.patch_embed.conv1.weight'
    for bands, rule in ((1, expected[conv].sum(1, keepdim=True)), (5, expected[conv][:, [0, 1, 2, 0, 1]] * 0.6)):
        model = timm.create_model('vheat_tiny', pretrained=True, in_chans=bands, num_classes=5, img_size=256)
        state = model.state_dict()
        torch.testing.assert_close(state[conv], rule)
        assert state['head.fc.weight'].shape == (5, 768)
        grown = resize_freq_embed(expected['backbone.freq_embed.3'], (8, 8), mode='pad')
        assert torch.equal(state['backbone.freq_embed.3'], grown)
        assert model.in_chans == bands
    maps = timm.create_model('vheat_tiny', pretrained=True, features_only=True, out_indices=(2,), in_chans=1)
    key = 'backbone.layers.2.5.op.linear.weight'
    assert torch.equal(maps.model.state_dict()[key], expected[key])
    assert shapes(maps(images(1))) == [(384, 4, 6)]


def test_wrong_weights_are_refused(release, tmp_path):
    small = str(release / 'vheatcls' / 'vHeat_small.pth')
    with pytest.raises(CheckpointError, match=r'vHeat-small.*but the model is vHeat-tiny'):
        timm.create_model('vheat_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=small))
    with pytest.raises(CheckpointError, match=r'^the checkpoint holds vHeat-small [^\n]*but the model is vHeat-tiny'):
        timm.create_model('vheat_tiny', checkpoint_path=small)
    with pytest.raises(CheckpointError, match=r'gone\.pth'):
        timm.create_model('vheat_tiny', pretrained=True, pretrained_cfg_overlay=dict(url=str(tmp_path / 'gone.pth')))


def test_saved_models_come_back(narrow, tmp_path):
    """timm's folders for the Hugging Face Hub, with other arguments than the saved ones, too."""
    pytest.importorskip('huggingface_hub')
    model = timm.create_model('vheat_tiny', img_size=64, num_classes=4, in_chans=1).eval()
    timm.models.save_for_hf(model, str(tmp_path / 'saved'), safe_serialization=True)
    config = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    assert config['architecture'] == 'vheat_tiny'
    x = images(1)
    with torch.no_grad():
        again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
        assert torch.equal(again(x), model(x))
        assert again.backbone.img_size == (64, 64)
        larger = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True, img_size=128, num_classes=2)
        grown = resize_freq_embed(model.backbone.freq_embed[0], (32, 32), mode='pad')
        assert torch.equal(larger.backbone.freq_embed[0], grown)
        # and without timm
        ours = create_model('vheat_tiny', tmp_path / 'saved', img_size=64, in_channels=1).eval()
        assert torch.equal(ours(x), model(x))


# ---- libraries that build on timm ----

USE = """
import runpy, sys
runpy.run_path('{root}/vheat_mm/utils/torchvision.py')['ensure_torchvision']()
import timm
import vheat_mm
assert 'vheat_tiny' in timm.list_models()

import torch
import segmentation_models_pytorch as smp
image = torch.randn(1, 3, 64, 96)
net = smp.Unet('tu-vheat_tiny', encoder_weights=True, classes=5).eval()
assert net.encoder.out_channels == [3, 0, 96, 192, 384, 768]
with torch.no_grad():
    assert net(image).shape == (1, 5, 64, 96)
    encoded = net.encoder(image)[2:]

from transformers import AutoBackbone, TimmBackbone, TimmBackboneConfig
backbone = TimmBackbone.from_pretrained('vheat_tiny', out_indices=(0, 1, 2, 3)).eval()
with torch.no_grad():
    maps = backbone(image).feature_maps
assert backbone.channels == [96, 192, 384, 768]
assert all(map(torch.equal, maps, encoded)), 'the same weights give the same maps'
backbone.save_pretrained('{folder}')
again = TimmBackbone(TimmBackboneConfig.from_pretrained('{folder}'))
from safetensors.torch import load_file
again.load_state_dict(load_file('{folder}/model.safetensors'))
built = AutoBackbone.from_config(TimmBackboneConfig(backbone='vheat_tiny', out_indices=(1, 3)))
assert [tuple(x.shape[1:]) for x in built(image).feature_maps] == [(192, 8, 12), (768, 2, 3)]
"""


def test_segmentation_models_pytorch_and_transformers(release, tmp_path):
    """In a process that imports timm first."""
    environment = interop_env(ROOT, HF_HUB_OFFLINE='1', VHEAT_WEIGHTS=str(release))
    code = USE.format(root=ROOT, folder=tmp_path / 'saved')
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
