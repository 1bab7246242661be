"""Latency, throughput and memory of vHeat against Swin and ConvNeXt, and of its backends against each other.

python tools/analysis_tools/benchmark.py --preset cpu --out-dir work_dirs/benchmark
python tools/analysis_tools/benchmark.py --sizes 224 800x1216 --dtypes fp32 bf16 --models vheat swin
python tools/analysis_tools/benchmark.py --page docs/performance.md RESULT.json [RESULT.json ...]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from functools import partial
from pathlib import Path

import torch
from benchmark_measure import (
    DTYPES,
    STEPS,
    Result,
    autocast,
    is_out_of_memory,
    machine_limits,
    peak_memory,
    release,
    saved_bytes,
    take_turns,
    timed,
)
from benchmark_models import (
    ARCHS,
    MODELS,
    ModelError,
    backend_of,
    build,
    even_odd_flops,
    minimal_bytes,
)
from benchmark_report import describe_run, print_table, write_page, write_results
from torch.utils.flop_counter import FlopCounterMode

from vheat_mm.ops import get_backend

SQUARES = ('224', '256', '384', '512', '640', '768', '1024', '1280')
PRESETS = {
    'cpu': dict(
        sizes=[*SQUARES, '800x1216'], batch_size=['1', '224:8'], dtypes=['fp32', 'bf16'], modes=['forward'], repeats=5,
        roofline=True,
    ),
    'cpu-train': dict(sizes=['640'], dtypes=['fp32', 'bf16'], modes=['train'], repeats=7),
    'h200': dict(
        device='cuda', sizes=['224', '512', '768', '800x1216', '1280'], dtypes=['bf16'], modes=['forward', 'train'],
        batch_size=['8', '224:128', '512:32', '768:16', '800x1216:2', '1280:4'], models=list(MODELS), repeats=10,
        warmup=3, roofline=True,
    ),
    'quick': dict(sizes=['64', '96'], dtypes=['fp32'], modes=['forward', 'train'], repeats=3),
}  # fmt: skip
DEFAULTS = dict(
    models=['vheat', 'vheat-reference', 'swin', 'convnext'], arch='tiny', sizes=[*SQUARES, '800x1216'],
    batch_size=['1'], dtypes=['fp32'], modes=['forward'], compile='none', threads=None, device='cpu', tf32=False,
    repeats=10, warmup=2, min_time=0.0, roofline=False,
)  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    parser.add_argument('--preset', choices=list(PRESETS), help='a set of the options below; those given win over it')
    add('--models', nargs='+', choices=MODELS, metavar='MODEL', help=f'of {", ".join(MODELS)}')
    add('--arch', choices=ARCHS, help='size of all models (default tiny)')
    add('--sizes', nargs='+', help='pixels, N or HxW')
    add('--batch-size', nargs='+', help='N for all sizes, SIZE:N for one')
    add('--dtypes', nargs='+', choices=list(DTYPES), help='fp32, or autocast to bf16, fp16')
    add('--modes', nargs='+', choices=list(STEPS), help='forward pass without gradients, training step')
    add('--compile', choices=('none', 'default', 'max-autotune'), help='torch.compile (default none)')
    add('--threads', type=int, help='threads of the CPU (default: all)')
    add('--device', choices=('cpu', 'cuda'))
    add('--tf32', action='store_true', help='allow TF32 in fp32 products on CUDA')
    add('--repeats', type=int, help='rounds that count (default 10)')
    add('--warmup', type=int, help='rounds before them (default 2)')
    add('--min-time', type=float, help='seconds that all rounds of a case take at least')
    add('--roofline', action='store_true', help='measure bandwidth and matrix rate too, and compare')
    parser.add_argument('--out-dir', help='folder for benchmark.json, .csv and .png (default: print only)')
    parser.add_argument('--page', metavar='PAGE.md', help='write a page from RESULT.json files; nothing is measured')
    parser.add_argument('results', nargs='*', metavar='RESULT.json', help='with --page')
    given = vars(parser.parse_args(argv))
    args = argparse.Namespace(**(DEFAULTS | PRESETS.get(given.get('preset') or '', {}) | given))
    try:
        args.sizes = [read_size(text) for text in args.sizes]
        args.batches = read_batches(args.batch_size)
    except ValueError as error:
        parser.error(str(error))
    if bool(args.page) != bool(args.results):
        parser.error('--page and RESULT.json files go together')
    for name, least in (('repeats', 1), ('warmup', 0), ('threads', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name} must be at least {least}, got {value}')
    if args.device == 'cuda' and not args.page and not torch.cuda.is_available():
        parser.error('--device cuda: PyTorch sees no CUDA device here; drop it to measure the CPU')
    return args


def read_size(text: str) -> tuple[int, int]:
    """Read ``'N'`` or ``'HxW'`` in pixels."""
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 32 for side in sides):
        raise ValueError(f'a size is N or HxW in pixels, 32 at least, got {text!r}')
    return int(sides[0]), int(sides[-1])


def read_batches(texts: list[str]) -> dict[tuple[int, int] | None, int]:
    """Read ``N`` (for every size, key None) and ``SIZE:N`` entries."""
    batches: dict[tuple[int, int] | None, int] = {None: 1}
    for text in texts:
        size, _, count = text.rpartition(':')
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f'--batch-size is N or SIZE:N with N at least 1, got {text!r}')
        batches[read_size(size) if size else None] = int(count)
    return batches


def measure_case(args: argparse.Namespace, size: tuple[int, int], dtype: str, mode: str) -> dict[str, dict]:
    """Measure all models in one case; returns records by model name."""
    torch.manual_seed(0)
    batch = args.batches.get(size, args.batches[None])
    image = torch.randn(batch, 3, *size, device=args.device)
    models, records = {}, {}
    for name in args.models:
        try:
            model = build(name, args.arch, size).to(args.device)
        except ModelError as error:
            records[name] = dict(error=str(error))
            continue
        if name.startswith('vheat-') and 'vheat' in models:
            model.load_state_dict(models['vheat'].state_dict())
        model.train(mode == 'train')  # some backbones' train() returns nothing
        models[name] = model
    runnable = dict(models)
    if args.compile != 'none':
        torch.compiler.reset()  # the number of graphs kept per function is limited, and sizes share functions
        runnable = {name: torch.compile(m, dynamic=False, mode=args.compile) for name, m in models.items()}

    def once(name: str) -> None:
        with backend_of(name), autocast(args.device, dtype):
            STEPS[mode](runnable[name], image)

    results = take_turns(
        {name: partial(timed, partial(once, name), args.device) for name in models},
        args.repeats, args.warmup, args.min_time,
    )  # fmt: skip
    limits = machine_limits(args.device, dtype) if args.roofline else None
    for name, model in models.items():
        result = results[name]
        if result.error is None:
            add_memory(result, once, name, model, runnable[name], image, args, dtype, mode)
        record = dict(
            seconds=result.median, quartiles=result.quartiles, samples=result.samples, error=result.error,
            images_per_s=batch / result.median if result.median else None, peak_bytes=result.peak_bytes,
            saved_bytes=result.saved_bytes,
        )  # fmt: skip
        if limits and result.median and name.startswith('vheat') and mode == 'forward':
            with backend_of(name):
                record['roofline'] = roofline(model, image, result.median, limits, dtype)
        records[name] = record
        release()
    return records


def add_memory(result: Result, once, name, model, runnable, image, args, dtype, mode) -> None:
    """Fill in the memory of one run; it stays None where memory runs out."""
    try:
        if mode == 'train':
            with backend_of(name), autocast(args.device, dtype):
                result.saved_bytes = saved_bytes(model, partial(runnable, image))
        result.peak_bytes = peak_memory(partial(once, name), args.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


def roofline(model, image: torch.Tensor, seconds: float, limits: dict[str, float], dtype: str) -> dict[str, float]:
    """Arithmetic and traffic that a forward pass cannot avoid against what the machine does at best."""
    element = torch.empty((), dtype=DTYPES[dtype]).element_size()
    size = (image.shape[2], image.shape[3])
    counted = copy.deepcopy(model)
    if getattr(counted, 'freq_embed', None) is not None:
        counted.switch_to_deploy(size)  # decays are kept in the runs that are timed
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(image)
    flops = counter.get_total_flops()
    if get_backend() == 'fast' and image.device.type == 'cpu':
        flops -= even_odd_flops(model, image.shape[0], size, DTYPES[dtype])
    moved = minimal_bytes(model, image.shape[0], size, element)
    bound = max(flops / limits['flop_per_s'], moved / limits['bytes_per_s'])
    return dict(limits, flops=flops, minimal_bytes=moved, bound_seconds=bound, fraction=bound / seconds)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_args(argv)
    if args.page:
        write_page(args.page, args.results)
        print(f'written: {args.page}')
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    command = 'python tools/analysis_tools/benchmark.py ' + ' '.join(sys.argv[1:] if argv is None else argv)
    run = describe_run(args, command)
    # From small to large: glibc keeps more memory once it has handed out large blocks, which makes later cases faster
    # than they are in a process that only ever sees their size.
    sizes = sorted(args.sizes, key=lambda size: size[0] * size[1] * args.batches.get(size, args.batches[None]))
    cases = [(size, dtype, mode) for mode in args.modes for size in sizes for dtype in args.dtypes]
    folder = Path(args.out_dir) if args.out_dir else None
    with contextlib.suppress(KeyboardInterrupt):
        for size, dtype, mode in cases:
            records = measure_case(args, size, dtype, mode)
            batch = args.batches.get(size, args.batches[None])
            run['cases'].append(dict(size=size, batch_size=batch, dtype=dtype, mode=mode, models=records))
            times = ', '.join(f'{k} {r.get("seconds") or r["error"]:.4}' for k, r in records.items())
            print(f'{mode} {dtype} {batch}x{size[0]}x{size[1]}: {times}', file=sys.stderr, flush=True)
            if folder:
                write_results(folder, run)  # after every case: an interrupted run keeps what it has
    print_table(run)
    if folder:
        print(f'written: {folder}/benchmark.json, benchmark.csv, benchmark.png')
    return 0 if len(run['cases']) == len(cases) else 130


if __name__ == '__main__':
    raise SystemExit(main())
