"""From what a user names to a list of inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vheat_mm.apis.inference.types import Item
from vheat_mm.utils.errors import ToolError


def list_items(sources: Sequence[str | os.PathLike], recursive: bool = False) -> list[Item]:
    """Files, and the files of folders, in alphabetical order.

    Raises:
        ToolError: A source does not exist; there are no files.
    """
    items: list[Item] = []
    for source in map(Path, sources):
        if not source.exists():
            raise ToolError(f'there is no {str(source)!r} (working directory {Path.cwd()})')
        pattern = '**/*' if recursive else '*'
        files = sorted(path for path in source.glob(pattern) if path.is_file()) if source.is_dir() else [source]
        root = source if source.is_dir() else source.parent
        items += [Item(str(file), file.relative_to(root).as_posix(), 0, str(source)) for file in files]
    if not items:
        raise ToolError(f'no files in {", ".join(map(str, sources))}')
    return [Item(item.path, item.name, index, item.source) for index, item in enumerate(items)]
