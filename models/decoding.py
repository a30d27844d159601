"""Write a group's answers behind one prompt: feed the tokens drawn, get the hidden states that predict the next.

Packed: one copy of each prompt's keys and values stays, and the answers of its group read it together. Their own keys
go into the columns behind it, so nothing is copied or grows from token to token. An answer that is finished leaves the
rows. Plain: the slow twin, on transformers' own cache, widened to a copy of the prompt for each answer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.shared_prefix import Layout, additive, causal_convolution, sdpa, split_heads


class PackedAnswers:
    """What the layers see while answers are written: the layout of one new token of W answers of each of B prompts."""

    def __init__(self, prompts: Layout, group_size: int, max_length: int):
        rows, device = len(prompts.lengths), prompts.lengths.device
        room = group_size * (max_length - 1)  # the last token is never fed
        self.chosen = torch.arange(group_size, device=device).expand(rows, -1)  # (B, W) which of its group's answers
        self._prompt_seen = torch.arange(prompts.columns, device=device) < prompts.lengths[:, None]  # (B, P)
        self._owners = torch.empty(rows, 0, dtype=torch.long, device=device)  # (B, used) whose token is in a column
        self._mask = torch.empty(0)
        self._repeated: dict[int, Tensor] = {}  # the mask by how many queries share a key
        self._keys_values = {index: (_extended(keys, room), _extended(values, room))
                             for index, (keys, values) in prompts.kept.keys_values.items()}  # (B, heads, P + room, d)
        self._states = {index: (tail.repeat_interleave(group_size, 0), state.repeat_interleave(group_size, 0))
                        for index, (tail, state) in prompts.kept.states.items()}

    def next_column(self) -> None:
        """Open a column for one more token of every answer in the rows."""
        self._owners = torch.cat([self._owners, self.chosen], 1)
        own = self._owners[:, None] == self.chosen[..., None]  # (B, W, used)
        prompt = self._prompt_seen[:, None].expand(-1, own.shape[1], -1)
        self._mask = additive(torch.cat([prompt, own], -1), torch.float32)[:, None]  # (B, 1, W, P + used)
        self._repeated = {}

    def keep(self, places: Tensor) -> None:
        """Leave only some of the answers in the rows: places (B, W') among the W."""
        flat = flat_places(places, self.chosen.shape[1])
        self.chosen = self.chosen.gather(1, places)
        self._states = {index: (tail.index_select(0, flat), state.index_select(0, flat))
                        for index, (tail, state) in self._states.items()}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Full attention of one new token an answer: query (B * W, heads, 1, d)."""
        keys, values = self._keys_values[module.layer_idx]
        (rows, wide), end = self.chosen.shape, self._prompt_seen.shape[1] + self._owners.shape[1]
        heads, width = key.shape[1], key.shape[3]
        keys[:, :, end - wide:end] = key.view(rows, wide, heads, width).transpose(1, 2)
        values[:, :, end - wide:end] = value.view(rows, wide, heads, width).transpose(1, 2)
        # Queries that read the same keys stand in one row: (B, key heads, repeats * W, d).
        repeats = query.shape[1] // heads
        asked = query.view(rows, wide, heads, repeats, width).permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, width)
        if repeats not in self._repeated:  # once a token, not once a layer
            self._repeated[repeats] = self._mask.repeat(1, 1, repeats, 1)
        out = sdpa(asked, keys[:, :, :end], values[:, :, :end], self._repeated[repeats], scaling)
        return out.view(rows, heads, repeats, wide, width).permute(0, 3, 1, 2, 4).reshape(query.shape)

    def recur(self, module: nn.Module, mixed: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
        """Gated delta rule of one new token an answer: mixed (B * W, 1, C)."""
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

        tail, state = self._states[module.layer_idx]
        inputs = torch.cat([tail, mixed.transpose(1, 2)], -1)  # (B W, C, K)
        out, state = torch_recurrent_gated_delta_rule(
            *split_heads(module, causal_convolution(module, inputs)), g=decay, beta=beta, initial_state=state,
            output_final_state=True, use_qk_l2norm_in_kernel=True)
        self._states[module.layer_idx] = inputs[..., 1:], state
        return out


class PackedWriter:
    """Writes answers that share their prompts' keys. rows: (n,) which of the B * G answers are still written."""

    def __init__(self, language_model: nn.Module, prompts: Layout, hidden: Tensor, positions: Tensor,
                 group_size: int, max_length: int):
        """hidden (B, d) and positions ([axes,] B, 1) are those of the prompts' last tokens."""
        self._model = language_model
        self._group_size = group_size
        self._packed = PackedAnswers(prompts, group_size, max_length)
        self._positions = positions.repeat_interleave(group_size, -2)  # ([axes,] B * W, 1)
        self._no_mask = hidden.new_zeros(1, 1, 1, 1)  # four axes: transformers builds no mask; the layout masks
        self.hidden = hidden.repeat_interleave(group_size, 0)  # (n, d)
        self.rows = torch.arange(len(self.hidden), device=hidden.device)

    def feed(self, embedded: Tensor) -> None:
        """Take one more token of each answer, embedded (n, 1, d)."""
        self._positions = self._positions + 1
        self._packed.next_column()
        self.hidden = self._model(inputs_embeds=embedded, attention_mask=self._no_mask, position_ids=self._positions,
                                  use_cache=False, layout=self._packed).last_hidden_state[:, -1]

    def drop(self, stopped: Tensor) -> Tensor | None:
        """Take finished answers out of the rows; stopped: (B * G,) bool. Returns which rows stay; None for all.

        Every prompt keeps as many answers as the one with most, so a finished one can stay for a while.
        """
        finished = stopped.view(-1, self._group_size).gather(1, self._packed.chosen)  # (B, W)
        wide = int((~finished).sum(1).max())
        if wide == finished.shape[1]:
            return None
        places = finished.to(torch.uint8).argsort(dim=1, stable=True)[:, :wide]  # unfinished ones first
        kept = flat_places(places, finished.shape[1])
        self._packed.keep(places)
        self._positions = self._positions.index_select(-2, kept)
        self.rows = self.rows.index_select(0, kept)
        return kept


class PlainWriter:
    """The slow twin of PackedWriter: every answer on a row of its own, with its own copy of the prompt's cache."""

    def __init__(self, language_model: nn.Module, cache: Any, hidden: Tensor, positions: Tensor, mask: Tensor,
                 group_size: int):
        """As PackedWriter; mask: (B, P) bool, False at padding on the left."""
        self._model = language_model
        self._cache = cache
        cache.reorder_cache(torch.arange(len(hidden), device=hidden.device).repeat_interleave(group_size))
        self._positions = positions.repeat_interleave(group_size, -2)
        self._mask = mask.repeat_interleave(group_size, 0)  # (B * G, columns so far)
        self.hidden = hidden.repeat_interleave(group_size, 0)
        self.rows = torch.arange(len(self.hidden), device=hidden.device)

    def feed(self, embedded: Tensor) -> None:
        """Take one more token of each answer, embedded (n, 1, d)."""
        self._positions = self._positions + 1
        self._mask = pad(self._mask, (0, 1), value=True)
        self.hidden = self._model(inputs_embeds=embedded, attention_mask=self._mask, position_ids=self._positions,
                                  past_key_values=self._cache, use_cache=True).last_hidden_state[:, -1]

    def drop(self, stopped: Tensor) -> None:
        """Leave finished answers where they are."""


def flat_places(places: Tensor, wide: int) -> Tensor:
    """Turn places (B, W') among W = wide answers of each prompt into places among all B * W rows."""
    return (places + torch.arange(len(places), device=places.device)[:, None] * wide).flatten()


def _extended(values: Tensor, room: int) -> Tensor:
    """Give keys or values (B, heads, P, d) room for further columns, in the dtype that attention computes in."""
    device = values.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype
    return pad(values.to(dtype), (0, 0, 0, room))
