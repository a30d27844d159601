"""What learning may need: off by default to the bit, each option reaching what it names, processes and resumed runs."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import train_vlm_parallel as training
import update
from config import TrainOptions
from ground.options import read_options
from loss import LOG_RATIO_LIMIT, LossTerms, VLM_GRPOLoss, approx_kl_divergence, masked_mean
from models.processes import Processes
from models.sharding import load_optimizer_state
from reward import RewardParts
from rollout import Group, sample_flat_again
from runs import tags, train_options, weights
from sheets.samples import Sample


@pytest.fixture
def options(shop, tmp_path):
    """Options of a run of 20 steps, some of whose minibatches are off-policy; an answer earns by its length."""
    (tmp_path / "mine.py").write_text("def length(answer, label, sample):\n    return len(answer) / 40\n")
    return train_options(shop, tmp_path, reward=[f"{tmp_path}/mine.py:length"], max_steps=20, save_every=20,
                         eval_every=0, minibatch_size=2, epochs=2, preflight=False, show_every=0)


def trained(options, name, **changes):
    """The weights after a run."""
    return weights(training.train(replace(options, output_dir=f"{options.output_dir}/{name}", **changes)))


def equal(one, other):
    """Whether two models are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class PlainGRPO(VLM_GRPOLoss):
    """The clipped loss with its KL term and nothing else."""

    def terms(self, log_probs, experience, entropy=None, blind_log_probs=None):
        mask, advantages = experience.action_mask, experience.advantages.reshape(-1, 1)
        log_probs, old = (torch.where(mask, each, 0.0) for each in (log_probs, experience.old_log_probs))
        ratio = (log_probs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps)
        kl = approx_kl_divergence(log_probs, experience.ref_log_probs, mask)
        per_token = -torch.min(ratio * advantages, clipped * advantages) + self.kl_weight * kl
        loss = masked_mean(masked_mean(per_token, mask, dim=1), mask.any(1))
        zero = torch.zeros(())
        return LossTerms(loss, masked_mean(kl, mask), zero, zero, zero)


def plain_advantages(rewards, **_):
    """Deviations from the group's mean in its standard deviations."""
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-8)


def plain_adam(parameters, options):
    """AdamW as torch makes it."""
    return torch.optim.AdamW(nn.ParameterList(parameters).parameters(), lr=options.lr, weight_decay=0.0)


def test_the_defaults_are_plain_grpo_to_the_bit(options, monkeypatch):
    ours = trained(options, "ours")
    monkeypatch.setattr(update, "VLM_GRPOLoss", PlainGRPO)
    monkeypatch.setattr(update, "make_optimizer", plain_adam)
    monkeypatch.setattr(training, "group_advantages", plain_advantages)
    assert equal(ours, trained(options, "plain"))


