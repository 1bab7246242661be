"""Files that are read without running code and written entirely or not at all, for the tools' processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner import CheckpointLoader

from vheat_mm.checkpoint.io import atomic_file, read_checkpoint


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Checkpoint loader for MMEngine; see :func:`vheat_mm.checkpoint.read_checkpoint`.

    Args:
        filename: Path or address.
        map_location: Where MMEngine wants the tensors: the CPU will do, as it copies them into the model.
    """
    return read_checkpoint(filename)


def install() -> None:
    """Make MMEngine use the two above in this process."""
    register_backend('local', AtomicLocalBackend, prefixes='', force=True)
    CheckpointLoader.register_scheme(prefixes=('', 'http://', 'https://'), loader=load_from_local, force=True)


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local files, but for ``put``, which writes beside the target and renames.

    A full disk, or a kill while writing, leaves no truncated file behind, and no damaged earlier one.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj``; missing folders are made. Raises OSError with the path on failure."""
        target = Path(filepath)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_file(target) as file:
                file.write(obj)
        except OSError as error:
            raise OSError(error.errno, f'{error.strerror} while writing', str(target)) from error

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text likewise."""
        self.put(obj.encode(encoding), filepath)
