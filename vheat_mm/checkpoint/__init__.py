"""Checkpoint files: read safely, verified, downloaded, written whole; which one a run resumes from."""

from vheat_mm.checkpoint.io import read_checkpoint, save_atomically

__all__ = ['read_checkpoint', 'save_atomically']
