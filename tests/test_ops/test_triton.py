"""Triton kernels against the reference in Triton's interpreter, and compiled for a Hopper GPU, here or not.

Whether kernels are interpreted is settled for a process when Triton decorates them. So that no other test's process
changes, the interpreter and the compiler get processes of their own, in which this file's other tests run. Where there
is a GPU, the kernels also run on it, in the process that was started.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('triton')

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vheat_mm.ops import reference
from vheat_mm.ops.backends import use_backend
from vheat_mm.ops.triton import common, cosine, decay, heat, norms, tiles

ROLE = os.environ.get('VHEAT_TEST_TRITON', '')  # what this process is for: '', 'interpret' or 'compile'
DEVICE = 'cuda' if torch.cuda.is_available() and ROLE != 'interpret' else 'cpu'
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # the interpreter truncates bfloat16
# Odd, rectangular, one pixel high or wide; channels that are no power of two, and more than a tile has.
SHAPES = [(2, 5, 3, 12), (1, 1, 9, 40), (2, 4, 1, 20), (1, 1, 1, 16), (1, 3, 17, 96), (1, 3, 2, 136)]
SHARED_MEMORY = 99 * 1024  # of a block on GPUs of compute capability 8.6 and 8.9; Hopper's have 227 KiB


def in_own_process(role: str, cache: Path) -> str:
    environment = os.environ | dict(
        VHEAT_TEST_TRITON=role, TRITON_INTERPRET='1' if role == 'interpret' else '0', TRITON_CACHE_DIR=str(cache)
    )
    command = [sys.executable, '-m', 'pytest', '-q', '-s', '-p', 'no:cacheprovider', __file__]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


class TestProcesses:
    __test__ = not ROLE

    def test_kernels_are_right_in_the_interpreter(self, tmp_path):
        assert re.search(r'\d+ passed', in_own_process('interpret', tmp_path))

    def test_kernels_compile_for_hopper(self, tmp_path):
        print(in_own_process('compile', tmp_path))

    def test_kernels_leave_the_cpu_alone(self):
        if common.INTERPRETED.value:
            pytest.skip('the interpreter is on')
        x, channels = torch.ones(1, 4, 4, 8), torch.ones(8)
        calls = dict(
            heat_conduction=(x, x[0]),
            heat_norm_gate_=(x, x, x[0], channels, channels, 1e-5),
            add_norm=(x, x, None, channels, channels, 1e-5),
            norm_add=(x, x, None, channels, channels, 1e-5),
            decay_map=(x[0], torch.ones(8, 8), channels),
        )
        for name, args in calls.items():
            assert 'not an NVIDIA GPU' in supports(name, *args)


def supports(name, *args):
    """True, or why the Triton kernel of an op declines."""
    return next(k for k in getattr(reference, name).kernels if k.backend == 'triton').supports(*args)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def inputs(shape, dtype):
    """Signal and gate, halves of one map; decay; three tensors of one number per channel."""
    torch.manual_seed(0)
    both = random(*shape[:3], 2 * shape[3], dtype=dtype)
    return (*both.chunk(2, -1), random(*shape[1:]).sigmoid(), *(random(shape[3]) for _ in range(3)))


def results(function, args, wanted=None, used=None):
    """Outputs, and gradients of those used for the arguments wanted, all by default, at fixed output gradients."""
    args = [a if a is None else a.detach().requires_grad_(wanted is None or i in wanted) for i, a in enumerate(args)]
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    grads = [random(*o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
    chosen = [
        (o, g)
        for i, (o, g) in enumerate(zip(outputs, grads, strict=True))
        if o.requires_grad and (used is None or i in used)
    ]
    wrt = [a for a in args if a is not None and a.requires_grad]
    return [*outputs, *torch.autograd.grad([o for o, _ in chosen], wrt, [g for _, g in chosen])]


def check(kernel, function, args, dtype, **options):
    """Outputs and gradients of a kernel against those of the reference in float64."""
    got = results(kernel, args, **options)
    with use_backend('reference'):
        expected = results(function, [a if a is None else a.double() for a in args], **options)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).norm() / b.norm().clamp_min(1e-3 * b.numel() ** 0.5)
        assert error < TOLERANCE[dtype], (dtype, error)


def layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def heat_norm_gate(x, gate, decay_map, weight, bias):
    return layer_norm(reference.heat_conduction(x, decay_map), weight, bias) * F.silu(gate)


def add_norm(x, branch, gamma, weight, bias):
    total = x + (branch if gamma is None else gamma * branch)
    return total, layer_norm(total, weight, bias)


def norm_add(x, branch, gamma, weight, bias):
    normed = layer_norm(branch, weight, bias)
    return x + (normed if gamma is None else gamma * normed)


def with_eps(function):
    return lambda *args: function(*args, 1e-5)


OPS = {
    'heat_conduction': (heat.heat_conduction, reference.heat_conduction, lambda x, g, d, *c: [x, d]),
    'heat_norm_gate': (with_eps(heat.heat_norm_gate_), heat_norm_gate, lambda x, g, d, *c: [x, g, d, *c[:2]]),
    'add_norm': (with_eps(norms.add_norm), add_norm, lambda x, g, d, *c: [x, g, *c]),
    'add_norm without gamma': (with_eps(norms.add_norm), add_norm, lambda x, g, d, *c: [x, g, None, *c[1:]]),
    'norm_add': (with_eps(norms.norm_add), norm_add, lambda x, g, d, *c: [x, g, *c]),
    'norm_add without gamma': (with_eps(norms.norm_add), norm_add, lambda x, g, d, *c: [x, g, None, *c[1:]]),
    'decay_map': (decay.decay_map, reference.decay_map, lambda x, g, d, *c: [x[0], d[0, :1] * c[0][:, None], c[1]]),
}


@pytest.fixture(params=OPS)
def op(request):
    """The kernel of an op, its reference, and the choice of its arguments from ``inputs``."""
    return OPS[request.param]


class TestKernels:
    __test__ = ROLE == 'interpret' or (DEVICE == 'cuda' and not ROLE)

    @pytest.mark.parametrize('dtype', TOLERANCE)
    @pytest.mark.parametrize('shape', SHAPES, ids=str)
    def test_is_the_reference(self, op, shape, dtype):
        kernel, function, choose = op
        check(kernel, function, choose(*inputs(shape, dtype)), dtype)

    @pytest.mark.parametrize(
        ('shape', 'dtype'), [((1, 66, 1, 8), torch.float16), ((1, 1, 130, 8), torch.float32)], ids=str
    )
    def test_long_sides_take_several_tiles(self, shape, dtype):
        kernel, function, choose = OPS['heat_norm_gate']
        check(kernel, function, choose(*inputs(shape, dtype)), dtype)

    @pytest.mark.parametrize('dtype', TOLERANCE)
    @pytest.mark.parametrize('name', ['heat_conduction', 'heat_norm_gate'])
    def test_sides_too_long_for_the_chip(self, name, dtype, monkeypatch):
        monkeypatch.setitem(tiles.MAX_FUSED, dtype, 4)
        kernel, function, choose = OPS[name]
        args = choose(*inputs((1, 5, 2, 12), dtype))
        check(kernel, function, args, dtype)
        check(kernel, function, args, dtype, wanted=[len(args) // 2])  # the decay alone: nothing to damp
        check(kernel, function, args, dtype, wanted=[0])

    def test_sums_over_the_batch_and_rows_in_parts(self, op, monkeypatch):
        monkeypatch.setattr(tiles, 'PARTIAL_SUMS', 2)
        kernel, function, choose = op
        check(kernel, function, choose(*inputs((3, 4, 3, 12), torch.float32)), torch.float32)

    def test_each_gradient_alone(self, op):
        kernel, function, choose = op
        args = choose(*inputs((2, 3, 2, 12), torch.float32))
        for i, argument in enumerate(args):
            if argument is not None:
                check(kernel, function, args, torch.float32, wanted=[i])

    @pytest.mark.parametrize('used', [[0], [1]])
    @pytest.mark.parametrize('name', ['add_norm', 'add_norm without gamma'])
    def test_one_output_of_add_norm_alone(self, name, used):
        kernel, function, choose = OPS[name]
        args = choose(*inputs((2, 3, 2, 12), torch.float32))
        check(kernel, function, args, torch.float32, used=used, wanted=[0, 1])

    @pytest.mark.parametrize('name', ['add_norm', 'add_norm without gamma', 'norm_add', 'norm_add without gamma'])
    def test_branch_of_a_narrower_type(self, name):
        kernel, function, choose = OPS[name]
        x, branch, *rest = choose(*inputs((2, 3, 2, 12), torch.float32))
        branch = branch.bfloat16()
        assert results(kernel, [x, branch, *rest])[0].dtype is torch.float32
        check(kernel, function, [x, branch, *rest], torch.bfloat16)

    def test_without_gradients(self, op):
        kernel, _, choose = op
        args = choose(*inputs((2, 3, 2, 12), torch.float32))
        expected = results(kernel, args)
        with torch.inference_mode():
            got = kernel(*args)
        for a, b in zip(got if isinstance(got, tuple) else (got,), expected, strict=False):
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_maps_in_any_layout(self, op):
        kernel, function, choose = op
        args = choose(*inputs((2, 3, 4, 12), torch.float32))
        args = [a.mT.contiguous().mT if a is not None and a.ndim > 1 else a for a in args]
        check(kernel, function, args, torch.float32)

    def test_halves_are_not_copied(self):
        signal, gate, *_ = inputs((2, 1, 6, 12), torch.float32)
        for half in (signal, gate, signal[:1], signal[:, :, :1]):
            rows, distance = common.as_rows(half)
            assert rows.data_ptr() == half.data_ptr()
            assert distance == 24 or half.shape[2] == 1
        repeated = signal[:1].expand(2, -1, -1, -1), signal[:, :, :1].expand(-1, -1, 3, -1)
        for other in (gate.transpose(0, 2), signal[..., ::2], signal[:, :, 1:], signal.mT, *repeated):
            rows, distance = common.as_rows(other)
            assert rows.is_contiguous()
            assert distance == rows.shape[-1]

    def test_float16_keeps_large_modes(self):
        x = torch.full((1, 8, 180, 4), 2000.0, dtype=torch.float16, device=DEVICE)
        torch.testing.assert_close(heat.heat_conduction(x, torch.ones_like(x[0])), x, rtol=2e-3, atol=0)

    def test_gradient_of_a_tiny_diffusivity(self):
        """exp(-w k) rounds to 1; its derivative -w does not."""
        args = [torch.zeros(3, 4, 16), torch.zeros(16, 16), torch.full((16,), 1e-9)]
        check(decay.decay_map, reference.decay_map, [a.to(DEVICE) for a in args], torch.float32)

    def test_autocast_leaves_types_alone(self, op):
        kernel, _, choose = op
        args = choose(*inputs((1, 3, 2, 12), torch.float32))
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = results(kernel, args)
        for a, b in zip(got, results(kernel, args), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_refuses_second_derivatives(self, op):
        kernel, _, choose = op
        args = choose(*inputs((2, 3, 4, 12), torch.float32))
        args = [a if a is None else a.detach().requires_grad_() for a in args]
        output = kernel(*args)
        output = output[0] if isinstance(output, tuple) else output
        with pytest.raises(RuntimeError, match='VHEAT_KERNELS=reference'):
            torch.autograd.grad(output.sum(), args[0], create_graph=True)

    def test_says_what_it_takes(self):
        x, gate, damping, a, b, c = inputs((2, 5, 6, 12), torch.bfloat16)
        assert supports('heat_conduction', x, damping) is True
        assert 'not of the size' in supports('heat_conduction', x, damping[:-1])
        assert 'another type' in supports('heat_conduction', x.double(), damping)
        assert 'empty' in supports('heat_conduction', x[:0], damping)
        assert supports('heat_norm_gate_', x, gate, damping, a, b, 1e-5) is True
        assert 'gate' in supports('heat_norm_gate_', x, gate.float(), damping, a, b, 1e-5)
        assert 'width' in supports('heat_norm_gate_', x, gate, damping, a[:-1], b, 1e-5)
        assert supports('add_norm', x.float(), gate, c, a, b, 1e-5) is True
        assert 'shapes' in supports('norm_add', x, gate[:1], None, a, b, 1e-5)
        wide = torch.ones(1, 2049, device=DEVICE)
        assert '2049 channels' in supports('add_norm', wide, wide, None, wide[0], wide[0], 1e-5)
        assert supports('decay_map', x[0], a[:, None] * b, c) is True
        assert 'bias' in supports('decay_map', x[0], a[:, None] * b, c[:-1])

    @pytest.mark.parametrize('post_norm', [False, True])
    def test_whole_network(self, make_vheat, post_norm):
        model = make_vheat(post_norm, img_size=32).to(DEVICE)
        for parameter in model.parameters():  # as initialised, its maps all but vanish, and what is left is noise
            torch.nn.init.normal_(parameter, std=0.5)
        x = random(1, 3, 32, 24)

        def run(backend, x):
            with use_backend(backend):
                outputs = model(x)
            # Behind the stem, whose first norm, of two channels, magnifies rounding errors in any backend.
            weights = [p for name, p in model.named_parameters() if not name.startswith('patch_embed')]
            return [*outputs, *torch.autograd.grad(sum(o.cos().sum() for o in outputs), weights)]

        got = run('triton', x)
        model.double()
        for a, b in zip(got, run('reference', x.double()), strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()

    @pytest.mark.filterwarnings('ignore')
    def test_compiled_graphs_hold_kernels(self, op):
        """Forward and backward, in one graph each, with the outputs and gradients of eager mode."""
        kernel, _, choose = op
        args = choose(*inputs((1, 3, 2, 12), torch.float32))
        torch.compiler.reset()
        compiled = torch.compile(kernel, backend='aot_eager', fullgraph=True)
        for a, b in zip(results(compiled, args), results(kernel, args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    @pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')
    def test_cuda_graphs_capture_forward_and_backward(self, op):
        kernel, _, choose = op
        args = choose(*inputs((2, 20, 17, 96), torch.bfloat16))
        expected = results(kernel, args)  # compiles, and fills the cache of bases
        args = [a if a is None else a.detach().requires_grad_() for a in args]
        torch.manual_seed(1)
        outputs = expected[: len(expected) - sum(a is not None for a in args)]
        grads = [random(*o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = kernel(*args)
            got = got if isinstance(got, tuple) else (got,)
            got = [*got, *torch.autograd.grad(got, [a for a in args if a is not None], grads)]
        graph.replay()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


class TestCompiled:
    """Every launch of forward and backward at real sizes, recorded on tensors without memory and compiled."""

    __test__ = ROLE == 'compile'

    SIZES = (
        *((128, 56, 56, 96), (128, 28, 28, 192), (128, 14, 14, 384), (128, 7, 7, 768)),  # images of 224 pixels
        *((2, 200, 304, 96), (2, 100, 152, 192), (1, 320, 320, 96)),  # detection, first stages
    )

    @pytest.mark.parametrize(('dtype', 'tf32'), [(torch.bfloat16, True), (torch.float32, False), (torch.float32, True)])
    def test_kernels_fit_a_multiprocessor(self, dtype, tf32, monkeypatch, tmp_path):
        torch.backends.cuda.matmul.allow_tf32 = tf32  # for good: this process does nothing else
        monkeypatch.setattr(
            torch, 'autocast', lambda *args, **options: contextlib.nullcontext()
        )  # knows no meta device
        for op in custom_ops():
            op.register_fake(op._init_fn)  # on the meta device the op itself runs, up to its launches
        launches = {}
        for size in self.SIZES:
            for module in (cosine, heat, norms, decay):
                monkeypatch.setattr(module, 'launch', functools.partial(record, launches, size))
            run_all(size, dtype)
        assert {name for name, *_ in launches} == {
            *('transform_kernel', 'conduct_kernel', 'conduct_backward_kernel', 'damp_backward_kernel'),
            *('norm_gate_kernel', 'norm_gate_backward_kernel', 'norm_kernel', 'norm_backward_kernel', 'decay_kernel'),
        }
        for (name, *_), (size, source, options) in launches.items():
            compiled = triton.compile(source, target=GPUTarget('cuda', 90, 32), options=options)
            print(f'{name:26}{size!s:22}{str(dtype)[6:]:9} {resources(compiled, tmp_path)}')
            assert compiled.metadata.shared <= SHARED_MEMORY, (name, size)


def custom_ops():
    return [
        value
        for module in (heat, norms, decay)
        for value in vars(module).values()
        if isinstance(value, torch.library.CustomOpDef)
    ]


def run_all(size, dtype):
    """Forward and backward of every op, at one size, on the meta device."""
    b, h, w, c = size

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device='meta', requires_grad=True)

    signal, gate = empty(b, h, w, 2 * c, dtype=dtype).chunk(2, -1)
    gamma, weight, bias = empty(c), empty(c), empty(c)
    damping = decay.decay_map(empty(h, w, c), empty(c, c), bias)
    x = heat.heat_norm_gate_(signal, gate, damping, weight, bias, 1e-5) + heat.heat_conduction(signal, damping)
    for scale in () if h > 56 else (gamma, None) if h == 56 else (gamma,):  # the large maps' channels come elsewhere
        total, normed = norms.add_norm(x, gate, scale, weight, bias, 1e-5)
        x = norms.norm_add(total, normed, scale, weight, bias, 1e-5)
    x.backward(x.detach())


def record(launches, size, kernel, programs, like, *args, **meta):
    """Keep a launch as what Triton would compile for it, tensors taken to be aligned as an allocator aligns them."""
    types = {torch.float32: '*fp32', torch.bfloat16: '*bf16'}
    options = {name: meta.pop(name) for name in ('num_warps', 'num_stages') if name in meta}
    assert programs < 2**31
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = meta[name] if name in meta else args[i]
        if name in meta or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = 'constexpr', value
        elif isinstance(value, float):
            signature[name] = 'fp32'
        else:
            signature[name] = types[value.dtype] if isinstance(value, torch.Tensor) else 'i32'
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(i,)] = [['tt.divisibility', 16]]
    key = (kernel.__name__, str(signature), str(constants), str(attributes), str(options))
    launches.setdefault(key, (size, ASTSource(kernel, signature, constants, attributes), options))


def resources(compiled, folder):
    """Shared memory, registers and spilled bytes per thread, as far as Triton's own tools can tell."""
    text = f'shared {compiled.metadata.shared / 1024:5.1f} KiB'
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    if tool.exists():
        path = folder / 'kernel.cubin'
        path.write_bytes(compiled.asm['cubin'])
        listing = subprocess.run([tool, '-res-usage', path], capture_output=True, text=True, check=False).stdout
        found = re.search(r'REG:(\d+) STACK:(\d+)', listing)
        text += f', {found[1]} registers, {found[2]} bytes spilled' if found else ''
    return text
