"""From hidden states to log-probs, in float32, at a temperature and without banned ids: in sampling and update alike.

In bfloat16 a head multiplies rounded numbers, as every layer does, but the sums, its logits, stay in float32: rounded,
a logit of 20 would come in steps of an eighth.

An update wants one number of each row of logits, so the rows are computed in chunks and, beyond one chunk, again in the
backward pass: what is held at once does not grow with the number of tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.packing import pack, product

CHUNK_NUMBERS = 2 ** 24  # logits held at once: 64 MiB in float32


class Logits:
    """A head's product as it is computed, with the weight cast once: hidden (n, d) -> (n, V), never in bfloat16."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, few_rows: bool = False):
        """few_rows: it is called again and again, for one token of each answer."""
        self._dtype = dtype
        self._weight = weight.to(dtype)  # (V, d)
        # Torch's kernels for CPUs would round the sums; in float32 products of bfloat16 numbers are exact.
        self._widened = dtype == torch.bfloat16 and weight.device.type == "cpu"
        if self._widened:
            self._weight = self._weight.float()
        self._packed = pack(self._weight) if few_rows else None

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self._dtype)
        if self._widened:
            hidden = hidden.float()
        elif self._dtype == torch.bfloat16:
            return torch.mm(hidden, self._weight.T, out_dtype=torch.float32)
        if self._packed is not None:
            return product(hidden, self._packed)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden, self._weight)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which layers multiply hidden states here and now."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def distribution(head: Callable[[Tensor], Tensor], hidden: Tensor, temperature: float | None, banned: Tensor) -> Tensor:
    """Probabilities over the vocabulary, (n, V): of hidden (n, d) at the temperature, None meaning 1."""
    return _tempered(head(hidden), temperature or 1.0, banned).softmax(-1)


def token_log_probs(head: nn.Linear, hidden: Tensor, tokens: Tensor, temperature: float, banned: Tensor,
                 with_entropy: bool = True, chunk_numbers: int = CHUNK_NUMBERS) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens (n,) that hidden states (n, d) predict; and the entropy there: (n,).

    with_entropy False leaves the entropy 0, without gradient.
    """
    rows = max(1, chunk_numbers // head.weight.shape[0])
    return _TokenLogProbs.apply(hidden, head.weight, tokens, temperature, banned, with_entropy, rows)


def _tempered(logits: Tensor, temperature: float, banned: Tensor) -> Tensor:
    return (logits.float() / temperature).index_fill_(-1, banned, -torch.inf)


class _TokenLogProbs(torch.autograd.Function):
    """d log p(token) / d logits = (one at the token - p) / temperature, and d entropy / d logits = -p (log p + entropy)
    / temperature, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, banned: Tensor,
                with_entropy: bool, rows: int) -> tuple[Tensor, Tensor]:
        ctx.dtype = compute_dtype(hidden)
        ctx.temperature, ctx.rows, ctx.probabilities = temperature, rows, None
        taken, entropy = (torch.zeros(len(tokens), device=hidden.device) for _ in range(2))
        whole = len(tokens) <= rows and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        head = Logits(weight, ctx.dtype)
        for chunk in _chunks(len(tokens), rows):
            log_probs = _tempered(head(hidden[chunk]), temperature, banned).log_softmax(-1)  # (rows, V)
            taken[chunk] = log_probs.gather(1, tokens[chunk, None])[:, 0]
            probabilities = log_probs.exp() if with_entropy or whole else None
            if with_entropy:  # p log p, 0 where p is: the products of 0 and -inf are NaN, and left out
                entropy[chunk] = -log_probs.mul_(probabilities).nan_to_num_(nan=0.0).sum(1)
            if whole:
                ctx.probabilities = probabilities
        ctx.save_for_backward(hidden, weight, tokens, banned, entropy)
        ctx.set_materialize_grads(False)  # what the loss makes no use of costs nothing
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return taken, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, banned, entropy = ctx.saved_tensors
        grad = torch.zeros_like(entropy) if grad is None else grad
        cast = weight.to(ctx.dtype)
        head = Logits(weight, ctx.dtype) if ctx.probabilities is None else None
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(len(tokens), ctx.rows):
            own = hidden[chunk].to(ctx.dtype)
            logits_grad = ctx.probabilities
            if logits_grad is None:
                logits_grad = _tempered(head(own), ctx.temperature, banned).softmax(-1)  # (rows, V)
            if entropy_grad is not None:
                widening = torch.xlogy(logits_grad, logits_grad).add_(logits_grad * entropy[chunk, None])
                widening.mul_(-entropy_grad[chunk, None] / ctx.temperature)
            logits_grad.mul_(-grad[chunk, None] / ctx.temperature)
            logits_grad.scatter_add_(1, tokens[chunk, None], grad[chunk, None] / ctx.temperature)
            if entropy_grad is not None:
                logits_grad += widening
            logits_grad = logits_grad.to(ctx.dtype)
            if hidden_grad is not None:
                hidden_grad[chunk] = (logits_grad @ cast).to(hidden.dtype)
            if weight_grad is not None:
                weight_grad += logits_grad.T @ own
        ctx.probabilities = None
        return hidden_grad, weight_grad, None, None, None, None, None


def _chunks(count: int, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, count, rows)]
