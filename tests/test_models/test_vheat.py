"""The network: the release's numbers, the published counts, and every way it is used."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.registry import MODELS
from torch import nn

from vheat_mm import VHeat
from vheat_mm.models.vheat import DropPath

DATA = Path(__file__).parents[1] / 'data'
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-4)]


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def total(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return sum(out.square().mean() for out in outputs)


@pytest.mark.parametrize(('dtype', 'tolerance'), PRECISIONS)
@pytest.mark.parametrize('kind', ['prenorm', 'postnorm'])
def test_golden_backbone(golden, make_vheat, kind, dtype, tolerance, monkeypatch):
    # The gradients are near 1e-9 and ill-conditioned: the order in which oneDNN's convolution adds up the stem alone
    # moves one of them by 1.5e-4 in float32. PyTorch's own convolution is compared instead.
    monkeypatch.setattr(torch.backends.mkldnn, 'enabled', dtype == torch.float64)
    numbers = golden(f'backbone_{kind}.npz')
    model = make_vheat(post_norm=kind == 'postnorm').to(dtype)
    model.load_state_dict({key[2:]: value for key, value in numbers.items() if key.startswith('w.')})
    for case in ('native', 'large', 'wide'):
        model.zero_grad()
        image = numbers[f'{case}.x'].to(dtype).requires_grad_()
        outputs = model(image)
        for i, out in enumerate(outputs):
            assert relative_error(out, numbers[f'{case}.out{i}']) < tolerance
        if case == 'large':
            continue
        total(outputs).backward()
        gradients = {
            'x': image.grad,
            'to_k': model.get_parameter('layers.2.0.op.to_k.0.weight').grad,
            'dwconv': model.get_parameter('layers.0.0.op.dwconv.weight').grad,
            **{f'freq_embed{i}': embed.grad for i, embed in enumerate(model.freq_embed)},
        }
        for name, gradient in gradients.items():
            assert relative_error(gradient, numbers[f'{case}.grad_{name}']) < tolerance, name


@pytest.mark.parametrize(('dtype', 'tolerance'), PRECISIONS)
@pytest.mark.parametrize('kind', ['prenorm', 'postnorm'])
def test_golden_classifier(golden, make_vheat, kind, dtype, tolerance):
    numbers = golden(f'classifier_{kind}.npz')
    weights = {key[2:]: value.to(dtype) for key, value in numbers.items() if key.startswith('w.')}
    head = nn.Linear(32, 5, dtype=dtype)
    head.load_state_dict({name: weights.pop(f'classifier.3.{name}') for name in ('weight', 'bias')})
    model = make_vheat(post_norm=kind == 'postnorm', out_indices=-1).to(dtype).eval()
    model.load_state_dict({key.replace('classifier.0', 'outnorm3'): value for key, value in weights.items()})
    logits = head(model(numbers['x'].to(dtype))[0].mean((2, 3)))
    assert relative_error(logits, numbers['logits']) < tolerance


# published: parameters in M, FLOPs (multiply-adds) in G at 224, then both re-parameterised; with the linear head
PUBLISHED = {
    'tiny': (30.85, 4.94, 29.56, 4.59),
    'small': (52.22, 9.17, 50.05, 8.48),
    'base': (92.13, 16.16, 87.50, 14.92),
}


@pytest.mark.parametrize('arch', PUBLISHED)
def test_published_counts_and_keys(arch):
    """Keys and shapes as released; parameters and FLOPs to the published digits."""
    released = json.loads((DATA / f'state_dict_{arch}.json').read_text())
    with torch.device('meta'):
        dense, last = VHeat(arch, img_size=512).state_dict(), VHeat(arch, out_indices=(3,)).state_dict()
    assert {key: list(value.shape) for key, value in dense.items()} == released['backbone_512']
    shapes = {key.replace('outnorm3', 'classifier.0'): list(value.shape) for key, value in last.items()}
    head = {'classifier.3.weight': [1000, shapes['classifier.0.weight'][0]], 'classifier.3.bias': [1000]}
    assert shapes | head == released['classifier_224']

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = VHeat(arch, out_indices=(3,))
            self.head = nn.Linear(self.backbone.num_features[-1], 1000)

        def forward(self, x):
            return self.head(self.backbone(x)[0].mean((2, 3)))

    classifier, counts = Classifier().eval(), []
    for _ in range(2):
        flops = FlopAnalyzer(classifier, torch.zeros(1, 3, 224, 224))
        flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts += [sum(p.numel() for p in classifier.parameters()) / 1e6, flops.total() / 1e9]
        if len(counts) == 2:
            classifier.backbone.switch_to_deploy()
    assert [round(count, 2) for count in counts] == list(PUBLISHED[arch])


@pytest.mark.parametrize('size', [(64, 64), (1, 70), (33, 1), (1, 1), (100, 260), (32, 32)])
def test_any_image_size(make_vheat, size):
    model = make_vheat().eval()
    image = torch.randn(3, 3, *size)
    outputs = model(image)
    height, width = size
    for i, out in enumerate(outputs):
        stride = 4 << i
        assert out.shape == (3, 4 << i, -(-height // stride), -(-width // stride))
        assert torch.isfinite(out).all()
    alone = model(image[:1])  # no image sees another
    for one, all_three in zip(alone, outputs, strict=True):
        torch.testing.assert_close(one, all_three[:1], rtol=1e-4, atol=1e-5)


def test_channels_last_inside_and_plain_memory_outside(make_vheat):
    model = make_vheat(post_norm=True)
    for module in model.modules():
        if type(module).__name__ in ('Block', 'Mlp', 'Stem', 'Downsample'):
            module.register_forward_hook(lambda m, args, out: copies.append(not out.is_contiguous()))
    copies: list[bool] = []
    outputs = model(torch.randn(2, 3, 64, 96))
    assert len(copies) == 5 * 2 + 1 + 3
    assert not any(copies)
    assert all(out.is_contiguous() for out in outputs)


def test_roi_align_reads_the_outputs_right(make_vheat):
    """mmcv 2.1.0 reads a channels-last map as if it were not, silently: the reason for plain outputs."""
    roi_align = pytest.importorskip('mmcv.ops').roi_align
    out = make_vheat()(torch.randn(1, 3, 64, 64))[0].detach()
    rois = torch.tensor([[0.0, 0.0, 0.0, 15.0, 15.0]])
    plain = torch.empty(out.shape).copy_(out)
    assert torch.equal(roi_align(out, rois, (4, 4)), roi_align(plain, rois, (4, 4)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(make_vheat, dtype):
    model, image = make_vheat(post_norm=True).eval(), torch.randn(2, 3, 64, 96)
    exact = model(image)
    cast = copy.deepcopy(model).to(dtype)(image.to(dtype))
    with torch.autocast('cpu', dtype):
        mixed = model(image)
    for a, b, c in zip(exact, cast, mixed, strict=True):  # norms over 4 channels amplify rounding
        assert relative_error(b, a.double()) < 0.1
        assert relative_error(c, a.double()) < 0.1


@pytest.mark.parametrize('post_norm', [False, True])
def test_checkpointing_changes_nothing(make_vheat, post_norm):
    plain = make_vheat(post_norm=post_norm, drop_path_rate=0.5)
    saving = make_vheat(post_norm=post_norm, drop_path_rate=0.5, with_cp=True)
    image = torch.randn(4, 3, 64, 96)
    for model in (plain, saving):
        torch.manual_seed(3)
        total(model(image)).backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize('train', [True, False])
def test_compiles_as_one_graph(make_vheat, train):
    torch.compiler.reset()
    model, image = make_vheat(with_cp=train).train(train), torch.randn(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    with torch.set_grad_enabled(train):
        for a, b in zip(compiled(image), model(image), strict=True):
            assert relative_error(a, b.double()) < 1e-4


@torch.no_grad()
def test_one_compiled_graph_serves_every_image_size(make_vheat):
    torch.compiler.reset()
    model = make_vheat(out_indices=0).eval()  # a stem and a stage: what inductor compiles in seconds
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((64, 96), (33, 70)):
        image = torch.randn(2, 3, *size)
        (found,), (expected,) = compiled(image), model(image)
        assert relative_error(found, expected.double()) < 1e-4


@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), -1, (-4, -2), (0, 1, 2, 3)])
def test_every_parameter_is_used_by_the_outputs(make_vheat, out_indices):
    model = make_vheat(out_indices=out_indices)
    outputs = model(torch.randn(1, 3, 64, 64))
    assert [out.shape[1] for out in outputs] == [4 << i for i in model.out_indices]
    total(outputs).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    full = make_vheat()
    full.load_state_dict(model.state_dict(), strict=False)
    for i, out in zip(model.out_indices, outputs, strict=True):
        torch.testing.assert_close(full(torch.zeros(1, 3, 64, 64))[i].shape, out.shape)


DISTRIBUTED = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from vheat_mm import VHeat

dist.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1)
model = VHeat(dict(embed_dims=4, depths=(1, 1, 2, 1)), 64, with_cp=sys.argv[2] == 'True', out_indices=(0, 2))
model = DistributedDataParallel(model)
for _ in range(2):
    sum(out.square().mean() for out in model(torch.randn(2, 3, 64, 64))).backward()
os._exit(0)  # after gloo the interpreter's shut-down may abort (seen with PyTorch 2.13)
"""


