"""The benchmark tool: what it measures and what it writes."""

import csv
import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vheat_mm import VHeat
from vheat_mm.ops import use_backend
from vheat_mm.ops.eager import heat

TOOLS = Path(__file__).resolve().parents[2] / 'tools' / 'analysis_tools'


@pytest.fixture(scope='module', autouse=True)
def importable():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


def test_models_take_turns():
    from benchmark_measure import take_turns

    order = []
    times = {'a': iter([9.0, 1.0, 5.0, 3.0]), 'b': iter([9.0, 2.0, 2.0, 8.0])}

    def run(name):
        order.append(name)
        return next(times[name])

    results = take_turns({name: lambda name=name: run(name) for name in times}, repeats=3, warmup=1)
    assert len(order) == 8
    assert all(set(order[i : i + 2]) == {'a', 'b'} for i in range(0, 8, 2))
    assert order[2:4] != order[4:6]  # who comes first changes
    assert results['a'].median == 3.0  # the warm-up's 9 does not count
    assert results['b'].median == 2.0
    assert results['a'].quartiles == (2.0, 4.0)


def test_out_of_memory_ends_one_model_only():
    from benchmark_measure import take_turns

    def greedy():
        raise RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes')

    results = take_turns({'greedy': greedy, 'modest': lambda: 1.0}, repeats=4, warmup=1)
    assert (results['greedy'].error, results['greedy'].median) == ('oom', None)
    assert results['modest'].samples == [1.0] * 4
    with pytest.raises(RuntimeError, match='shape'):
        take_turns({'wrong': lambda: (_ for _ in ()).throw(RuntimeError('shape mismatch'))}, repeats=1, warmup=0)


def test_exponent_of_power_laws():
    from benchmark_measure import fitted_exponent

    pixels = [100.0, 400.0, 2500.0]
    assert fitted_exponent(pixels, [3e-6 * p**1.25 for p in pixels]) == pytest.approx(1.25)
    assert fitted_exponent([100.0], [1.0]) is None


def test_saved_bytes_counts_storages_once():
    from benchmark_measure import saved_bytes

    linear = nn.Linear(8, 4)
    x = torch.randn(16, 8)
    # the linear map keeps x, the exponential its result, the product both of its factors (the same storage)
    assert saved_bytes(linear, lambda: linear(x).exp().square()) == (16 * 8 + 16 * 4) * 4


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--sizes', '16'], "got '16'"),
        (['--sizes', '64x'], "got '64x'"),
        (['--batch-size', '64:0'], "got '64:0'"),
        (['--repeats', '0'], '--repeats must be at least 1'),
        (['--page', 'x.md'], 'go together'),
        (['--size', '64'], 'unrecognized arguments'),
    ],
)
def test_bad_options(argv, message, capsys):
    import benchmark

    with pytest.raises(SystemExit) as stop:
        benchmark.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_options_win_over_presets():
    import benchmark

    args = benchmark.parse_args(['--preset', 'cpu', '--sizes', '64x96', '--batch-size', '2', '64x96:3'])
    assert args.sizes == [(64, 96)]
    assert args.dtypes == ['fp32', 'bf16']
    assert args.batches == {None: 2, (64, 96): 3}


def test_run_and_page(tmp_path, capsys, monkeypatch, one_thread):
    """A narrow vHeat at 32 and 64 pixels, forward and training, to a page."""
    import benchmark
    import benchmark_models
    from benchmark_report import exponents

    arch = dict(embed_dims=8, depths=(1, 1, 1, 1))
    monkeypatch.setattr(benchmark_models, 'VHeat', lambda _, img_size: VHeat(arch, img_size=img_size))
    monkeypatch.setattr(benchmark, 'machine_limits', cache(benchmark.machine_limits))  # measured once, not in each case
    out = tmp_path / 'first'
    argv = ['--models', 'vheat', 'vheat-reference', '--sizes', '32', '64', '32x64', '--modes', 'forward', 'train']
    argv += ['--threads', '1']
    assert benchmark.main([*argv, '--repeats', '2', '--warmup', '1', '--roofline', '--out-dir', str(out)]) == 0
    assert 'over reference' in capsys.readouterr().out
    run = json.loads((out / 'benchmark.json').read_text())
    assert len(run['cases']) == 6
    assert run['threads'] == 1
    assert run['command'].endswith(f'--out-dir {out}')
    forward, train = run['cases'][0]['models'], run['cases'][3]['models']
    assert len(forward['vheat']['samples']) == 2
    assert forward['vheat']['saved_bytes'] is None
    assert 0 < train['vheat']['saved_bytes'] < train['vheat-reference']['saved_bytes']
    assert 0 < forward['vheat']['roofline']['fraction'] < 1
    with (out / 'benchmark.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[0]['over_vheat-reference']) == pytest.approx(
        forward['vheat']['seconds'] / forward['vheat-reference']['seconds']
    )
    assert set(exponents(run)) == {(m, 'fp32', n) for m in ('forward', 'train') for n in forward}
    assert (out / 'benchmark.png').read_bytes().startswith(b'\x89PNG')

    page = tmp_path / 'docs' / 'performance.md'
    assert benchmark.main(['--page', str(page), str(out / 'benchmark.json')]) == 0
    text = page.read_text()
    assert run['command'] in text
    assert '--preset h200' in text  # no figures of a GPU: the command that makes them
    assert (page.parent / 'images' / 'benchmark_first.png').is_file()
    with pytest.raises(SystemExit, match=r'is no benchmark\.json'):
        benchmark.main(['--page', str(page), str(out / 'benchmark.csv')])
    assert page.read_text() == text


def test_flops_of_the_even_odd_split(monkeypatch, make_vheat):
    """The split saves half of the transforms' FLOPs, less where a side is odd."""
    from benchmark import roofline
    from benchmark_models import even_odd_flops

    model = make_vheat()
    monkeypatch.setattr(heat, 'SPLIT_FROM', {torch.float32: 32})  # the first stage of 64 x 64 pixels alone
    dim, depth = model.num_features[0], model.depths[0]
    assert even_odd_flops(model, 3, (64, 64), torch.float32) == 3 * depth * 2 * (16 + 16) * 16 * 16 * dim
    assert even_odd_flops(model, 1, (60, 68), torch.float32) == depth * 4 * (112 * 17 + 144 * 15) * dim
    assert even_odd_flops(model, 1, (60, 64), torch.float32) == 0
    model.eval()
    flops, limits = {}, dict(flop_per_s=1.0, bytes_per_s=1.0)
    for backend in ('fast', 'reference'):
        with use_backend(backend):
            flops[backend] = roofline(model, torch.rand(1, 3, 64, 64), 1.0, limits, 'fp32')['flops']
    assert flops['reference'] - flops['fast'] == depth * 2 * (16 + 16) * 16 * 16 * dim
    model.decay_cache.clear()
    with torch.no_grad(), FlopCounterMode(display=False) as first, use_backend('reference'):
        model(torch.rand(1, 3, 64, 64))
    assert flops['reference'] < first.get_total_flops()  # decays are not computed at every image


def test_missing_package_is_named(monkeypatch):
    from benchmark_models import ModelError, build

    for name in ('mmdet', 'mmdet.models', 'mmdet.models.backbones'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match='pip install mmdet'):
        build('swin', 'tiny', (64, 64))
    with pytest.raises(ModelError, match='64x96'):
        build('swin-scaled', 'tiny', (64, 96))
