"""Modules are called: hooks, wrapped or replaced layers and changed weights take effect, with every backend."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from vheat_mm import ops
from vheat_mm.apis import explain_backends
from vheat_mm.models.vheat import Mlp
from vheat_mm.ops.eager import onednn

# One of each kind, in the first and the last stage.
PLACES = [
    *('patch_embed', 'patch_embed.conv1', 'patch_embed.norm1.1', 'patch_embed.conv2', 'patch_embed.norm2'),
    *('layers.0.0', 'layers.0.0.norm1', 'layers.0.0.op', 'layers.0.0.op.dwconv', 'layers.0.0.op.linear'),
    *('layers.0.0.op.to_k', 'layers.0.0.op.to_k.0', 'layers.0.0.op.to_k.1', 'layers.0.0.op.out_norm'),
    *('layers.0.0.op.out_linear', 'layers.0.0.norm2', 'layers.0.0.mlp', 'layers.0.0.mlp.fc1', 'layers.0.0.mlp.fc2'),
    *('layers.0.0.drop_path', 'layers.0.1', 'layers.0.1.0', 'layers.0.1.1', 'layers.3.0.op.linear', 'outnorm0'),
]
WEIGHTED = [name for name in PLACES if name.split('.')[-1] not in ('patch_embed', 'op', 'to_k', 'mlp', 'drop_path')]
WEIGHTED = [n for n in WEIGHTED if n not in ('layers.0.0', 'layers.0.1', 'patch_embed.norm2', 'layers.0.0.op.to_k.1')]


@pytest.fixture(params=['pre_norm', 'post_norm'])
def model(make_vheat, request):
    model = make_vheat(post_norm=request.param == 'post_norm')
    torch.manual_seed(0)
    for parameter in model.parameters():  # with initial weights the operator has little effect
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


class Adapter(nn.Module):
    """A layer with a low-rank addition, like LoRA; here any smooth change of its output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *args):
        out = self.layer(*args)
        return out + self.scale * out.tanh()


class Half(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def replace(model, name, make):
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))


def bend(x):
    """A change that no norm undoes."""
    return x + x.tanh()


def bend_output(module, args, output):
    return tuple(map(bend, output)) if isinstance(output, tuple) else bend(output)


def bend_input(module, args):
    return (bend(args[0]), *args[1:])


def wrap_forward(module):
    forward = module.forward  # as accelerate's hooks do
    module.forward = lambda *args: bend(forward(*args))


def subclass(module):
    kind = type(module)
    module.__class__ = type('Sub', (kind,), {'forward': lambda self, *args: bend(kind.forward(self, *args))})


CHANGES = {
    'forward hook': (PLACES, lambda m, n: m.get_submodule(n).register_forward_hook(bend_output)),
    'forward pre-hook': (PLACES, lambda m, n: m.get_submodule(n).register_forward_pre_hook(bend_input)),
    'adapter': ([n for n in PLACES if n not in ('layers.0.0', 'layers.0.0.op')], lambda m, n: replace(m, n, Adapter)),
    'forward of its own': (PLACES, lambda m, n: wrap_forward(m.get_submodule(n))),
    'subclass': (PLACES, lambda m, n: subclass(m.get_submodule(n))),
    'parametrization': (
        WEIGHTED,
        lambda m, n: parametrize.register_parametrization(m.get_submodule(n), 'weight', Half()),
    ),
    'pruning': (WEIGHTED, lambda m, n: prune.l1_unstructured(m.get_submodule(n), 'weight', 0.5)),
}
UNDONE = {('parametrization', name) for name in ('patch_embed.conv1', 'patch_embed.conv2', 'layers.0.1.0')}  # by norms


def run(model, image, train, backend):
    """Outputs, and in training the gradients of all parameters."""
    model.train(train)
    with ops.use_backend(backend), torch.set_grad_enabled(train):
        outputs = model(image)
        if not train:
            return list(outputs)
        loss = sum((out * torch.linspace(-1, 1, out.shape[-1])).sum() for out in outputs)
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        return [*outputs, *(g for g in gradients if g is not None)]


