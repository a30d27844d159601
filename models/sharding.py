"""Split a policy's weights over all processes (FSDP2): each holds a share, a layer is whole only while it computes.

The units are transformers' own layers, of language and vision; what is outside them belongs to the root, whose forward
is one call a row. While answers are written the weights are gathered once, not once a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models.policy import Policy, repeated_layers


def shard(policy: Policy) -> None:
    """Split the weights over the default process group; call it before the optimizer is made."""
    compute = torch.bfloat16 if policy.dtype == torch.bfloat16 else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in repeated_layers(policy.model):
        fully_shard(layer, mp_policy=precision)
    fully_shard(policy.root, mp_policy=precision)


def shard_all(policy: Policy, reference: Policy | None) -> list[nn.Parameter]:
    """Split policy and reference over the processes; returns what trains, anew: it is another object now."""
    shard(policy)
    if reference is not None and reference.model is not policy.model:
        shard(reference)
    return [parameter for parameter in policy.model.parameters() if parameter.requires_grad]


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Hold every weight whole for the time of the block, so that nothing in it waits for another process.

    Does nothing to a policy that is not sharded.
    """
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


def whole(value: Any) -> Any:
    """Gather a tensor that is split over the processes, all of which call this; anything else stays as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_weights(policy: Policy, keep: bool) -> dict[str, Tensor]:
    """Gather what a checkpoint holds, a tensor at a time, in all processes; only those that keep it hold it all."""
    tied = set(getattr(policy.model, "all_tied_weights_keys", None) or ())
    kept = {}
    for name, value in policy.model.state_dict().items():
        if name in tied or (policy.adapter is not None and ".lora_" not in name):
            continue
        value = whole(value)
        if keep:
            kept[name] = value.cpu()
    return kept


def load_whole_weights(policy: Policy, weights: dict[str, Tensor]) -> None:
    """Take on what whole_weights gave, each process its share."""
    for name, own in policy.model.state_dict().items():
        if name in weights:
            value = weights[name].to(own.device, own.dtype)
            own.copy_(distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value)


def whole_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """The optimizer's state_dict as one process alone would have it, so that any number of processes can go on."""
    state = optimizer.state_dict()
    gathered_state = {}
    for index, values in state["state"].items():
        values = {name: whole(value) for name, value in values.items()}
        if keep:
            gathered_state[index] = {name: value.cpu() if isinstance(value, Tensor) else value
                                     for name, value in values.items()}
    return state | {"state": gathered_state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take on what whole_optimizer_state gave, each process its share."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[index]
        if isinstance(parameter, DTensor):
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = distribute_tensor(value.to(parameter.device), parameter.device_mesh,
                                                     parameter.placements)
    optimizer.load_state_dict(state)
