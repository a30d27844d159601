"""The pre-flight: on a GPU, here a planted one, it tries rollout, reference and update, and refuses what can't fit."""

from types import SimpleNamespace

import pytest
import torch

import train_vlm_parallel as training
import update
from config import TrainOptions
from models.family import ModelError
from models.memory import Copies, PassSize
from models.policy import Policy
from models.processes import Processes
from rollout import products_together
from runs import one_step, train_options
from training import preflight
from training.preflight import GIB, moments_to_come, products_that_fit, refuse_too_large

WEIGHTS, MOMENTS = 20, 10  # GiB
COSTS = {"sample": 10, "update": 25, "reference": 5}  # GiB a product


class PlantedCard:
    """A GPU of 100 GiB: passes take so much a product, and find no memory where that is more than there is."""

    total = 100 * GIB

    def __init__(self, costs, moments):
        self.costs, self.moments, self.taken, self.most, self.tried = costs, moments, WEIGHTS, 0, []

    def held(self):
        return self.taken * GIB

    def peak_of(self, work):
        self.most = 0
        work()
        return self.held() + self.most * GIB

    def reserve(self, size):
        self.take(self.moments)
        self.taken += self.moments
        return torch.empty(0)

    def take(self, size):
        if self.taken + size > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.most = max(self.most, size)

    def meet(self, name, products):
        self.tried.append((name, products))
        self.take(self.costs[name] * products)


@pytest.fixture
def planted(monkeypatch):
    """Plants a card that the passes of a run then meet."""
    def plant(moments=MOMENTS, **costs):
        card, sample, score, step = PlantedCard(COSTS | costs, moments), Policy.sample, Policy.log_probs, \
            update.log_probs_of

        def sampled(policy, prompts, *args):
            card.meet("sample", len(prompts))
            return sample(policy, prompts, *args)

        def scored(policy, prompts, *args, **more):
            if not torch.is_grad_enabled():
                card.meet("reference", len(prompts))
            return score(policy, prompts, *args, **more)

        def updated(learner, items, options):
            card.meet("update", len(items))
            return step(learner, items, options)

        monkeypatch.setattr(Policy, "sample", sampled)
        monkeypatch.setattr(Policy, "log_probs", scored)
        monkeypatch.setattr(update, "log_probs_of", updated)
        monkeypatch.setattr(preflight, "card_of", lambda device: card)
        return card

    return plant


def prepared(shop, tmp_path, **changes):
    options = train_options(shop, tmp_path, eval_every=0, exact_path=True, batch_size=8, **changes)  # no guard
    return training.prepare(options, training.Processes())


def test_what_is_left_open_is_set_to_what_fits(shop, tmp_path, planted, said):
    """90 of 100 GiB, 30 of them taken: six are sampled, two trained on; each is tried."""
    card = planted()
    run = prepared(shop, tmp_path, rollout_batch_size=0, micro_batch_size=0)
    assert run.policy.sampled_together.products == 6 and run.learner.passes.products == 2
    assert card.tried == [("sample", 1), ("sample", 6), ("update", 1), ("update", 1), ("update", 2), ("reference", 2)]
    line = next(line for line in said if "pre-flight: data.xlsx row" in line)
    assert "sampling 6 products, as many as fit: 90.00 GiB" in line
    assert "updating 2 products, as many as fit: 80.00 GiB" in line
    assert "the reference 2 products: 40.00 GiB" in line
    assert all(parameter.grad is None for parameter in run.learner.parameters)


def test_a_chunk_is_no_larger_than_a_step(shop, tmp_path, planted):
    planted(sample=1, update=1, reference=1)
    run = prepared(shop, tmp_path, rollout_batch_size=0, micro_batch_size=0)
    assert run.policy.sampled_together.products == 8 and run.learner.passes.products == 8


def test_the_longest_chunk_of_each_pass_is_tried_and_halved(shop, tmp_path, planted, said):
    """Eight and four find no memory; three updated would leave less than a tenth free, so one is taken."""
    card = planted(sample=20, update=22, reference=25)
    run = prepared(shop, tmp_path, rollout_batch_size=8, micro_batch_size=3)
    assert run.policy.sampled_together.products == 2 and run.learner.passes.products == 1
    assert [products for name, products in card.tried if name == "sample"] == [8, 4, 2, 2, 2, 2]
    assert ("update", 3) in card.tried and card.tried[-1] == ("reference", 1)
    assert any("out of memory with 8 products a pass while sampling: going on with 4" in line for line in said)
    assert any("96.0 of 100.0 GiB taken: going on with 1 products a pass" in line for line in said)


def test_answers_are_as_long_as_they_may_be_while_it_samples(shop, tmp_path, planted, monkeypatch):
    planted()
    good, lengths = Policy.sample, []

    def noted(policy, *args):
        generation = good(policy, *args)
        lengths.append(int(generation.action_mask.sum(1).min()))
        return generation

    monkeypatch.setattr(Policy, "sample", noted)
    run = prepared(shop, tmp_path)
    assert set(lengths) == {8} and len(run.policy.stop_ids)