@pytest.mark.parametrize('with_cp', [False, True])
def test_distributed_data_parallel(with_cp, tmp_path):
    """Without ``find_unused_parameters``, a second step fails if any parameter went without gradient."""
    command = [sys.executable, '-W', 'ignore', '-c', DISTRIBUTED, str(tmp_path / 'store'), str(with_cp)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 3, 4])
def test_frozen_stages(make_vheat, frozen_stages):
    model = make_vheat(frozen_stages=frozen_stages, drop_path_rate=0.5)
    assert model.train() is model
    frozen = [] if frozen_stages < 0 else ['patch_embed.']
    for i in range(frozen_stages):
        frozen += [f'layers.{i}.', f'freq_embed.{i}', f'outnorm{i}.']
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(tuple(frozen))), name
    for name, module in model.named_modules():
        if name and name not in ('layers', 'freq_embed'):
            assert module.training == (not f'{name}.'.startswith(tuple(frozen))), name
    if frozen_stages < 4:
        total(model(torch.randn(1, 3, 64, 64))).backward()


def test_stochastic_depth(make_vheat):
    model = make_vheat(drop_path_rate=0.4)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    torch.manual_seed(0)
    kept = DropPath(0.4).train()(torch.ones(20000, 2, 2, 3))
    values = kept[:, 0, 0, 0]
    assert torch.equal(kept, values[:, None, None, None].expand_as(kept))  # a sample as a whole
    assert values.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert values.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(DropPath(0.4).eval()(kept), kept)


