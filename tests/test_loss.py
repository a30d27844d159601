"""Every formula against numbers worked by hand."""

import math

import pytest
import torch

from loss import VLM_GRPOLoss, approx_kl_divergence, group_advantages, masked_mean
from replay_buffer import Experience


def experience(old, advantages, mask, ref=None, truncated=None):
    old = torch.tensor(old)
    mask = torch.tensor(mask)
    return Experience(completions=torch.zeros(mask.shape, dtype=torch.long), action_mask=mask, old_log_probs=old,
                      ref_log_probs=None if ref is None else torch.tensor(ref), rewards=torch.zeros(len(mask)),
                      advantages=torch.tensor(advantages),
                      truncated=None if truncated is None else torch.tensor(truncated))


LOG = math.log


def test_supervised_loss():
    # The second answer is taught, the third cut off: -(ln 0.2 + ln 0.5) / 2 = ln 10 / 2; nothing else is of either.
    new = torch.tensor([[LOG(0.3), LOG(0.3)], [LOG(0.2), LOG(0.5)], [LOG(0.9), LOG(0.9)]], requires_grad=True)
    item = experience([[LOG(0.3), LOG(0.3)], [0.0, 0.0], [LOG(0.9), LOG(0.9)]], [2.0, 0.0, -1.0], [[True, True]] * 3,
                      ref=[[LOG(0.3), LOG(0.3)], [-9.0, -9.0], [LOG(0.9), LOG(0.9)]], truncated=[False, False, True])
    item.taught = torch.tensor([False, True, False])
    loss = VLM_GRPOLoss(0.2, 0.1, mask_truncated=True, sft_weight=0.5)
    assert loss.supervised(new, item).item() == pytest.approx(LOG(10) / 2)
    assert loss.mask(item).tolist() == [[True, True], [False, False], [False, False]] and loss.size(item) == 1
    terms = loss.terms(new, item)
    assert (terms.total_loss.item(), terms.kl_divergence.item(), terms.ratio.item()) == pytest.approx((-2.0, 0.0, 1.0))
    assert torch.autograd.grad(loss.supervised(new, item), new)[0].tolist() == [[0, 0], [-0.5, -0.5], [0, 0]]
    assert torch.autograd.grad(terms.total_loss, new)[0].tolist() == [[-1, -1], [0, 0], [0, 0]]
    item.taught = None
    assert loss.supervised(new, item) == 0


