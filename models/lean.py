"""A decoder for the time of a rollout: few launches a layer, no casts of weights, adapters merged in.

Weights that read the same input lie side by side in one matrix, in the dtype that products are computed in and with the
adapter's share added. They are copies, dropped afterwards: the model's own stay to the bit what they are. Norms,
rotation and residuals take as few operations as torch has for them. A model with a layer that isn't known here is left
to transformers' code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu, softplus

from models.lora import can_merge, merged_weight
from models.packing import pack, product
from models.rotation import turn
from models.shared_prefix import Layout

_KNOWN_LAYERS = ("Qwen2DecoderLayer", "Qwen2_5_VLDecoderLayer", "Qwen3DecoderLayer", "Qwen3VLTextDecoderLayer",
                 "Qwen3_5DecoderLayer", "LlamaDecoderLayer")


class LeanDecoder:
    """The layers, norm and rotation of a language model, for hidden states that are fed a token at a time."""

    def __init__(self, language_model: nn.Module, dtype: torch.dtype, wide: torch.dtype):
        self.layers = [_Layer(layer, dtype, wide) for layer in language_model.layers]
        self._norm = _Norm(language_model.norm, wide)
        self._rotation = language_model.rotary_emb
        own = {weight.untyped_storage().data_ptr() for weight in language_model.parameters()}
        products = [each for layer in self.layers for each in layer.products]
        self.copied = sum(each.weight.nbytes for each in products  # bytes that are not the model's own
                          if each.weight.untyped_storage().data_ptr() not in own)
        self.copied += sum(each.packed.nbytes for each in products if each.packed is not None)

    def __call__(self, hidden: Tensor, positions: Tensor, layout: Any) -> Tensor:
        """Run hidden (B, L, d) at positions ([axes,] B, L) through the layers."""
        cos, sin = self._rotation(hidden, positions)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # (B, L, 1, rotated width)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, layout)
        return self._norm(hidden)


@contextmanager
def lean(language_model: nn.Module, dtype: torch.dtype, wide: torch.dtype) -> Iterator[LeanDecoder | None]:
    """Let a language model's layers compute the lean way inside of the block: products in dtype, sums between layers in
    wide. Yields its decoder; None, and changes nothing, where a layer or a weight is of a kind that isn't known, or
    where there is no memory for copies."""
    decoder = _make(language_model, dtype, wide)
    if decoder is None:
        yield None
        return
    try:
        with torch.autocast(language_model.device.type, enabled=False):
            for layer, own in zip(language_model.layers, decoder.layers, strict=True):
                layer.forward = partial(_forward, own.predicting if own is decoder.layers[-1] else own)
            yield decoder
    finally:
        for layer in language_model.layers:
            vars(layer).pop("forward", None)


def _make(language_model: nn.Module, dtype: torch.dtype, wide: torch.dtype) -> LeanDecoder | None:
    if not _is_known(language_model):
        return None
    try:
        with torch.autocast(language_model.device.type, enabled=False):
            return LeanDecoder(language_model, dtype, wide)
    except torch.OutOfMemoryError:
        logger.warning("no memory for copies of the language model's weights while answers are written: each layer "
                       "casts and adapts its own for every token, which is slower")
        return None


def _forward(own: Callable[..., Tensor], hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], layout: Any,
             **kwargs: Any) -> Tensor:
    """Stand in for the forward of transformers' layer."""
    cos, sin = position_embeddings
    return own(hidden_states, cos.unsqueeze(2), sin.unsqueeze(2), layout)


def _is_known(language_model: nn.Module) -> bool:
    # FSDP2 puts its name before that of a layer's class; weights that it has not gathered can't be merged.
    return all(type(layer).__name__.removeprefix("FSDP") in _KNOWN_LAYERS and "forward" not in vars(layer)
               and all(can_merge(each) for each in _linears(layer)) for layer in language_model.layers)


def _linears(layer: nn.Module) -> list[nn.Module]:
    return [module for part in layer.children() for name, module in part.named_children()
            if "_proj" in name]  # of a delta net in_proj_qkv, too


