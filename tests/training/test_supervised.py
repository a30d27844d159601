"""Supervised steps: what is taught, how it is learnt, where the reference policy comes from, and what a resumed run
makes of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_vlm_parallel as training
from models.policy import Policy
from rounding import float64
from runs import tags, train_options
from sizes.labels import Label
from tiny import noise_photo, three_prompts
from training.supervised import answer_ids, check_lessons, lessons_of, with_label


@pytest.fixture
def options(shop, tmp_path, monkeypatch):
    """Options of a run of two supervised steps and two of GRPO; other tests check the fast path."""
    monkeypatch.setattr(training, "check_fast_path", lambda *_: None)
    return train_options(shop, tmp_path, max_steps=4, sft_steps=2, eval_every=0, show_every=0, preflight=False,
                         save_every=1, keep_last=0, kl_weight=0.1)


def named(options, name, **changes):
    """The same options with folders of their own."""
    return replace(options, output_dir=f"{options.output_dir}/{name}", log_dir=f"{options.log_dir}/{name}", **changes)


def trained(folder):
    """The weights of a checkpoint, or its adapter's."""
    return load_file(next(folder.glob("*model.safetensors")))


def saved(folder):
    """Every tensor of a checkpoint, optimizer and reference among them."""
    state = torch.load(folder / "trainer_state.pt", weights_only=True)
    moments = {f"{index} {name}": value for index, values in state["optimizer"]["state"].items()
               for name, value in values.items()}
    kept = {f"reference {name}": value for name, value in state.get("reference", {}).items()}
    return trained(folder) | moments | kept


def test_an_answer_ends_with_the_stop_token_of_the_models_turns(policy):
    prompt = three_prompts(policy)[0]
    ids = answer_ids(policy, prompt, Label((12.0, 8.5, 15.0)))
    assert json.loads(policy.tokenizer.decode(ids[:-1])) == {"length": 12, "width": 8.5, "height": 15, "unit": "cm"}
    assert int(ids[-1]) in policy.stop_ids.tolist() and int(ids[-1]) in prompt.input_ids.tolist()
    ids = answer_ids(policy, replace(prompt, input_ids=prompt.input_ids[:0]), Label((12.0,)))
    assert int(ids[-1]) == policy.tokenizer.eos_token_id


@pytest.mark.parametrize("changes", [{}, {"train_vision": True, "minibatch_size": 2}, {"lora_rank": 4}])
def test_supervised_steps_are_plain_fine_tuning(options, changes):
    """The slow twin: one answer a row, torch's own AdamW and clipping, photos encoded anew."""
    options = replace(options, max_steps=2, lr=1e-2, **changes)
    with float64():
        final = training.train(options)
        run = training.prepare(named(options, "twin"), training.Processes())
        assert run.reference is None
        parameters = run.learner.parameters
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for step in range(2):
            lessons, _ = lessons_of(run.encoder, training.products_at(step, run, options), options)
            minibatches = training.ReplayBuffer(lessons).minibatches(1, 2 if options.minibatch_size else 1, f"0/{step}")
            for minibatch in minibatches:
                losses = [run.policy.log_probs(item.prompts, item.completions, item.action_mask, 1.0,
                                               exact_path=True)[0][0] for item in minibatch]
                optimizer.zero_grad()
                (-torch.cat(losses).mean()).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
    run.policy.save(options.model_path, final.parent / "twin")
    one, other = (trained(folder) for folder in (final, final.parent / "twin"))
    assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-9
    curves = tags(options.log_dir)
    assert curves["supervised_loss"] == curves["total_loss"] and len(curves["lr"]) == 2
    assert curves["supervised_loss"][1][1] < curves["supervised_loss"][0][1]
    assert not {"returns", "kl_divergence", "ratio", "entropy", "seconds/rollout"} & curves.keys()


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"dtype": "bfloat16", "sft_weight": 0.5},
                                     {"ref_sync_every": 3}])
def test_a_run_stopped_on_either_side_of_the_border_goes_on_to_the_bit(options, changes):
    options = replace(options, minibatch_size=2, lr_scheduler="linear", sft_lr=1e-2, **changes)
    final = training.train(options)
    whole = saved(final)
    assert any(name.startswith("reference") for name in whole)
    for stop in (1, 3):  # what a run that was killed behind these steps goes on from
        resumed = named(options, f"from_{stop}", resume=str(final.parent / f"step_00000{stop}"))
        found = saved(training.train(resumed))
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole), stop


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}])
def test_the_reference_is_the_model_behind_the_supervised_steps(options, changes):
    options = replace(options, lr=1e-2, **changes)
    final = training.train(options)
    curve = [value for _, value in tags(options.log_dir)["kl_divergence"]]  # of steps 3 and 4, before each moves
    assert abs(curve[0]) < 1e-6 < curve[1]
    border, last = trained(final.parent / "step_000002"), trained(final)
    kept = torch.load(final / "trainer_state.pt", weights_only=True)["reference"]
    if options.lora_rank:
        kept = {f"base_model.model.{key.replace('.reference.', '.')}": value for key, value in kept.items()}
        assert kept.keys() == border.keys()
    assert all(torch.equal(kept[key], border[key]) for key in kept)
    assert not all(torch.equal(border[key], last[key]) for key in border)


