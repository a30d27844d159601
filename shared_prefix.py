"""Score a group on one row: [prompt | answer 1 | answer 2 | ...], the prompt computed once.

Embeddings, norms, projections and MLPs run over the whole row; only the token mixers split. Full attention: the
prompt attends to itself causally, each answer to the prompt's keys and to its own. Gated delta net: the prompt's final
state and its last convolution inputs start every answer. The result is exact, with gradients, and costs P + G T
tokens where G separate rows cost G (P + T). Prior art for text: Prefix Grouper, arXiv 2506.05433.

Transformers is entered by its public doors: a registered attention function, and the layout as a forward keyword (a
keyword, since a checkpointed layer runs again during backward).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, scaled_dot_product_attention

from family import ModelError

NAME = "shared_prefix"


@dataclass(frozen=True)
class PrefixLayout:
    """Where the prompt ends and the answers begin. B rows, P prompt columns, G answers of T columns each."""

    prompt_columns: int
    group_size: int
    answer_columns: int
    prompt_real: Tensor  # (B, P) bool, False at padding on the left
    prompt_mask: Tensor | None  # (B, 1, P, P) bool; None without padding: plain causal attention
    folded: bool  # answers attend as rows of their own, the prompt's keys repeated: cheaper when the prompt is short
    answer_mask: Tensor  # bool; (B or 1, 1, G * T, P + G * T), folded (B * G or 1, 1, T, P + T)


def make_layout(prompt_real: Tensor, group_size: int, answer_columns: int) -> PrefixLayout:
    """Lay out rows of a padded prompt (B, P) and group_size answers of answer_columns columns."""
    prompt_columns, device = prompt_real.shape[1], prompt_real.device
    padded = not bool(prompt_real.all())
    seen = prompt_real if padded else prompt_real[:1]
    folded = prompt_columns < group_size * answer_columns  # repeating keys costs less than masking other answers
    column = torch.arange(answer_columns if folded else group_size * answer_columns, device=device)
    answer = column // answer_columns
    own = (answer[:, None] == answer[None]) & (column[:, None] >= column[None])  # block-diagonal, causal
    if folded and padded:
        seen = seen.repeat_interleave(group_size, 0)
    answer_mask = torch.cat([seen[:, None, None].expand(-1, -1, len(column), -1),
                             own.expand(len(seen), 1, -1, -1)], -1)
    prompt_mask = None
    if padded:
        causal = torch.ones(prompt_columns, prompt_columns, dtype=torch.bool, device=device).tril()
        itself = torch.eye(prompt_columns, dtype=torch.bool, device=device)  # padding sees itself: no empty softmax
        prompt_mask = (causal & prompt_real[:, None, None]) | itself
    return PrefixLayout(prompt_columns, group_size, answer_columns, prompt_real, prompt_mask, folded, answer_mask)


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, layout: PrefixLayout | None = None, **kwargs: Any
              ) -> tuple[Tensor, None]:
    """Attend as the layout says; without one, as transformers' sdpa does. query (B, H, L, d) -> (B, L, H, d)."""
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                                      **kwargs)
    columns = layout.prompt_columns
    grouped = key.shape[1] != query.shape[1]
    attend = partial(scaled_dot_product_attention, scale=scaling, enable_gqa=grouped)
    prompt = attend(query[:, :, :columns], key[:, :, :columns], value[:, :, :columns], attn_mask=layout.prompt_mask,
                    is_causal=layout.prompt_mask is None)
    if not layout.folded:
        answers = attend(query[:, :, columns:], key, value, attn_mask=layout.answer_mask)
        return torch.cat([prompt, answers], 2).transpose(1, 2), None
    group = layout.group_size
    folded_query = _fold(query[:, :, columns:].transpose(1, 2), group).transpose(1, 2)  # (B G, H, T, d)
    answers = attend(folded_query, _beside_prompt(key, layout), _beside_prompt(value, layout),
                     attn_mask=layout.answer_mask).transpose(1, 2)  # (B G, T, H, d)
    return torch.cat([prompt.transpose(1, 2), answers.reshape(len(query), -1, *answers.shape[2:])], 1), None