class _Layer:
    """A token mixer and an MLP, each behind a norm and added to what went in."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, wide: torch.dtype):
        attends = hasattr(layer, "self_attn")
        self._mix = (_Attention(layer.self_attn, dtype, wide) if attends else
                     _DeltaNet(layer.linear_attn, dtype, wide))
        self._out = _Product([layer.self_attn.o_proj if attends else layer.linear_attn.out_proj], dtype)
        self._norm, self._mlp_norm = (_Norm(norm, wide) for norm in
                                      (layer.input_layernorm, layer.post_attention_layernorm))
        self._gate_up = _Wide([layer.mlp.gate_proj, layer.mlp.up_proj], dtype)
        self._down, self._activation = _Product([layer.mlp.down_proj], dtype), layer.mlp.act_fn
        self.products = [self._mix, self._out, self._gate_up, self._down]

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, layout: Any) -> Tensor:
        """Hidden (B, L, d), cos and sin (B, L, 1, rotated width)."""
        return self._behind(hidden, self._mix(self._norm(hidden), cos, sin, layout))

    def predicting(self, hidden: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """Run prompts through a last layer: of each, the column that predicts; the other columns stay as they are."""
        columns = hidden.flatten(0, 1)  # (B * L, d)
        mixed = self._mix.predicting(self._norm(hidden), cos, sin, layout)  # (B, 1, ..)
        predicting = self._behind(columns.index_select(0, layout.predictors)[:, None], mixed)  # (B, 1, d)
        return columns.index_copy(0, layout.predictors, predicting[:, 0]).view(hidden.shape)

    def _behind(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """What comes behind the token mixer."""
        hidden = self._out.added(hidden, mixed)
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, -1)
        return self._down.added(hidden, self._activation(gate).mul_(up))


class _Product:
    """Linear layers that read the same input, as one: their outputs side by side."""

    packed: Tensor | None = None

    def __init__(self, linears: Sequence[nn.Module], dtype: torch.dtype):
        self._lay([merged_weight(each) for each in linears], dtype)

    def _lay(self, parts: Sequence[tuple[Tensor, Tensor | None]], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.weight, self._bias = (
            _side_by_side([weight.to(dtype) for weight, _ in parts]),
            None if parts[0][1] is None else _side_by_side([bias.to(dtype) for _, bias in parts]))

    def __call__(self, inputs: Tensor) -> Tensor:
        return linear(inputs.to(self._dtype), self.weight, self._bias)

    def added(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        """The product added to hidden (B, L, d), in hidden's dtype."""
        if self._bias is not None or hidden.dtype != self._dtype:
            return hidden + self(inputs)
        return torch.addmm(hidden.flatten(0, 1), inputs.flatten(0, 1), self.weight.T).view(hidden.shape)


