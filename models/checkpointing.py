"""Layers that drop what they computed and compute it again in the backward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers stacks, of language and vision: what is checkpointed and sharded one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Checkpoint layers in a forward pass with gradient.

    Transformers' layers do so in training mode only. The layers alone get it, not what is inside: no dropout.
    """
    for layer in layers:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = layer.training = torch.is_grad_enabled()
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
