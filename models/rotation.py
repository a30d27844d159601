"""Rotary positions in few passes over memory."""

from typing import Any

import torch
from torch import Tensor


def turn(heads: Tensor, cos: Tensor, down: Tensor, up: Tensor, sign: int = 1) -> Tensor:
    """Rotate columns of heads (.., d) in pairs d/2 apart, without gradient.

    first' = first cos - second down, second' = second cos + first up; cos (.., d), down and up (.., d/2). sign -1 turns
    the other way.
    """
    half = heads.shape[-1] // 2
    turned = heads * cos
    turned[..., :half].addcmul_(heads[..., half:], down, value=-sign)
    turned[..., half:].addcmul_(heads[..., :half], up, value=sign)
    return turned


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(heads, cos, *sin.chunk(2, -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return turn(grad, cos, second, first, sign=-1), None, None


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads (.., d) by cos and sin (.., d), with gradient for heads alone: its twin is rotate_half() of
    transformers, which copies everything four times."""
    return _Turned.apply(heads, cos, sin)
