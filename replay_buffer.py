"""Experiences of one step: what was sampled, what it was worth, and how likely it was.

An Experience holds one group or several joined ones. Prompts and photo features are held once a product; everything
else has a row per answer, G rows a product in order.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.family import Prompt

_ROWS = ("completions", "action_mask", "old_log_probs", "ref_log_probs", "rewards", "advantages", "truncated",
         "taught")


@dataclass
class Experience:
    """Answers with their log-probs, rewards and advantages. N answers, T completion tokens."""

    completions: Tensor  # (N, T) ids
    action_mask: Tensor  # (N, T) bool: completion tokens, the stop token included
    old_log_probs: Tensor  # (N, T) of the tokens taken, while sampling, or as update.renew_old_log_probs takes them
    ref_log_probs: Tensor | None  # (N, T) under the reference policy
    rewards: Tensor  # (N,)
    advantages: Tensor  # (N,)
    truncated: Tensor | None = None  # (N,) bool: hit the length limit without a stop token
    prompts: tuple[Prompt, ...] = ()  # one a product
    features: tuple[Tensor | None, ...] | None = None  # encoded photos, one a product; None when the vision trains
    sources: tuple[str, ...] = ()  # where each product comes from, for messages: sheet and row
    taught: Tensor | None = None  # (N,) bool: the label written as an answer, which nobody sampled


def join_experiences(experiences: Sequence[Experience]) -> Experience:
    """Join groups into one batch, completions padded on the right. What one of them lacks the batch lacks."""
    columns = max(item.action_mask.shape[1] for item in experiences)

    def widened(value: Tensor) -> Tensor:
        return value if value.dim() == 1 else pad(value, (0, columns - value.shape[1]))

    first = experiences[0]
    joined = {name: torch.cat([widened(getattr(item, name)) for item in experiences]) for name in _ROWS
              if all(getattr(item, name) is not None for item in experiences)}
    features = None if first.features is None else tuple(each for item in experiences for each in item.features or ())
    return replace(first, **dict.fromkeys(_ROWS) | joined, features=features,
                   prompts=tuple(prompt for item in experiences for prompt in item.prompts),
                   sources=tuple(source for item in experiences for source in item.sources))


@dataclass
class ReplayBuffer:
    """The groups of one step."""

    items: list[Experience] = field(default_factory=list)

    def append(self, experience: Experience) -> None:
        """Add a group."""
        self.items.append(experience)

    def parts(self, minibatch_size: int | None) -> int:
        """Count the minibatches of at most minibatch_size groups that an epoch takes; None: one."""
        return math.ceil(len(self.items) / (minibatch_size or max(len(self.items), 1)))

    def minibatches(self, epochs: int, parts: int, seed: int | str) -> Iterator[list[Experience]]:
        """Yield so many lists of groups an epoch, as even as can be: every group once, freshly shuffled each epoch.

        A last one of few groups would move the weights as far as the others do, and by worse advice.
        """
        for epoch in range(epochs):
            order = list(range(len(self.items)))
            random.Random(f"{seed}/{epoch}").shuffle(order)
            for part in range(parts):
                share = order[part * len(order) // parts:(part + 1) * len(order) // parts]
                yield [self.items[index] for index in share]

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors, lists and dictionaries that torch.save writes and weights_only reads."""
        return {"items": [vars(item) | {"prompts": [dict(vars(prompt)) for prompt in item.prompts]}
                          for item in self.items]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what state_dict returned."""
        self.items = [Experience(**item | {"prompts": tuple(Prompt(**prompt) for prompt in item["prompts"])})
                      for item in state["items"]]
