"""Packed decoding against its slow twin: the same tokens, no copies of the prompt, no work for finished answers."""

import pytest
import torch

from models import decoding
from models.policy import Policy
from rounding import float64
from tiny import adapted, sample, three_prompts


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


def test_finished_answers_leave_the_rows(policy, monkeypatch):
    fed = []
    good = decoding.PackedWriter.feed

    def counted(writer, embedded):
        fed.append(len(embedded))
        good(writer, embedded)

    monkeypatch.setattr(decoding.PackedWriter, "feed", counted)
    generation = as_written(policy, False, group_size=8, columns=60, temperature=4.0)
    lengths = generation.action_mask.sum(1).view(3, 8)
    # Before token t of 1, 2, ...: each prompt has as many rows as the one with most answers of t tokens and more.
    wanted = [3 * int((lengths > step).sum(1).max()) for step in range(1, int(lengths.max()))]
    assert fed == wanted
    assert sum(fed) < 24 * (60 - 1)


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
    assert {shape for *_, shape in held} == {(3, 2, longest + 12 * 9, 8)}


def test_a_writer_can_be_asked_for_less_than_it_holds():
    places = torch.tensor([[0, 2], [1, 2]])
    assert decoding.flat_places(places, 3).tolist() == [0, 2, 4, 5]


def test_keys_are_held_in_the_dtype_that_attention_computes_in():
    values = torch.ones(1, 1, 2, 4)
    assert decoding._extended(values, 3).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        extended = decoding._extended(values, 3)
    assert extended.dtype == torch.bfloat16 and extended.shape == (1, 1, 5, 4)
    assert extended.sum() == 8
