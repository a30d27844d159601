"""Split a policy's weights over all processes (FSDP2): each holds a share, a layer is whole only while it computes.

Each process reads no more than its share. The units are transformers' own layers, of language and vision; what is
outside them belongs to the root, whose forward is one call a row. While answers are written the weights are gathered
once, not once a token.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor

from models.checkpointing import repeated_layers
from models.family import ModelError
from models.lora import part_of
from models.policy import Policy, Root
from models.weights import own_rows


def splitter(dtype: torch.dtype, grid: DeviceMesh | None = None, offload: bool = False) -> Callable[..., Root]:
    """Give a function that splits a model's weights over all processes, or over those of each machine of the grid, and
    returns the root under which it computes from now on, a given one or a new one.

    dtype: that of matrix products. offload: shares stay in the host's memory. A model on meta reads only this process's
    share of its weights afterwards.
    """
    compute = torch.bfloat16 if dtype == torch.bfloat16 else None
    how = {"mesh": grid and grid["fsdp"],
           "mp_policy": MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False),
           "offload_policy": CPUOffloadPolicy(torch.cuda.is_available()) if offload else OffloadPolicy()}

    def split(model: nn.Module, root: Root | None = None) -> Root:
        for layer in repeated_layers(model):
            fully_shard(layer, **how)
        return fully_shard(root or Root(model), **how)

    return split


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Hold every weight whole for the time of the block, so that nothing in it waits for another process.

    Does nothing to a policy that is not sharded. Raises ModelError where there is no memory for that.
    """
    units = units_of(policy)
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
    except torch.OutOfMemoryError as problem:
        raise ModelError("out of memory while gathering all weights, as sampling and the reference want them: try "
                         "--dtype bfloat16, or --lora_rank with --sharding none") from problem
    try:
        yield
    finally:
        give_back(policy)
        for unit in units:
            unit.set_reshard_after_forward(unit is not policy.root, recurse=False)


def is_split(policy: Policy) -> bool:
    """Whether this process holds no more than a share of the weights."""
    return isinstance(policy.root, FSDPModule)


def units_of(policy: Policy) -> list[FSDPModule]:
    """The modules whose weights are gathered together, the root first; none of a policy that is not split."""
    return [module for module in policy.root.modules() if isinstance(module, FSDPModule)]


def give_back(policy: Policy) -> None:
    """Keep no more than this process's share, and forget passes: what one without gradient, or one that failed, leaves
    behind would let the next one gather in another order than other processes do."""
    for unit in units_of(policy):
        unit.reshard()
    if is_split(policy) and policy.root._get_fsdp_state()._is_root:  # a pass has been made
        policy.root.reset_iter_state()


def numbers_at_once(policy: Policy) -> int:
    """How many weights of a split policy lie whole at once in a pass, at most: those outside the layers, and those of a
    layer three times over while the next one is gathered."""
    everything, *layers = (sum(parameter.numel() for parameter in module.parameters())
                           for module in (policy.model, *repeated_layers(policy.model)))
    return everything - sum(layers) + 3 * max(layers, default=0)


class Lockstep:
    """Keeps the processes in step in passes over weights that are split, where one of them fails half-way.

    The others wait for it at every layer that they gather, and for its gradients. So what this process has taken part
    in is counted, and make_up() takes part in the rest: the order is the same in every pass, whatever is computed.
    """

    def __init__(self, policy: Policy):
        self._policy = policy
        self._taken_part = 0  # in so many of the pass's collectives
        self._to_leave_out = 0  # so many of the next ones
        for unit in units_of(policy):
            unit.set_custom_all_gather(_CountedGather(self))
            unit.set_custom_reduce_scatter(_CountedReduction(self))

    def begin_pass(self, reduces: bool) -> None:
        """Begin a forward and backward pass. reduces False: gradients stay whole here, and a later pass reduces them.
        """
        self._taken_part = 0
        self._policy.root.set_requires_gradient_sync(reduces)

    def takes_part(self) -> bool:
        """Whether to take part in the next collective."""
        if self._to_leave_out:
            self._to_leave_out -= 1
            return False
        self._taken_part += 1
        return True

    def make_up(self, smallest_pass: Callable[[], None]) -> None:
        """After a pass that failed, whose tensors are gone, do the smallest one for what the others still wait for.

        What it computes means nothing: forget_gradients() comes next, in all processes.
        """
        give_back(self._policy)
        self.forget_gradients()
        self._to_leave_out = self._taken_part
        smallest_pass()
        assert not self._to_leave_out, "the smallest pass gathers less than the one that failed"

    def forget_gradients(self) -> None:
        """Drop gradients that wait, whole, for a later pass to reduce them."""
        for unit in units_of(self._policy):
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = None
                    if hasattr(parameter, "_unsharded_param"):
                        parameter._unsharded_param.grad = None


