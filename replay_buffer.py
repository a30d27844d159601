"""Experiences of one step: what was sampled, what it was worth, and how likely it was.

An Experience holds one group or several joined ones. Prompt and photo tensors are held once a product; everything
else has a row per answer, G rows a product in order.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.family import Prompt

_PROMPT_AND_ANSWER = ("sequences", "attention_mask")  # the fields with P + T columns; the others have T


@dataclass
class Experience:
    """Answers with their log-probs, rewards and advantages. N answers, T completion tokens, P prompt tokens."""

    sequences: Tensor  # (N, P + T) prompt and completion ids; the last T columns are the completion
    action_log_probs: Tensor  # (N, T) old log-probs, taken while sampling
    log_probs_ref: Tensor | None  # (N, T) under the reference policy
    returns: Tensor  # (N,) rewards
    advantages: Tensor  # (N,)
    attention_mask: Tensor  # (N, P + T) bool
    action_mask: Tensor  # (N, T) bool: completion tokens, the stop token included
    truncated: Tensor | None = None  # (N,) bool: hit the length limit without a stop token
    prompts: tuple[Prompt, ...] = ()  # one a product
    features: tuple[Tensor | None, ...] | None = None  # encoded photos, one a product; None when the vision trains
    sources: tuple[str, ...] = ()  # where each product comes from, for messages: sheet and row

    @property
    def completions(self) -> Tensor:
        """The completion ids, (N, T)."""
        return self.sequences[:, -self.action_mask.shape[1]:]

    def to(self, device: torch.device | str) -> "Experience":
        """Move the tensors with a row per answer, and the features; prompts stay on the CPU."""
        moved = {name: value.to(device) for name, value in self._tensors().items()}
        if self.features is not None:
            moved["features"] = tuple(None if value is None else value.to(device) for value in self.features)
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        return {item.name: value for item in fields(self)
                if isinstance(value := getattr(self, item.name), Tensor)}


def make_experience(prompt: Prompt, completions: Tensor, action_mask: Tensor, **values: Any) -> Experience:
    """Build one group's experience from its prompt and completions (G, T)."""
    prompt_ids = prompt.input_ids.to(completions.device).expand(len(completions), -1)  # (G, P)
    return Experience(sequences=torch.cat([prompt_ids, completions], 1), action_mask=action_mask,
                      attention_mask=torch.cat([torch.ones_like(prompt_ids, dtype=torch.bool), action_mask], 1),
                      prompts=(prompt,), **values)


def join_experiences(experiences: Sequence[Experience]) -> Experience:
    """Join groups into one batch: prompts padded on the left, completions on the right."""
    columns = max(item.action_mask.shape[1] for item in experiences)
    prompt_columns = max(item.sequences.shape[1] - item.action_mask.shape[1] for item in experiences)

    def widened(item: Experience, name: str) -> Tensor:
        value = getattr(item, name)
        right = columns - item.action_mask.shape[1]
        left = prompt_columns - (item.sequences.shape[1] - item.action_mask.shape[1])
        return value if value.dim() == 1 else pad(value, (left if name in _PROMPT_AND_ANSWER else 0, right))

    joined = {name: torch.cat([widened(item, name) for item in experiences]) for name in experiences[0]._tensors()}
    features = None if experiences[0].features is None else \
        tuple(feature for item in experiences for feature in item.features or ())
    return replace(experiences[0], **joined, features=features,
                   prompts=tuple(prompt for item in experiences for prompt in item.prompts),
                   sources=tuple(source for item in experiences for source in item.sources))


def split_experience(experience: Experience) -> list[Experience]:
    """Split a joined batch into its groups again, padding cut off; without prompts it is one group."""
    if len(experience.prompts) < 2:
        return [experience]
    group_size = len(experience.sequences) // len(experience.prompts)
    columns = experience.action_mask.shape[1]
    prompt_columns = experience.sequences.shape[1] - columns
    parts = []
    for index, prompt in enumerate(experience.prompts):
        rows = slice(index * group_size, (index + 1) * group_size)
        longest = int(experience.action_mask[rows].sum(1).max())
        start = prompt_columns - len(prompt.input_ids)
        cut = {}
        for name, value in experience._tensors().items():
            value = value[rows]
            if value.dim() == 2:
                value = value[:, start:prompt_columns + longest] if name in _PROMPT_AND_ANSWER else value[:, :longest]
            cut[name] = value
        features = None if experience.features is None else (experience.features[index],)
        parts.append(replace(experience, **cut, prompts=(prompt,), features=features,
                             sources=experience.sources[index:index + 1]))
    return parts


@dataclass
class ReplayBuffer:
    """The groups of one step. limit: groups kept at most, the oldest go first; 0 keeps all."""

    limit: int = 0
    items: list[Experience] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Experience:
        return self.items[index]

    def append(self, experience: Experience) -> None:
        """Add groups; a joined experience is split first."""
        self.items.extend(split_experience(experience))
        if self.limit > 0:
            del self.items[:-self.limit]

    def clear(self) -> None:
        """Forget everything."""
        self.items.clear()

    def sample(self, count: int, seed: int | str = 0) -> Experience:
        """Join `count` different groups drawn at random."""
        return join_experiences(random.Random(str(seed)).sample(self.items, count))

    def minibatches(self, epochs: int, minibatch_size: int | None, seed: int | str) -> Iterator[list[Experience]]:
        """Yield lists of at most minibatch_size groups, every group once an epoch, freshly shuffled each epoch."""
        size = minibatch_size or max(len(self.items), 1)
        for epoch in range(epochs):
            order = list(range(len(self.items)))
            random.Random(f"{seed}/{epoch}").shuffle(order)
            for start in range(0, len(order), size):
                yield [self.items[index] for index in order[start:start + size]]

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and lists that torch.save writes and weights_only reads."""
        return {"limit": self.limit, "items": [_plain(item) for item in self.items]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what state_dict returned."""
        self.limit = state["limit"]
        self.items = [Experience(**{**item, "prompts": tuple(Prompt(**prompt) for prompt in item["prompts"]),
                                    "features": None if item["features"] is None else tuple(item["features"]),
                                    "sources": tuple(item["sources"])})
                      for item in state["items"]]


def _plain(experience: Experience) -> dict[str, Any]:
    values = {item.name: getattr(experience, item.name) for item in fields(experience)}
    values["prompts"] = [{"input_ids": prompt.input_ids, "photos": dict(prompt.photos)}
                         for prompt in experience.prompts]
    values["features"] = None if experience.features is None else list(experience.features)
    values["sources"] = list(experience.sources)
    return values