def _beside_prompt(values: Tensor, layout: PrefixLayout) -> Tensor:
    """Repeat the prompt's keys or values for every answer and put the answer's own behind: (B * G, H, P + T, d)."""
    columns = layout.prompt_columns
    own = _fold(values[:, :, columns:].transpose(1, 2), layout.group_size).transpose(1, 2)
    return torch.cat([values[:, :, :columns].repeat_interleave(layout.group_size, 0), own], 2)


def delta_net(module: nn.Module, stock: Any, hidden_states: Tensor, layout: PrefixLayout | None = None, **kwargs: Any
              ) -> Tensor:
    """Run Qwen3_5GatedDeltaNet with the prompt's final states starting every answer; without a layout, as it is."""
    if layout is None:
        return stock(hidden_states=hidden_states, **kwargs)
    from transformers.activations import ACT2FN
    from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_fn, torch_chunk_gated_delta_rule

    columns, group = layout.prompt_columns, layout.group_size
    rows, length, _ = hidden_states.shape
    real = pad(layout.prompt_real, (0, length - columns), value=True)
    hidden_states = hidden_states * real[..., None].to(hidden_states.dtype)  # padding must not enter the state
    mixed = module.in_proj_qkv(hidden_states).transpose(1, 2)  # (B, C, L)
    beta = module.in_proj_b(hidden_states).sigmoid()  # (B, L, heads)
    decay = -module.A_log.float().exp() * nn.functional.softplus(
        module.in_proj_a(hidden_states).float() + module.dt_bias)

    kernel = module.conv1d.weight  # (C, 1, K)
    prompt = causal_conv1d_fn(mixed[..., :columns], kernel.squeeze(1), module.conv1d.bias,
                              activation=module.activation)
    tail = pad(mixed[..., :columns], (kernel.shape[-1] - 1, 0))[..., -(kernel.shape[-1] - 1):]  # (B, C, K - 1)
    answers = _fold(mixed[..., columns:].transpose(1, 2), group).transpose(1, 2)  # (B G, C, T)
    answers = conv1d(torch.cat([tail.repeat_interleave(group, 0), answers], -1).to(kernel.dtype), kernel,
                     module.conv1d.bias, groups=len(kernel))
    answers = ACT2FN[module.activation](answers).to(mixed.dtype)

    rule = partial(torch_chunk_gated_delta_rule, output_final_state=True, use_qk_l2norm_in_kernel=True)
    out, state = rule(*_heads(module, prompt), g=decay[:, :columns], beta=beta[:, :columns], initial_state=None)
    out_answers, _ = rule(*_heads(module, answers), g=_fold(decay[:, columns:], group),
                          beta=_fold(beta[:, columns:], group), initial_state=state.repeat_interleave(group, 0))
    out = torch.cat([out, out_answers.reshape(rows, -1, *out.shape[2:])], 1)  # (B, L, heads, d)
    gate = module.in_proj_z(hidden_states).reshape(-1, module.head_v_dim)
    out = module.norm(out.reshape(-1, module.head_v_dim), gate)
    return module.out_proj(out.reshape(rows, length, -1))


def _fold(values: Tensor, group: int) -> Tensor:
    """Turn answers behind one another into rows: (B, G * T, ...) -> (B * G, T, ...)."""
    return values.reshape(len(values) * group, values.shape[1] // group, *values.shape[2:])


def _heads(module: nn.Module, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split convolved columns (N, C, L) into query, key, value: (N, L, heads, d)."""
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
            raise ModelError(f"the shared-prefix path does not know layers of kind {kind}; take --exact_path")
    AttentionInterface.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    language_model.config._attn_implementation = NAME


def answer_states(hidden: Tensor, layout: PrefixLayout) -> Tensor:
    """Pick the hidden states that predict each answer token: (B, P + G * T, d) -> (B * G, T, d)."""
    rows, _, width = hidden.shape
    group, columns = layout.group_size, layout.answer_columns
    last = hidden[:, layout.prompt_columns - 1, None, None].expand(-1, group, -1, -1)  # (B, G, 1, d)
    own = hidden[:, layout.prompt_columns:].reshape(rows, group, columns, width)
    return torch.cat([last, own[:, :, :-1]], 2).reshape(rows * group, columns, width)
