"""One product -> one group; what fails is named and never trains."""

import threading
from concurrent.futures import wait
from dataclasses import replace

import pytest
import torch
from loguru import logger

from rollout import PromptEncoder, draw_uniforms, rollout, rollout_groups
from rounding import float64
from sheets.samples import PhotoError, Sample, load_photos
from tiny import noise_photo
from training.preflight import largest_product


def sample_of(tmp_path, row, text="box", photos=1, label=(12.0, 8.0, 15.0)):
    paths = []
    for index in range(photos):
        paths.append(tmp_path / f"{row}_{index}.png")
        noise_photo(row * 10 + index).save(paths[-1])
    return Sample(row=row, product_id=f"p{row}", text=text, label=label, photos=tuple(paths), sheet="sheet.xlsx")


def groups_of(policy, samples, batch, seed="0/0", size=4):
    return rollout_groups(PromptEncoder(policy), samples, size, 0.7, 8, seed, batch)


def test_public_rollout_scores_a_group_of_twelve(dense_policy):
    group = rollout(dense_policy.model, dense_policy.tokenizer, dense_policy.image_processor, "a mug",
                    [noise_photo(1), noise_photo(2)], "12 8 15")
    assert len(group.answers) == len(group.rewards) == len(group.completions) == 12
    assert all(0 <= reward <= 1 for reward in group.rewards)
    assert group.action_mask.shape == group.old_log_probs.shape == group.completions.shape
    assert (group.old_log_probs[group.action_mask] < 0).all()
    assert len(set(group.answers)) > 1


def test_photos_reach_the_model_and_none_is_fine(dense_policy):
    args = dense_policy.model, dense_policy.tokenizer, dense_policy.image_processor, "a mug"
    with_photos = rollout(*args, [noise_photo(1), noise_photo(2)], "12 8 15")
    other_photos = rollout(*args, [noise_photo(3), noise_photo(4)], "12 8 15")
    without = rollout(*args, [], "12 8 15")
    assert with_photos.features is not None and without.features is None
    assert len(with_photos.prompt.input_ids) == len(other_photos.prompt.input_ids) > len(without.prompt.input_ids)
    assert with_photos.answers != other_photos.answers != without.answers


def test_answers_depend_on_seed_and_row_not_on_the_batch(policy, tmp_path):
    samples = [sample_of(tmp_path, row, text="box " * row, photos=row % 3) for row in range(2, 7)]
    with float64(policy):
        one_by_one, _ = groups_of(policy, samples, batch=1)
        together, failures = groups_of(policy, samples, batch=5)
        other_seed, _ = groups_of(policy, samples, batch=5, seed="0/1")
    assert not failures
    assert [group.sample.row for group in together] == [2, 3, 4, 5, 6]
    assert [group.answers for group in together] == [group.answers for group in one_by_one]
    assert [group.answers for group in together] != [group.answers for group in other_seed]


def test_what_a_processor_raises_is_the_failure_of_its_row(remote_policy, tmp_path):
    samples = [sample_of(tmp_path, row) for row in range(2, 5)]
    noise_photo(1, (500, 8)).save(samples[1].photos[0])
    remote_policy.max_pixels = 600  # leaves that photo 3 pixels high: the processor takes its rows for colours
    groups, failures = groups_of(remote_policy, samples, batch=2)
    assert [group.sample.row for group in groups] == [2, 4]
    assert [str(failure) for failure in failures] == ["sheet.xlsx row 3 (p3): the model's processor fails on it: "
                                                      f"ValueError: {failures[0].reason.partition('ValueError: ')[2]}"]
    assert "mean must have" in failures[0].reason


@pytest.mark.parametrize("problem", [ValueError, TypeError, KeyError, IndexError, AssertionError, RuntimeError,
                                     ZeroDivisionError, AttributeError, OSError])
