"""Tensors lent to another process: the same there, and each piece of memory used again once it is let go of."""

import gc
import multiprocessing
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from models import lending
from models.lending import Lender


def receive(lent):
    """Send as a process does and take up in this one: pickled for a pipe, and back."""
    return ForkingPickler.loads(ForkingPickler.dumps(lent))


@pytest.fixture
def mapped(monkeypatch):
    """Let every tensor stay where it was put."""
    monkeypatch.setattr(lending, "_MAPPED", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_lent_tensor_is_the_same_there(dtype, mapped):
    sent = (torch.arange(24).reshape(2, 3, 4) % 5).to(dtype)
    lender = Lender()
    arrived = receive(lender.lend(sent))
    assert arrived.dtype == dtype and torch.equal(arrived, sent)
    assert torch.equal(receive(lender.lend(sent.transpose(0, 2))), sent.transpose(0, 2))
    assert receive(lender.lend(sent[:0])).shape == (0, 3, 4)


def test_a_piece_is_used_again_when_nothing_looks_at_it_any_more(mapped):
    lender = Lender()
    first = receive(lender.lend(torch.full((100,), 1.0)))
    view = first[10:20].view(2, 5)
    second = receive(lender.lend(torch.full((100,), 2.0)))
    assert len(lender._pieces) == 2
    del first
    gc.collect()
    third = receive(lender.lend(torch.full((100,), 3.0)))  # the view still looks at the first piece
    assert len(lender._pieces) == 3 and view.tolist() == [[1.0] * 5] * 2
    del view
    gc.collect()
    fourth = receive(lender.lend(torch.full((50,), 4.0)))
    assert len(lender._pieces) == 3
    assert [set(tensor.tolist()) for tensor in (second, third, fourth)] == [{2.0}, {3.0}, {4.0}]


def test_a_free_piece_goes_where_a_larger_one_is_due(mapped):
    lender = Lender()
    for size in (10, 20, 30, 20, 10):
        receive(lender.lend(torch.zeros(size)))
    assert [piece.numel() for piece in lender._pieces] == [64 + 30 * 4]


def test_a_small_tensor_is_copied_as_it_arrives():
    lender = Lender()
    kept = [receive(lender.lend(torch.full((100,), float(number)))) for number in range(5)]
    assert len(lender._pieces) == 1 and [float(tensor[0]) for tensor in kept] == [0, 1, 2, 3, 4]


def lend_in_turn(pipe):
    lender = Lender()
    for number in range(6):
        pipe.send(lender.lend(torch.full((3 * 2 ** 20,), float(number))))
        pipe.recv()
    pipe.send(len(lender._pieces))


def test_from_process_to_process():
    """12 MB each, so that they stay mapped: what is held is never written over, what is let go of is used again."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=lend_in_turn, args=(there,))
    process.start()
    kept = []
    for _ in range(6):
        kept = [*kept[-1:], here.recv()]  # two at a time
        here.send(None)
        assert float(kept[-1].min()) == float(kept[-1].max()) == float(kept[0].max()) + len(kept) - 1
    assert here.recv() <= 4
    process.join()
    assert process.exitcode == 0
