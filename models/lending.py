"""Tensors that one process hands to another in shared memory, each piece of it used again when it is let go of.

Fresh shared memory is dear: the kernel zeroes and maps it page by page, eight times the copy itself (74 MB of pixels:
48 ms, of which the copy is 6). A piece's first byte says whether it is lent: who lends writes 1, who borrows writes 0
once the last tensor over it is gone.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

_HEAD = 64  # bytes before the data, which stay aligned
_MAPPED = 2 ** 23  # bytes of a tensor that stays where it is: a smaller one is not worth an open file


class NoSharedMemory(RuntimeError):
    """A tensor that shared memory has no room for."""


class Lender:
    """Lend tensors to another process; a piece is sized for what was lent first and goes where a larger one is due."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []

    def lend(self, tensor: Tensor) -> "Lent":
        """Copy a tensor into shared memory for the process that this is sent to; raises NoSharedMemory."""
        size = _HEAD + tensor.numel() * tensor.element_size()
        piece = self._free_piece(size)
        piece[0] = 1
        _view(piece, tensor.dtype, tensor.shape).copy_(tensor)
        return Lent(piece, tensor.dtype, tensor.shape)

    def _free_piece(self, size: int) -> Tensor:
        free = sorted((index for index, piece in enumerate(self._pieces) if not piece[0]),
                      key=lambda index: len(self._pieces[index]))
        for index in free:
            if len(self._pieces[index]) >= size:
                return self._pieces[index]
        if free:
            del self._pieces[free[-1]]
        try:
            self._pieces.append(torch.empty(size, dtype=torch.uint8).share_memory_())
        except RuntimeError as problem:
            raise NoSharedMemory(str(problem)) from None
        return self._pieces[-1]


class Lent:
    """A lent tensor on its way: where it arrives it is a tensor again, and its piece is free when that is gone."""

    def __init__(self, piece: Tensor, dtype: torch.dtype, shape: torch.Size):
        self._parts = (piece, dtype, shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, self._parts


def _arrive(piece: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if len(piece) < _MAPPED:
        tensor = _view(piece, dtype, shape).clone()
        piece[0] = 0
        return tensor
    array = piece.numpy()
    # A tensor made from an array keeps it as long as any view of that tensor lives; a tensor's own end says less.
    weakref.finalize(array, piece.__setitem__, 0, 0).atexit = False
    return _view(torch.from_numpy(array), dtype, shape)


def _view(piece: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    data = piece[_HEAD:_HEAD + shape.numel() * dtype.itemsize]
    return data.view(dtype).view(shape)
