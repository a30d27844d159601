"""Log-probs from hidden states: by hand, against plain log_softmax, in chunks, and what is held on to."""

import math

import pytest
import torch
from torch import nn

from models.head import Logits, distribution, token_log_probs

NONE = torch.tensor([], dtype=torch.long)


def make_head(tokens=11, width=6, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(width, tokens, bias=False, dtype=dtype)


def plain_log_probs(head, hidden, temperature, banned):
    return (head(hidden) / temperature).index_fill(-1, banned, -torch.inf).log_softmax(-1)


def by_hand_head():
    """Two tokens with logits 0 and log 3 for hidden state 1: probabilities 1/4 and 3/4."""
    head = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    head.weight.data = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    return head


def test_by_hand():
    hidden = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    head = by_hand_head()
    log_probs, entropy = token_log_probs(head, hidden, torch.tensor([0, 1]), 1.0, NONE)
    assert log_probs.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)])
    assert entropy.tolist() == pytest.approx([-(math.log(1 / 4) + 3 * math.log(3 / 4)) / 4] * 2)
    log_probs.sum().backward()
    # d log p(token) / d logits is one at the token minus p; times the weights: 0 and log 3.
    assert hidden.grad[:, 0].tolist() == pytest.approx([-0.75 * math.log(3), 0.25 * math.log(3)])
    assert head.weight.grad[:, 0].tolist() == pytest.approx([0.75 - 0.25, -0.75 + 0.25])


def test_temperature_and_banned_ids_by_hand():
    hidden = torch.tensor([[2.0]], dtype=torch.float64)  # logits 0 and 2 log 3, at temperature 2 again 0 and log 3
    log_probs, _ = token_log_probs(by_hand_head(), hidden, torch.tensor([0]), 2.0, NONE)
    assert log_probs.item() == pytest.approx(math.log(1 / 4))
    log_probs, entropy = token_log_probs(by_hand_head(), hidden, torch.tensor([0]), 2.0, torch.tensor([1]))
    assert log_probs.item() == entropy.item() == 0
    assert distribution(by_hand_head(), hidden, 2.0, NONE)[0].tolist() == pytest.approx([1 / 4, 3 / 4])
    assert distribution(by_hand_head(), hidden, 2.0, torch.tensor([1])).tolist() == [[1, 0]]


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunks_give_what_plain_log_softmax_gives(rows):
    head, banned = make_head(), torch.tensor([2, 5])
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    tokens, weights = torch.tensor([0, 1, 3, 4, 6, 10, 9]), torch.randn(7, dtype=torch.float64)
    plain = plain_log_probs(head, hidden, 0.7, banned)
    wanted = torch.autograd.grad((plain.gather(1, tokens[:, None])[:, 0] * weights).sum(), (hidden, head.weight))
    log_probs, entropy = token_log_probs(head, hidden, tokens, 0.7, banned, chunk_numbers=rows * 11)
    without, nothing = token_log_probs(head, hidden, tokens, 0.7, banned, with_entropy=False, chunk_numbers=rows * 11)
    assert torch.equal(without, log_probs) and not nothing.any()
    found = torch.autograd.grad((log_probs * weights).sum(), (hidden, head.weight))
    assert torch.allclose(log_probs, plain.gather(1, tokens[:, None])[:, 0].float(), atol=1e-6)
    assert torch.allclose(entropy, torch.special.entr(plain.exp()).sum(1).float(), atol=1e-6)
    assert entropy.requires_grad and not nothing.requires_grad
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@pytest.mark.parametrize("both", [False, True])
def test_the_gradient_of_the_entropy_is_the_plain_one(rows, both):
    head, banned = make_head(), torch.tensor([2, 5])
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    tokens, weights = torch.tensor([0, 1, 3, 4, 6, 10, 9]), torch.randn(2, 7, dtype=torch.float64)
    plain = plain_log_probs(head, hidden, 0.7, banned).index_fill(1, banned, 0.0)  # these have p 0, not e ** 0
    plain_entropy = -(plain * plain.exp()).sum(1)
    log_probs, entropy = token_log_probs(head, hidden, tokens, 0.7, banned, chunk_numbers=rows * 11)
    sums = [(entropies * weights[1]).sum() + both * (taken.double() * weights[0]).sum() for taken, entropies in
            ((plain.gather(1, tokens[:, None])[:, 0], plain_entropy), (log_probs, entropy))]
    wanted, found = (torch.autograd.grad(each, (hidden, head.weight)) for each in sums)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, wanted, strict=True))