def test_a_run_of_supervised_steps_alone_goes_on_with_grpo_as_if_asked_at_once(options):
    options = replace(options, checkpoint_path=None)
    whole = saved(training.train(named(options, "whole")))
    alone = named(options, "alone")
    training.train(replace(alone, max_steps=2))
    assert "reference" not in torch.load(Path(alone.output_dir) / "step_000002/trainer_state.pt", weights_only=True)
    found = saved(training.train(replace(alone, resume="auto")))
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_rates_on_both_sides_of_the_border(options):
    options = replace(options, lr=1.0, sft_lr=2.0, lr_scheduler="linear")
    assert [training.learning_rate(step, options) for step in range(4)] == [2.0, 1.5, 0.5, 0.25]
    assert training.learning_rate(1, replace(options, sft_lr=None)) == 0.75


def test_the_model_behind_the_supervised_steps_is_evaluated(options):
    training.train(replace(options, eval_every=3, save_best=False))
    assert [step for step, _ in tags(options.log_dir)["held_out/mean_reward"]] == [0, 2, 3, 4]


def test_products_without_a_readable_photo_or_room_are_left_out_and_named(options, monkeypatch, said):
    run = training.prepare(options, training.Processes())
    good, sizes = Policy.photo_features, []

    def limited(policy, prompts):
        sizes.append(len(prompts))
        if len(prompts) > 1 or prompts[0] is prompt:
            raise torch.OutOfMemoryError
        return good(policy, prompts)

    monkeypatch.setattr(Policy, "photo_features", limited)
    prompt = run.encoder.encode(run.products[1])
    broken = replace(run.products[0], photos=("/nowhere.png",))
    lessons, failures = lessons_of(run.encoder, [broken, *run.products[1:4]], options)
    assert [lesson.sources[0] for lesson in lessons] == [f"data.xlsx row {each.row}" for each in run.products[2:4]]
    assert sizes == [3, 1, 1, 1] and [failure.sample.row for failure in failures] == [broken.row, run.products[1].row]
    assert "out of memory while encoding its photos" in failures[1].reason


def test_a_run_whose_products_can_not_be_opened_ends_and_says_why(options, monkeypatch):
    monkeypatch.setattr(training, "lessons_of", lambda *_: ([], []))
    with pytest.raises(training.BadRun, match="no product could be opened in 2"):
        training.train(replace(options, max_bad_steps=2))


def test_the_longest_answer_is_shown_and_measured(dense_policy, said):
    samples = [training.Sample(row=row, product_id="", text="", label=label, photos=(), sheet="s.xlsx")
               for row, label in ((2, Label((1.0, 2.0, 3.0))), (3, Label((12.25, 2.0, 3.0))))]
    check_lessons(dense_policy, samples, 64)
    assert "12.25" in said[0] and "of s.xlsx row 3" in said[0] and len(said) == 1
    check_lessons(dense_policy, samples, 4)
    assert "--max_length 4 cuts" in said[2]


def test_the_label_stands_behind_the_sampled_answers(dense_policy):
    prompt = dense_policy.encode_prompt("mug", [noise_photo(1)])
    mask = torch.ones(2, 3, dtype=torch.bool)
    zeros = torch.zeros(2, 3)
    item = training.Experience(mask.long(), mask, zeros, None, zeros[:, 0], zeros[:, 0] + 1, mask[:, 0], (prompt,),
                               (None,), ("s row 2",))
    found = with_label(item, dense_policy, Label((1.0, 2.0, 3.0)))
    ids = answer_ids(dense_policy, prompt, Label((1.0, 2.0, 3.0)))
    assert found.taught.tolist() == [False, False, True] and found.prompts == (prompt,) and len(ids) > 3
    assert found.completions[2].tolist() == ids.tolist() and found.action_mask[2].all()
    assert found.action_mask[:2].sum(1).tolist() == [3, 3] and found.advantages.tolist() == [1, 1, 0]
    assert found.sources == ("s row 2",) and found.features == (None,)