def test_masked_mean():
    values = torch.tensor([[1.0, 2.0, 30.0], [5.0, float("nan"), float("inf")]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(values, mask) == pytest.approx(8 / 3)
    assert masked_mean(values, mask, dim=1).tolist() == [1.5, 5.0]
    assert masked_mean(values, torch.zeros_like(mask)) == 0
    assert masked_mean(values[:1], None) == 11


def test_group_advantages():
    # mean 0.5, deviations -0.3, -0.1, 0.1, 0.3: sample variance 0.2 / 3
    std = math.sqrt(0.2 / 3)
    rewards = torch.tensor([0.2, 0.4, 0.6, 0.8])
    expected = [-0.3 / std, -0.1 / std, 0.1 / std, 0.3 / std]
    assert group_advantages(rewards).tolist() == pytest.approx(expected, rel=1e-5)
    assert group_advantages(rewards, std_floor=0.6).tolist() == pytest.approx([-0.5, -1 / 6, 1 / 6, 0.5], rel=1e-5)
    assert group_advantages(rewards, std_floor=0.1).tolist() == pytest.approx(expected, rel=1e-5)
    assert group_advantages(rewards, scale="none").tolist() == pytest.approx([-0.3, -0.1, 0.1, 0.3], rel=1e-5)
    assert group_advantages(rewards, eps=1.0).tolist() == pytest.approx([x * std / (std + 1) for x in expected],
                                                                        rel=1e-5)


def test_advantages_over_the_spread_of_the_batch():
    # 0, 0.2, 0.4 and 1: mean 0.4, squares 0.16, 0.04, 0, 0.36, sample variance 0.56 / 3. The group's mean is 0.1.
    rewards, batch, std = torch.tensor([0.0, 0.2]), torch.tensor([0.0, 0.2, 0.4, 1.0]), math.sqrt(0.56 / 3)
    found = group_advantages(rewards, scale="batch", batch_rewards=batch)
    assert found.tolist() == pytest.approx([-0.1 / std, 0.1 / std], rel=1e-5)
    floored = group_advantages(rewards, std_floor=0.5, scale="batch", batch_rewards=batch)
    assert floored.tolist() == pytest.approx([-0.2, 0.2], rel=1e-5)
    assert group_advantages(rewards[:1], scale="batch", batch_rewards=batch).tolist() == [0.0]
    assert group_advantages(torch.tensor([0.7] * 12), scale="batch", batch_rewards=batch).tolist() == [0.0] * 12


def test_groups_without_spread_get_zero():
    assert group_advantages(torch.tensor([0.7])).tolist() == [0.0]
    assert group_advantages(torch.tensor([0.7] * 12)).tolist() == [0.0] * 12  # 0.7's mean rounds: noise / 1e-8 else


def test_kl_estimate():
    # k3 with ratio ref / new = 2: 2 - ln 2 - 1; with 1/2: 1/2 + ln 2 - 1; equal: 0
    new = torch.tensor([[LOG(0.2), LOG(0.4), LOG(0.3)]])
    ref = torch.tensor([[LOG(0.4), LOG(0.2), LOG(0.3)]])
    assert approx_kl_divergence(new, ref)[0].tolist() == pytest.approx([1 - LOG(2), LOG(2) - 0.5, 0], abs=1e-6)
    mask = torch.tensor([[True, False, False]])
    assert approx_kl_divergence(new, ref, mask)[0].tolist() == pytest.approx([1 - LOG(2), 0, 0], abs=1e-6)
    far = approx_kl_divergence(torch.tensor([[-1e4]]), torch.tensor([[0.0]]))
    assert torch.isfinite(far).all() and far == pytest.approx(math.exp(20) - 21, rel=1e-5)


# Two answers. First, two tokens, A = 2: ratios 1.5 (clipped to 1.2) and 0.5. Second, one token, A = -1: ratio 0.5
# (clipped to 0.8). Per token: -2.4 | -1.0 | max(0.5, 0.8) = 0.8.
OLD = [[LOG(0.2), LOG(0.4), 0.0], [LOG(0.4), 0.0, 0.0]]
NEW = [[LOG(0.3), LOG(0.2), 0.0], [LOG(0.2), 0.0, 0.0]]
MASK = [[True, True, False], [True, False, False]]
ADVANTAGES = [2.0, -1.0]


@pytest.mark.parametrize(("loss_type", "expected"), [
    ("grpo", ((-2.4 - 1.0) / 2 + 0.8) / 2), ("dapo", (-2.4 - 1.0 + 0.8) / 3),
    ("dr_grpo", ((-2.4 - 1.0) + 0.8) / 2 / 10)])
def test_clipped_loss(loss_type, expected):
    objective = VLM_GRPOLoss(0.2, 0.0, loss_type=loss_type, max_length=10)
    loss, kl = objective(torch.tensor(NEW), experience(OLD, ADVANTAGES, MASK))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert kl == 0
    terms = objective.terms(torch.tensor(NEW), experience(OLD, ADVANTAGES, MASK))
    assert float(terms.total_loss) == pytest.approx(expected, rel=1e-5) and terms.kl_divergence == 0
    assert float(terms.ratio) == pytest.approx((1.5 + 0.5 + 0.5) / 3, rel=1e-5)
    assert float(terms.clip_fraction) == pytest.approx(2 / 3)
    assert float(terms.entropy) == pytest.approx(-(LOG(0.3) + LOG(0.2) + LOG(0.2)) / 3, rel=1e-5)
    entropy = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]])
    terms = objective.terms(torch.tensor(NEW), experience(OLD, ADVANTAGES, MASK), entropy)
    assert float(terms.entropy) == pytest.approx(3.0)


