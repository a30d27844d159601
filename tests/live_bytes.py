"""Bytes of the tensors that are alive, counted at every operation: what a GPU's allocator would have given out."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the storages that operations make: now, and at most so far (peak).

    Tensors that were there before are not counted, nor what a kernel takes for itself.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def _meet(self, storage, size):
        key = storage._cdata
        if key not in self._known:
            self._known[key] = size
            weakref.finalize(storage, self._lose, key)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _lose(self, key):
        self.now -= self._known.pop(key)


def held_by(tensors):
    """Bytes of tensors, those that share a storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors
                if isinstance(tensor, torch.Tensor)}
    return sum(storages.values())