class _CountedGather(DefaultAllGather):
    def __init__(self, lockstep: Lockstep):
        self._lockstep = lockstep

    def __call__(self, output_tensor: Tensor, *args: Any, **more: Any) -> Any:
        if self._lockstep.takes_part():
            return super().__call__(output_tensor, *args, **more)
        output_tensor.zero_()
        return None


class _CountedReduction(DefaultReduceScatter):
    def __init__(self, lockstep: Lockstep):
        self._lockstep = lockstep

    def __call__(self, output_tensor: Tensor, *args: Any, **more: Any) -> Any:
        return super().__call__(output_tensor, *args, **more) if self._lockstep.takes_part() else None


@contextmanager
def gathering_in_float32(policy: Policy) -> Iterator[None]:
    """Gather the weights of a split policy in float32 for the time of the block, whatever they are multiplied in.

    Does nothing to a policy that is not split.
    """
    units = units_of(policy)
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    policies = [group.mp_policy for group in groups]

    def gather_as(precisions: Sequence[MixedPrecisionPolicy]) -> None:
        for unit in units:
            unit.reshard()
        for group, precision in zip(groups, precisions, strict=True):
            group.mp_policy = precision
            for parameter in group.fsdp_params:  # room for whole weights is made at the first gathering and kept
                parameter.init_dtype_attrs(precision)
                parameter.all_gather_outputs = []
                vars(parameter).pop("_unsharded_param", None)

    gather_as([replace(precision, param_dtype=torch.float32) for precision in policies])
    try:
        yield
    finally:
        gather_as(policies)


@contextmanager
def differentiating(policy: Policy, parameters: Sequence[nn.Parameter]) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """Give a function that takes a loss, computed in the block, to its whole gradients at some of the parameters.

    Of a policy that is split, all processes call it with the same loss; no other parameter gets a gradient.
    """
    if not is_split(policy):
        yield lambda loss: list(torch.autograd.grad(loss, parameters))
        return
    wanted = {id(parameter) for parameter in parameters}
    others = [parameter for parameter in policy.model.parameters()
              if parameter.requires_grad and id(parameter) not in wanted]

    def gradients(loss: Tensor) -> list[Tensor]:
        loss.backward()
        found = [whole(parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return found

    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield gradients
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def whole(value: Any) -> Any:
    """Gather a tensor that is split over the processes, all of which call this; anything else stays as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be split, without gradient."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole_weights(policy: Policy, keep: bool) -> dict[str, Tensor]:
    """Gather what a checkpoint holds, a tensor at a time, in all processes; only those that keep it hold it all."""
    tied = set(getattr(policy.model, "all_tied_weights_keys", None) or ())
    kept = {}
    for name, value in policy.model.state_dict().items():
        if name in tied or (policy.adapter is not None and not part_of(name, policy.adapter_name)):
            continue
        value = whole(value)
        if keep:
            kept[name] = value.cpu()
    return kept


def load_whole_weights(policy: Policy, weights: dict[str, Tensor]) -> None:
    """Take on what whole_weights gave, each process its share; no more is read of weights that are in a file."""
    for name, own in policy.model.state_dict().items():
        if name in weights:
            own_part(own).copy_(weights[name][own_rows(own)] if isinstance(own, DTensor) else weights[name])


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
    """Take on what whole_optimizer_state gave, each process its share; no more is read of a state that is in a file.

    Whether its kernels are fused depends on where the optimizer is, not on where the state comes from.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[index]
        for name, value in values.items():
            if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
                values[name] = copy.deepcopy(value)  # 8-bit moments are no tensors but dictionaries of them
                continue
            own = value[own_rows(parameter)].to(parameter.device, copy=True)
            held = DTensor.from_local(own, parameter.device_mesh, parameter.placements, run_check=False,
                                      shape=parameter.shape, stride=parameter.stride())
            values[name] = held.to(parameter.device)  # with --offload the mesh is of GPUs, the share on the host
    groups = [saved | {name: own[name] for name in ("fused",) if name in own}  # the machine's choice, not the run's
              for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict(state | {"param_groups": groups})
