"""Kernels for the CPU against the reference in float64: outputs, gradients, memory, and when they are not used."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vheat_mm import ops
from vheat_mm.ops import chunks, registry
from vheat_mm.ops.eager import even_odd, heat, onednn
from vheat_mm.ops.eager import mlp as eager_mlp
from vheat_mm.ops.library import register_flop_formulas

SIZES = [(2, 8, 8), (1, 5, 12), (2, 1, 9), (1, 7, 1), (3, 1, 1), (2, 41, 57), (1, 100, 103)]
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, in the Frobenius norm
C = 12


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of 64 positions, so that tiny maps take several; the even/odd split where both sides add up to 16."""
    monkeypatch.setattr(onednn, 'GROUP_BYTES', 64 * C * 2)
    monkeypatch.setattr(onednn, 'COPIES_BYTES', 3 * 9 * 9 * 2)
    monkeypatch.setattr(heat, 'SPLIT_FROM', dict.fromkeys(onednn.DTYPES, 16))
    assert ops.get_backend() == 'fast'


def inputs(name, size, dtype):
    b, h, w = size
    new = lambda *shape, scale=1.0: (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)  # noqa: E731
    x, weight, bias = new(b, h, w, C), new(2 * C, C, scale=0.3), new(2 * C)
    return {
        'heat_conduction': (x, torch.rand(h, w, C, dtype=torch.float64).float()),
        'decay_map': (torch.randn(h, w, C), weight[:C].float(), bias[:C].float()),
        'norm_gate': (x, new(b, h, w, 2 * C)[..., C:], 1 + new(C), new(C), 1e-5),
        'heat_norm_gate_': (x, new(b, h, w, C), torch.rand(h, w, C), 1 + new(C), new(C), 1e-5),
        'linear': (x, weight, bias),
        'split_linear': (x, weight, bias),
        'mlp': (x, weight[:, :, None, None], bias, weight.mT.contiguous(), bias[:C]),
    }[name]


# The tests of numbers run a second time as on a CPU without AVX-512, in a process of its own.
AVX2 = dict(ONEDNN_MAX_CPU_ISA='AVX2', ATEN_CPU_CAPABILITY='avx2')
IS_AVX2 = os.environ.get('ONEDNN_MAX_CPU_ISA') == 'AVX2'

CUSTOM_OPS = ['heat_conduction', 'linear', 'split_linear', 'mlp']
NAMES = ['heat_conduction', 'decay_map', 'norm_gate', 'heat_norm_gate_', 'linear', 'split_linear', 'mlp']


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def run(op, args, gradients):
    """Outputs, and with ``gradients`` those of all tensors, for a fixed random cotangent."""
    args = [a.detach().clone().requires_grad_(gradients) if isinstance(a, torch.Tensor) else a for a in args]
    if not gradients:  # weights of inference are parameters
        args = [
            nn.Parameter(a, requires_grad=False) if i and isinstance(a, torch.Tensor) else a for i, a in enumerate(args)
        ]
    outputs = op(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not gradients:
        return list(outputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, [a for a in args if isinstance(a, torch.Tensor)])]


@pytest.mark.parametrize('gradients', [False, True], ids=['inference', 'training'])
@pytest.mark.parametrize('dtype', list(ERRORS), ids=str)
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('name', NAMES)
def test_kernels_agree_with_the_reference(name, size, dtype, gradients):
    op = getattr(ops, name)
    torch.manual_seed(0)
    args = inputs(name, size, dtype)
    with ops.use_backend('reference'):
        exact = run(op, [a.double() if isinstance(a, torch.Tensor) else a for a in args], gradients)
        own = run(op, args, gradients)
    found = run(op, args, gradients)
    assert len(found) == len(exact)
    for a, b, of_type in zip(found, exact, own, strict=True):
        assert a.shape == b.shape
        # sums of bfloat16 weights' gradients cancel: there, better than the reference in the same type
        limit = max(ERRORS[dtype], 0.75 * error(of_type, b)) if dtype is torch.bfloat16 else ERRORS[dtype]
        assert error(a, b) < (limit if name != 'decay_map' else 1e-5)


