"""Packed decoding against its slow twin: the same tokens, no copies of the prompt, no work for finished answers."""

import itertools

import pytest
import torch

from models import decoding
from models.policy import Policy
from models.sampling import LOOK_EVERY
from models.shared_prefix import with_room
from rounding import float64
from tiny import adapted, qwen_image_processor, qwen_model, qwen_tokenizer, sample, three_prompts, tiny_model
from traces import traced


def as_written(policy, exact_path, **options):
    """A policy on the same model that samples the fast or the slow way."""
    twin = Policy(policy.model, policy.tokenizer, policy.image_processor, exact_path=exact_path)
    return sample(twin, three_prompts(policy), **options)


@pytest.mark.parametrize("options", [{"group_size": 12, "columns": 24}, {"group_size": 4, "temperature": 1.3},
                                     {"group_size": 1, "temperature": None}, {"columns": 1}])
def test_the_same_tokens_as_the_slow_twin(policy, options):
    for seed in ("one", "two"):
        with float64(policy):
            fast, slow = (as_written(policy, exact_path, seed=seed, **options) for exact_path in (False, True))
        mask = slow.action_mask
        assert torch.equal(fast.action_mask, mask) and torch.equal(fast.truncated, slow.truncated)
        assert torch.equal(fast.completions[mask], slow.completions[mask])
        assert (fast.old_log_probs - slow.old_log_probs).abs().max() < 1e-10


def test_the_same_tokens_with_an_adapter(policy):
    with float64(policy):
        adapted(policy)
        fast, slow = (as_written(policy, exact_path, group_size=6) for exact_path in (False, True))
    mask = slow.action_mask
    assert torch.equal(fast.action_mask, mask) and torch.equal(fast.completions[mask], slow.completions[mask])


def stopping_often(policy, dtype=torch.float32):
    """A policy on the same model for which every 15th token ends an answer."""
    twin = Policy(policy.model, policy.tokenizer, policy.image_processor, dtype)
    twin.stop_ids = torch.arange(5, len(policy.tokenizer), 15)
    return twin


def test_finished_answers_leave_the_rows(policy, monkeypatch):
    fed = []
    good = decoding.PackedWriter.feed

    def counted(writer, embedded):
        fed.append(len(embedded))
        return good(writer, embedded)

    monkeypatch.setattr(decoding.PackedWriter, "feed", counted)
    generation = sample(stopping_often(policy), three_prompts(policy), group_size=8, columns=60, temperature=4.0)
    lengths = generation.action_mask.sum(1).view(3, 8)
    wanted, wide = [], 8
    for step in range(1, 60):  # before token 1 of 0, 1, ...
        if step > LOOK_EVERY and step % LOOK_EVERY == 1:  # as many rows a prompt as the one with most left, or more
            left = int(((lengths > step) | generation.truncated.view(3, 8)).sum(1).max())
            if not left:
                break
            wide = min(wide, min(width for width in (2, 4, 6, 8) if width >= left))
        wanted.append(3 * wide)
    assert fed == wanted and len(set(fed)) > 2
    assert sum(fed) < 24 * (60 - 1)


@pytest.mark.parametrize(("unfinished", "group_size", "wide"), [(12, 12, 12), (10, 12, 12), (9, 12, 9), (4, 12, 6),
                                                                 (1, 12, 3), (1, 1, 1), (3, 5, 3), (1, 5, 2)])
def test_widths_are_few(unfinished, group_size, wide):
    assert decoding.width_for(unfinished, group_size) == wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_is_the_same_work_on_the_same_memory_and_nothing_waits(policy, dtype):
    twin = stopping_often(policy, dtype)
    with traced() as trace:
        generation = sample(twin, three_prompts(twin), group_size=4, columns=22, temperature=4.0)
    assert trace.waits == []
    assert 0 < trace.looks <= generation.completions.shape[1] / LOOK_EVERY + 1
    assert sum(token.anew for token in trace.tokens) >= 3  # begun, finished answers dropped, room made
    assert sum(not token.anew for token in trace.tokens) >= 12
    for before, token in itertools.pairwise(trace.tokens):
        if not token.anew:
            assert token.operations == before.operations


@pytest.mark.parametrize("new", ["item", "bools", "tolist", "nonzero", "another place"])
def test_a_new_wait_is_seen(dense_policy, monkeypatch, new):
    good = decoding.PackedWriter.feed

    def waiting(writer, embedded):
        hidden = good(writer, embedded)
        if new == "item":
            return hidden * (hidden.abs().max() > -1).item()
        if new == "bools":
            return hidden[torch.ones(len(hidden), dtype=torch.bool)]
        if new == "tolist":
            hidden[0, :1].tolist()
        if new == "nonzero":
            hidden[0].nonzero()
        if new == "another place":
            writer.kept_alive = [*getattr(writer, "kept_alive", []), hidden]
            writer._positions = writer._positions.clone()
        return hidden

    monkeypatch.setattr(decoding.PackedWriter, "feed", waiting)
    with traced() as trace:
        sample(dense_policy, three_prompts(dense_policy), columns=4)
    alike = all(token.operations == before.operations for before, token in itertools.pairwise(trace.tokens))
    assert bool(trace.waits) != (new == "another place") and alike == (new != "another place")


def launches(policy):
    """Of every token after the first."""
    with traced() as trace:
        sample(policy, three_prompts(policy)[2:], group_size=2, columns=3)
    return {token.launches for token in trace.tokens}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "hybrid"])
def test_a_token_takes_at_most_800_launches_with_an_adapter_or_without(kind, dtype, tokenizer, image_processor):
    """28 layers of Qwen2.5-VL, and MiniCPM-V-4.6's 24."""
    if kind == "hybrid":
        model = tiny_model(tokenizer, (["linear_attention"] * 3 + ["full_attention"]) * 6)
    else:
        tokenizer, image_processor = qwen_tokenizer(), qwen_image_processor()
        model = qwen_model(kind, tokenizer, num_hidden_layers=28)
    policy = Policy(model, tokenizer, image_processor, dtype)
    without = launches(policy)
    assert len(without) == 1 and max(without) <= 800
    assert launches(adapted(policy)) == without


def test_the_prompts_keys_are_held_once(dense_policy, monkeypatch):
    held = []
    good = decoding.PackedAnswers.attend

    def watched(packed, module, *args):
        keys, values = packed._keys_values[module.layer_idx]
        held.append((module.layer_idx, keys.data_ptr(), values.data_ptr(), tuple(keys.shape)))
        return good(packed, module, *args)

    monkeypatch.setattr(decoding.PackedAnswers, "attend", watched)
    prompts = three_prompts(dense_policy)
    sample(dense_policy, prompts, group_size=12, columns=10)
    longest = max(len(prompt.input_ids) for prompt in prompts)
    assert len(set(held)) == 2  # one place a layer from the first token to the last
    assert {shape for *_, shape in held} == {(3, 2, -(-(longest + 12 * 9) // 8) * 8, 8)}


def test_a_writer_can_be_asked_for_less_than_it_holds():
    places = torch.tensor([[0, 2], [1, 2]])
    assert decoding.flat_places(places, 3).tolist() == [0, 2, 4, 5]


def test_keys_are_held_in_the_dtype_that_attention_computes_in():
    values = torch.ones(1, 1, 2, 4)
    assert with_room(values, 3).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        extended = with_room(values, 3)
    assert extended.dtype == torch.bfloat16 and extended.shape == (1, 1, 5, 4)
    assert extended.sum() == 8
