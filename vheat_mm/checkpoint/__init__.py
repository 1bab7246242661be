"""Checkpoint files: reading untrusted ones safely, verification, download, atomic writing, choice for resuming."""

from vheat_mm.checkpoint.io import read_checkpoint, save_atomically

__all__ = ['read_checkpoint', 'save_atomically']