def difference(found, expected):
    """Relative, over all tensors together."""
    found, expected = (torch.cat([t.flatten() for t in tensors]) for tensors in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize('train', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('change', CHANGES)
def test_change_takes_effect_as_in_the_reference(model, image, change, train):
    places, apply = CHANGES[change]
    model(image)  # nothing that this call keeps may be used after the change
    before = run(model, image, train, 'fast')
    for name in places:
        changed = copy.deepcopy(model)
        apply(changed, name)
        found, expected = run(changed, image, train, 'fast'), run(changed, image, train, 'reference')
        count = len(model.out_indices)
        rounding = difference(found[:count], expected[:count])
        assert rounding < 5e-6, name
        assert difference(found, expected) < 1e-2, name  # gradients of maps whose norms magnify rounding
        if (change, name) not in UNDONE:
            assert difference(found[:count], before[:count]) > max(
                5e-6, 5 * difference(found[:count], expected[:count])
            ), name


@pytest.mark.parametrize('train', [False, True], ids=['inference', 'training'])
def test_every_module_fires_its_hooks(make_vheat, image, train):
    model, fired = make_vheat().train(train), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.add(name))
    with torch.set_grad_enabled(train):
        model(image)
    assert {name for name, _ in model.named_modules()} - fired == {'layers'}  # a list, which nobody calls


def test_global_hooks_and_full_backward_hooks_see_every_module(make_vheat, image):
    model, forward, backward = make_vheat().train(), set(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: forward.add(module))
    try:
        model(image)
    finally:
        handle.remove()
    for module in model.modules():
        module.register_full_backward_hook(lambda module, *_: backward.add(module))
    sum(out.sum() for out in model(image)).backward()
    called = set(model.modules()) - {model.layers}
    assert called <= forward
    assert {m for m in called if list(m.parameters())} - {model.freq_embed} <= backward  # it takes no tensor


def test_class_with_another_forward_method(make_vheat, image, monkeypatch):
    model = make_vheat().eval()
    with torch.no_grad():
        before = model(image)
        monkeypatch.setattr(Mlp, 'forward', lambda self, x: torch.zeros_like(x))
        assert difference(model(image), before) > 1e-4


def test_dynamic_quantisation(make_vheat, image):
    model = make_vheat(arch=dict(embed_dims=16, depths=(1, 1, 1, 1))).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        found, expected = quantised(image), model(image)
    assert 0 < difference(found, expected) < 0.1


@pytest.mark.parametrize(
    'conv',
    [
        nn.Conv2d(3, 2, 5, 2, 2),
        nn.Conv2d(3, 2, 3, 2, 2, dilation=2),
        nn.Conv2d(3, 2, 3, 2, 1, padding_mode='reflect'),
        nn.Conv2d(3, 2, 3, 2, 1, bias=False),
    ],
    ids=['k5', 'dilated', 'reflect', 'no_bias'],
)
def test_exchanged_stem_convolution(make_vheat, image, conv):
    model = make_vheat().eval()
    model.patch_embed.conv1 = conv
    with torch.no_grad():
        found = model(image)
    for a, b in zip(found, model(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_forward_mode_derivative(model, image):
    model.eval()
    tangent = torch.randn_like(image)
    with torch.no_grad(), forward_ad.dual_level():
        outputs = model(forward_ad.make_dual(image, tangent))
        found = [forward_ad.unpack_dual(out).tangent for out in outputs]
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        up, down = (exact(image.double() + sign * 1e-5 * tangent.double()) for sign in (1, -1))
    assert difference(found, [((a - b) / 2e-5).float() for a, b in zip(up, down, strict=True)]) < 1e-3


def test_gradients_of_each_sample(model, image):
    model.eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x):
        return functional_call(model, weights, (x[None],))[3].square().sum()

    each = vmap(grad(loss), (None, 0))(weights, image)
    for i, x in enumerate(image):
        single = grad(loss)(weights, x)
        assert difference([each[k][i] for k in single], list(single.values())) < 1e-3


def test_batched_gradients_are_refused_by_name(make_vheat, image):
    out = make_vheat()(image.requires_grad_())[3]
    with pytest.raises(RuntimeError, match='VHEAT_KERNELS=reference'):
        torch.autograd.grad(out, image, torch.randn(3, *out.shape), is_grads_batched=True)


def test_default_device_of_meta_leaves_no_trace(make_vheat, image):
    model = make_vheat().eval()
    with torch.no_grad():
        with torch.device('meta'):
            found = model(image)
        for a, b, c in zip(found, model(image), copy.deepcopy(model)(image), strict=True):
            assert a.device.type == 'cpu'
            torch.testing.assert_close(a, c)
            torch.testing.assert_close(b, c)


@pytest.mark.parametrize('train', [False, True])
def test_meta_and_fake_tensors(make_vheat, train):
    expected = [(2, 4, 16, 16), (2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)]
    with torch.device('meta'):
        model = make_vheat().train(train)
    with torch.set_grad_enabled(train):
        outputs = model(torch.empty(2, 3, 64, 64, device='meta'))
    assert [tuple(out.shape) for out in outputs] == expected
    if train:
        sum(out.sum() for out in outputs).backward()
    with torch._subclasses.fake_tensor.FakeTensorMode():
        outputs = make_vheat().train(train)(torch.randn(2, 3, 64, 64))
    assert [tuple(out.shape) for out in outputs] == expected


@torch.no_grad()
def test_weights_that_come_for_each_call(make_vheat, image):
    """As accelerate offloads: weights are on the meta device but while their module runs."""
    model = make_vheat().eval()
    expected = model(image)
    for module in [m for m in model.modules() if list(m.parameters(recurse=False))]:
        kept = {name: p.data for name, p in module.named_parameters(recurse=False)}

        def load(module, *_, kept=kept):
            module._parameters.update({name: nn.Parameter(value) for name, value in kept.items()})

        def drop(module, *_, kept=kept):
            module._parameters.update({name: nn.Parameter(value.to('meta')) for name, value in kept.items()})

        drop(module)
        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)
    for a, b in zip(model(image), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_trace_passes_its_own_check(make_vheat, image):
    traced = torch.jit.trace(make_vheat().eval(), image)  # check_trace runs it a second time
    assert [tuple(out.shape) for out in traced(image)] == [tuple(out.shape) for out in make_vheat()(image)]


@torch.no_grad()
def test_counts_of_modules_add_up(make_vheat, image):
    """Counters that hook modules find all of the work: nothing but the operator's own products is outside of them."""
    model, by_module = make_vheat(img_size=(32, 48)).eval(), FlopCounterMode(display=False)
    with by_module:
        model(image)
    counts = by_module.get_flop_counts()
    leaves = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    counted = {name.partition('.')[2] for name in counts}
    assert leaves <= counted
    hooked = sum(sum(c.values()) for name, c in counts.items() if name.partition('.')[2] in leaves)
    products = sum(c.get(torch.ops.aten.bmm, 0) for name, c in counts.items() if name == 'Global')
    assert hooked + products == by_module.get_total_flops()


def test_modules_say_what_computes_them(make_vheat, image):
    model = make_vheat().eval()
    model.layers[0][0].mlp.fc1.register_forward_hook(bend_output)
    text = explain_backends(model, image)
    assert 'layers.0.0.mlp (Mlp) calls its submodules: fc1 has hooks' in text
    assert 'layers.0.0.op (HeatConduction2d) is computed by kernels' in text
    assert 'layers.1.0 (Block) is computed by kernels' in text
    with ops.use_backend('reference'):
        assert 'layers.1.0 (Block) calls its submodules: the backend is reference' in explain_backends(model, image)


@torch.no_grad()
def test_global_hooks_reach_compiled_models(make_vheat, image):
    model = make_vheat().eval()
    handle = nn.modules.module.register_module_forward_hook(lambda m, _, out: 2 * out if type(m) is nn.Linear else out)
    try:
        for a, b in zip(torch.compile(model, backend='aot_eager')(image), model(image), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    finally:
        handle.remove()


@torch.no_grad()
def test_hook_that_writes_to_a_decay_leaves_no_trace(model, image):
    model.eval()
    before = [out.clone() for out in model(image)]

    def low_pass(module, args):
        args[1][2:] = 0

    handle = model.layers[0][0].register_forward_pre_hook(low_pass)
    assert difference(model(image), before) > 1e-6
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(model(image), before, strict=True))


@torch.no_grad()
def test_patched_convolutions_and_appended_layers(model, image):
    model.eval()
    patched = copy.deepcopy(model)
    conv = patched.layers[0][0].op.dwconv
    conv._conv_forward = lambda x, weight, bias: torch.zeros_like(x)  # as the trick for seamless textures does
    assert difference(patched(image), model(image)) > 1e-5
    appended = copy.deepcopy(model)
    appended.layers[0][1].append(nn.Tanh())
    assert difference(appended(image)[1:], model(image)[1:]) > 1e-3


def test_explanation_knows_geometry(make_vheat, image):
    model = make_vheat().eval()
    model.patch_embed.conv1 = nn.Conv2d(3, 2, 5, 2, 2)
    model.layers[0][0].mlp.fc1 = nn.Conv2d(4, 16, 3, padding=1)
    text = explain_backends(model, image)
    for name in ('patch_embed (Stem)', 'layers.0.0 (Block)', 'layers.0.0.mlp (Mlp)'):
        assert f'{name} calls its submodules: the geometry of a submodule has changed' in text
        assert f'{name} is computed by kernels' not in text


@torch.no_grad()
def test_residual_stream_keeps_its_type_at_every_size(make_vheat, monkeypatch):
    """Under autocast with layer scale the stream is float32, in one group of rows or in several."""
    model, image = make_vheat(post_norm=True).eval(), torch.randn(1, 3, 64, 64)
    found = []
    for size in (1 << 20, 64 * 4 * 4):
        monkeypatch.setattr(onednn, 'GROUP_BYTES', size)
        with torch.autocast('cpu', torch.bfloat16):
            found.append(model(image))
    for a, b in zip(*found, strict=True):
        assert a.dtype is b.dtype
        assert difference([a.float()], [b.float()]) < 0.02


@torch.no_grad()
def test_autocast_leaves_float64_alone(model, image):
    model, image = model.double().eval(), image.double()
    expected = model(image)
    with torch.autocast('cpu', torch.bfloat16):
        assert difference(model(image), expected) < 1e-12


@pytest.mark.parametrize('size', [(600, 4), (4, 600), (700, 20)], ids=str)
@pytest.mark.parametrize('train', [False, True])
def test_maps_of_one_column(make_vheat, size, train):
    model, image = make_vheat(), torch.randn(1, 3, *size)
    assert difference(run(model, image, train, 'fast'), run(model, image, train, 'reference')) < 1e-2
    x, decay = torch.randn(1, 400, 1, 8), torch.rand(400, 1, 8)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = ops.heat_conduction(x.to(dtype).requires_grad_(train), decay)
        with ops.use_backend('reference'):
            assert difference([found], [ops.heat_conduction(x, decay)]) < limit


@torch.no_grad()
def test_one_graph_serves_all_models_and_empty_batches(make_vheat, image):
    graphs = []
    torch.compiler.reset()

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for _ in range(3):
        model = make_vheat().eval()
        for a, b in zip(torch.compile(model, backend=backend)(image), model(image), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert len(graphs) == 1
    outputs = torch.compile(make_vheat().eval(), backend='aot_eager')(image[:0])
    assert [len(out) for out in outputs] == [0] * 4


@torch.no_grad()
def test_parameters_at_odd_offsets(make_vheat, image):
    model = nn.ModuleDict(dict(head=nn.Linear(2, 5), backbone=make_vheat())).eval()
    parameters = list(model.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters), parameters)
    for a, b in zip(model['backbone'](image), model['backbone'](image), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('grad', [False, True])
def test_ops_take_what_the_reference_takes(grad):
    x, weight, bias = torch.randn(1, 4, 5, 8, requires_grad=grad), torch.randn(16, 8, 1, 1), torch.randn(8)
    wide, decay = torch.randn(8, 16), torch.rand(4, 5, 8)
    calls = [
        lambda: ops.split_linear(x, weight, None)[1],
        lambda: ops.split_linear(x, weight, torch.zeros(16))[0],
        lambda: ops.mlp(x, weight, None, wide, None),
        lambda: ops.norm_gate(x, torch.ones(1, 1, 1, 8), bias, bias, 1e-5),
        lambda: ops.heat_norm_gate_(x + 0, torch.ones(1, 1, 1, 8), decay, bias, bias, 1e-5),
        lambda: ops.heat_conduction(x=x, decay=decay),
    ]
    for call in calls:
        with torch.set_grad_enabled(grad):
            found = call()
            with ops.use_backend('reference'):
                torch.testing.assert_close(found, call(), rtol=1e-4, atol=1e-5)