CHANGES = [{"scale_advantages": "batch"}, {"scale_advantages": "none"}, {"ratio_level": "sequence"},
           {"clip_ratio_c": 1.01}, {"entropy_weight": 0.1}, {"adam_eps": 1e-3},
           {"ref_sync_every": 1}, {"sft_weight": 0.1}, {"sft_steps": 1}, {"look_weight": 0.5}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_option_reaches_the_weights(options, changes):
    short = replace(options, max_steps=2, save_every=2)
    assert not equal(trained(short, "plain"), trained(short, "changed", **changes))


class Others(Processes):
    """A run of two processes, the other of which sampled one group."""

    def gather(self, thing):
        return [thing, [10.0, 20.0]]


def test_the_batch_whose_spread_counts_is_that_of_all_processes(options):
    options = replace(options, scale_advantages="batch", kl_weight=0.0)
    run = training.prepare(options, training.Processes())
    groups, _ = training.rollout_groups(run.encoder, run.products[:3], 4, 1.0, 8, "0/0", 3)
    run.scorer.rescore(groups)
    rewards = [group.rewards for group in groups]
    run.learner.processes = Others()
    spread = torch.tensor([*sum(rewards, []), 10.0, 20.0]).std()
    for item, own in zip(training.fill_buffer(groups, run, options).items, torch.tensor(rewards), strict=True):
        assert torch.allclose(item.advantages, (own - own.mean()) / (spread + 1e-8), rtol=1e-5)


def test_each_reward_is_scaled_by_itself(options, tmp_path):
    (tmp_path / "two.py").write_text("def two(answer, label, sample):\n    return {'long': len(answer), **"
                                     "({'even': 1} if len(answer) % 2 else {})}\n")
    options = replace(options, reward=[f"{tmp_path}/two.py:two:0.25", f"{tmp_path}/mine.py:length"], kl_weight=0.0,
                      scale_rewards_each=True)
    run = training.prepare(options, training.Processes())
    groups, _ = training.rollout_groups(run.encoder, run.products[:2], 4, 1.0, 8, "0/0", 3)
    run.scorer.rescore(groups)
    sums = []
    assert any(len(group.rewards_each()[0]) == 3 for group in groups)  # where an answer has it, all have the third part
    for group in groups:
        long = torch.tensor([float(len(answer)) for answer in group.answers])
        sums.append(1.25 * training.group_advantages(long) + 0.25 * training.group_advantages(long % 2))
    for item, own in zip(training.fill_buffer(groups, run, options).items, sums, strict=True):
        assert torch.allclose(item.advantages, own / torch.cat(sums).std(), rtol=1e-4)


def test_a_group_is_flat_when_each_of_its_rewards_is():
    group = group_of(1, 1.0, 1.0)
    assert group.flat() and group.flat(each=True) and group.rewards_each()[1].tolist() == [[1.0, 1.0]]
    group.parts = [replace(part, each=(("a", 1.0, value), ("b", -1.0, value))) for part, value in
                   zip(group.parts, (0.2, 0.4), strict=True)]
    assert group.flat() and not group.flat(each=True)
    assert sample_flat_again([group], 1, None, each=True) == ([group], [])


@pytest.mark.parametrize(("written", "read"), [("true", "group"), ("false", "none"), ("batch", "batch")])
def test_checkpoints_that_knew_two_ways_of_scaling_are_read(tmp_path, written, read):
    (tmp_path / "options.yaml").write_text(f"scale_advantages: {written}\n")
    assert read_options(tmp_path / "options.yaml").scale_advantages == read


def test_a_bonus_raises_the_entropy(options):
    def entropy_after(weight):
        changed = replace(options, entropy_weight=weight, output_dir=f"{options.output_dir}/{weight}",
                          log_dir=f"{options.log_dir}/{weight}", lr=1e-2, max_steps=6, save_every=6)
        training.train(changed)
        return tags(changed.log_dir)["entropy"][-1][1]

    assert entropy_after(1.0) > entropy_after(0.0) + 0.1


@pytest.mark.parametrize(("eps", "moved"), [(1e-8, 0.1), (0.5, 0.05)])
def test_the_first_step_of_adam_by_hand(eps, moved):
    # Unbiased, the first moment is the gradient 0.5 and the root of the second too: lr * 0.5 / (0.5 + eps).
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = update.make_optimizer([weight], TrainOptions(lr=0.1, adam_eps=eps))
    weight.grad = torch.tensor([0.5])
    optimizer.step()
    assert weight.item() == pytest.approx(-moved)


def test_on_a_cpu_adam_is_not_fused_wherever_its_state_comes_from():
    optimizer = update.make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], TrainOptions())
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = True
    load_optimizer_state(optimizer, state)
    assert [group["fused"] for group in optimizer.param_groups] == [None, None]


def test_a_policy_moves_towards_another_by_hand(dense_policy):
    other = copy.deepcopy(dense_policy)
    with torch.no_grad():
        for own, its in zip(dense_policy.model.parameters(), other.model.parameters(), strict=True):
            own.fill_(4.0)
            its.fill_(8.0)
    dense_policy._head.weight.data = dense_policy._head.weight.data.bfloat16()
    dense_policy.move_towards(other, 0.25)  # 0.75 * 4 + 0.25 * 8
    assert {float(weight.min()) for weight in dense_policy.model.parameters()} == {5.0}
    dense_policy.move_towards(other, 1.0)
    assert {float(weight.min()) for weight in dense_policy.model.parameters()} == {8.0}
    assert dense_policy._head.weight.dtype == torch.bfloat16


