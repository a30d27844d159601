"""Split a policy's weights over all processes (FSDP2): each holds a share, a layer is whole only while it computes.

The units are transformers' own layers, of language and vision; what is outside them belongs to the root, whose forward
is one call a row. While answers are written the weights are gathered once, not once a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from policy import Policy, repeated_layers


def shard(policy: Policy) -> None:
    """Split the weights over the default process group; call it before the optimizer is made."""
    compute = torch.bfloat16 if policy.dtype == torch.bfloat16 else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in repeated_layers(policy.model):
        fully_shard(layer, mp_policy=precision)
    fully_shard(policy.root, mp_policy=precision)


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Hold every weight whole for the time of the block, so that nothing in it waits for another process."""
    units = [module for module in policy.root.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not policy.root, recurse=False)
