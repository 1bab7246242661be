"""Time and memory of several models, taken in turns within one process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vheat_mm.ops.eager import onednn

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


@dataclass
class Result:
    """Measurements of one model in one case.

    Attributes:
        samples: Seconds of each run.
        peak_bytes: Device memory (CUDA) or growth of the process's resident set (CPU) during one run.
        saved_bytes: What autograd keeps between forward and backward; training only.
        error: ``'oom'`` or why there are no numbers.
    """

    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error: str | None = None

    @property
    def median(self) -> float | None:
        """Seconds."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Lower and upper quartile, seconds."""
        if len(self.samples) < 2:
            return None
        lower, _, upper = statistics.quantiles(self.samples, n=4, method='inclusive')
        return lower, upper


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """Autocast region of a named type; none for fp32."""
    return torch.autocast(device, DTYPES[dtype]) if dtype != 'fp32' else contextlib.nullcontext()


def forward(model: nn.Module, image: Tensor) -> None:
    """One forward pass without gradients."""
    with torch.no_grad():
        model(image)


def train_step(model: nn.Module, image: Tensor) -> None:
    """Forward, backward of the sum of the outputs' means, gradients dropped; no optimizer."""
    loss = sum(out.float().mean() for out in model(image))
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


STEPS: dict[str, Callable[[nn.Module, Tensor], None]] = dict(forward=forward, train=train_step)


def take_turns(
    runs: dict[str, Callable[[], float]], repeats: int, warmup: int, min_time: float = 0.0, at_most: int = 200
) -> dict[str, Result]:
    """Time several runs in turns, in an order that rotates from round to round.

    Args:
        runs: What to run, by name; each returns the seconds it took.
        repeats: Rounds at least.
        warmup: Rounds before them that are not counted.
        min_time: Seconds that all rounds take together at least.
        at_most: Rounds at most.

    Returns:
        Samples by name; a run that is out of memory has the error ``'oom'`` and no samples.
    """
    results = {name: Result() for name in runs}
    spent, done = 0.0, -warmup
    while done < repeats or (spent < min_time and done < at_most):
        names = [name for name in runs if results[name].error is None]
        shift = done % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            try:
                seconds = runs[name]()
            except (RuntimeError, MemoryError) as error:  # CUDA's OutOfMemoryError is a RuntimeError
                if not is_out_of_memory(error):
                    raise
                results[name] = Result(error='oom')
                release()
                continue
            if done >= 0:
                results[name].samples.append(seconds)
                spent += seconds
        done += 1
        if not names:
            break
    return results


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, on either device."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or 'out of memory' in text or 'alloc' in text


def timed(function: Callable[[], None], device: str) -> float:
    """Seconds of a call; on CUDA between two events on the stream."""
    if device != 'cuda':
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory(function: Callable[[], None], device: str) -> int | None:
    """Bytes in use at most during a call: all on a CUDA device, the growth of the resident set on Linux' CPU."""
    release()
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    try:
        Path('/proc/self/clear_refs').write_text('5')  # sets the high-water mark to what is resident now
        before = resident('VmRSS')
        function()
        return max(0, resident('VmHWM') - before)
    except OSError:
        function()
        return None


def resident(name: str, pid: int | str = 'self') -> int:
    """Bytes resident of a process: ``VmRSS`` now, ``VmHWM`` at most; 0 once it has ended. Raises OSError off Linux."""
    for line in Path(f'/proc/{pid}/status').read_text().splitlines():
        if line.startswith(f'{name}:'):
            return int(line.split()[1]) * 1024
    return 0


def saved_bytes(model: nn.Module, function: Callable[[], object]) -> int:
    """Bytes that autograd keeps for backward: distinct storages, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()  # alive until counted, or freed memory would be counted twice
        total = sum(seen.values())
    del kept
    return total


def release() -> None:
    """Free unused memory, so that one model's measurement does not depend on the model before."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory: a later peak within it would not be seen
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fitted_exponent(pixels: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Exponent e of the least-squares fit ``seconds = a pixels^e`` in logarithms; None for fewer than two sizes."""
    if len(set(pixels)) < 2:
        return None
    x = torch.tensor(pixels, dtype=torch.float64).log()
    y = torch.tensor(seconds, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def machine_limits(device: str, dtype: str) -> dict[str, float]:
    """Bandwidth (bytes / s) of a large copy and rate (FLOP / s) of a large matrix product, measured now."""
    big = 2**28 if device == 'cuda' else 2**25
    m, n = (8192, 8192) if device == 'cuda' else (4096, 1024)
    source = torch.zeros(big, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    x, weight = (torch.randn(rows, n, device=device, dtype=DTYPES[dtype]) for rows in (m, n))
    products = {'product': lambda: x @ weight}
    if onednn.supports(x) is True:  # which library is faster depends on the processor
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)  # its best: the roofline, not what the network runs
        products['oneDNN'] = lambda: onednn.product(x, packed)
    with torch.no_grad():
        runs = {'copy': lambda: target.copy_(source), **products}
        taken = take_turns({name: partial(timed, run, device) for name, run in runs.items()}, repeats=10, warmup=3)
    best = min(min(taken[name].samples) for name in products)
    return dict(bytes_per_s=2 * source.nbytes / min(taken['copy'].samples), flop_per_s=2 * m * n * n / best)
