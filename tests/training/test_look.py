"""--look_weight: the same answers where the photos are blanked, in the same pass, with a gradient at both."""

from dataclasses import replace

import pytest
import torch

import train_vlm_parallel as training
import update
from evidence.evaluation import blank_photos
from ground.errors import OptionError
from rounding import float64
from runs import tags, train_options
from sheets.samples import PhotoError


@pytest.fixture
def options(shop, tmp_path, monkeypatch):
    """Options of a run in which looking alone is rewarded; other tests check the fast path."""
    monkeypatch.setattr(training, "check_fast_path", lambda *_: None)
    return train_options(shop, tmp_path, eval_every=0, show_every=0, preflight=False, kl_weight=0.0, look_weight=1.0,
                         missing_photos="text_only", eval_fraction=0.0, batch_size=9)


def groups_of(run, options):
    """A group for each product that tells something: one with photos, one whose row names none, one more."""
    products = sorted(run.products, key=lambda sample: bool(sample.photos))[:2] + run.products[-2:-1]
    assert [bool(sample.photos) for sample in products] == [False, False, True]
    return training.rollout_groups(run.encoder, products[1:], 3, 1.0, 6, "0/0", 3)[0]


def without_worth(run, options):
    """Experiences whose answers are worth nothing, so that looking is all that is left."""
    buffer = training.fill_buffer(groups_of(run, options), run, options)
    for item in buffer.items:
        item.advantages = torch.zeros_like(item.advantages)
    return buffer


@pytest.mark.parametrize("changes", [{}, {"train_vision": True, "sft_weight": 1e-9}])
def test_blanked_photos_are_seen_in_the_same_pass(options, changes):
    options = replace(options, **changes)
    with float64():
        run = training.prepare(options, training.Processes())
        buffer = without_worth(run, options)
        assert [item.blind is not None for item in buffer.items] == [False, True]
        batch, own, _, blind = update.log_probs_of(run.learner, buffer.items, options)
        sample = next(sample for sample in run.products if f"row {sample.row}" in buffer.items[1].sources[0])
        prompt = run.policy.encode_prompt(sample.text, blank_photos(sample))
        item = buffer.items[1]
        wanted, _ = run.policy.log_probs([prompt], item.completions, item.action_mask, 1.0, exact_path=True)
        rows = len(item.rewards)
        assert (blind[rows:, :wanted.shape[1]] - wanted).abs().max() < 1e-10
        assert torch.equal(blind[:rows], own[:rows]) and (blind[rows:] - own[rows:]).abs().max() > 1e-3
        seen, _ = run.policy.log_probs(item.prompts, item.completions, item.action_mask, 1.0, exact_path=True)
        assert (own[rows:, :seen.shape[1]] - seen).abs().max() < 1e-10


def test_the_gradient_is_that_of_finite_differences(options):
    options = replace(options, train_vision=True, micro_batch_size=1)
    with float64():
        run = training.prepare(options, training.Processes())
        buffer = without_worth(run, options)
        assert update.backward(run.learner, buffer.items, options, on_policy=True)["look"] > 0
        parameters = [parameter for parameter in run.learner.parameters if parameter.grad is not None]
        directions = [torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                      for index, parameter in enumerate(parameters)]
        slope = sum(float((parameter.grad * direction).sum()) for parameter, direction in
                    zip(parameters, directions, strict=True))

        def loss_at(distance):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += distance * direction
                batch, log_probs, entropy, blind = update.log_probs_of(run.learner, buffer.items, options)
                loss = run.learner.objective.terms(log_probs, batch, entropy, blind).total_loss
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter -= distance * direction
            return float(loss)

        assert (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-5)
        assert abs(slope) > 1e-3


def test_what_is_rewarded_rises(options):
    options = replace(options, lr=1e-2, epochs=6)
    run = training.prepare(options, training.Processes())
    buffer = without_worth(run, options)

    def look():
        with torch.no_grad():
            batch, log_probs, entropy, blind = update.log_probs_of(run.learner, buffer.items, options)
            return float(run.learner.objective.terms(log_probs, batch, entropy, blind).look)

    before = look()
    metrics = update.update(run.learner, buffer, options, step=0)
    assert look() > 2 * before and metrics["look"] > before


def test_it_is_drawn_beside_the_other_curves(options):
    training.train(replace(options, max_steps=1, batch_size=3, look_weight=0.1))
    assert 0 < tags(options.log_dir)["look"][0][1] < 2


def test_a_sheet_without_photos_is_refused(options):
    with pytest.raises(OptionError, match="--look_weight 1.0 needs photos"):
        training.prepare(replace(options, image_cache_dir="nowhere"), training.Processes())


def test_a_photo_that_breaks_before_it_is_blanked_costs_its_twin_only(options, said, monkeypatch):
    def broken(sample):
        raise PhotoError("planted")

    monkeypatch.setattr(training, "blank_photos", broken)
    run = training.prepare(options, training.Processes())
    groups = groups_of(run, options)
    items = training.fill_buffer(groups, run, options).items
    assert [item.blind for item in items] == [None, None]
    assert "photos not blanked: data.xlsx row" in "".join(said) and "planted" in "".join(said)
