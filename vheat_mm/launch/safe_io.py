"""Files that are read without running code and written entirely or not at all, for the tools' processes."""

from __future__ import annotations

from typing import Any

from mmengine.fileio import register_backend
from mmengine.runner import CheckpointLoader

from ..checkpoint import read_checkpoint
from ..hooks.atomic_checkpoint import AtomicLocalBackend


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