def test_an_error_in_a_prompt_prepared_ahead_is_that_of_its_row(dense_policy, tmp_path, monkeypatch, problem):
    good = dense_policy.encode_prompt

    def broken(text, photos):
        if "odd" in text:
            raise problem("planted")
        return good(text, photos)

    monkeypatch.setattr(dense_policy, "encode_prompt", broken)
    samples = [sample_of(tmp_path, 2), sample_of(tmp_path, 3, text="odd"), sample_of(tmp_path, 4)]
    encoder = PromptEncoder(dense_policy)
    encoder.prefetch(samples)
    groups, failures = rollout_groups(encoder, samples, 2, 0.7, 4, "0", 2)
    assert [group.sample.row for group in groups] == [2, 4] and "planted" in str(failures[0])
    assert largest_product(encoder, samples)[0].row in (2, 4)


def test_an_unreadable_photo_fails_its_product_only(dense_policy, tmp_path):
    samples = [sample_of(tmp_path, row) for row in (2, 3, 4)]
    samples[1].photos[0].write_bytes(b"<html>not a photo</html>")
    groups, failures = groups_of(dense_policy, samples, batch=3)
    assert [group.sample.row for group in groups] == [2, 4]
    assert len(failures) == 1 and "sheet.xlsx row 3 (p3)" in str(failures[0])


def test_non_finite_log_probs_are_a_failure_not_an_answer(dense_policy, tmp_path):
    with torch.no_grad():
        dense_policy._language_model.norm.weight.fill_(float("nan"))
    groups, failures = groups_of(dense_policy, [sample_of(tmp_path, 2)], batch=1)
    assert groups == [] and "not finite" in str(failures[0])


