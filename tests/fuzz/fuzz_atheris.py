"""Coverage-guided fuzzing of every loader with atheris (libFuzzer); `pip install atheris` first, no test needs it.

python tests/fuzz/fuzz_atheris.py FOLDER [libFuzzer's options, such as -max_total_time=600 -seed=1]

The first byte of an input chooses what the rest is: a file, the pickle of a zip with correct checksums, the pickles of
PyTorch's format before 1.6, or a safetensors file. The corpus in FOLDER starts with valid checkpoints. A finding is any
error but CheckpointError, code that runs, too much memory or time, or an output file that is not a checkpoint.
"""

import sys
import tempfile
from pathlib import Path

import atheris
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(include=['vheat_mm']):
    from fuzz.drive import Loaders, Watch, limit_memory, measure
    from fuzz.hostile_files import records_of, write_zip

    from vheat_mm.checkpoint import pickle_inspector

FORMATS = ('file', 'zip', 'stream', 'safetensors')


def main() -> None:
    """Command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp())
    (scratch / 'out').mkdir()
    pickle_inspector.MAX_OPCODES = 20_000  # to save time
    loaders, watch = Loaders(scratch / 'out'), Watch(scratch)
    state = {key: value[:1].clone() if value.ndim else value for key, value in loaders.model.state_dict().items()}
    records = records_of({'model': state})
    for kind, content in valid_files(scratch, state, records).items():
        (folder / kind).write_bytes(bytes([FORMATS.index(kind)]) + content)

    def drive(data: bytes) -> None:
        if len(data) < 2:
            return
        kind, content = FORMATS[data[0] % len(FORMATS)], data[1:]
        path = scratch / ('x.safetensors' if kind == 'safetensors' else 'x.pth')
        if kind == 'zip':
            write_zip(path, records | {'data.pkl': content})
        else:
            path.write_bytes(content)
        others = loaders.by_name()
        first = {name: others.pop(name) for name in ('verify_file', 'read_checkpoint')}
        found = measure(loaders, watch, str(path), first)
        if found['outcomes']['read_checkpoint'] == 'loaded' or data[0] >= 250:  # the others begin with these two
            found['findings'] += measure(loaders, watch, str(path), others)['findings']
        if found['findings'] or found['seconds'] > 20:
            raise RuntimeError(f'{kind}: {found["findings"]} after {found["seconds"]:.1f} s')

    for kind in FORMATS:  # lazy imports happen here
        drive((folder / kind).read_bytes())
    limit_memory()
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(folder)], drive)
    atheris.Fuzz()


def valid_files(scratch: Path, state: dict[str, torch.Tensor], records: dict[str, bytes]) -> dict[str, bytes]:
    """One checkpoint in each format."""
    from safetensors.torch import save

    torch.save({'model': state}, scratch / 'seed.pth')
    torch.save({'model': state}, scratch / 'old.pth', _use_new_zipfile_serialization=False)
    return {
        'file': (scratch / 'seed.pth').read_bytes(),
        'zip': records['data.pkl'],
        'stream': (scratch / 'old.pth').read_bytes(),
        'safetensors': save({key: value.contiguous() for key, value in state.items()}),
    }


if __name__ == '__main__':
    main()
