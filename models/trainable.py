"""What of a policy trains: which parameters, in which parts a person thinks of them, and which got no gradient."""

import torch
from loguru import logger
from torch import nn

from models.lora import TRAINED, part_of
from models.policy import Policy


def set_trainable(policy: Policy, train_vision: bool) -> list[nn.Parameter]:
    """Let the language model train, and the vision with train_vision, or the adapter alone where there is one.

    Returns the trainable parameters.

    They are float32 whatever the compute dtype: an update of 1e-6 relative size vanishes in bfloat16.
    """
    policy.model.requires_grad_(policy.adapter is None)
    for module in policy.family.vision_modules(policy.model):
        module.requires_grad_(train_vision)
    for name, parameter in policy.model.named_parameters():
        if part_of(name, TRAINED):
            parameter.requires_grad_(True)
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return parameters


def parameter_parts(policy: Policy) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Group parameters by the part a person thinks in: vision, embeddings, each kind of layer, head, adapters."""
    vision = {id(parameter) for module in policy.family.vision_modules(policy.model)
              for parameter in module.parameters()}
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in policy.model.named_parameters():
        words = [word for word in name.split(".")[:-1] if word not in ("model", "layers", "visual")]
        if id(parameter) in vision:
            part = "vision: " + words[0]
        else:
            words = [word for word in words if not word.isdigit()]
            part = "adapter: " + words[1] if ".lora_" in name else "language: " + ".".join(words[:2])
        parts.setdefault(part, []).append((name, parameter))
    return parts


def parameter_table(policy: Policy) -> str:
    """Say how many parameters of each part train."""
    lines = [f"{'part':<44}{'parameters':>14}{'trainable':>14}"]
    total = trainable = 0
    for part, named in parameter_parts(policy).items():
        count = sum(parameter.numel() for _, parameter in named)
        trains = sum(parameter.numel() for _, parameter in named if parameter.requires_grad)
        total, trainable = total + count, trainable + trains
        lines.append(f"{part:<44}{count:>14,}{trains:>14,}")
    return "\n".join([*lines, f"{'all':<44}{total:>14,}{trainable:>14,}"])


def warn_without_gradient(policy: Policy) -> list[str]:
    """Warn of each part that should train but got no gradient; call it after the first backward pass."""
    silent = [part for part, named in parameter_parts(policy).items()
              if any(parameter.requires_grad for _, parameter in named)
              and not any(parameter.grad is not None and bool(parameter.grad.any()) for _, parameter in named)]
    for part in silent:
        logger.warning(f"{part} should train but got no gradient at the first step; it stays as it is")
    return silent