def test_the_reference_follows_every_so_many_steps(options):
    options = replace(options, minibatch_size=None, epochs=1, max_steps=5, ref_sync_every=2)
    training.train(options)
    kl = [value for _, value in tags(options.log_dir)["kl_divergence"]]  # taken before a step's only update
    assert [abs(value) < 1e-6 for value in kl] == [True, False, True, False, True]


@pytest.mark.parametrize("mix", [1.0, 0.6])
def test_a_resumed_run_goes_on_with_the_reference_it_had(options, mix):
    settings = dict(ref_sync_every=2, ref_sync_mix=mix, max_steps=6, save_every=3)
    whole = trained(options, "whole", **settings)
    trained(options, "stopped", **settings | {"max_steps": 3})
    assert equal(whole, trained(options, "stopped", **settings, resume="auto"))


def group_of(row, *rewards):
    """A group of one-token answers that earn so much."""
    sample = Sample(row=row, product_id=str(row), text="", label=(), photos=(), sheet="s.xlsx")
    ones = [[1]] * len(rewards)
    parts = [RewardParts(reward, (), (), True, "") for reward in rewards]
    return Group(sample, None, None, torch.tensor(ones), torch.tensor(ones).bool(), torch.zeros(len(rewards), 1),
                 torch.zeros(len(rewards)).bool(), [""] * len(rewards), parts)


def test_groups_without_spread_are_sampled_again_and_those_that_stay_so_left_out():
    asked = []
    later = {(2, 1): group_of(2, 0.5, 0.5), (2, 2): group_of(2, 0.1, 0.9), (3, 1): group_of(3, 1.0, 1.0),
             (3, 2): group_of(3, 1.0, 1.0)}

    def sample(products, number):
        asked.append((number, [product.row for product in products]))
        return [later[product.row, number] for product in products if product.row != 4], [f"4, time {number}"]

    groups = [group_of(1, 0.2, 0.3), group_of(2, 0.7, 0.7), group_of(3, 0.0, 0.0), group_of(4, 0.0, 0.0)]
    kept, failed = sample_flat_again(groups, 2, sample)
    assert asked == [(1, [2, 3, 4]), (2, [2, 3, 4])] and failed == ["4, time 1", "4, time 2"]
    assert kept == [groups[0], later[2, 2]]
    assert sample_flat_again(groups, 0, sample) == (groups, []) and len(asked) == 2
    assert sample_flat_again(groups[:1], 5, sample) == (groups[:1], []) and len(asked) == 2


def coarse(options, tmp_path, expression, **changes):
    """Options with a reward of few values."""
    (tmp_path / "coarse.py").write_text(f"def reward(answer, label, sample):\n    return {expression}\n")
    return replace(options, reward=[f"{tmp_path}/coarse.py:reward"], resample_flat=2, max_steps=3, save_every=3,
                   **changes)


def test_what_is_trained_on_has_spread_and_what_is_shown_was_sampled_first(options, tmp_path, monkeypatch):
    good, seen = training.update, []

    def watched(learner, buffer, *args):
        seen.append([bool(item.advantages.any()) for item in buffer.items])
        return good(learner, buffer, *args)

    monkeypatch.setattr(training, "update", watched)
    again = coarse(options, tmp_path, "float(len(answer) % 4 == 0)", show_every=1)
    once = replace(again, resample_flat=0, output_dir=f"{tmp_path}/once", log_dir=f"{tmp_path}/once_logs", max_steps=1)
    training.train(once)
    kept_before = seen.pop()
    training.train(again)
    assert not all(kept_before) and all(all(step) for step in seen)
    first, plain = tags(again.log_dir), tags(once.log_dir)
    assert [value for _, value in first["trained_groups"]] == [len(step) for step in seen]
    assert all(first[name][0] == plain[name][0] for name in ("returns", "zero_variance_share"))


def test_steps_in_which_nothing_has_spread_end_the_run_and_say_why(options, tmp_path):
    with pytest.raises(training.BadRun, match=r"every group without spread.*--resample_flat\) in 2"):
        training.train(coarse(options, tmp_path, "1.0", max_bad_steps=2))
