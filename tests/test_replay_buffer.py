"""Join, minibatches, saving: nothing lost, nothing mixed up."""

import pytest
import torch

from models.family import Prompt
from replay_buffer import Experience, ReplayBuffer, join_experiences


def group(prompt_length, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    mask = torch.arange(columns)[None] < torch.tensor(lengths)[:, None]
    rows = len(lengths)

    def draw(*shape):
        return torch.rand(*shape, generator=generator)

    prompt = Prompt(torch.randint(1, 99, (prompt_length,), generator=generator), {"pixel_values": draw(1, 3, 4, 8)})
    return Experience(torch.randint(1, 99, (rows, columns), generator=generator), mask, draw(rows, columns),
                      draw(rows, columns), draw(rows), draw(rows), draw(rows) > 0.5, (prompt,), (draw(3, 4),),
                      (f"sheet row {seed}",))


def same(one: Experience, other: Experience) -> bool:
    tensors = ("completions", "action_mask", "old_log_probs", "ref_log_probs", "rewards", "advantages", "truncated")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors) \
        and one.sources == other.sources \
        and all(torch.equal(x, y) for x, y in zip(one.features, other.features, strict=True)) \
        and all(torch.equal(x.input_ids, y.input_ids) and x.photos.keys() == y.photos.keys()
                for x, y in zip(one.prompts, other.prompts, strict=True))


GROUPS = [group(5, [3, 1], 1), group(2, [2, 4], 2), group(7, [1, 1], 3)]


def test_join_pads_completions_right_and_keeps_prompts_once():
    batch = join_experiences(GROUPS[:2])
    assert batch.completions.shape == batch.old_log_probs.shape == batch.ref_log_probs.shape == (4, 4)
    assert torch.equal(batch.completions[2], GROUPS[1].completions[0])
    assert torch.equal(batch.completions[0, :3], GROUPS[0].completions[0]) and batch.completions[0, 3] == 0
    assert batch.action_mask.sum(1).tolist() == [3, 1, 2, 4]
    assert torch.equal(batch.rewards, torch.cat([GROUPS[0].rewards, GROUPS[1].rewards]))
    assert batch.prompts == GROUPS[0].prompts + GROUPS[1].prompts and len(batch.features) == 2
    assert batch.sources == ("sheet row 1", "sheet row 2")


def test_optional_fields_stay_absent():
    bare = group(3, [2, 2], 9)
    bare.ref_log_probs, bare.truncated, bare.features = None, None, None
    batch = join_experiences([bare, bare])
    assert batch.ref_log_probs is None and batch.truncated is None and batch.features is None


def test_minibatches_cover_every_group_once_an_epoch_and_drop_none():
    buffer = ReplayBuffer()
    for seed in range(7):
        buffer.append(group(3, [2, 1], seed))
    batches = list(buffer.minibatches(epochs=3, parts=buffer.parts(3), seed="s"))
    assert [len(batch) for batch in batches] == [2, 2, 3] * 3
    epochs = [[item.sources[0] for batch in batches[start:start + 3] for item in batch] for start in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 7 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [[item.sources for item in batch] for batch in buffer.minibatches(3, 3, seed="s")] == \
        [[item.sources for item in batch] for batch in batches]
    assert len(next(buffer.minibatches(1, buffer.parts(None), 0))) == 7


@pytest.mark.parametrize(("groups", "size", "sizes"), [
    (16, 5, [4, 4, 4, 4]), (16, 4, [4, 4, 4, 4]), (5, 2, [1, 2, 2]), (3, 8, [3]), (3, None, [3]), (0, 4, []),
    (0, None, [])])
def test_minibatches_are_even(groups, size, sizes):
    buffer = ReplayBuffer(items=[GROUPS[0]] * groups)
    assert [len(batch) for batch in buffer.minibatches(1, buffer.parts(size), 0)] == sizes


def test_state_survives_saving(tmp_path):
    torch.save(ReplayBuffer(items=list(GROUPS)).state_dict(), tmp_path / "buffer.pt")
    loaded = ReplayBuffer()
    loaded.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    assert len(loaded.items) == 3 and all(same(one, other) for one, other in zip(loaded.items, GROUPS, strict=True))
