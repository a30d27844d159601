"""The comparison at the start of a run: every way in which the fast path could be wrong stops it, by name, in both
dtypes, whether the fault shows in padded batches only or in unpadded ones."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import train_vlm_parallel as training
from config import TrainOptions
from models import decoding, shared_prefix
from models.family import ModelError
from models.loading import freeze
from models.policy import Policy
from models.trainable import set_trainable
from rollout import PromptEncoder
from runs import train_options
from sheets.samples import PhotoError, Sample
from tiny import adapted, noise_photo
from training import guard
from training.setup import hold_in


def is_padded(owner):
    """Whether the batch of a layout, or of answers that are written, has a prompt that is padded."""
    if isinstance(owner, decoding.PackedWriter):
        owner = owner._packed
    return owner.padded if isinstance(owner, shared_prefix.Layout) else not bool(owner._prompt_seen.all())


def spoil_layout(change):
    """A fault in the layout of scored groups: change(layout) gives other answers."""
    def plant(patch, padded):
        good = shared_prefix.lay_out_groups

        def spoilt(*args):
            layout = good(*args)
            return replace(layout, answers=change(layout)) if is_padded(layout) == padded else layout
        patch.setattr(shared_prefix, "lay_out_groups", spoilt)
    return plant


def replace_method(owner, name, spoilt):
    """A fault in a method: spoilt(good, self, ...) stands in for it."""
    def plant(patch, padded):
        good = getattr(owner, name)
        patch.setattr(owner, name, lambda self, *args: spoilt(good, self, *args) if is_padded(self) == padded
                      else good(self, *args))
    return plant


def unseen_first_column(layout):
    mask = layout.answers.mask.clone()
    mask[..., 0] = -torch.inf
    return replace(layout.answers, mask=mask)


def seen_padding(layout):
    mask = layout.answers.mask.clone()
    mask[..., :layout.columns] = 0
    return replace(layout.answers, mask=mask)


def prompt_detached(good, layout, module, query, key, value, scaling):
    columns = layout.columns
    key, value = (torch.cat([kept[:, :, :columns].detach(), kept[:, :, columns:]], 2) for kept in (key, value))
    return good(layout, module, query, key, value, scaling)


def owners_forgotten(good, packed):
    good(packed)
    for mask in packed._masks.values():
        mask.zero_()


def first_half_unseen(good, packed):
    good(packed)
    for mask in packed._masks.values():
        mask[..., :packed._prompt_seen.shape[1] // 2] = -torch.inf


def padding_read(good, packed):
    good(packed)
    for mask in packed._masks.values():
        mask[..., :packed._prompt_seen.shape[1]] = 0


def late_by_one(good, writer, embedded):
    writer._positions = writer._positions + 1
    return good(writer, embedded)


def states_forgotten(good, packed, module, mixed, beta, decay):
    for state in packed._recurrences._states:
        state.zero_()
    return good(packed, module, mixed, beta, decay)


FAULTS = {
    "update: answers see each other": ("updated", spoil_layout(
        lambda layout: replace(layout.answers, mask=torch.zeros_like(layout.answers.mask)))),
    "update: a column of the prompt is not seen": ("updated", spoil_layout(unseen_first_column)),
    "update: positions late by one": ("updated", spoil_layout(
        lambda layout: replace(layout.answers, offsets=layout.answers.offsets + 1))),
    "update: recurrent state of the prompt dropped": ("updated", replace_method(
        shared_prefix.Layout, "_recur_answers", lambda good, layout, module, mixed, beta, decay, tail, state:
        good(layout, module, mixed, beta, decay, tail, torch.zeros_like(state)))),
    "both: convolution of the prompt dropped": ("updated", replace_method(
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
IN_PADDING = {
    "update: padding is seen": ("updated", spoil_layout(seen_padding)),
    "decoding: padding is seen": ("sampled", replace_method(decoding.PackedAnswers, "next_column", padding_read)),
}
NEED_DELTA_NETS = ("recurrent state", "convolution")


@pytest.fixture
def product(tmp_path):
    """A product with two photos."""
    paths = tuple(tmp_path / f"{index}.png" for index in range(2))
    for index, path in enumerate(paths):
        noise_photo(index, (96, 64)).save(path)
    return Sample(2, "p2", "mug, grid 10 cm", (1.0, 2.0, 3.0), paths, sheet="sheet.xlsx")


def pair_of(policy, dtype):
    """The policy as it trains in a dtype, and its reference."""
    parts = policy.tokenizer, policy.image_processor
    trained = Policy(policy.model, *parts, dtype)
    set_trainable(trained, train_vision=False)
    model = freeze(copy.deepcopy(policy.model))
    hold_in(dtype, model, ())
    return trained, Policy(model, *parts, dtype)


def guarded(pair, products):
    """Guard a pair on products."""
    encoder = PromptEncoder(pair[0], template="{text}")
    guard.check_fast_path(*pair, True, encoder, products, TrainOptions(max_length=8))


@pytest.fixture
def slow_path_once(monkeypatch):
    """The slow path, which no fault touches, computes the same answers once."""
    good, known = guard.slow_path, {}

    def remembered(policy, trial, trains=True):
        key = policy.dtype, id(policy.model), trains, trial.completions[trial.action_mask].numpy().tobytes()
        if key not in known:
            known[key] = good(policy, trial, trains)
        return known[key]

    monkeypatch.setattr(guard, "slow_path", remembered)


@contextmanager
def planted(plant, padded):
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, padded)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_broken_fast_path_is_caught(policy, product, dtype, slow_path_once):
    """Every fault in both dtypes, and in padded and unpadded batches, by turns; what is read of padding, in both."""
    pair = pair_of(policy, dtype)
    guarded(pair, [product])
    has_delta_nets = any(hasattr(layer, "linear_attn") for layer in policy._language_model.layers)
    faults = [(name, (turn + (dtype == torch.float32)) % 2 == 0) for turn, name in enumerate(FAULTS)]
    for name, padded in faults + [(name, True) for name in IN_PADDING]:
        if has_delta_nets or not any(word in name for word in NEED_DELTA_NETS):
            said, plant = (FAULTS | IN_PADDING)[name]
            with planted(plant, padded), pytest.raises(ModelError, match=f"{said}.*--exact_path"):
                guarded(pair, [product])
                pytest.fail(f"{name}, padded {padded}: not caught")


def test_a_bfloat16_base_is_widened_and_put_back_to_the_bit(dense_policy, product, slow_path_once):
    """Under an adapter what trains in float32 is little: widened, a small fault is seen; afterwards nothing changed."""
    policy = adapted(Policy(dense_policy.model.bfloat16(), dense_policy.tokenizer, dense_policy.image_processor,
                            torch.bfloat16))
    set_trainable(policy, train_vision=False)
    before = [parameter.detach().clone() for parameter in policy.model.parameters()]
    pair = policy, policy.without_adapter()
    guarded(pair, [product])
    for name in ("update: positions late by one", "decoding: positions late by one"):
        said, plant = FAULTS[name]
        with planted(plant, True), pytest.raises(ModelError, match=said):
            guarded(pair, [product])
    assert {parameter.dtype for parameter in before} == {torch.float32, torch.bfloat16}
    assert all(one.dtype == other.dtype and torch.equal(one, other)
               for one, other in zip(before, policy.model.parameters(), strict=True))


def test_without_memory_for_float32_gross_faults_are_caught_and_it_is_said(dense_policy, product, said, monkeypatch):
    good = guard.slow_path

    def short(policy, *args, **options):
        if policy.dtype == torch.float32:
            raise torch.OutOfMemoryError("planted")
        return good(policy, *args, **options)

    monkeypatch.setattr(guard, "slow_path", short)
    pair = pair_of(dense_policy, torch.bfloat16)
    guarded(pair, [product])
    assert any("not compared in float32: there is no memory" in line for line in said)
    assert any("fast path against one answer at a time" in line for line in said)
    with planted(FAULTS["update: answers see each other"][1], True), pytest.raises(ModelError, match="updated"):
        guarded(pair, [product])


@pytest.mark.parametrize("shares_vision", [False, True])
def test_photos_are_encoded_once(dense_policy, product, monkeypatch, shares_vision):
    encoded = []
    good = type(dense_policy.family).photo_features

    def counted(family, model, prompts):
        encoded.append(model)
        return good(family, model, prompts)

    monkeypatch.setattr(type(dense_policy.family), "photo_features", counted)
    pair = pair_of(dense_policy, torch.bfloat16)
    guard.check_fast_path(*pair, shares_vision, PromptEncoder(pair[0]), [product], TrainOptions(max_length=4))
    assert encoded == [pair[0].model] + [pair[1].model] * (not shares_vision)


def test_two_prompts_of_unequal_length_are_chosen(dense_policy, product, tmp_path):
    encoder = PromptEncoder(dense_policy)
    bare = replace(product, row=3, photos=())
    for products, photos in (([bare, product], [False, True]), ([bare], [False, False])):
        prompts = guard.choose_prompts(encoder, products)
        assert [bool(prompt.photos) for prompt in prompts] == photos
        assert len(prompts[0].input_ids) < len(prompts[1].input_ids)
    (tmp_path / "0.png").write_bytes(b"no photo")
    assert guard.choose_prompts(PromptEncoder(dense_policy), [product]) == []


def test_the_slow_path_runs_where_the_fast_one_is_broken(shop, tmp_path, monkeypatch):
    for _, plant in FAULTS.values():
        for padded in (False, True):
            plant(monkeypatch, padded)
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