def test_the_gradient_of_the_entropy_by_hand():
    hidden, head = torch.ones(1, 1, dtype=torch.float64, requires_grad=True), by_hand_head()
    _, entropy = token_log_probs(head, hidden, torch.tensor([0]), 1.0, NONE)
    entropy.sum().backward()
    # H = log 4 - 3/4 log 3. d H / d logits = -p (log p + H): -1/4 (-log 4 + H) = 3/16 log 3, and the same lost.
    assert head.weight.grad[:, 0].tolist() == pytest.approx([3 / 16 * math.log(3), -3 / 16 * math.log(3)])
    assert hidden.grad.item() == pytest.approx(-3 / 16 * math.log(3) ** 2)


def test_a_frozen_head_gets_no_gradient():
    head = make_head().requires_grad_(False)
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    token_log_probs(head, hidden, torch.arange(4), 1.0, NONE, chunk_numbers=22)[0].sum().backward()
    assert head.weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not token_log_probs(head, hidden, torch.arange(4), 1.0, NONE)[0].requires_grad


def test_no_tokens_at_all():
    hidden = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    log_probs, entropy = token_log_probs(make_head(), hidden, NONE, 1.0, NONE)
    log_probs.sum().backward()
    assert len(log_probs) == len(entropy) == 0 and hidden.grad.shape == (0, 6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # other libraries' objects, asked what they are
@pytest.mark.parametrize(("chunk_numbers", "held"), [(3 * 500, 0), (1000 * 500, 500 * 40)])
def test_logits_are_held_once_in_one_chunk_and_not_at_all_in_many(chunk_numbers, held):
    """Peak memory must not hold (tokens, V) twice: every tensor alive between forward and backward is counted."""
    import gc

    head = make_head(500, 6, torch.float32)
    hidden = torch.randn(40, 6, requires_grad=True)
    log_probs, _ = token_log_probs(head, hidden, torch.arange(40), 1.0, NONE, chunk_numbers=chunk_numbers)
    gc.collect()
    big = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.numel() >= 3 * 500
           and each.shape[-1] == 500]
    assert sum(each.numel() for each in big) == held
    log_probs.sum().backward()


def test_bfloat16_computes_in_bfloat16():
    head = make_head(50, 6, torch.float32)
    hidden = torch.randn(8, 6, requires_grad=True)
    exact, _ = token_log_probs(head, hidden, torch.arange(8), 1.0, NONE)
    exact_grad, = torch.autograd.grad(exact.sum(), head.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = token_log_probs(head, hidden, torch.arange(8), 1.0, NONE)
    grad, = torch.autograd.grad(rounded.sum(), head.weight)
    assert rounded.dtype == grad.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05
    assert 0 < (grad - exact_grad).abs().max() < 0.1


def test_bfloat16_logits_are_not_rounded():
    """Rounded operands, exact sums: logits of 20 and more rounded to bfloat16 would move log-probs by up to 0.07."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(64, 20000, bias=False), torch.randn(200, 64)
    nn.init.normal_(head.weight, std=0.5)
    logits = hidden.bfloat16().double() @ head.weight.detach().bfloat16().double().T
    tokens = logits.argmax(1)
    exact = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scored, _ = token_log_probs(head, hidden, tokens, 1.0, NONE)
        drawn = distribution(Logits(head.weight, torch.bfloat16), hidden, 1.0, NONE)
    assert (scored - exact).abs().max() < 1e-4
    assert (drawn.log() - logits.log_softmax(1)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_head_called_again_and_again_gives_what_a_plain_product_gives(dtype):
    torch.manual_seed(0)
    weight, hidden = torch.randn(9001, 128), torch.randn(12, 128)
    packed = Logits(weight, dtype, few_rows=True)
    assert packed._packed is not None and Logits(weight, dtype)._packed is None
    wanted = hidden.to(dtype).double() @ weight.to(dtype).double().T
    for rows in (12, 5, 1, 40):  # as answers are finished
        given = hidden.repeat(4, 1)[:rows]
        with torch.inference_mode():
            found = packed(given)
        assert found.dtype == torch.float32 and (found - wanted.repeat(4, 1)[:rows]).abs().max() < 1e-4
        assert (Logits(weight, dtype)(given) - found).abs().max() < 1e-4


def test_a_head_that_gains_nothing_is_not_packed(monkeypatch):
    assert Logits(torch.randn(100, 128), torch.float32, few_rows=True)._packed is None
    assert Logits(torch.randn(9001, 128, dtype=torch.float64), torch.float64, few_rows=True)._packed is None
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert Logits(torch.randn(9001, 128), torch.float32, few_rows=True)._packed is None


def test_a_gpu_is_asked_for_float32_sums():
    weight, hidden = (torch.empty(rows, 6, dtype=torch.bfloat16, device="meta") for rows in (50, 8))
    logits = Logits(weight, torch.bfloat16)(hidden)
    assert logits.dtype == torch.float32 and logits.shape == (8, 50)
