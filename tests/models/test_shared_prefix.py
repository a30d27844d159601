"""One row a group against one answer at a time: log-probs and gradients, for every family and way of training."""

import copy
from dataclasses import replace

import pytest
import torch

from models import shared_prefix
from models.policy import Policy
from models.trainable import set_trainable
from tiny import adapted, sample, three_prompts


def gradients(policy, prompts, generation, exact_path, checkpointing):
    """Log-probs, the gradient of their weighted sum at every trainable weight, and how many numbers autograd held."""
    policy = Policy(policy.model, policy.tokenizer, policy.image_processor, gradient_checkpointing=checkpointing)
    return gradients_of(policy, prompts, generation, exact_path)


def gradients_of(policy, prompts, generation, exact_path):
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    held = []

    def count(tensor):
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        scored, _ = policy.log_probs(prompts, generation.completions, generation.action_mask, 0.7,
                                     exact_path=exact_path)
    weights = torch.linspace(-1, 1, scored.numel()).view(scored.shape)
    found = torch.autograd.grad((scored * weights).sum(), parameters, allow_unused=True)
    return scored.detach(), found, sum(held)


def unequal(generation):
    """Cut the answers to 1, 2, 3 .. columns, one length after the other and over again."""
    answers, columns = generation.action_mask.shape
    lengths = torch.arange(answers) * 7 % columns + 1
    return replace(generation, action_mask=generation.action_mask & (torch.arange(columns) < lengths[:, None]))


@pytest.mark.parametrize(("trains", "checkpointing"),
                         [("language", False), ("language and vision", True), ("adapter", True)])
def test_log_probs_and_gradients_equal_one_answer_at_a_time(policy, trains, checkpointing):
    if trains == "adapter":
        adapted(policy)
    set_trainable(policy, train_vision=trains == "language and vision")
    prompts = three_prompts(policy)
    generation = unequal(sample(policy, prompts, group_size=12, columns=20))
    fast, fast_grad, _ = gradients(policy, prompts, generation, False, checkpointing)
    slow, slow_grad, _ = gradients(policy, prompts, generation, True, False)
    assert (fast - slow).abs().max() < 1e-4
    scale = max(float(each.abs().max()) for each in slow_grad if each is not None)
    for one, other in zip(fast_grad, slow_grad, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("exact_path", [False, True])
def test_checkpointing_holds_less_and_gives_the_same(policy, exact_path):
    set_trainable(policy, train_vision=False)
    prompts = three_prompts(policy)
    generation = sample(policy, prompts)
    with_all, grad, much = gradients(policy, prompts, generation, exact_path, False)
    with_less, other_grad, little = gradients(policy, prompts, generation, exact_path, True)
    assert torch.equal(with_all, with_less)
    assert all(torch.equal(one, other) for one, other in zip(grad, other_grad, strict=True) if one is not None)
    assert little < 0.6 * much
    plain = Policy(policy.model, policy.tokenizer, policy.image_processor)
    other = copy.copy(plain)
    other.gradient_checkpointing = True
    assert gradients_of(other, prompts, generation, exact_path)[2] == little
    assert gradients_of(plain, prompts, generation, exact_path)[2] == much  # as it was
    assert not any(layer.training for layer in policy.model.modules())


def test_the_row_has_no_column_too_many(policy):
    """Prompts once, answers without padding and without their last token."""
    prompts = three_prompts(policy)[:1]
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    layout = shared_prefix.lay_out_groups([len(prompts[0].input_ids)], mask, torch.float32)
    assert layout.answers.tokens.tolist() == [[0, 1, 2, 8]] and layout.answers.offsets.tolist() == [[0, 1, 2, 0]]
    last, first = layout.columns - 1, layout.columns
    assert layout.predictors.tolist() == [last, first, first + 1, first + 2, last, last, first + 3]
    own = (layout.answers.mask[0, 0, :, layout.columns:] == 0).int().tolist()
    assert own == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert (layout.answers.mask[0, 0, :, :layout.columns] == 0).all()


def test_answers_of_one_token_need_no_columns(policy):
    prompts = three_prompts(policy)
    completions, mask = torch.tensor([[40], [41], [42], [43], [44], [45]]), torch.ones(6, 1, dtype=torch.bool)
    assert shared_prefix.lay_out_groups([3, 4, 5], mask, torch.float32).answers is None
    with torch.no_grad():
        fast, slow = (policy.log_probs(prompts, completions, mask, 0.7, exact_path=exact)[0]
                      for exact in (False, True))
    assert (fast - slow).abs().max() < 1e-4


def test_rows_of_unequal_prompts_and_answers_by_hand():
    """Two prompts of 2 and 3 tokens; answers of 2 and 1 tokens, and of 3 and 3."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]).bool()
    layout = shared_prefix.lay_out_groups([2, 3], mask, torch.float32)
    assert (layout.columns, layout.padded) == (3, True)
    assert layout.answers.tokens.tolist() == [[0, 0, 0, 0], [6, 7, 9, 10]]  # three columns of padding in the first row
    assert layout.predictors.tolist() == [1, 3, 1, 9, 10, 11, 9, 12, 13]
    seen = (layout.answers.mask[:, 0] == 0).int()
    assert seen[0, 0].tolist() == [1, 1, 0, 1, 0, 0, 0]
    assert seen[1].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1, 0],
                                [1, 1, 1, 0, 0, 1, 1]]