@pytest.mark.parametrize('size', [None, 96, (64, 160)])
def test_switch_to_deploy(make_vheat, size):
    model = make_vheat(post_norm=True).eval()
    height, width = (64, 64) if size is None else (size, size) if isinstance(size, int) else size
    image = torch.randn(1, 3, height, width)
    before = model(image)
    model.switch_to_deploy(size)
    for a, b in zip(before, model(image), strict=True):
        torch.testing.assert_close(a, b)
    keys = model.state_dict()
    assert keys['layers.2.1.op.k_exp'].shape == (height // 16, width // 16, 16)
    assert not [key for key in keys if 'freq_embed' in key or 'to_k' in key]
    other = make_vheat(post_norm=True, img_size=(height, width))
    other.switch_to_deploy()
    other.load_state_dict({key: value * 0.9 for key, value in keys.items()})
    assert torch.equal(other.layers[0][0].op.k_exp, keys['layers.0.0.op.k_exp'] * 0.9)
    with pytest.raises(ValueError, match=f'deployed for a stage map of {height // 4}x{width // 4}.*8x8'):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(RuntimeError, match='deployed already'):
        model.switch_to_deploy()


def test_layer_depth(make_vheat):
    model = make_vheat()  # depths 1, 1, 2, 1
    expected = {
        'patch_embed.conv1.weight': 0,
        'freq_embed.0': 1,
        'layers.0.0.norm1.weight': 1,
        'layers.0.1.0.weight': 1,
        'layers.1.0.op.linear.weight': 2,
        'freq_embed.2': 3,
        'layers.2.1.mlp.fc1.bias': 4,
        'layers.2.2.1.weight': 4,
        'layers.3.0.norm2.bias': 5,
        'outnorm3.weight': 6,
    }
    assert set(expected) <= {name for name, _ in model.named_parameters()}
    for name, depth in expected.items():
        assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (depth, 7), name
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (6, 7)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (dict(arch='huge'), "'huge'.*base.*small.*tiny"),
        (dict(arch=dict(embed_dims=8)), 'lacks.*depths'),
        (dict(arch=dict(embed_dims=8, depths=(1, 1, 1, 1), heads=3)), 'heads'),
        (dict(arch=dict(embed_dims=8, depths=(1, 1, 1))), r'\(1, 1, 1\)'),
        (dict(arch=None), 'arch.*None'),
        (dict(arch=dict(embed_dims=8, depths=2)), 'depths.*2'),
        (dict(arch=dict(embed_dims=7, depths=(1, 1, 1, 1))), 'embed_dims.*7'),
        (dict(img_size=31), 'img_size.*32.*31'),
        (dict(img_size=224.0), 'img_size.*224.0'),
        (dict(img_size=(64, 64, 64)), 'img_size.*64, 64, 64'),
        (dict(out_indices=(0, 4)), r'out_indices.*\(0, 4\)'),
        (dict(out_indices=()), 'out_indices'),
        (dict(out_indices=None), 'out_indices.*None'),
        (dict(out_indices=(True,)), 'out_indices.*True'),
        (dict(out_indices=(3, -1)), 'twice'),
        (dict(drop_path_rate=1.0), 'drop_path_rate.*1.0'),
        (dict(frozen_stages=5), 'frozen_stages.*5'),
        (dict(drop_path_rate='0.1'), "drop_path_rate.*'0.1'"),
        (dict(frozen_stages=True), 'frozen_stages.*True'),
        (dict(mlp_ratio=0), 'mlp_ratio'),
        (dict(mlp_ratio='4'), "mlp_ratio.*'4'"),
        (dict(in_channels=0), 'in_channels.*0'),
        (dict(in_channels=5.0), 'in_channels.*5.0'),
        (dict(in_channels=True), 'in_channels.*True'),
        (dict(arch=dict(embed_dims=8, depths=(1, 1, 1, 1), layer_scale='x')), "layer_scale.*'x'"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        VHeat(**arguments)


def test_unknown_argument_is_refused_by_name():
    with pytest.raises(TypeError, match='window_size'):
        MODELS.build(dict(type='VHeat', window_size=7))


def test_initialisation():
    model = VHeat('tiny', img_size=64)
    assert model.freq_embed[3].std().item() == pytest.approx(0.02, rel=0.1)
    linear = model.layers[2][0].op.linear
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not linear.bias.any()
    bound = 384**-0.5  # PyTorch's default for a convolution of 384 inputs
    assert model.layers[2][0].mlp.fc1.weight.abs().max().item() == pytest.approx(bound, rel=0.02)


def test_pickles(make_vheat):
    model, image = make_vheat().eval(), torch.randn(1, 3, 64, 64)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(image)[3], model(image)[3])
