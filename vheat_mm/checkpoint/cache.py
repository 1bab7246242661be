"""The local file behind a path, an address or a name; what is downloaded stays in PyTorch's hub cache.

One process downloads, also of those on several machines that share the cache, and the others wait for it. The SHA-256
of the first download is recorded beside the file, as ``sha256sum`` writes it, and later downloads must have the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import urllib.parse
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # which torch requires
from mmengine.logging import print_log

from vheat_mm.checkpoint.download import download, forget
from vheat_mm.checkpoint.released import VARIABLE, Released, check_name, find_released, locate
from vheat_mm.checkpoint.verify import verify
from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.files import PARTIAL, atomic_file, replace_file
from vheat_mm.utils.text import first_line, is_address

FETCH_AGAIN = 'remove it to download it again, or copy it again if it was copied'


def local_file(path: str) -> str:
    """The local file of a path, an http(s) address or the name of a published checkpoint, downloaded if need be.

    Raises:
        CheckpointError: Unknown name; the download failed, or is no intact checkpoint, or another one than before.
    """
    release = find_released(path)
    if release is None:
        if is_address(path):
            return str(_cached(path))
        check_name(path)
        return path
    if os.path.lexists(path):
        text = f'{path!r} is taken as the name of released weights; what lies in the working folder is {f"./{path}"!r}'
        print_log(text, logger='current', level=logging.WARNING)
    place = locate(release)
    local = _cached(place, release) if is_address(place) else Path(place)
    digest = _check_digest(local, local, str(local))
    print_log(f'Released weights {release.name}: {str(local)!r}, SHA-256 {digest}', logger='current')
    return str(local)


def _cached(url: str, release: Released | None = None) -> Path:
    """The file of an address in PyTorch's hub cache, where it is downloaded to and checked unless it is there."""
    try:
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    except ValueError as error:
        raise CheckpointError(f'{url!r} is no valid address: {error}') from error
    if release is None:
        # The name alone does not tell an epoch_12.pth from another one; the address, with its query, does.
        digest = hashlib.sha256(url.split('#')[0].encode()).hexdigest()[:12]
        name = f'{Path(name).stem[:100]}-{digest}{Path(name).suffix[:20]}'
    target = Path(torch.hub.get_dir()) / 'checkpoints' / name
    mirror = f', or set {VARIABLE} to a folder or an address that has {release.path!r}' if release else ''
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(target.with_name(f'.{name}.lock'))
            try:
                held = lock.acquire(timeout=0)
            except Timeout:
                print_log(f'{str(target)!r}: waiting for another process that downloads it', logger='current')
                held = lock.acquire()
            with held:
                if not target.exists():
                    _download(url, target, mirror)
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        raise CheckpointError(
            f'could not download {url!r} to {str(target)!r}: {first_line(error)}. Set TORCH_HOME to a folder for '
            f'downloads that is writable and has room{mirror}'
        ) from error
    return target


def _download(url: str, target: Path, mirror: str) -> None:
    part = target.with_name(f'.{target.name}{PARTIAL}')
    print_log(f'Downloading {url!r} to {str(target)!r}', logger='current')
    try:
        download(url, part)
    except CheckpointError as error:
        raise CheckpointError(f'{error}. Without a network, put the file at {str(target)!r}{mirror}') from error
    try:
        with part.open('rb') as file:
            verify(file, url, target.suffix == '.safetensors')  # an error page is not kept
        digest = _check_digest(part, target, url)
        with atomic_file(_record_of(target)) as record:
            record.write(f'{digest}  {target.name}\n'.encode())
        replace_file(part, target)
    finally:
        forget(part)
    print_log(f'Downloaded {str(target)!r}, SHA-256 {digest}', logger='current')


def _record_of(file: Path) -> Path:
    return file.with_name(f'{file.name}.sha256')


def _check_digest(file: Path, target: Path, source: str) -> str:
    """SHA-256 of a file; an error if another one is recorded beside ``target``."""
    sha = hashlib.sha256()
    with file.open('rb') as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    record, found = _record_of(target), sha.hexdigest()
    expected = record.read_text(encoding='utf-8', errors='replace').split()[:1] if record.exists() else [found]
    if expected != [found]:
        state = f'damaged or was replaced: {FETCH_AGAIN}' if file == target else 'another file than before'
        raise CheckpointError(
            f'{source!r} has SHA-256 {found}, but {str(record)!r} has {"".join(expected)!r} from '
            f'an earlier download: it is {state}. If the change is meant, remove the record'
        )
    return found