def test_upper_clip_of_its_own():
    loss, _ = VLM_GRPOLoss(0.2, 0.0, clip_eps_high=0.4)(torch.tensor(NEW), experience(OLD, ADVANTAGES, MASK))
    assert float(loss) == pytest.approx(((-2.8 - 1.0) / 2 + 0.8) / 2, rel=1e-5)


@pytest.mark.parametrize(("loss_type", "expected"), [
    # Of the first answer's ratios 1.5 and 0.5 the geometric mean, sqrt(0.75) = 0.866, times A = 2, is not clipped below
    # for A > 0; the second answer's 0.5 is its only token's, clipped to 0.8 for A = -1.
    ("grpo", (-2 * math.sqrt(0.75) + 0.8) / 2), ("dapo", (2 * -2 * math.sqrt(0.75) + 0.8) / 3),
    ("dr_grpo", (2 * -2 * math.sqrt(0.75) + 0.8) / 2 / 10)])
def test_a_ratio_an_answer(loss_type, expected):
    objective = VLM_GRPOLoss(0.2, 0.0, loss_type=loss_type, max_length=10, ratio_level="sequence")
    new = torch.tensor(NEW, requires_grad=True)
    terms = objective.terms(new, experience(OLD, ADVANTAGES, MASK))
    assert float(terms.total_loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(terms.ratio) == pytest.approx((2 * math.sqrt(0.75) + 0.5) / 3, rel=1e-5)
    assert float(terms.clip_fraction) == pytest.approx(1 / 3)  # one token of three, in an answer of its own
    terms.total_loss.backward()
    if loss_type == "grpo":  # d/d log pi of -2 s, s the mean ratio: -2 s / 2 a token; over two answers
        assert new.grad[0].tolist() == pytest.approx([-math.sqrt(0.75) / 2, -math.sqrt(0.75) / 2, 0], rel=1e-5)
    assert not new.grad[1].any()  # clipped


def test_dual_clip_bounds_what_a_bad_answer_costs():
    # Ratios 5, 2 and 0.5. For A = -2: min(5 * -2, 1.2 * -2) = -10, bounded by 3 * -2; min(2 * -2, -2.4) = -4; the last
    # is clipped to 0.8 * -2. For A = 2 nothing changes: 1.2 * 2, 1.2 * 2, 0.5 * 2.
    old, new = [[LOG(0.1), LOG(0.2), LOG(0.4)]] * 2, [[LOG(0.5), LOG(0.4), LOG(0.2)]] * 2
    group = experience(old, [-2.0, 2.0], [[True] * 3] * 2)
    tensor = torch.tensor(new, requires_grad=True)
    terms = VLM_GRPOLoss(0.2, 0.0, clip_ratio_c=3.0).terms(tensor, group)
    assert float(terms.total_loss.detach()) == pytest.approx(((6 + 4 + 1.6) / 3 - (2.4 + 2.4 + 1) / 3) / 2, rel=1e-5)
    assert float(terms.clip_fraction) == pytest.approx((2 + 2) / 6)
    terms.total_loss.backward()  # of the first token nothing, of the second 2 * 2 / 3 tokens / 2 answers
    assert tensor.grad[0].tolist() == pytest.approx([0, 4 / 6, 0], rel=1e-5)
    plain = VLM_GRPOLoss(0.2, 0.0).terms(torch.tensor(new), group)
    assert float(plain.total_loss) == pytest.approx(((10 + 4 + 1.6) / 3 - (2.4 + 2.4 + 1) / 3) / 2, rel=1e-5)
    assert float(plain.clip_fraction) == pytest.approx((1 + 2) / 6)


@pytest.mark.parametrize(("loss_type", "mean"), [("grpo", ((1 + 2) / 2 + 6) / 2), ("dapo", (1 + 2 + 6) / 3),
                                                ("dr_grpo", (1 + 2 + 6) / 2 / 10)])
def test_entropy_is_rewarded(loss_type, mean):
    plain, rewarding = (VLM_GRPOLoss(0.2, 0.0, loss_type=loss_type, max_length=10, entropy_weight=weight)
                        for weight in (0.0, 0.1))
    entropy = torch.tensor([[1.0, 2.0, float("nan")], [6.0, 99.0, 99.0]], requires_grad=True)
    group = experience(OLD, ADVANTAGES, MASK)
    before, after = (each.terms(torch.tensor(NEW), group, entropy).total_loss for each in (plain, rewarding))
    assert float(after.detach()) == pytest.approx(float(before) - 0.1 * mean, rel=1e-5)
    after.backward()
    share = {"grpo": [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0]], "dapo": [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]],
             "dr_grpo": [[1 / 20, 1 / 20, 0], [1 / 20, 0, 0]]}[loss_type]
    assert torch.allclose(entropy.grad, -0.1 * torch.tensor(share))
    with pytest.raises(ValueError, match="entropy of each token"):
        rewarding(torch.tensor(NEW), group)


