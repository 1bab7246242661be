"""Safe reading and atomic writing of files in MMEngine, for the processes of the tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner import CheckpointLoader

from vheat_mm.checkpoint.io import atomic_file, read_checkpoint


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """MMEngine's checkpoint loader, replaced by :func:`vheat_mm.checkpoint.read_checkpoint`.

    Args:
        filename: Path or address.
        map_location: Ignored: tensors stay on the CPU until they are copied into the model.
    """
    return read_checkpoint(filename)


def install() -> None:
    """Make MMEngine use :func:`load_from_local` and :class:`AtomicLocalBackend` in this process."""
    register_backend('local', AtomicLocalBackend, prefixes='', force=True)
    CheckpointLoader.register_scheme(prefixes=('', 'http://', 'https://'), loader=load_from_local, force=True)


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local backend whose ``put`` writes a temporary file and renames it.

    A full disk, or a kill while writing, leaves the earlier file as it was.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` and create missing folders. Raises OSError with the path on failure."""
        target = Path(filepath)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_file(target) as file:
                file.write(obj)
        except OSError as error:
            raise OSError(error.errno, f'{error.strerror} while writing', str(target)) from error

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text, as :meth:`put`."""
        self.put(obj.encode(encoding), filepath)
