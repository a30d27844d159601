"""The comparison at the start of a run: every way in which the fast path could be wrong stops it, by name."""

from dataclasses import replace

import pytest
import torch

import train_vlm_parallel as training
from models import decoding, shared_prefix
from models.family import ModelError
from models.policy import Policy
from runs import train_options
from sheets.samples import PhotoError


def spoil_layout(change):
    """A fault in the layout of scored groups."""
    def plant(monkeypatch):
        good = shared_prefix.lay_out_groups

        def spoilt(*args):
            layout = good(*args)
            return replace(layout, answers=change(layout.answers))
        monkeypatch.setattr(shared_prefix, "lay_out_groups", spoilt)
    return plant


def replace_method(owner, name, spoilt):
    """A fault in a method: spoilt(good, self, ...) stands in for it."""
    def plant(monkeypatch):
        good = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *args: spoilt(good, self, *args))
    return plant


def unseen_first_column(answers):
    mask = answers.mask.clone()
    mask[..., 0] = -torch.inf
    return replace(answers, mask=mask)


def prompt_detached(good, layout, module, query, key, value, scaling):
    columns = layout.columns
    key, value = (torch.cat([kept[:, :, :columns].detach(), kept[:, :, columns:]], 2) for kept in (key, value))
    return good(layout, module, query, key, value, scaling)


def owners_forgotten(good, packed):
    good(packed)
    packed._mask = torch.zeros_like(packed._mask)


def first_half_unseen(good, packed):
    good(packed)
    packed._mask[..., :packed._prompt_seen.shape[1] // 2] = -torch.inf


def late_by_one(good, writer, embedded):
    writer._positions = writer._positions + 1
    good(writer, embedded)


def states_forgotten(good, packed, module, mixed, beta, decay):
    tail, state = packed._states[module.layer_idx]
    packed._states[module.layer_idx] = tail, torch.zeros_like(state)
    return good(packed, module, mixed, beta, decay)


FAULTS = {
    "update: answers see each other": ("updated", spoil_layout(
        lambda answers: replace(answers, mask=torch.zeros_like(answers.mask)))),
    "update: a column of the prompt is not seen": ("updated", spoil_layout(unseen_first_column)),
    "update: positions late by one": ("updated", spoil_layout(
        lambda answers: replace(answers, offsets=answers.offsets + 1))),
    "update: recurrent state of the prompt dropped": ("updated", replace_method(
        shared_prefix.Layout, "_recur_answers", lambda good, layout, module, mixed, beta, decay, tail, state:
        good(layout, module, mixed, beta, decay, tail, torch.zeros_like(state)))),
    "both: convolution of the prompt dropped": ("sampled", replace_method(
        shared_prefix.Layout, "_tail", lambda good, layout, head, count: torch.zeros_like(good(layout, head, count)))),
    "gradient: stops at the prompt": ("gradient", replace_method(shared_prefix.Layout, "attend", prompt_detached)),
    "decoding: answers see each other": ("sampled", replace_method(
        decoding.PackedAnswers, "next_column", owners_forgotten)),
    "decoding: half of the cache dropped": ("sampled", replace_method(
        decoding.PackedAnswers, "next_column", first_half_unseen)),
    "decoding: recurrent state dropped": ("sampled", replace_method(
        decoding.PackedAnswers, "recur", states_forgotten)),
    "decoding: positions late by one": ("sampled", replace_method(decoding.PackedWriter, "feed", late_by_one)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_fast_path_is_caught_at_the_start(shop, tmp_path, monkeypatch, fault):
    said, plant = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises(ModelError, match=f"{said}.*--exact_path"):
        training.train(train_options(shop, tmp_path, eval_every=0, max_length=12))


def test_the_slow_path_runs_where_the_fast_one_is_broken(shop, tmp_path, monkeypatch):
    for _, plant in FAULTS.values():
        plant(monkeypatch)
    training.train(train_options(shop, tmp_path, eval_every=0, max_steps=1, exact_path=True))


def test_a_reference_that_gives_nan_is_caught_at_the_start(shop, tmp_path, monkeypatch):
    good = training.load_models

    def spoilt(*args):
        policy, reference, shares_vision = good(*args)
        with torch.no_grad():
            reference._language_model.norm.weight.fill_(float("nan"))
        return policy, reference, shares_vision

    monkeypatch.setattr(training, "load_models", spoilt)
    with pytest.raises(ModelError, match="reference.*--exact_path"):
        training.train(train_options(shop, tmp_path, eval_every=0))


def test_it_says_what_it_found(shop, tmp_path, said):
    training.train(train_options(shop, tmp_path, eval_every=0, max_steps=1))
    lines = [line for line in said if "fast path against one answer at a time" in line]
    assert len(lines) == 1
    assert all(name in lines[0] for name in ("sampled", "updated", "reference", "gradient"))


def test_a_product_that_can_not_be_rolled_out_is_passed_over(shop, tmp_path, said, monkeypatch):
    good, asked = Policy.encode_prompt, []

    def failing_once(self, text, photos):
        asked.append(text)
        if len(asked) == 1:
            raise PhotoError("photo 1 is not readable")
        return good(self, text, photos)

    monkeypatch.setattr(Policy, "encode_prompt", failing_once)
    training.train(train_options(shop, tmp_path, eval_every=0, max_steps=1))
    assert any("can't be checked on this product" in line and "photo 1" in line for line in said)
    assert any("fast path against" in line for line in said)
