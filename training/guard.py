"""Compare the fast path with the slow one on a real product, before the first step: nothing wrong trains in silence."""

from collections.abc import Sequence

import torch
from loguru import logger
from torch import Tensor, nn

from config import TrainOptions
from models.family import ModelError
from models.policy import Policy
from models.processes import ALONE, Processes
from models.sharding import differentiating, gathered
from rollout import Group, PromptEncoder, rollout_groups
from sheets.samples import Sample

# By compute dtype: how far log-probs may lie apart, and gradients, as a share of their length.
LIMITS = {torch.float32: (1e-3, 1e-2), torch.bfloat16: (0.5, 0.3)}


def check_on_a_product(policy: Policy, reference: Policy | None, encoder: PromptEncoder, products: Sequence[Sample],
                       options: TrainOptions, processes: Processes = ALONE) -> None:
    """Compare the fast path with the slow one on the first product that can be rolled out.

    Of a policy that is split, all processes call this for the same products, and pass over what one of them can't open.
    """
    for product in products:
        with gathered(policy):
            groups, failures = rollout_groups(encoder, [product], 3, options.temperature, options.max_length, "guard",
                                              1)
        if all(processes.gather(bool(groups))):
            check_fast_path(policy, reference, groups[0], options.temperature)
            return
        why = failures[0] if failures else "another process can't roll it out"
        logger.warning(f"the fast path can't be checked on this product: {why}")


def check_fast_path(policy: Policy, reference: Policy | None, group: Group, temperature: float) -> None:
    """Take one group's log-probs on its shared row and answer by answer; raises ModelError naming what differs.

    Compared are the log-probs taken while sampling, those of policy and reference, and the policy's gradient. The slow
    pass takes one answer at a time, so it needs no more memory than training does.
    """
    log_prob_limit, gradient_limit = LIMITS[policy.dtype]
    probes = choose_probes(policy)
    shared, shared_gradient = log_probs_and_gradient(policy, group, temperature, probes, exact_path=False)
    exact, exact_gradient = log_probs_and_gradient(policy, group, temperature, probes, exact_path=True)
    gaps = {"sampled": float((group.old_log_probs - exact).abs().max()),
            "updated": float((shared - exact).abs().max())}
    if reference is not None:
        pair = [log_probs_and_gradient(reference, group, temperature, [], exact_path=exact_path)[0]
                for exact_path in (False, True)]
        gaps["reference"] = float((pair[0] - pair[1]).abs().max())
    for name, gap in gaps.items():
        if not gap < log_prob_limit:  # so that NaN is caught as well
            raise ModelError(f"the fast path is wrong for this model: {name} log-probs are {gap:.2g} away from those "
                             "of one answer at a time. Take --exact_path")
    if probes:
        gap = float((shared_gradient - exact_gradient).norm() / exact_gradient.norm().clamp(min=1e-30))
        if not gap < gradient_limit:
            raise ModelError(f"the fast path is wrong for this model: its gradient is {gap:.0%} of its length away "
                             "from that of one answer at a time. Take --exact_path")
        gaps["gradient"] = gap
    logger.info("fast path against one answer at a time: " + ", ".join(f"{name} {gap:.1e}" for name, gap in
                                                                        gaps.items()))


def choose_probes(policy: Policy) -> list[nn.Parameter]:
    """Small trainable weights of the first and the last decoder layer: gradients reach the first through all others."""
    layers = policy.family.language_model(policy.model).layers
    return [parameter for layer in (layers[0], layers[-1]) for parameter in layer.parameters()
            if parameter.requires_grad and parameter.numel() <= 2 ** 20]


def log_probs_and_gradient(policy: Policy, group: Group, temperature: float, probes: Sequence[nn.Parameter],
                           exact_path: bool) -> tuple[Tensor, Tensor]:
    """Log-probs (G, T) and the gradient of their sum at the probes, as one vector."""
    parts = [slice(row, row + 1) for row in range(len(group.completions))] if exact_path else [slice(None)]
    log_probs, gradient = [], torch.zeros(())
    for part in parts:
        with torch.set_grad_enabled(bool(probes)), differentiating(policy, probes) as gradients:
            found, _ = policy.log_probs([group.prompt], group.completions[part], group.action_mask[part], temperature,
                                        exact_path=exact_path, with_entropy=False)
            if probes:
                own = gradients(found.sum())
                gradient = gradient.to(found.device) + torch.cat([each.float().flatten() for each in own])
        log_probs.append(found.detach())
    return torch.cat(log_probs), gradient