class _Wide(_Product):
    """A product wide enough that on a CPU it is packed for the tokens of answers."""

    def __init__(self, linears: Sequence[nn.Module], dtype: torch.dtype):
        super().__init__(linears, dtype)
        self.packed = pack(self.weight)

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.packed is None or inputs.shape[1] > 1:  # of a prompt
            return super().__call__(inputs)
        return product(inputs.to(self._dtype), self.packed, self._bias)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of several, along the first axis; one alone is not copied."""
    return tensors[0].detach() if len(tensors) == 1 else torch.cat([tensor.detach() for tensor in tensors])


class _Norm:
    """Division by the root of the mean square, times a weight."""

    def __init__(self, norm: nn.Module, wide: torch.dtype):
        self._weight, self._eps = _norm_weight(norm).to(wide), _eps(norm)

    def __call__(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self._weight.shape, self._weight, self._eps)


def _norm_weight(norm: nn.Module) -> Tensor:
    weight = norm.weight.detach()
    return weight.float() + 1 if type(norm).__name__ == "Qwen3_5RMSNorm" else weight


def _eps(norm: nn.Module) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


class _Attention(_Product):
    """Full attention up to its output layer: queries, keys, values and gates by one product."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, wide: torch.dtype):
        parts = [merged_weight(each) for each in (module.q_proj, module.k_proj, module.v_proj)]
        self._module, self._head = module, module.head_dim
        self._gated = type(module).__name__ == "Qwen3_5Attention"
        if self._gated:  # of each head, the query lies before its gate
            queries, gates = zip(*(_halves(part, module.head_dim) for part in parts[0]), strict=True)
            parts = [queries, *parts[1:], gates]
        self._lay(parts, dtype)
        self._queries, self._keys = (len(weight) // module.head_dim for weight, _ in parts[:2])
        self._scale = None
        if hasattr(module, "q_norm"):
            self._scale = torch.cat([_norm_weight(norm).to(wide).expand(heads, -1) for norm, heads in
                                     ((module.q_norm, self._queries), (module.k_norm, self._keys))])  # (heads, d)
            self._eps = _eps(module.q_norm)

    def __call__(self, inputs: Tensor, cos: Tensor, sin: Tensor, layout: Any) -> Tensor:
        heads = super().__call__(inputs).unflatten(-1, (-1, self._head))  # (B, L, heads, d)
        both, values = self._queries + self._keys, self._queries + 2 * self._keys
        turned = self._turned(heads, slice(0, both), cos, sin)
        out = layout.attend(self._module, turned[:, :self._queries], turned[:, self._queries:],
                            heads[:, :, both:values].transpose(1, 2), self._module.scaling).transpose(1, 2).flatten(2)
        return out * heads[:, :, values:].flatten(2).sigmoid() if self._gated else out

    def predicting(self, inputs: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """Attend from each prompt's last column alone: (B, 1, heads * d)."""
        both, values = self._queries + self._keys, self._queries + 2 * self._keys
        asking, cos_there, sin_there = (each.flatten(0, 1).index_select(0, layout.predictors)[:, None]
                                        for each in (inputs, cos, sin))
        heads = super().__call__(asking).unflatten(-1, (-1, self._head))  # (B, 1, heads, d)
        query = self._turned(heads, slice(0, self._queries), cos_there, sin_there)
        rows = slice(self._queries * self._head, values * self._head)
        kept = linear(inputs.to(self._dtype), self.weight[rows], None if self._bias is None else self._bias[rows])
        kept = kept.unflatten(-1, (-1, self._head))  # (B, L, keys and values, d)
        key = self._turned(kept, slice(self._queries, both), cos, sin)
        out = layout.attend_last(self._module, query, key, kept[:, :, self._keys:].transpose(1, 2),
                                 self._module.scaling).transpose(1, 2).flatten(2)
        return out * heads[:, :, values:].flatten(2).sigmoid() if self._gated else out

    def _turned(self, heads: Tensor, which: slice, cos: Tensor, sin: Tensor) -> Tensor:
        """Scale and rotate the first heads (B, L, .., d), which are those of queries and keys: (B, heads, L, d)."""
        count = which.stop - which.start
        turned = heads[:, :, :count]
        if self._scale is not None:
            turned = rms_norm(heads, (self._head,), None, self._eps)[:, :, :count] * self._scale[which]
        return _rotated(turned, cos, sin).to(heads.dtype).transpose(1, 2)


def _halves(part: Tensor | None, head: int) -> tuple[Tensor | None, Tensor | None]:
    """Take rows of heads that are twice as high apart: the upper half of each, and the lower."""
    if part is None:
        return None, None
    upper, lower = part.unflatten(0, (-1, 2, head)).unbind(1)  # (heads, d, ..)
    return upper.flatten(0, 1), lower.flatten(0, 1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first columns of heads (B, L, heads, d), as many as cos and sin have, in pairs half of them apart."""
    width = cos.shape[-1]
    first = turn(heads[..., :width], cos, *sin.chunk(2, -1))
    return first if width == heads.shape[-1] else torch.cat([first, heads[..., width:]], -1)


class _DeltaNet(_Product):
    """The gated delta net up to its output layer: what is mixed, gate, beta and decay by one product."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, wide: torch.dtype):
        parts = [merged_weight(each) for each in (module.in_proj_qkv, module.in_proj_z, module.in_proj_b,
                                                  module.in_proj_a)]
        self._lay(parts, dtype)
        self._module, self._sizes = module, [len(weight) for weight, _ in parts]
        self._rate, self._bias_of_step = -module.A_log.detach().float().exp(), module.dt_bias.detach().float()
        self._norm = _Norm(module.norm, self._rate.dtype)

    def __call__(self, inputs: Tensor, cos: Tensor, sin: Tensor, layout: Any) -> Tensor:
        mixed, gate, beta, step = super().__call__(inputs).float().split(self._sizes, -1)  # (B, L, ..)
        decay = softplus(step + self._bias_of_step) * self._rate
        if isinstance(layout, Layout):  # a prompt's kernels on GPUs take no float32
            mixed = mixed.to(self._dtype)
        out = self._norm(layout.recur(self._module, mixed, beta.sigmoid(), decay).float())  # (B, L, heads, d)
        result = torch.empty_like(gate, dtype=self._dtype, memory_format=torch.contiguous_format)
        return torch.mul(out.flatten(2), silu(gate), out=result)

    def predicting(self, inputs: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """Take each prompt's last column of what comes out, (B, 1, ..): the state wants them all."""
        return self(inputs, cos, sin, layout).flatten(0, 1).index_select(0, layout.predictors)[:, None]