@pytest.mark.parametrize('name', ['mlp', 'norm_gate', 'split_linear', 'heat_conduction'])
def test_training_on_maps_of_another_layout(name):
    """A permuted map is dense, and what is made alike is permuted as well."""
    op, (x, *rest) = getattr(ops, name), inputs(name, (2, 9, 11), torch.float32)
    permuted = lambda *args: op(args[0].permute(0, 2, 3, 1), *args[1:])  # noqa: E731
    args = [x.permute(0, 3, 1, 2).contiguous(), *rest]
    with ops.use_backend('reference'):
        exact = run(permuted, [a.double() if isinstance(a, torch.Tensor) else a for a in args], gradients=True)
    for a, b in zip(run(permuted, args, gradients=True), exact, strict=True):
        assert error(a, b) < ERRORS[torch.float32]


@pytest.mark.parametrize('name', ['mlp', 'norm_gate', 'split_linear'])
def test_training_in_float64_keeps_its_digits(name):
    op, args = getattr(ops, name), inputs(name, (2, 9, 11), torch.float64)
    with ops.use_backend('reference'):
        exact = run(op, args, gradients=True)
    found = run(op, args, gradients=True)
    assert all(a.dtype == torch.float64 and error(a, b) < 1e-13 for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize('dtype', list(ERRORS), ids=str)
def test_mlp_that_keeps_its_wide_map(dtype, monkeypatch):
    """As those of the wide stages do: one product less in backward, and the same gradients."""
    args, products = inputs('mlp', (2, 41, 57), dtype), []
    with ops.use_backend('reference'):
        exact = run(ops.mlp, [a.double() for a in args], gradients=True)
    dense = onednn.dense
    monkeypatch.setattr(onednn, 'dense', lambda *operands: products.append(1) or dense(*operands))
    counts = []
    for width in (C + 1, C):
        monkeypatch.setattr(eager_mlp, 'KEEP_FROM_WIDTH', width)
        found = run(ops.mlp, args, gradients=True)
        assert all(error(a, b) < ERRORS[dtype] for a, b in zip(found, exact, strict=True))
        out = ops.mlp(args[0].clone().requires_grad_(), *args[1:])
        products.clear()
        out.sum().backward()
        counts.append(len(products))
    assert counts[1] < counts[0]


@pytest.mark.parametrize(('name', 'gradients'), [(n, g) for n in NAMES for g in (False, True)])
def test_kernels_are_in_use(name, gradients):
    """What the test above compares is not the reference twice."""
    if (name, gradients) in {('decay_map', False), ('norm_gate', False), ('heat_norm_gate_', True)}:
        pytest.skip('has no kernel of its own here')
    args = inputs(name, (2, 41, 57), torch.float32)
    with registry.record() as chosen:
        run(getattr(ops, name), args, gradients)
    assert (name, 'fast') in chosen
    with ops.use_backend('reference'), registry.record() as chosen:
        run(getattr(ops, name), args, gradients)
    assert {backend for _, backend in chosen} == {'reference'}


@torch.no_grad()
@pytest.mark.parametrize('dtype', list(ERRORS), ids=str)
def test_large_maps_some_channels_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(heat, 'PART_BYTES', 1)  # a cache line of channels, and what is left
    filter_dct, widths = even_odd.filter_dct, []
    monkeypatch.setattr(even_odd, 'filter_dct', lambda x, *rest: widths.append(x.shape[-1]) or filter_dct(x, *rest))
    x, decay = torch.randn(2, 50, 33, 40).to(dtype), torch.rand(50, 33, 40)
    if onednn.supports(x) is not True:
        pytest.skip(f'no kernel here: {onednn.supports(x)}')
    with ops.use_backend('reference'):
        exact = ops.heat_conduction(x.double(), decay.double())
    assert error(ops.heat_conduction(x, decay), exact) < ERRORS[dtype]
    assert max(widths) == 64 // x.element_size()


@torch.no_grad()
def test_even_odd_split_halves_the_products(monkeypatch):
    monkeypatch.setattr(onednn, 'product', lambda x, weight: x @ weight.mT)  # an operator that the counter knows
    x, places = torch.randn(1, 32, 48, C), torch.zeros(32, 48, C)
    with ops.use_backend('reference'), FlopCounterMode(display=False) as whole:
        ops.heat_conduction(x, places)
    with FlopCounterMode(display=False) as half:
        even_odd.filter_dct(x[0], lambda modes, rows, columns: places[rows, columns].add_(1), torch.empty_like(x[0]))
    assert 2 * half.get_total_flops() == whole.get_total_flops()
    assert (places == 1).all()


@torch.no_grad()
@pytest.mark.parametrize('size', [(64, 96), (61, 47), (3, 5), (1, 200), (203, 2)], ids=str)
def test_stem_in_strips(make_vheat, size):
    """Borders of strips are no borders of the image."""
    stem, image = make_vheat().patch_embed, torch.randn(2, *size, 3)
    with ops.use_backend('reference'):
        expected = stem(image)
    with registry.record() as chosen:
        found = stem(image)
    assert ('embed_patches', 'fast') in chosen
    assert error(found, expected.double()) < 1e-5


@pytest.mark.parametrize('size', [(9, 4), (4, 12), (7, 7), (1, 1)], ids=str)
def test_resize_is_bicubic(size):
    results = {}
    for backend in ('reference', 'fast'):
        embed = torch.randn(7, 6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with ops.use_backend(backend), torch.autocast('cpu', torch.bfloat16):
            resized = ops.fit_freq_embed(embed, size)
        (resized * resized.detach().sin()).sum().backward()
        results[backend] = (resized, embed.grad)
    for fast, reference in zip(results['fast'], results['reference'], strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_positions_in_groups():
    sizes = []
    x, y = torch.randn(2, 9, 31, C), torch.randn(2, 9, 31, C)
    expected = x * y + 1
    found = ops.apply_to_rows(lambda a, b: sizes.append(len(a)) or a * b + 1, x, y)
    assert torch.equal(found, expected)
    assert len(sizes) > 1
    assert sum(sizes) == 2 * 9 * 31


@torch.no_grad()
def test_images_in_groups(monkeypatch):
    monkeypatch.setattr(chunks, 'MIN_ROWS', 100)
    sizes = []
    x = torch.randn(7, 6, 8, C)
    found = ops.apply_to_images(lambda images: sizes.append(len(images)) or images.cumsum(1), x)
    assert torch.equal(found, x.cumsum(1))
    assert sizes == [3, 3, 1]  # at least 100 rows of 6 x 8


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_norm_on_a_gpu_sees_one_type(dtype, monkeypatch):
    """CUDA's norm, unlike the CPU's, refuses half precision beside float32 weights, which is what autocast leaves to
    backward; the meta device, which computes nothing, stands in for a GPU."""
    seen = []
    for module, name in ((torch, 'native_layer_norm'), (torch.ops.aten, 'native_layer_norm_backward')):
        norm = getattr(module, name)

        def watched(*args, norm=norm):
            seen.append({a.dtype for a in args if isinstance(a, torch.Tensor)})
            return norm(*args)

        monkeypatch.setattr(module, name, watched)
    maps = [torch.empty(2, 5, 6, C, dtype=dtype, device='meta', requires_grad=True) for _ in range(2)]
    norm = nn.LayerNorm(C, device='meta')
    kernel = ops.norm_gate.kernels[0].function  # meta tensors are for the reference otherwise
    kernel(*maps, norm.weight, norm.bias, norm.eps).sum().backward()
    assert seen == [{torch.float32}] * 2
    assert [t.grad.dtype for t in (*maps, norm.weight, norm.bias)] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize('arch', [{}, dict(post_norm=True)], ids=['pre_norm', 'post_norm'])
def test_whole_network(make_vheat, arch):
    model = make_vheat(**arch)
    for embed in model.freq_embed:
        nn.init.normal_(embed)
    image = torch.randn(2, 3, 181, 230)
    results = {}
    for backend, dtype in (('reference', torch.float64), ('fast', torch.float32)):
        copied = copy.deepcopy(model).to(dtype)
        with ops.use_backend(backend):
            outputs = copied(image.to(dtype))
            sum((o * o.detach().sin()).sum() for o in outputs).backward()
            copied.eval()
            with torch.no_grad():
                results[backend] = [*outputs, *(p.grad for p in copied.parameters()), *copied(image.to(dtype))]
    for found, exact in zip(results['fast'], results['reference'], strict=True):
        assert error(found, exact) < 1e-4


@torch.no_grad()
def test_bfloat16_is_as_exact_as_the_reference(make_vheat):
    torch.manual_seed(0)
    model, image = make_vheat().eval(), torch.randn(4, 3, 416, 448)
    exact = copy.deepcopy(model).double()(image.double())
    errors = {}
    for backend in ('reference', 'fast'):
        with ops.use_backend(backend), torch.autocast('cpu', torch.bfloat16):
            errors[backend] = [error(a, b) for a, b in zip(model(image), exact, strict=True)]
    for fast, reference in zip(errors['fast'], errors['reference'], strict=True):
        assert fast < 1.1 * reference


def saved_bytes(model: nn.Module, image: torch.Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = model(image)
    del outputs
    return sum(seen.values())


def test_mlp_keeps_what_its_products_read():
    """Of a float32 map under autocast, as norms give on a GPU: the half-precision copy alone."""
    x, *weights = inputs('mlp', (2, 9, 11), torch.float32)
    x.requires_grad_()
    kept = []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape, t.dtype)) or t, lambda t: t)
    with watch, torch.autocast('cpu', torch.bfloat16):
        out = ops.mlp(x, *weights)
    assert (x.shape, torch.bfloat16) in kept
    assert (x.shape, torch.float32) not in kept
    out.sum().backward()
    assert x.grad.dtype == torch.float32


def test_training_keeps_a_third_less(make_vheat):
    model, image = make_vheat(), torch.randn(2, 3, 64, 64)
    with ops.use_backend('reference'):
        reference = saved_bytes(model, image)
    assert saved_bytes(model, image) < 0.67 * reference


@pytest.mark.parametrize('name', ['heat_conduction', 'decay_map', 'norm_gate', 'mlp'])
def test_second_derivative_is_refused(name):
    op = getattr(ops, name)
    args = inputs(name, (1, 5, 6), torch.float32)
    args = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(RuntimeError, match='VHEAT_KERNELS=reference'):
        torch.autograd.grad(op(*args).sum(), args[0], create_graph=True)
    with ops.use_backend('reference'):
        torch.autograd.grad(op(*args).sum(), args[0], create_graph=True)


def test_counters_and_tracers_see_the_reference(make_vheat):
    model, image = make_vheat().eval(), torch.randn(1, 3, 64, 64)
    counts = []
    for backend in ('reference', 'fast'):
        model.decay_cache.clear()  # decay maps are counted, too
        with ops.use_backend(backend), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with torch.no_grad():
        traced = torch.jit.trace(model, image, check_trace=False)
    assert 'mkldnn::' not in str(traced.inlined_graph)


def test_backend_comes_from_the_environment():
    code = 'from vheat_mm import ops; print(ops.get_backend())'
    for value, expected in (('reference', 'reference'), ('', 'fast')):
        done = subprocess.run(
            [sys.executable, '-c', code], env=os.environ | dict(VHEAT_KERNELS=value), capture_output=True, text=True
        )
        assert done.stdout.strip() == expected
    done = subprocess.run(
        [sys.executable, '-c', code], env=os.environ | dict(VHEAT_KERNELS='quick'), capture_output=True, text=True
    )
    assert "VHEAT_KERNELS must be one of fast, reference, triton, got 'quick'" in done.stderr
    with pytest.raises(ValueError, match=r"'quick'"), ops.use_backend('quick'):
        pass


@torch.no_grad()
def test_compiled_graph_holds_custom_ops(make_vheat):
    model, image = make_vheat().eval(), torch.randn(1, 3, 64, 64)
    expected = model(image)
    names = set()

    def backend(graph, example_inputs):
        names.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    found = torch.compile(model, backend=backend, fullgraph=True)(image)
    expected_ops = ('mlp', 'linear', 'split_linear', 'heat_conduction', 'convolve', 'embed_patches', 'decay_maps')
    assert {f'vheat_mm.{op}.default' for op in expected_ops} <= names
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiled_graph_keeps_decays_until_weights_change(make_vheat):
    model, image = make_vheat().eval(), torch.randn(1, 3, 64, 96)
    op = model.layers[0][0].op
    nn.init.normal_(op.out_linear.weight)  # else the operator says little
    graph = torch.compile(model, backend='aot_eager', fullgraph=True)
    before = graph(image)
    built = model.decay_cache.builds
    torch.testing.assert_close(graph(image), before)
    assert model.decay_cache.builds == built
    op.to_k[0].bias.data += 5  # leaves no trace on the parameter
    after = graph(image)
    assert model.decay_cache.builds == built + 1
    torch.testing.assert_close(after, copy.deepcopy(model)(image), rtol=1e-4, atol=1e-5)
    assert error(after[0], before[0]) > 2e-3


def test_compiled_graph_trains_what_is_not_frozen(make_vheat):
    """Norms and biases alone (BitFit): no opaque operator, which has no gradients, may stand in their way."""
    model, image = make_vheat(), torch.randn(1, 3, 64, 64)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    gradients = []
    for network in (model, torch.compile(model, backend='aot_eager', fullgraph=True)):
        model.zero_grad()
        sum(o.square().sum() for o in network(image)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compiled_graph_takes_weights_of_inference_mode(make_vheat):
    with torch.inference_mode():
        model, image = make_vheat().eval(), torch.randn(1, 3, 64, 64)
        graph = torch.compile(model, backend='aot_eager')
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast('cpu', dtype, enabled=dtype is torch.bfloat16):
                for a, b in zip(graph(image), model(image), strict=True):
                    assert error(a, b.double()) < 0.03


@torch.no_grad()
def test_custom_ops_count_as_the_reference():
    """Counters that meet a custom op in a graph; eager mode shows them the reference."""
    register_flop_formulas()
    size, w, b = (2, 9, 11), torch.randn, torch.randn
    conv = (w(2 * C, C, 3, 3), b(2 * C), (2, 2), (1, 1), (1, 1), 1)
    stem = [w(4, C, 3, 3), b(4), b(4), b(4), w(8, 4, 3, 3), b(8), b(8), b(8)]
    pairs = [tuple(stem[i : i + 2]) for i in range(0, 8, 2)]
    x = torch.randn(*size, C)
    custom = torch.ops.vheat_mm
    calls = [
        *((getattr(custom, n), getattr(ops, n), (a := inputs(n, size, torch.float32)), a) for n in CUSTOM_OPS),
        (custom.convolve, ops.convolve, (x, *conv), (x, *conv)),
        (custom.embed_patches, ops.embed_patches, (x, stem, 1e-6, 1e-6), (x, *pairs[:2], 1e-6, *pairs[2:], 1e-6)),
    ]
    for op, function, args, same in calls:
        with FlopCounterMode(display=False) as found:
            op(*args)
        with FlopCounterMode(display=False) as expected:
            function(*same)
        assert found.get_total_flops() == expected.get_total_flops() > 0, op


@torch.no_grad()
def test_exported_graph_needs_nothing_of_ours(make_vheat):
    exported = torch.export.export(make_vheat().eval(), (torch.randn(1, 3, 64, 64),))
    names = {str(node.target) for node in exported.graph.nodes}
    assert not [name for name in names if name.startswith(('vheat_mm', 'mkldnn'))]


@pytest.mark.skipif(IS_AVX2, reason='is in that process')
def test_numbers_on_a_cpu_without_avx512():
    chosen = '(agree and 41) or whole_network or float64 or trains_in_bfloat16'
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__, '-k', chosen]
    done = subprocess.run(command, env=os.environ | AVX2, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert ' passed' in done.stdout


def test_network_trains_in_bfloat16(make_vheat):
    """Under autocast and as a bfloat16 model, on every CPU; kernels that the CPU lacks give way to the reference."""
    if IS_AVX2:
        assert onednn.supports(torch.ones(1, 2, 2, 8).bfloat16()) is not True
    model, image = make_vheat(), torch.randn(2, 3, 96, 64)
    exact = copy.deepcopy(model).double()(image.double())
    for network, dtype in ((model, torch.float32), (copy.deepcopy(model).bfloat16(), torch.bfloat16)):
        for train in (True, False):
            with torch.set_grad_enabled(train), torch.autocast('cpu', torch.bfloat16, enabled=dtype is torch.float32):
                outputs = network.train(train)(image.to(dtype))
            assert all(error(a, b) < 0.03 for a, b in zip(outputs, exact, strict=True))
            if train:
                sum(out.float().square().sum() for out in outputs).backward()
                assert all(p.grad.isfinite().all() for p in network.parameters())
