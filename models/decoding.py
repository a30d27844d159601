"""Write a group's answers behind one prompt: feed the tokens drawn, get the hidden states that predict the next.

Packed: one copy of each prompt's keys and values stays, and the answers of its group read it together. Their own keys
go into columns behind it, in buffers with room for many tokens, so that every token takes the same operations, of the
same shapes, at the same addresses, until answers that are finished leave the rows or the room is used up. Plain: the
slow twin, on transformers' own cache, widened to a copy of the prompt for each answer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm

from models.shared_prefix import Layout, additive, causal_convolution, sdpa

_ALIGNED = 8  # attention's kernels copy a mask whose rows don't begin at multiples of so many numbers
_WIDTHS = 4  # how many widths a group goes through while its answers are finished: each is other shapes


def tokens_of_room(device: torch.device) -> int:
    """For how many tokens of each answer there is room at a time: every column of room is looked at for every token,
    but on a GPU more room is other shapes, and those are recorded anew."""
    return 16 if device.type == "cpu" else 64


def room_for(columns: int, group_size: int, length: int, device: torch.device) -> int:
    """The columns that a PackedWriter begins with, behind a prompt's, for answers of so many tokens."""
    return columns_of_room(columns, group_size, min(length - 1, tokens_of_room(device)))


def columns_of_room(columns: int, wide: int, tokens: int) -> int:
    """The columns behind a prompt's for so many tokens of each of its answers, and what aligns the whole."""
    return wide * tokens + -(columns + wide * tokens) % _ALIGNED


