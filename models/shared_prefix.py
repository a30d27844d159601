"""A group on one row: [prompt | answer 1 | answer 2 | ...], the prompt computed once.

Embeddings, norms, projections and MLPs run over the whole row; only the token mixers split. Full attention: the
prompt attends to itself causally, each answer to the prompt's keys and to its own. Gated delta net: the prompt's final
state and its last convolution inputs start every answer. The result is exact, with gradients, and costs P plus the
answers' tokens where G separate rows cost G times P as well. Prior art for text: Prefix Grouper, arXiv 2506.05433.

Prompts are padded on the right: causal attention never looks there, so no prompt needs a mask. Answers lie behind one
another without padding, and without their last token, which predicts nothing.

Transformers is entered by its public doors: a registered attention function, and the layout as a forward keyword (a
keyword, since a checkpointed layer runs again during backward).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, scaled_dot_product_attention

from models.family import ModelError

NAME = "shared_prefix"


@dataclass(frozen=True)
class Answers:
    """The answer columns of B rows. G answers a row, S columns, N the columns of the longest answer."""

    group_size: int
    tokens: Tensor  # (B, S) where each column's token stands in the flattened (B * G, T) completions
    offsets: Tensor  # (B, S) its place in its answer
    mask: Tensor  # (B, 1, S, P + S) 0 where a column may look, -inf elsewhere
    fold: Tensor  # (B * G * N,) the column that stands there once each answer is a row of its own
    unfold: Tensor  # (B * S,) and the way back


@dataclass(frozen=True)
class Kept:
    """What decoding goes on from, by layer."""

    room: int = 0  # columns behind the prompts' P, for those of answers
    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (B, heads, P + room, d) each
    repeats: set[int] = field(default_factory=set)  # how many queries read the same key
    # (B, C, K - 1), (B, heads, dk, dv), and the convolution's kernel (C, 1, K) in the state's dtype
    states: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Rows of a prompt and the answers behind it. B rows, P prompt columns."""

    lengths: Tensor  # (B,) columns of each prompt, padding follows up to P
    columns: int  # P
    padded: bool  # some prompt is shorter than P
    predictors: Tensor  # of each answer token: the column before it, counted over all rows
    answers: Answers | None = None  # None: prompts alone
    kept: Kept | None = None  # filled by the layers when it is there

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Full attention over rows (B, heads, P + S, d)."""
        columns = self.columns
        self._keep(module, query, key, value)
        prompt = sdpa(query[:, :, :columns], key[:, :, :columns], value[:, :, :columns], None, scaling)
        if self.answers is None:
            return prompt
        return torch.cat([prompt, sdpa(query[:, :, columns:], key, value, self.answers.mask, scaling)], 2)

    def attend_last(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
                    ) -> Tensor:
        """Full attention of each prompt's last column, query (B, heads, 1, d), over prompts alone."""
        self._keep(module, query, key, value)
        seen = torch.arange(self.columns, device=key.device) < self.lengths[:, None]  # (B, P)
        return sdpa(query, key, value, additive(seen, query.dtype)[:, None, None], scaling)

    def _keep(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.kept is not None:
            self.kept.keys_values[module.layer_idx] = tuple(with_room(each, self.kept.room) for each in (key, value))
            self.kept.repeats.add(query.shape[1] // key.shape[1])

    def recur(self, module: nn.Module, mixed: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
        """Gated delta rule over projected rows: mixed (B, P + S, C), beta and decay (B, P + S, heads)."""
        columns = self.columns
        prompt_beta, prompt_decay = beta[:, :columns], decay[:, :columns]
        if self.padded:  # padding must leave the state as it is: nothing written, nothing forgotten
            padding = torch.arange(columns, device=mixed.device) >= self.lengths[:, None]  # (B, P)
            prompt_beta = prompt_beta.masked_fill(padding[..., None], 0.0)
            prompt_decay = prompt_decay.masked_fill(padding[..., None], 0.0)
        kernel = module.conv1d.weight.shape[-1]  # K
        head = mixed[:, :columns].transpose(1, 2)  # (B, C, P)
        convolved = causal_convolution(module, pad(head, (kernel - 1, 0)))
        out, state = _rule()(*split_heads(module, convolved), g=prompt_decay, beta=prompt_beta, initial_state=None,
                             output_final_state=True, use_qk_l2norm_in_kernel=True)
        tail = self._tail(head, kernel - 1)  # (B, C, K - 1)
        if self.kept is not None:
            self.kept.states[module.layer_idx] = tail, state, module.conv1d.weight.detach().to(state.dtype)
        if self.answers is None:
            return out
        return torch.cat([out, self._recur_answers(module, mixed, beta, decay, tail, state)], 1)

    def _tail(self, head: Tensor, count: int) -> Tensor:
        """The last `count` columns of each prompt, zeros before its start: (B, C, count)."""
        head = pad(head, (count, 0))
        if not self.padded:
            return head[..., head.shape[-1] - count:]
        at = self.lengths[:, None] + torch.arange(count, device=head.device)  # (B, count)
        return head.gather(2, at[:, None].expand(-1, head.shape[1], -1))

    def _recur_answers(self, module: nn.Module, mixed: Tensor, beta: Tensor, decay: Tensor, tail: Tensor,
                       state: Tensor) -> Tensor:
        answers, rows = self.answers, len(mixed)
        group = answers.group_size

        def folded(values: Tensor) -> Tensor:  # (B, P + S, c) -> (B * G, N, c)
            own = values[:, self.columns:].flatten(0, 1).index_select(0, answers.fold)
            return own.view(rows * group, -1, values.shape[-1])

        inputs = torch.cat([tail.repeat_interleave(group, 0), folded(mixed).transpose(1, 2)], -1)  # (B G, C, K - 1 + N)
        out, _ = _rule()(*split_heads(module, causal_convolution(module, inputs)), g=folded(decay), beta=folded(beta),
                         initial_state=state.repeat_interleave(group, 0), output_final_state=True,
                         use_qk_l2norm_in_kernel=True)  # (B G, N, heads, d)
        return out.flatten(0, 1).index_select(0, answers.unfold).view(rows, -1, *out.shape[2:])


def lay_out_prompts(lengths: Sequence[int], device: torch.device, room: int = 0) -> Layout:
    """Lay out prompts alone, keeping what decoding goes on from, with room for so many columns of answers."""
    columns = max(lengths)
    lengths = torch.tensor(lengths)
    last = torch.arange(len(lengths)) * columns + lengths - 1
    return Layout(lengths.to(device), columns, bool((lengths < columns).any()), last.to(device),
                  kept=Kept(room))


def lay_out_groups(lengths: Sequence[int], action_mask: Tensor, dtype: torch.dtype) -> Layout:
    """Lay out prompts of given lengths with their answers; action_mask (B * G, T) says how long each answer is."""
    real, device = action_mask.cpu(), action_mask.device
    rows, group, prompt_columns = len(lengths), len(action_mask) // len(lengths), max(lengths)
    lengths = torch.tensor(lengths)  # (B,)
    counts = (real.sum(1) - 1).clamp(min=0).view(rows, group)  # (B, G): an answer's last token predicts nothing
    starts = counts.cumsum(1) - counts  # (B, G)
    columns, longest = int(counts.sum(1).max()), int(counts.max())  # S, N
    width = prompt_columns + columns

    owner, offset = torch.full((rows, columns), -1), torch.zeros(rows, columns, dtype=torch.long)  # (B, S)
    for row in range(rows):
        owned = torch.arange(group).repeat_interleave(counts[row])
        owner[row, :len(owned)] = owned
        offset[row, :len(owned)] = torch.arange(len(owned)) - starts[row, owned]
    answer = owner.clamp(min=0) + torch.arange(rows)[:, None] * group  # (B, S) counted over all rows

    row, token = real.nonzero(as_tuple=True)  # of each answer token: its answer, its place there
    own = prompt_columns + starts.flatten()[row] + token - 1
    predictors = (row // group) * width + torch.where(token == 0, lengths[row // group] - 1, own)
    answers = None
    if columns:
        place = torch.minimum(torch.arange(longest), (counts.flatten()[:, None] - 1).clamp(min=0))  # (B G, N)
        fold = (starts.flatten()[:, None] + place).clamp(max=columns - 1)
        fold = fold + (torch.arange(rows * group) // group * columns)[:, None]
        answers = Answers(group, (answer * real.shape[1] + offset).to(device), offset.to(device),
                          _answer_mask(lengths.to(device), prompt_columns, owner.to(device), dtype),
                          fold.flatten().to(device), (answer * longest + offset).flatten().to(device))
    return Layout(lengths.to(device), prompt_columns, bool((lengths < prompt_columns).any()), predictors.to(device),
                  answers)


def _answer_mask(lengths: Tensor, prompt_columns: int, owner: Tensor, dtype: torch.dtype) -> Tensor:
    """Where answer columns may look: their prompt, and what came before in their own answer. (B, 1, S, P + S)."""
    rows, columns = owner.shape
    prompt = torch.arange(prompt_columns, device=owner.device) < lengths[:, None]  # (B, P)
    own = (owner[:, :, None] == owner[:, None]).tril()  # (B, S, S)
    seen = torch.cat([prompt[:, None].expand(-1, columns, -1), own], -1)
    return additive(seen, dtype)[:, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask of what is seen into one that is added to attention's logits: 0 or -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def with_room(values: Tensor, room: int) -> Tensor:
    """Give keys or values (B, heads, P, d) room for further columns, in the dtype that attention computes in."""
    device = values.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype
    return pad(values.to(dtype), (0, 0, 0, room))


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attend by torch's kernels, causally where there is no mask; key and value may have fewer heads."""
    grouped = query.shape[1] != key.shape[1]
    if mask is not None and not torch.is_autocast_enabled(query.device.type):
        mask = mask.to(query.dtype)  # of another dtype, the kernel on CPUs reads it wrong without a word
    if grouped and mask is not None and query.device.type == "cuda":  # with both, only the slow kernel is left there
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling,
                                        enable_gqa=grouped)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, layout: Any = None, **kwargs: Any
              ) -> tuple[Tensor, None]:
    """Attend as the layout says; without one, as transformers' sdpa does. query (B, H, L, d) -> (B, L, H, d)."""
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                                      **kwargs)
    return layout.attend(module, query, key, value, scaling).transpose(1, 2), None


def delta_net(module: nn.Module, stock: Any, hidden_states: Tensor, layout: Any = None, **kwargs: Any) -> Tensor:
    """Run Qwen3_5GatedDeltaNet with the recurrence as the layout says; without one, as it is."""
    if layout is None:
        return stock(hidden_states=hidden_states, **kwargs)
    mixed = module.in_proj_qkv(hidden_states)  # (B, L, C)
    beta = module.in_proj_b(hidden_states).sigmoid()  # (B, L, heads)
    decay = -module.A_log.float().exp() * nn.functional.softplus(
        module.in_proj_a(hidden_states).float() + module.dt_bias)
    out = layout.recur(module, mixed, beta, decay)  # (B, L, heads, d)
    gate = module.in_proj_z(hidden_states).reshape(-1, module.head_v_dim)
    out = module.norm(out.reshape(-1, module.head_v_dim), gate)
    return module.out_proj(out.reshape(*hidden_states.shape[:2], -1))


def causal_convolution(module: nn.Module, inputs: Tensor, kernel: Tensor | None = None) -> Tensor:
    """The layer's short convolution and activation over inputs (n, C, K - 1 + L), K - 1 of them gone by: (n, C, L).

    kernel: the layer's in another dtype.
    """
    from transformers.activations import ACT2FN

    kernel = module.conv1d.weight if kernel is None else kernel
    out = conv1d(inputs.to(kernel.dtype), kernel, module.conv1d.bias, groups=len(kernel))
    return ACT2FN[module.activation](out).to(inputs.dtype)


def _rule() -> Any:
    """The gated delta rule in chunks: transformers takes fla's kernel for it where one is installed."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule


def split_heads(module: nn.Module, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split convolved columns (n, C, L) into query, key, value: (n, L, heads, d)."""
    rows, _, length = mixed.shape
    query, key, value = mixed.transpose(1, 2).split([module.key_dim, module.key_dim, module.value_dim], -1)
    return (query.reshape(rows, length, -1, module.head_k_dim), key.reshape(rows, length, -1, module.head_k_dim),
            value.reshape(rows, length, -1, module.head_v_dim))


_KNOWN_ATTENTION = ("Qwen3_5Attention", "Qwen2_5_VLAttention", "Qwen3VLTextAttention", "Qwen2Attention",
                    "Qwen3Attention", "LlamaAttention")
_KNOWN_DELTA_NETS = ("Qwen3_5GatedDeltaNet",)


def install(language_model: nn.Module) -> None:
    """Teach a language model's token mixers the layout; raises ModelError naming a layer of unknown kind."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for layer in language_model.layers:
        mixer = getattr(layer, "self_attn", None) or getattr(layer, "linear_attn", None)
        kind = type(mixer).__name__
        if kind in _KNOWN_DELTA_NETS and not isinstance(mixer.forward, partial):
            mixer.forward = partial(delta_net, mixer, mixer.forward)
        elif kind not in _KNOWN_ATTENTION + _KNOWN_DELTA_NETS:
            raise ModelError(f"the shared-prefix path does not know layers of kind {kind}; train_vlm_parallel.py "
                             "--exact_path does without it")
        if getattr(mixer, "sliding_window", None):
            raise ModelError("the shared-prefix path does not know attention with a sliding window; "
                             "train_vlm_parallel.py --exact_path does without it")
    AttentionInterface.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    language_model.config._attn_implementation = NAME