@pytest.mark.parametrize(("costs", "message"), [
    ({"moments": 90}, "Adam's moments come with the first step and take .* GiB; the GPU has 100.0, of which .* 20.0"),
    ({"sample": 75}, "out of memory while sampling answers to one product of [0-9]+ prompt tokens"),
    ({"sample": 65}, "takes 95.0 GiB, with weights and with room for Adam's moments; the GPU has 100.0, a tenth"),
    ({"update": 75}, "out of memory with one product a pass, the largest"),
    ({"update": 65}, "takes 95.0 GiB, with weights and with room for Adam's moments"),
    ({"reference": 75}, "out of memory with one product a pass"),
])
@pytest.mark.parametrize("size", [0, 1])
def test_what_can_not_fit_is_refused_before_training(shop, tmp_path, planted, costs, message, size):
    planted(**costs)
    with pytest.raises(ModelError, match=f"{message}.*--max_pixels") as refused:
        training.train(train_options(shop, tmp_path, eval_every=0, exact_path=True, rollout_batch_size=size,
                                     micro_batch_size=size))
    assert "--lora_rank" in str(refused.value) and "--sharding fsdp" in str(refused.value)
    assert not list((tmp_path / "run").glob("step_*"))


def test_how_many_products_are_sampled_together():
    policies = [SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda")]
    options = TrainOptions(batch_size=16)
    assert [products_together(options, policy) for policy in policies] == [4, 16]  # less where less fits
    options.rollout_batch_size = 5
    assert [products_together(options, policy) for policy in policies] == [5, 5]


def test_adams_moments_are_foretold(shop, tmp_path):
    options = train_options(shop, tmp_path)
    run, buffer = one_step(options)
    run.learner.optimizer.state.clear()  # a run allocates it before its first step
    foretold = moments_to_come(run.learner)
    assert foretold == 2 * 4 * sum(parameter.numel() for parameter in run.learner.parameters) > 0
    update.update(run.learner, buffer, options, step=0)
    moments = [value for state in run.learner.optimizer.state.values() for name, value in state.items()
               if name.startswith("exp_avg")]
    assert sum(value.numel() * value.element_size() for value in moments) == foretold
    assert moments_to_come(run.learner) == 0


@pytest.mark.parametrize(("copied", "wanted", "products", "kept"), [
    (30, 0, 4, True),    # 90 of 100, 20 held, 30 of copies: 40 for passes of 10
    (30, 3, 3, True),
    (55, 4, 1, True),    # halved twice
    (65, 0, 7, False),   # 95 with one product; 70 without copies
    (65, 4, 4, False),
    (85, 0, 7, False),   # no memory for one product beside them
    (85, 4, 4, False),
])
def test_copies_of_weights_are_counted_once_and_done_without_where_they_leave_too_little(
        monkeypatch, said, copied, wanted, products, kept):
    card = PlantedCard({"sample": 10}, 0)

    class Planted:
        copies, sampled_together, exact_path, stop_ids = Copies(), PassSize(), False, torch.tensor([1])

        def photo_features(self, prompts):
            return [None] * len(prompts)

        def sample(self, prompts, features, uniforms, temperature):
            """As Policy.sample does: one product is written without copies where memory lacks beside them."""
            self.copies.taken = copied * GIB if self.copies.wanted else 0
            try:
                card.take(10 * len(prompts) + self.copies.taken // GIB)
            except torch.OutOfMemoryError:
                if len(prompts) > 1 or not self.copies.taken:
                    raise
                self.copies.wanted, self.copies.taken = False, 0
                card.take(10)
            return object()

    policy, options = Planted(), TrainOptions(batch_size=16)
    prompt = SimpleNamespace(input_ids=[5])
    found = preflight.try_passes(card, Processes(), policy.sampled_together, wanted, 16,
                                 lambda count: preflight.try_rollout(policy, prompt, count, options), policy.copies)
    assert found.startswith(f"{products} products") and policy.copies.wanted == kept
    assert (policy.sampled_together.products or wanted) == products
    assert kept != any("without copies of weights" in line for line in said)


@pytest.mark.parametrize(("peak", "moments", "fits"), [
    (30, 0, 7),     # 90 % of 100, 20 held: 70 for passes of 10
    (30, 8, 6),     # 62
    (110, 0, 0),    # not even one
    (30, 75, 0),    # nor where the moments take the room
    (21, 0, 16),    # 70 would fit; no more than a minibatch
    (20, 0, 16),
])
def test_products_that_fit(peak, moments, fits):
    assert products_that_fit(total=100, held=20, peak=peak, moments=moments, most=16) == fits


def test_a_pass_that_leaves_no_room_is_refused():
    refuse_too_large(fits=1, total=80 * GIB, peak=70 * GIB)
    with pytest.raises(ModelError, match="takes 75.0 GiB, with weights.*the GPU has 80.0.*--lora_rank"):
        refuse_too_large(fits=0, total=80 * GIB, peak=75 * GIB)
