"""Join, split, minibatches, saving: nothing lost, nothing mixed up."""

import pytest
import torch

from models.family import Prompt
from replay_buffer import Experience, ReplayBuffer, join_experiences, make_experience, split_experience


def group(prompt_length, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    mask = torch.arange(columns)[None] < torch.tensor(lengths)[:, None]
    rows = len(lengths)

    def draw(*shape):
        return torch.rand(*shape, generator=generator)

    prompt = Prompt(torch.randint(1, 99, (prompt_length,), generator=generator), {"pixel_values": draw(1, 3, 4, 8)})
    return make_experience(prompt, torch.randint(1, 99, (rows, columns), generator=generator), mask,
                           action_log_probs=draw(rows, columns), log_probs_ref=draw(rows, columns),
                           returns=draw(rows), advantages=draw(rows), truncated=draw(rows) > 0.5,
                           features=(draw(3, 4),), sources=(f"sheet row {seed}",))


def same(one: Experience, other: Experience) -> bool:
    tensors = zip(one._tensors().items(), other._tensors().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in tensors) and one.sources == other.sources \
        and all(torch.equal(x, y) for x, y in zip(one.features, other.features, strict=True)) \
        and all(torch.equal(x.input_ids, y.input_ids) and x.photos.keys() == y.photos.keys()
                for x, y in zip(one.prompts, other.prompts, strict=True))


GROUPS = [group(5, [3, 1], 1), group(2, [2, 4], 2), group(7, [1, 1], 3)]


def test_join_pads_prompts_left_and_completions_right():
    batch = join_experiences(GROUPS[:2])
    assert batch.sequences.shape == (4, 5 + 4) and batch.action_mask.shape == (4, 4)
    assert batch.attention_mask[2].tolist() == [False] * 3 + [True] * 2 + [True, True, False, False]
    assert torch.equal(batch.completions[2, :4], GROUPS[1].completions[0])
    assert torch.equal(batch.sequences[2, 3:5], GROUPS[1].prompts[0].input_ids)
    assert batch.action_mask.sum(1).tolist() == [3, 1, 2, 4]
    assert batch.sources == ("sheet row 1", "sheet row 2")


def test_split_undoes_join():
    parts = split_experience(join_experiences(GROUPS))
    assert len(parts) == 3
    assert all(same(part, original) for part, original in zip(parts, GROUPS, strict=True))


def test_optional_fields_stay_absent():
    bare = group(3, [2, 2], 9)
    bare.log_probs_ref, bare.features = None, None
    batch = join_experiences([bare, bare])
    assert batch.log_probs_ref is None and batch.features is None
    assert split_experience(batch)[1].log_probs_ref is None


def test_append_splits_joined_groups_and_the_oldest_go_first():
    buffer = ReplayBuffer(limit=2)
    buffer.append(join_experiences(GROUPS))
    assert len(buffer) == 2 and same(buffer[0], GROUPS[1]) and same(buffer[1], GROUPS[2])
    unlimited = ReplayBuffer()
    for item in GROUPS * 5:
        unlimited.append(item)
    assert len(unlimited) == 15
    unlimited.clear()
    assert len(unlimited) == 0 and list(unlimited.minibatches(2, 4, 0)) == []


def test_minibatches_cover_every_group_once_an_epoch_and_drop_none():
    buffer = ReplayBuffer()
    for seed in range(7):
        buffer.append(group(3, [2, 1], seed))
    batches = list(buffer.minibatches(epochs=3, minibatch_size=3, seed="s"))
    assert [len(batch) for batch in batches] == [3, 3, 1] * 3
    epochs = [[item.sources[0] for batch in batches[start:start + 3] for item in batch] for start in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 7 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [[item.sources for item in batch] for batch in buffer.minibatches(3, 3, "s")] == \
        [[item.sources for item in batch] for batch in batches]
    assert len(next(buffer.minibatches(1, None, 0))) == 7


def test_sample_draws_different_groups():
    buffer = ReplayBuffer(items=list(GROUPS))
    assert sorted(buffer.sample(3, seed=1).sources) == ["sheet row 1", "sheet row 2", "sheet row 3"]
    assert buffer.sample(2, seed=4).sources == buffer.sample(2, seed=4).sources
    with pytest.raises(ValueError):
        buffer.sample(4)


def test_state_survives_saving(tmp_path):
    buffer = ReplayBuffer(limit=5, items=list(GROUPS))
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    loaded = ReplayBuffer()
    loaded.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert loaded.limit == 5 and all(same(one, other) for one, other in zip(loaded.items, GROUPS, strict=True))


def test_to_moves_row_tensors_and_features_and_leaves_prompts():
    moved = GROUPS[0].to("meta")
    assert {tensor.device.type for tensor in moved._tensors().values()} == {"meta"}
    assert moved.features[0].device.type == "meta" and moved.prompts[0].input_ids.device.type == "cpu"
