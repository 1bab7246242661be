"""Mutate valid checkpoints at random and give them to every loader, for a given time.

python tests/fuzz/fuzz_checkpoints.py --minutes 10 --seed 0

Any error but CheckpointError, code that runs, too much memory, a partial output file, and a process that ends or hangs
are findings: they are printed, and the mutated file is kept in the folder given by --keep.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path


def work(folder: Path, keep: Path, seed: int, seconds: float) -> None:
    """Mutate files, load and report them until the time is over; runs in a process of its own."""
    warnings.simplefilter('ignore')
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch
    from fuzz.drive import SECONDS, Loaders, Watch, limit_memory, measure
    from fuzz.hostile_pickles import FRAGMENTS
    from fuzz.mutations import mutate, write_seeds

    out = folder / 'out'
    out.mkdir(exist_ok=True)
    loaders, watch = Loaders(out), Watch(out)
    torch.manual_seed(0)
    seeds = write_seeds(loaders.model.state_dict())
    for name, content in seeds.items():
        path = folder / f'warm{".safetensors" if name == "safetensors" else ".pth"}'
        path.write_bytes(content)
        assert not measure(loaders, watch, str(path))['findings']
    fragments = [fragment for fragment in FRAGMENTS.values() if len(fragment) < 5000]
    limit_memory()
    ends, every = time.monotonic() + seconds, loaders.by_name()
    number = 0
    while time.monotonic() < ends:
        number += 1
        rng = random.Random(f'{seed} {number}')
        suffix, content = mutate(rng, seeds, fragments)
        path = folder / f'input{suffix}'
        path.write_bytes(content)
        (folder / 'current').write_text(f'{number} {path.name}')
        # All loaders read the file first: one that cannot be read is given to the others only sometimes.
        first = dict(list(every.items())[:3])
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        found = measure(loaders, watch, str(path), every if rng.random() < 0.02 else first)
        if found['outcomes']['read_checkpoint'] == 'loaded':
            found = measure(loaders, watch, str(path), every)
        faulthandler.cancel_dump_traceback_later()
        words = {name: outcome.split(':')[0] for name, outcome in found['outcomes'].items()}
        if found['findings']:
            _keep(path, keep, f'{seed}-{number}')
        print(json.dumps(dict(number=number, words=words, findings=found['findings'])), flush=True)


def main() -> int:
    """Run a worker, restart it if it ends too early, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=10, help='how long')
    parser.add_argument('--seed', type=int, default=0, help='of the mutations; the same seed gives the same files')
    parser.add_argument('--keep', type=Path, default=Path('fuzz_findings'), help='folder for files that are findings')
    parser.add_argument('--worker', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.keep, args.seed, 60 * args.minutes)
        return 0
    ends = time.monotonic() + 60 * args.minutes
    counts: Counter[str] = Counter()
    restarts = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        while (left := ends - time.monotonic()) > 1:
            seed = args.seed + 1_000_000 * restarts
            status = _follow(folder, seed, left, counts, args.keep)
            if status:
                counts['findings'] += 1
                print(f'FINDING {seed}: the process ended with {status}', flush=True)
                number, name = (folder / 'current').read_text().split()
                _keep(folder / name, args.keep, f'{seed}-{number}')
            restarts += 1
    print(f'{args.minutes} minutes, seed {args.seed}: {dict(counts)}')
    return 1 if counts['findings'] else 0


def _follow(folder: Path, seed: int, seconds: float, counts: Counter[str], keep: Path) -> int:
    command = [sys.executable, __file__, '--worker', str(folder), '--seed', str(seed), '--minutes', str(seconds / 60)]
    command += ['--keep', str(keep)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if not line.startswith('{"number'):
                continue
            found = json.loads(line)
            counts['files'] += 1
            counts.update(f'{name} {word}' for name, word in found['words'].items())
            for finding in found['findings']:
                counts['findings'] += 1
                print(f'FINDING {seed}-{found["number"]}: {finding}', flush=True)
    return worker.returncode


def _keep(path: Path, keep: Path, name: str) -> None:
    keep.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, keep / f'{name}{path.suffix}')


if __name__ == '__main__':
    sys.exit(main())
