"""Decay maps of recently seen resolutions, for inference on CPUs."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# Compiled graphs hold numbers, not objects: a graph names the cache of its model by its handle.
_CACHES: WeakValueDictionary[int, DecayCache] = WeakValueDictionary()
_handles = itertools.count()


class _Entry(NamedTuple):
    sources: list[Tensor]  # copies
    tensors: list[Tensor]


class DecayCache:
    """Least-recently-used store of tensors that derive from weights, bounded in bytes; one per model.

    An entry is returned only while the contents of every weight it was computed from are the same: it holds a
    copy of them to compare with. Many writes leave no trace on a tensor (``.data``, fused
    optimizers, shared memory, NumPy views), so nothing less than the contents is asked. Compiled graphs use the same
    store.

    Args:
        max_bytes: Bound of the sum of all entries, copies included; a larger entry is never stored.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self.max_bytes = max_bytes
        self.builds = 0  # entries computed since creation
        number = next(_handles)
        with torch.inference_mode(False):
            self.handle = torch.tensor(number, device='cpu')  # an input of graphs: one graph serves all models
        _CACHES[number] = self
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Hashable, sources: Sequence[Tensor], build: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the entry for ``key``, computing it if it is absent or a source has changed."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and _are_equal(entry.sources, sources):
                self._entries.move_to_end(key)
                return entry.tensors
            # Entries are used in other modes as well: tensors made in inference mode could not be used under autograd.
            with torch.inference_mode(False), torch.no_grad():
                copies = [source.detach().clone() for source in sources]
                tensors = build()
            self.builds += 1
            self._entries.pop(key, None)
            self._entries[key] = _Entry(copies, tensors)
            while self.nbytes > self.max_bytes:
                self._entries.popitem(last=False)
            return tensors

    @property
    def nbytes(self) -> int:
        """Bytes held by all entries."""
        return sum(t.numel() * t.element_size() for entry in self._entries.values() for part in entry for t in part)

    def clear(self) -> None:
        """Drop all entries."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict) -> DecayCache:
        return DecayCache(self.max_bytes)  # a copy of a model computes its own

    def __reduce__(self) -> tuple:
        return (DecayCache, (self.max_bytes,))


def fetch(handle: Tensor, key: Hashable, sources: Sequence[Tensor], build: Callable[[], list[Tensor]]) -> list[Tensor]:
    """:meth:`DecayCache.get` of the cache with this handle; built without one where its model is gone."""
    cache = _CACHES.get(int(handle))
    return build() if cache is None else cache.get(key, sources, build)


def _are_equal(copies: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    return len(copies) == len(sources) and all(
        a.dtype is b.dtype and a.shape == b.shape and a.device == b.device and _is_equal(a, b)
        for a, b in zip(copies, sources, strict=True)
    )


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Compared as 64-bit integers where that is a view: twice as fast, and NaN equals itself."""
    size = a.element_size()
    if all(t.is_contiguous() and t.numel() * size % 8 == t.storage_offset() * size % 8 == 0 for t in (a, b)):
        a, b = (t.detach().view(-1).view(torch.int64) for t in (a, b))
    return torch.equal(a, b)