def test_a_ratio_an_answer_ignores_what_lies_behind_it():
    dirty = [[*NEW[0][:2], float("nan")], [NEW[1][0], 99.0, -1e9]]
    objective = VLM_GRPOLoss(0.2, 0.0, ratio_level="sequence")
    new = torch.tensor(dirty, requires_grad=True)
    loss, _ = objective(new, experience(OLD, ADVANTAGES, MASK))
    assert float(loss.detach()) == pytest.approx((-2 * math.sqrt(0.75) + 0.8) / 2, rel=1e-5)
    loss.backward()
    assert torch.isfinite(new.grad).all()


def test_kl_term_and_its_mean_over_real_tokens():
    ref = [[LOG(0.6), LOG(0.2), 9.0], [LOG(0.1), 9.0, 9.0]]  # ref / new = 2, 1, 1/2
    kls = [1 - LOG(2), 0.0, LOG(2) - 0.5]
    loss, kl = VLM_GRPOLoss(0.2, 0.1)(torch.tensor(NEW), experience(OLD, ADVANTAGES, MASK, ref))
    assert float(kl) == pytest.approx(sum(kls) / 3, rel=1e-5)
    expected = ((-2.4 - 1.0) / 2 + 0.8) / 2 + 0.1 * ((kls[0] + kls[1]) / 2 + kls[2]) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_truncated_answers_can_be_left_out():
    objective = VLM_GRPOLoss(0.2, 0.0, mask_truncated=True)
    loss, _ = objective(torch.tensor(NEW), experience(OLD, ADVANTAGES, MASK, truncated=[False, True]))
    assert float(loss) == pytest.approx((-2.4 - 1.0) / 2, rel=1e-5)
    nothing, _ = objective(torch.tensor(NEW), experience(OLD, ADVANTAGES, MASK, truncated=[True, True]))
    assert nothing == 0
    kept, _ = VLM_GRPOLoss(0.2, 0.0)(torch.tensor(NEW), experience(OLD, ADVANTAGES, MASK, truncated=[True, True]))
    assert float(kept) == pytest.approx(((-2.4 - 1.0) / 2 + 0.8) / 2, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e9])
def test_masked_garbage_and_more_padding_change_nothing(loss_type, garbage):
    objective = VLM_GRPOLoss(0.2, 0.1, loss_type=loss_type, max_length=10)
    ref = [[LOG(0.6), LOG(0.2), 0.0], [LOG(0.1), 0.0, 0.0]]

    def run(pad, fill):
        def widen(rows, value):
            return [[x if keep else value for x, keep in zip(row, mask, strict=True)] + [value] * pad
                    for row, mask in zip(rows, MASK, strict=True)]
        new = torch.tensor(widen(NEW, fill), requires_grad=True)
        mask = [row + [False] * pad for row in MASK]
        loss, kl = objective(new, experience(widen(OLD, fill), ADVANTAGES, mask, widen(ref, fill)))
        loss.backward()
        return float(loss.detach()), float(kl.detach()), new.grad

    clean, dirty = run(0, 0.0), run(4, garbage)
    assert dirty[:2] == pytest.approx(clean[:2], rel=1e-6)
    assert torch.equal(dirty[2][:, :3], clean[2])
    assert (dirty[2][:, 3:] == 0).all()