def test_a_product_without_memory_is_named_and_the_others_are_sampled_in_halves(dense_policy, tmp_path, monkeypatch):
    good, sizes = dense_policy.sample, []

    def limited(prompts, *args):
        sizes.append(len(prompts))
        if len(prompts) > 1 or len(sizes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return good(prompts, *args)

    monkeypatch.setattr(dense_policy, "sample", limited)
    samples = [sample_of(tmp_path, row) for row in (2, 3, 4, 5)]
    groups, failures = groups_of(dense_policy, samples, batch=4)
    assert sizes == [4, 2, 1, 1, 1, 1] and len(groups) == 3 and len(failures) == 1
    assert "out of memory while sampling it alone" in str(failures[0]) and "smaller photos" in str(failures[0])
    assert groups_of(dense_policy, samples, batch=4)[1] == [] and sizes[6:] == [1] * 4  # it is remembered


def test_prompt_cache_is_bounded_and_gives_the_same_prompt(dense_policy, tmp_path):
    samples = [sample_of(tmp_path, row) for row in range(2, 8)]
    one = PromptEncoder(dense_policy).encode(samples[0]).num_bytes
    encoder = PromptEncoder(dense_policy, cache_mb=1)
    encoder._limit = 3 * one
    first = encoder.encode(samples[0])
    assert encoder.encode(samples[0]) is first
    for sample in samples:
        encoder.encode(sample)
    assert encoder._bytes <= 3 * one and len(encoder._held) <= 3
    again = encoder.encode(samples[0])
    assert again is not first and torch.equal(again.photos["pixel_values"], first.photos["pixel_values"])


def test_prompts_to_come_are_prepared_on_another_thread(dense_policy, tmp_path):
    samples = [sample_of(tmp_path, row) for row in (2, 3, 4)]
    samples[1].photos[0].write_bytes(b"<html>not a photo</html>")
    threads = []

    def open_photos(sample):
        threads.append((sample.row, threading.current_thread() is threading.main_thread()))
        return load_photos(sample)

    encoder = PromptEncoder(dense_policy, open_photos=open_photos)
    encoder.prefetch(samples[:2])
    encoder.prefetch(samples[:2])  # asked for twice, prepared once
    first = encoder.encode(samples[0])
    with pytest.raises(PhotoError, match="row 3"):
        encoder.encode(samples[1])
    encoder.encode(samples[2])
    encoder.prefetch(samples[:1])  # it is held already
    assert threads == [(2, False), (3, False), (4, False)]
    wanted = PromptEncoder(dense_policy).encode(samples[0])
    assert torch.equal(first.input_ids, wanted.input_ids)
    assert torch.equal(first.photos["pixel_values"], wanted.photos["pixel_values"])


def test_one_thread_alone_asks_the_image_processor(dense_policy, tmp_path, monkeypatch):
    samples = [sample_of(tmp_path, row) for row in range(2, 10)]
    good, threads = dense_policy.encode_prompt, set()

    def watched(text, photos):
        threads.add(threading.current_thread().name)
        return good(text, photos)

    monkeypatch.setattr(dense_policy, "encode_prompt", watched)
    encoder = PromptEncoder(dense_policy)
    encoder.prefetch(samples[4:])
    for sample in samples:
        encoder.encode(sample)
    assert len(threads) == 1


def test_prompts_to_come_count_towards_the_cache(dense_policy, tmp_path):
    samples = [sample_of(tmp_path, row) for row in range(2, 10)]
    wanted = [PromptEncoder(dense_policy).encode(sample) for sample in samples]
    opened = []

    def open_photos(sample):
        opened.append(sample.row)
        return load_photos(sample)

    encoder = PromptEncoder(dense_policy, open_photos=open_photos)
    encoder._limit = int(3.5 * wanted[0].num_bytes)
    for index, sample in enumerate(samples):
        encoder.prefetch(samples[index:])
        wait(encoder._coming.values())
        assert opened == [one.row for one in samples[:index + 3 if index else 1]]  # the first says how large they are
        assert encoder._bytes + encoder._bytes_coming() <= encoder._limit
        assert torch.equal(encoder.encode(sample).photos["pixel_values"], wanted[index].photos["pixel_values"])
        encoder.forget([sample])
    nothing_ahead = PromptEncoder(dense_policy, cache_mb=0, open_photos=open_photos)
    opened.clear()
    nothing_ahead.prefetch(samples)
    assert not nothing_ahead._coming
    nothing_ahead.encode(samples[1])
    assert opened == [3]


def test_a_prompt_too_long_loses_whole_photos_from_the_end(policy, tmp_path):
    sample = sample_of(tmp_path, 2, photos=3)
    lengths = [len(PromptEncoder(policy).encode(replace(sample, photos=sample.photos[:count])).input_ids)
               for count in range(4)]
    assert lengths == sorted(set(lengths))
    said = []
    sink = logger.add(lambda line: said.append(str(line)))
    for limit, kept in ((lengths[3], 3), (lengths[3] - 1, 2), (lengths[1], 1), (lengths[0], 0)):
        prompt = PromptEncoder(policy, max_prompt_length=limit).encode(sample)
        assert len(prompt.input_ids) == lengths[kept] <= limit
        features = policy.photo_features([prompt])[0]  # what is left is whole: as many features as placeholders
        placeholders = int(policy.family.photo_positions(policy.model, prompt).sum())
        assert placeholders == (0 if features is None else len(features))
    logger.remove(sink)
    assert len(said) == 3 and "row 2 (p2): 2 of 3 photos" in said[0]
    groups, failures = rollout_groups(PromptEncoder(policy, max_prompt_length=lengths[0] - 1), [sample], 2, 1.0, 4,
                                      "s", 1)
    assert groups == [] and "the text alone" in str(failures[0])


def test_uniform_numbers_are_a_pure_function_of_the_seed():
    assert torch.equal(draw_uniforms("1/2/sheet/3", 12, 64), draw_uniforms("1/2/sheet/3", 12, 64))
    assert not torch.equal(draw_uniforms("1/2/sheet/3", 12, 64), draw_uniforms("1/2/sheet/4", 12, 64))
    assert draw_uniforms("x", 12, 64).dtype == torch.float64