def width_for(unfinished: int, group_size: int) -> int:
    """How many answers of a group stay in the rows: one of few widths, so that there are few shapes."""
    return min(width for width in (-(-group_size * part // _WIDTHS) for part in range(1, _WIDTHS + 1))
               if width >= unfinished)


class PackedAnswers:
    """What the layers see while answers are written: the layout of one new token of W answers of each of B prompts."""

    def __init__(self, prompts: Layout, group_size: int, room: int):
        self._columns, self._room = prompts.columns, room  # P, tokens of each answer that fit
        device = prompts.lengths.device
        self._prompt_seen = torch.arange(self._columns, device=device) < prompts.lengths[:, None]  # (B, P)
        self._keys_values = prompts.kept.keys_values  # (B, heads, P + room or more, d) each
        self._recurrences = _Recurrences(prompts.kept.states, group_size) if prompts.kept.states else None
        self._repeats = prompts.kept.repeats
        self._lay_out(group_size, 0)

    def _lay_out(self, wide: int, fed: int) -> None:
        """Make the masks and the place of the next column, behind that of `fed` tokens of W = wide answers."""
        device = self._prompt_seen.device
        columns = columns_of_room(self._columns, wide, self._room)
        self.wide, self._length = wide, self._columns + columns
        answers, column = torch.arange(wide, device=device), torch.arange(columns, device=device)
        own = (column % wide == answers[:, None]) & (column < fed * wide)  # (W, columns)
        seen = torch.cat([self._prompt_seen[:, None].expand(-1, wide, -1), own.expand(len(self._prompt_seen), -1, -1)],
                         -1)
        dtype = next(iter(self._keys_values.values()))[0].dtype if self._keys_values else torch.float32
        # By how many queries share a key, those of one answer apart by W: (B, 1, repeats * W, P + columns).
        self._masks = {repeats: additive(seen, dtype).repeat(1, repeats, 1)[:, None] for repeats in self._repeats}
        self._new = self._columns + (fed - 1) * wide + answers  # (W,) the columns of the newest token

    def next_column(self) -> None:
        """Open a column for one more token of every answer in the rows."""
        self._new.add_(self.wide)
        for repeats, mask in self._masks.items():
            opened = mask.view(-1, 1, repeats, self.wide, self._length)
            opened.scatter_(-1, self._new[:, None].expand(*opened.shape[:-1], 1), 0.0)
        if self._recurrences:
            self._recurrences.shift()

    def make_room(self, room: int, fed: int) -> None:
        """Have room for so many tokens of each answer."""
        self._room = room
        columns = self._columns + columns_of_room(self._columns, self.wide, room)
        for index, (keys, values) in self._keys_values.items():
            more = max(0, columns - keys.shape[2])
            self._keys_values[index] = pad(keys, (0, 0, 0, more)), pad(values, (0, 0, 0, more))
        self._lay_out(self.wide, fed)

    def keep(self, places: Tensor, fed: int) -> None:
        """Leave only some of the answers in the rows, after so many tokens: places (B, W') among the W."""
        steps = torch.arange(fed, device=places.device)[:, None] * self.wide
        columns = (self._columns + steps + places[:, None]).flatten(1)  # (B, fed * W')
        for kept in self._keys_values.values():
            for each in kept:
                own = each.gather(2, columns[:, None, :, None].expand(-1, each.shape[1], -1, each.shape[3]))
                each[:, :, self._columns:self._columns + columns.shape[1]] = own
        if self._recurrences:
            self._recurrences.keep(flat_places(places, self.wide))
        self._lay_out(places.shape[1], fed)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Full attention of one new token an answer: query (B * W, heads, 1, d)."""
        keys, values = self._keys_values[module.layer_idx]
        heads, width = key.shape[1], key.shape[3]
        for buffer, new in ((keys, key), (values, value)):
            buffer.index_copy_(2, self._new, new.view(-1, self.wide, heads, width).transpose(1, 2).to(buffer.dtype))
        # Queries that read the same keys stand in one row: (B, key heads, repeats * W, d).
        repeats = query.shape[1] // heads
        asked = query.view(-1, self.wide, heads, repeats, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = sdpa(asked, keys[:, :, :self._length], values[:, :, :self._length], self._masks[repeats], scaling)
        return out.unflatten(2, (repeats, self.wide)).permute(0, 3, 1, 2, 4).reshape(query.shape)

    def recur(self, module: nn.Module, mixed: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
        """Gated delta rule of one new token an answer: mixed (B * W, 1, C)."""
        return self._recurrences.step(module, mixed, beta, decay)


class _Recurrences:
    """The delta nets' states behind each of n rows, taken on a token at a time, in place."""

    def __init__(self, states: dict[int, tuple[Tensor, Tensor, Tensor]], group_size: int):
        """states: see shared_prefix.Kept."""
        self._places = {index: place for place, index in enumerate(states)}
        self._kernels = [kernel for _, _, kernel in states.values()]
        self._states = [state.repeat_interleave(group_size, 0) for _, state, _ in states.values()]  # (n, heads, dk, dv)
        # What the convolutions read, (layers, n, C, K), the newest in the last column: shifted in all layers at once.
        tails = torch.stack([tail.repeat_interleave(group_size, 0).to(state) for tail, state, _ in states.values()])
        self._inputs = pad(tails, (1, 0))
        depth = self._states[0].shape[2]
        self._scale = torch.tensor([[1 / depth], [depth ** -0.5]]).to(self._states[0])  # (2, 1)

    def keep(self, rows: Tensor) -> None:
        """Leave only some of the rows."""
        self._states = [state.index_select(0, rows) for state in self._states]
        self._inputs = self._inputs.index_select(1, rows)

    def shift(self) -> None:
        """Make place for one more column of inputs."""
        self._inputs.copy_(self._inputs.roll(-1, -1))

    def step(self, module: nn.Module, mixed: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
        """Take on a token in a layer: mixed (n, 1, C), beta and decay (n, 1, heads); gives (n, 1, heads, dv).

        state' = forgotten + k change, where change = (v - k forgotten) beta; out = q state' = q forgotten + q k change.
        """
        place = self._places[module.layer_idx]
        inputs, state = self._inputs[place], self._states[place]
        inputs[..., -1].copy_(mixed[:, 0])
        convolved = causal_convolution(module, inputs, self._kernels[place])  # (n, C, 1)
        depth, repeats = module.head_k_dim, module.num_v_heads // module.num_k_heads
        value = convolved[:, 2 * module.key_dim:, 0].unflatten(1, (-1, module.head_v_dim))  # (n, heads, dv)
        # Over its root mean square a key is sqrt(dk) long, and so is a query, which the rule divides by that once more.
        pair = rms_norm(convolved[..., 0].unflatten(1, (-1, depth)), (depth,), None, 1e-6 / depth)
        pair = pair[:, :2 * module.num_k_heads].unflatten(1, (2, -1)).transpose(1, 2)  # (n, key heads, 2, dk)
        scaled = pair.new_empty(len(pair), module.num_k_heads, repeats, 2, depth)
        torch.mul(pair[:, :, None].expand_as(scaled), self._scale, out=scaled)
        pair = scaled.flatten(1, 2)  # (n, heads, 2, dk): query and key
        state.mul_(decay[:, 0, :, None, None].exp())
        out, recalled = (pair @ state).unbind(2)  # (n, heads, dv) each
        change = (value - recalled).mul_(beta[:, 0, :, None])
        state.addcmul_(pair[:, :, 1, :, None], change[:, :, None])
        overlap = (pair @ pair.transpose(2, 3))[:, :, 0, 1:]  # (n, heads, 1)
        return out.addcmul_(overlap, change)[:, None]


class PackedWriter:
    """Writes answers that share their prompts' keys."""

    def __init__(self, decoder: Callable[[Tensor, Tensor, Any], Tensor], prompts: Layout, hidden: Tensor,
                 positions: Tensor, group_size: int, max_length: int):
        """decoder: gives hidden states (n, 1, d) of embedded tokens (n, 1, d), positions ([axes,] n, 1) and a layout.

        hidden (B, d) and positions ([axes,] B, 1) are those of the prompts' last tokens.
        """
        self._decoder, self._group_size, self._fed_at_most = decoder, group_size, max_length - 1
        self._tokens = min(self._fed_at_most, tokens_of_room(hidden.device))
        self._packed = PackedAnswers(prompts, group_size, self._tokens)
        self._positions = positions.repeat_interleave(group_size, -2)  # ([axes,] B * W, 1)
        self.hidden = hidden.repeat_interleave(group_size, 0)  # (n, d) of the last token that was read

    def feed(self, embedded: Tensor) -> Tensor:
        """Take one more token of each answer, embedded (n, 1, d): what predicts the next, (n, d).

        Does the same to the same memory each time, until make_room or drop say otherwise.
        """
        self._positions.add_(1)
        self._packed.next_column()
        return self._decoder(embedded, self._positions, self._packed)[:, -1]

    def make_room(self, fed: int) -> bool:
        """Have room for the token behind so many; says whether that moved anything."""
        if fed < self._tokens:
            return False
        self._tokens = min(self._fed_at_most, self._tokens + tokens_of_room(self.hidden.device))
        self._packed.make_room(self._tokens, fed)
        return True

    def drop(self, finished: Tensor, unfinished: int, fed: int) -> Tensor | None:
        """Take finished answers out of the rows, after so many tokens. Returns which rows stay; None for all.

        finished: (n,) bool. unfinished: answers of the prompt that has most of them left. Every prompt keeps as many,
        and what makes their number one of few: a finished one can stay for a while.
        """
        wide = width_for(unfinished, self._group_size)
        if wide >= self._packed.wide:
            return None
        finished = finished.view(-1, self._packed.wide)  # (B, W)
        places = finished.to(torch.uint8).argsort(dim=1, stable=True)[:, :wide]  # unfinished ones first
        kept = flat_places(places, self._packed.wide)
        self._packed.keep(places, fed)
        self._positions = self._positions.index_select(-2, kept)
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

    def feed(self, embedded: Tensor) -> Tensor:
        """Take one more token of each answer, embedded (n, 1, d): what predicts the next, (n, d)."""
        self._positions = self._positions + 1
        self._mask = pad(self._mask, (0, 1), value=True)
        return self._model(inputs_embeds=embedded, attention_mask=self._mask, position_ids=self._positions,
                           past_key_values=self._cache, use_cache=True).last_hidden_state[:, -1]

    def make_room(self, fed: int) -> bool:
        """A cache makes room by itself."""
        return False

    def drop(self, finished: Tensor, unfinished: int, fed: int) -> None:
        """Leave finished answers where they are."""


def flat_places(places: Tensor, wide: int) -> Tensor:
    """Turn places (B, W') among W = wide answers of each prompt into places among all B * W rows."""
    return (places + torch.arange(len(places), device=places.device)[:, None] * wide).flatten()