def test_an_answer_of_only_the_stop_token_is_finite():
    new = torch.tensor([[LOG(0.5)]], requires_grad=True)
    loss, kl = VLM_GRPOLoss(0.2, 0.1)(new, experience([[LOG(0.5)]], [1.0], [[True]], [[LOG(0.25)]]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(kl) and torch.isfinite(new.grad).all()


def test_on_policy_gradient_is_reinforce():
    new = torch.tensor(OLD, requires_grad=True)
    VLM_GRPOLoss(0.2, 0.0)(new, experience(OLD, ADVANTAGES, MASK))[0].backward()
    again = torch.tensor(OLD, requires_grad=True)
    mask = torch.tensor(MASK)
    reinforce = -(again * torch.tensor(ADVANTAGES)[:, None] * mask / mask.sum(1, keepdim=True)).sum() / len(mask)
    reinforce.backward()
    assert torch.allclose(new.grad, again.grad)


@pytest.mark.parametrize(("loss_type", "expected"), [
    ("grpo", 0), ("dapo", -(1 * 3 - 0.5 * 1 - 0.5 * 1) / 5), ("dr_grpo", -(1 * 3 - 0.5 * 1 - 0.5 * 1) / (3 * 4))])
def test_the_first_loss_of_a_step(loss_type, expected):
    """The ratio is 1 and advantages average to zero; a long answer with a good one weighs more where tokens count."""
    mask = [[True, True, True], [True, False, False], [True, False, False]]
    old = [[LOG(0.5)] * 3] * 3
    loss, _ = VLM_GRPOLoss(0.2, 0.0, loss_type=loss_type, max_length=4)(
        torch.tensor(old), experience(old, [1.0, -0.5, -0.5], mask))
    assert loss == pytest.approx(expected, abs=1e-7)


def test_log_ratios_are_clamped():
    new = torch.tensor([[100.0]], requires_grad=True)
    loss, _ = VLM_GRPOLoss(0.2, 0.0)(new, experience([[-100.0]], [-1.0], [[True]]))
    assert float(loss.detach()) == pytest.approx(math.exp(20), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_micro_batches_weighed_by_size_give_the_whole_loss(loss_type):
    objective = VLM_GRPOLoss(0.2, 0.0, loss_type=loss_type, max_length=10)
    whole = experience(OLD, ADVANTAGES, MASK)
    rows = [experience(OLD[i:i + 1], ADVANTAGES[i:i + 1], MASK[i:i + 1]) for i in range(2)]
    total = sum(objective.size(row) for row in rows)
    parts = sum(objective(torch.tensor(NEW[i:i + 1]), row)[0] * objective.size(row) / total
                for i, row in enumerate(rows))
    assert float(parts) == pytest.approx(float(objective(torch.tensor(NEW), whole)[0]), rel=1e-6)


def test_half_precision_inputs_are_computed_in_float32():
    loss, kl = VLM_GRPOLoss(0.2, 0.1)(torch.tensor(NEW).bfloat16(), experience(OLD, ADVANTAGES, MASK, NEW))
    assert loss.dtype == kl.dtype == torch.float32


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="grpo, dapo or dr_grpo"):
        VLM_GRPOLoss(0.2, 0.0, loss_type="ppo")
    with pytest.raises(ValueError, match="max_length"):
        VLM_GRPOLoss(0.2, 0.0, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="token or sequence"):
        VLM_GRPOLoss(0.2, 0.0, ratio_level="word")
