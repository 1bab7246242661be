"""Checkpoints in several files, as on the Hugging Face Hub: an index in JSON names the shard of each tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from vheat_mm.utils.errors import CheckpointError
from vheat_mm.utils.files import expand_user, read_regular
from vheat_mm.utils.text import first_line, is_address, some_of

INDEX = '.index.json'
# In the order in which transformers looks for them in a folder.
_IN_FOLDERS = ('model.safetensors', f'model.safetensors{INDEX}', 'pytorch_model.bin', f'pytorch_model.bin{INDEX}')
_SHARD = re.compile(r'(.*)-\d{5}-of-(\d{5})(\.\w+)')
_MAX_INDEX = 1 << 22  # bytes; about 100 for each tensor


def find_file(place: str) -> str:
    """The file that a path or an address means: itself, or the checkpoint or index in the folder that it names.

    Raises:
        CheckpointError: A folder without any; a shard, which is a part only; the address of an index, or one with
            a password.
    """
    if is_address(place):
        host = place.split('/', 3)[2]
        if '@' in host:  # Python does not send them, and messages and logs would show them
            host = host.rsplit('@', 1)[1]
            raise CheckpointError(f'an address of {host!r} has a user name or password in it: give it without')
        name = re.split('[?#]', place)[0].rsplit('/', 1)[-1]
        if name.endswith(INDEX) or _is_shard(name):
            raise CheckpointError(
                f'{place!r} belongs to a checkpoint in several files, which are not downloaded: get them all, as with '
                '"hf download REPOSITORY --local-dir FOLDER", and give the folder'
            )
        return place
    path = expand_user(place)
    try:
        is_folder = path.is_dir()
        found = [name for name in _IN_FOLDERS if is_folder and (path / name).exists()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{place!r} cannot be read: {first_line(error)}') from error
    if found:
        if found[1:]:
            print_log(f'{place!r} holds {" and ".join(found)}: {found[0]} is read', logger='current')
        return str(path / found[0])
    if is_folder:
        names = ', '.join(_IN_FOLDERS)
        raise CheckpointError(f'{place!r} is not a file but a folder without {names}: give the path of a file in it')
    if shard := _is_shard(path.name):
        index = path.with_name(f'{shard[1]}{shard[3]}{INDEX}')
        absent = f'copy the others and {index.name!r} beside it, and give that'
        remedy = f'give {str(index)!r}' if index.exists() else absent
        raise CheckpointError(f'{place!r} is one of {int(shard[2])} shards of a checkpoint: {remedy}')
    return str(path) if place.endswith(INDEX) else place


def _is_shard(name: str) -> re.Match | None:
    """The parts of a shard's name, ``None`` for other files and for the only one of a checkpoint."""
    shard = _SHARD.fullmatch(name)
    return shard if shard and int(shard[2]) > 1 else None


def read_shards(index: str, name: str, read: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    """The tensors of all shards that an index names.

    Args:
        index: Path of the index; its shards are beside it.
        name: The index, for errors.
        read: Reads a shard; of its path, and of its name for errors.

    Raises:
        CheckpointError: The index is damaged, or names files outside of its folder; a shard is missing or damaged, or
            holds other tensors than the index says.
    """
    state: dict[str, Any] = {}
    for shard, keys in find_shards(index, name).items():
        part = read(shard, shard)
        missing, extra = [key for key in keys if key not in part], [key for key in part if key not in keys]
        if missing or extra:
            raise CheckpointError(
                f'{name!r} and its shard {shard!r} do not belong together: missing in it are {some_of(missing)}; '
                f'of another shard or of none are {some_of(extra)}. Copy all files again from one source'
            )
        state |= part
    return state


def find_shards(index: str, name: str) -> dict[str, set[str]]:
    """Paths of the shards, and the keys of the tensors in each; see :func:`read_shards`."""
    return {_find_shard(Path(index).parent, shard, name): keys for shard, keys in _read_index(index, name).items()}


def _read_index(index: str, name: str) -> dict[str, set[str]]:
    """The keys of the tensors in each shard."""
    try:
        content = json.loads(read_regular(index, _MAX_INDEX))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'{name!r} is no index of shards: {first_line(error)}. Copy it again') from error
    places = content.get('weight_map') if isinstance(content, dict) else None
    if not places or not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{name!r} is no index of shards: its 'weight_map' does not give a file for each tensor")
    wanted: dict[str, set[str]] = {}
    for key, shard in places.items():
        wanted.setdefault(shard, set()).add(key)
    return wanted


def _find_shard(folder: Path, shard: str, name: str) -> str:
    """Path of a shard: a file in the folder of the index."""
    if not os.path.isfile(folder / shard):  # noqa: PTH113 (Path's raises for long names)
        raise CheckpointError(f'{name!r} names the shard {first_line(shard)!r}, no file beside it: copy it there')
    folder, file = folder.resolve(), (folder / shard).resolve()
    # In the cache of the Hugging Face Hub, snapshots/<commit>/<file> is a link to ../../blobs/<digest>.
    blobs = folder.parent.parent / 'blobs' if folder.parent.name == 'snapshots' else folder
    if file.parent not in (folder, blobs):
        raise CheckpointError(f'{name!r} names the shard {shard!r}, which is {str(file)!r} outside of its folder')
    return str(folder / shard)
