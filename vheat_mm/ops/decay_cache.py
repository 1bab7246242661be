"""Decay maps of recently seen resolutions, for inference."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Entry(NamedTuple):
    state: tuple
    held: list[torch.UntypedStorage]
    tensors: list[Tensor]


class DecayCache:
    """Least-recently-used store of tensors that derive from weights, bounded in bytes.

    An entry is returned only while every weight it was computed from is the very same tensor, unmodified: optimizer
    steps, ``load_state_dict``, ``.to()`` and in-place edits all show in a tensor's address, type, device or version
    counter. (An entry holds on to the memory it was computed from, lest another tensor come to lie at that address.)
    Writes through ``.data`` show in none of these; models that are edited so (MMEngine swaps EMA weights that way) are
    covered by :meth:`clear`, which :class:`~vheat_mm.VHeat` calls at every ``train()`` / ``eval()``.

    Args:
        max_bytes: Bound of the sum of all entries; an entry that is larger on its own is never stored.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self.max_bytes = max_bytes
        self.builds = 0  # entries computed since creation
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.RLock()  # compiled graphs of all threads share one cache

    def get(self, key: Hashable, sources: Sequence[Tensor], build: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the entry for ``key``, building it anew if it is absent or a source has changed."""
        if any(source.is_inference() for source in sources):
            return build()  # such tensors keep no version: changes would go unseen
        with self._lock:
            state = tuple((s.data_ptr(), s._version, s.dtype, s.device) for s in sources)
            entry = self._entries.get(key)
            if entry is not None and entry.state == state:
                self._entries.move_to_end(key)
                return entry.tensors
            # Entries outlive the mode they are built in: tensors of inference mode could not be used under autograd.
            with torch.inference_mode(False), torch.no_grad():
                tensors = build()
            self.builds += 1
            # A CUDA graph under capture owns its memory and may reuse it at the next replay.
            if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                self._entries.pop(key, None)
                self._entries[key] = _Entry(state, [s.untyped_storage() for s in sources], tensors)
                while self.nbytes > self.max_bytes:
                    self._entries.popitem(last=False)
            return tensors

    @property
    def nbytes(self) -> int:
        """Bytes held by all entries."""
        return sum(t.numel() * t.element_size() for entry in self._entries.values() for t in entry.tensors)

    def clear(self, which: Callable[[Any], bool] = lambda key: True) -> None:
        """Drop the entries whose key fits, by default all."""
        with self._lock:
            for key in [key for key in self._entries if which(key)]:
                del self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict) -> DecayCache:
        return DecayCache(self.max_bytes)  # entries belong to the original's weights

    def __reduce__(self) -> tuple:
        return (DecayCache, (self.max_bytes,))
