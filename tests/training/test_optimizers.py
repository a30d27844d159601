"""AdamW in 8 bits: it learns as well as AdamW does, goes on to the bit, and says what it wants."""

import pytest
import torch
from torch import nn

import ground.options
import update
from config import TrainOptions
from ground.errors import OptionError
from ground.options import check_options
from live_bytes import held_by
from models.sharding import load_optimizer_state, whole_optimizer_state
from runs import train_options
from training import checkpoint
from training.preflight import moments_of

EIGHT_BITS = dict(optimizer="adamw_8bit", lr=3e-3)


def bent():
    """A net of two matrices, and what it is to learn."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    inputs = torch.randn(512, 64)
    return net, inputs, torch.sin(inputs @ torch.randn(64, 64) / 4)


def steps(net, inputs, wanted, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        loss = (net(inputs) - wanted).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def learn(options, count):
    net, inputs, wanted = bent()
    optimizer = update.make_optimizer(list(net.parameters()), options)
    return net, optimizer, steps(net, inputs, wanted, optimizer, count)


def test_it_learns_as_adamw_does():
    """From a loss of 0.54 to 0.0124: within 5 % of AdamW's, in a quarter of the memory."""
    pytest.importorskip("bitsandbytes", reason="8 bits need bitsandbytes")
    _, optimizer, wanted = learn(TrainOptions(lr=3e-3), 200)
    _, small, found = learn(TrainOptions(**EIGHT_BITS), 200)
    assert wanted < 0.02 and found == pytest.approx(wanted, rel=0.05)
    moments = [held_by(value for state in each.state.values() for name, value in state.items()
                       if isinstance(value, torch.Tensor) and name not in ("step", "qmap1", "qmap2"))
               for each in (optimizer, small)]
    sizes = [64 * 256, 256, 64 * 256, 64]
    assert moments == [8 * sum(sizes), sum(moments_of(size, in_8_bits=True) for size in sizes)]
    assert moments[1] == 2 * 2 * (64 * 256 + 4 * 64) + 8 * (256 + 64)


def test_it_goes_on_to_the_bit(tmp_path):
    pytest.importorskip("bitsandbytes", reason="8 bits need bitsandbytes")
    options = TrainOptions(**EIGHT_BITS)
    through, _, _ = learn(options, 20)
    first, optimizer, _ = learn(options, 10)
    torch.save(whole_optimizer_state(optimizer, keep=True), tmp_path / "state.pt")
    _, inputs, wanted = bent()
    second = update.make_optimizer(list(first.parameters()), options)
    load_optimizer_state(second, torch.load(tmp_path / "state.pt", weights_only=True, mmap=True))
    steps(first, inputs, wanted, second, 10)
    assert all(torch.equal(one, other) for one, other in zip(through.parameters(), first.parameters(), strict=True))
    adamw, _, _ = learn(TrainOptions(lr=3e-3), 20)
    assert not torch.equal(adamw[0].weight, first[0].weight)


def test_what_it_wants_is_said(tmp_path, shop, monkeypatch):
    options = train_options(shop, tmp_path, optimizer="adamw_8bit")
    monkeypatch.setattr(ground.options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="--optimizer adamw_8bit needs bitsandbytes.*pip install bitsandbytes"):
        check_options(options)
    options.sharding = "fsdp"
    with pytest.raises(OptionError, match="adamw_8bit and --sharding fsdp contradict each other"):
        check_options(options)


def test_a_run_goes_on_with_the_optimizer_it_had(tmp_path, shop):
    options = train_options(shop, tmp_path)
    checkpoint.write_options(options, tmp_path / checkpoint.OPTIONS_FILE)
    options.optimizer = "adamw_8bit"
    with pytest.raises(OptionError, match="--optimizer adamw_8bit: the run in .* had adamw, .*--checkpoint_path"):
        checkpoint.read_state(tmp_path, options)
