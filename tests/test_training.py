"""The loop: first ratio 1, resume bit for bit, non-finite steps skipped, rows named, tags logged, checkpoints load."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rollout
import train_vlm_parallel as training
import update
from config import CompareOptions, TrainOptions
from evidence.report import write_sheet
from ground.errors import OptionError
from loss import VLM_GRPOLoss
from rounding import float64
from run import choose_samples
from runs import as_flags, one_step, tags, train_options, weights, write_shop
from sheets.cells import DataError
from sheets.table import write_table
from training import setup as loading
from training.checkpoint import list_checkpoints
from training.trained import options_of

ROOT = Path(__file__).resolve().parent.parent


def test_bad_rows_stop_a_run_before_weights_load(shop, tmp_path):
    options = train_options(shop, tmp_path, on_bad_row="stop", model_path=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="2 rows can't be trained on, and --on_bad_row is stop. The first: row 10 "):
        training.train(options)


def test_held_out_rows_are_told_apart_from_a_sheet_of_the_same_name(shop, tmp_path):
    rows = [["text", "label"], ["box a", "1 8 15"], ["box b", "2 8 15"]]
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        write_table(tmp_path / folder / "data.xlsx", rows)
    options = train_options(shop, tmp_path, data_path=str(tmp_path / "train" / "data.xlsx"),
                            eval_path=str(tmp_path / "test" / "data.xlsx"))
    products, held_out = training.load_products(options)
    assert not {(sample.sheet, sample.row) for sample in products} & {(s.sheet, s.row) for s in held_out}


def test_run_finds_the_held_out_worksheet_of_the_same_workbook(tmp_path):
    write_sheet(tmp_path / "data.xlsx", {name: [{"text": f"{name} {row}", "label": f"{row + 1} 2 3"}
                                                for row in range(3)] for name in ("train", "test")})
    path = str(tmp_path / "data.xlsx")
    trained = TrainOptions(data_path=path, sheet_name="train", eval_path=path, eval_sheet_name="test")
    for rows in ("test", "train"):
        options = CompareOptions(checkpoint_path="x", rows="held_out" if rows == "test" else "all")
        assert [sample.text for sample in choose_samples(options, trained)] == [f"{rows} {row}" for row in range(3)]


def test_odd_rows_and_leaks_are_said_at_start(shop, tmp_path, said):
    write_table(tmp_path / "data.xlsx", [["name", "label"], ["box 1 x 8 x 15 cm", "1 8 15"], ["box b", "9 9 9"]])
    write_table(tmp_path / "test.xlsx", [["name", "label"], ["box b", "9 9 9"]])
    options = train_options(shop, tmp_path, data_path=str(tmp_path / "data.xlsx"), column=["text=name"],
                            eval_path=str(tmp_path / "test.xlsx"))
    products, held_out = training.load_products(options)
    text = "".join(said)
    assert len(products) == 2 and len(held_out) == 1
    assert "answer in the text (1 rows)" in text and "label like a placeholder (1 rows)" in text
    assert "held-out product trained on (1 rows)" in text


def test_a_run_trains_logs_and_saves(shop, tmp_path, said):
    options = train_options(shop, tmp_path)
    final = training.train(options)
    text = "".join(said)
    assert "row 10" in text and "row 11" in text  # the unlabelled one, and the one without its photo
    assert "what trains" in text
    curves = tags(options.log_dir)
    for name in ("total_loss", "kl_divergence", "grad_norm", "returns", "success_rate", "valid_rate",
                 "zero_variance_share", "entropy", "ratio", "clip_fraction", "answer_length", "lr", "seconds/rollout",
                 "seconds/reference", "seconds/update"):
        assert [step for step, _ in curves[name]] == [1, 2, 3], name
        assert all(math.isfinite(value) for _, value in curves[name])
    assert [step for step, _ in curves["held_out/mean_reward"]] == [0, 2, 3]
    assert [value for _, value in curves["first_ratio"]] == pytest.approx([1, 1, 1], abs=1e-4)
    assert max(value for _, value in curves["log_prob_gap"]) < 1e-4
    assert curves["kl_divergence"][0][1] == pytest.approx(0, abs=1e-6)
    assert [path.name for path in list_checkpoints(Path(options.output_dir))] == ["step_000002", "step_000003"]
    assert options_of(str(final)).lr == options.lr
    assert options_of(str(final)).prompt_file == str(final / "prompt.txt")
    before, after = weights(shop / "model"), weights(final)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("vision_tower" in name or "merger" in name for name in moved)


def test_train_vision_moves_the_tower(shop, tmp_path):
    final = training.train(train_options(shop, tmp_path, train_vision=True, max_steps=1, eval_every=0))
    before, after = weights(shop / "model"), weights(final)
    assert any("vision_tower" in name for name in before if not torch.equal(before[name], after[name]))


def test_micro_batches_and_shared_features_do_not_change_the_result(shop, tmp_path):
    base = train_options(shop, tmp_path, max_steps=2, eval_every=0)
    results = []
    for name, changes in {"whole": {"micro_batch_size": 3}, "single": {"micro_batch_size": 1},
                          "rollouts": {"rollout_batch_size": 1}}.items():
        with float64():
            folder = training.train(replace(base, output_dir=str(tmp_path / name), **changes))
        results.append(weights(folder))
    for other in results[1:]:
        assert max(float((results[0][name] - other[name]).abs().max()) for name in other) < 1e-9


def test_minibatches_and_epochs_take_their_optimizer_steps(shop, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(1))
    training.train(train_options(shop, tmp_path, max_steps=1, eval_every=0, batch_size=5, minibatch_size=2, epochs=3))
    assert len(steps) == 1 + 3 * 3  # the first allocates what the optimizer keeps, and moves nothing


def test_processes_cut_their_products_into_the_same_number_of_even_parts(shop, tmp_path, monkeypatch):
    """Where another process has more to cut: this one, whose rollouts failed in part, has a share of each step."""
    options = train_options(shop, tmp_path, minibatch_size=2)
    run, buffer = one_step(options)
    sizes = []

    class Two(training.Processes):
        def most(self, number):
            return max(number, 3) if number == 2 else number  # the other has five products: three parts

    monkeypatch.setattr(update, "backward", lambda learner, minibatch, *_, **__: sizes.append(len(minibatch)))
    run.learner.processes = Two()
    training.update(run.learner, buffer, options, step=0)
    assert sizes == [1, 1, 1]


def test_the_first_minibatch_of_each_step_is_on_policy(shop, tmp_path):
    options = train_options(shop, tmp_path, eval_every=0, batch_size=5, minibatch_size=2, epochs=2, lr=1e-2)
    training.train(options)
    curves = tags(options.log_dir)
    assert [value for _, value in curves["first_ratio"]] == pytest.approx([1, 1, 1], abs=1e-4)
    assert max(value for _, value in curves["log_prob_gap"]) < 1e-4
    assert max(abs(value - 1) for _, value in curves["ratio"]) > 1e-3  # the later ones are not


def test_killed_and_resumed_equals_uninterrupted(shop, tmp_path):
    settings = dict(max_steps=12, save_every=2, keep_last=0, eval_every=0, lr_scheduler="linear", min_lr_ratio=0.1)
    whole = training.train(train_options(shop, tmp_path / "whole", **settings))
    options = train_options(shop, tmp_path / "killed", **settings)
    command = [sys.executable, str(ROOT / "train_vlm_parallel.py"), *as_flags(options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list_checkpoints(Path(options.output_dir)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = list_checkpoints(Path(options.output_dir))
    assert found and found[-1].name != "step_000012", "killed too early or too late to show anything"
    resumed = training.train(replace(options, resume="auto"))
    assert resumed.name == whole.name == "step_000012"
    one, other = weights(whole), weights(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    state, other_state = (torch.load(path / "trainer_state.pt", weights_only=True) for path in (whole, resumed))
    for key, value in state["optimizer"]["state"].items():
        assert all(torch.equal(value[name], other_state["optimizer"]["state"][key][name]) for name in value)


def test_a_finished_run_says_so(shop, tmp_path, said):
    options = train_options(shop, tmp_path, max_steps=1, eval_every=0)
    final = training.train(options)
    assert training.train(replace(options, resume="auto")) == final
    assert "nothing left to do" in "".join(said)


def test_resuming_with_other_options_warns(shop, tmp_path, said):
    options = train_options(shop, tmp_path, max_steps=1, eval_every=0)
    training.train(options)
    training.train(replace(options, resume="auto", max_steps=2, lr=5e-4))
    text = "".join(said)
    assert "--lr is 0.0005 now, the run being resumed had 0.001" in text and "--max_steps is" not in text


def test_a_fresh_run_does_not_mix_with_an_earlier_one(shop, tmp_path):
    options = train_options(shop, tmp_path, max_steps=2, eval_every=0)
    training.train(options)
    with pytest.raises(OptionError, match="--overwrite_output_dir"):
        training.train(replace(options, max_steps=1))
    final = training.train(replace(options, max_steps=1, overwrite_output_dir=True))
    assert list_checkpoints(Path(options.output_dir)) == [final]


def test_resume_without_a_checkpoint(shop, tmp_path, said):
    training.train(train_options(shop, tmp_path, max_steps=1, eval_every=0, resume="auto"))
    assert "no checkpoint in" in "".join(said)
    with pytest.raises(OptionError, match="trainer_state.pt"):
        training.train(train_options(shop, tmp_path, resume=str(tmp_path)))


def test_old_checkpoints_are_pruned(shop, tmp_path):
    options = train_options(shop, tmp_path, max_steps=5, save_every=1, keep_last=2, eval_every=0)
    training.train(options)
    assert [path.name for path in list_checkpoints(Path(options.output_dir))] == ["step_000004", "step_000005"]
    assert not list(Path(options.output_dir).glob("*.partial"))


class NaNLoss(VLM_GRPOLoss):
    """The loss, spoilt."""

    def terms(self, *args):
        terms = super().terms(*args)
        return replace(terms, total_loss=terms.total_loss * float("nan"))


def test_non_finite_steps_change_nothing_are_named_and_stop_the_run(shop, tmp_path, said, monkeypatch):
    monkeypatch.setattr(update, "VLM_GRPOLoss", NaNLoss)
    options = train_options(shop, tmp_path, max_steps=9, save_every=1, max_bad_steps=3, eval_every=0)
    with pytest.raises(training.BadRun, match="3 steps in a row .*: loss or gradient not finite in 3 "):
        training.train(options)
    text = "".join(said)
    assert text.count("skipped, weights unchanged") == 3 and "data.xlsx row" in text
    assert text.count("no optimizer step: loss or gradient not finite") == 3
    assert [value for _, value in tags(options.log_dir)["skipped_minibatches"]] == [1, 1, 1]
    saved, before = weights(list_checkpoints(Path(options.output_dir))[-1]), weights(shop / "model")
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_one_bad_minibatch_of_many_makes_no_bad_step(shop, tmp_path, monkeypatch):
    good, calls = update.accumulate, []

    def third_spoilt(*args):
        sums, *rest = good(*args)
        calls.append(1)
        return sums | ({"total_loss": sums["total_loss"] * float("nan")} if len(calls) % 3 == 0 else {}), *rest

    monkeypatch.setattr(update, "accumulate", third_spoilt)
    options = train_options(shop, tmp_path, minibatch_size=1, max_bad_steps=2, eval_every=0, preflight=False)
    training.train(options)
    curves = tags(options.log_dir)
    assert [value for _, value in curves["skipped_minibatches"]] == [1, 1, 1]
    assert [value for _, value in curves["optimizer_steps"]] == [2, 2, 2]


@pytest.mark.parametrize(("spoil", "why"), [
    (lambda groups, failures: ([replace(group, truncated=torch.ones_like(group.truncated)) for group in groups], []),
     "every answer left out by --mask_truncated"),
    (lambda groups, failures: ([], failures), "no answer could be sampled")])
def test_steps_that_hold_nothing_to_learn_from_are_bad(shop, tmp_path, said, monkeypatch, spoil, why):
    good = training.rollout_groups
    monkeypatch.setattr(training, "rollout_groups", lambda *args: spoil(*good(*args)))
    options = train_options(shop, tmp_path, mask_truncated=True, max_steps=9, save_every=1, max_bad_steps=3,
                            eval_every=0)
    with pytest.raises(training.BadRun, match=f"3 steps in a row .*: {why} in 3 "):
        training.train(options)
    assert f"step 2: no optimizer step: {why}" in "".join(said)
    saved, before = weights(list_checkpoints(Path(options.output_dir))[-1]), weights(shop / "model")
    assert all(torch.equal(saved[name], before[name]) for name in before)
    with pytest.raises(training.BadRun, match=f"3 steps in a row .*: {why} in 3 "):  # two of them before the stop
        training.train(replace(options, resume="auto"))
    assert "".join(said).count("step 3: no optimizer step") == 2


def test_a_non_finite_gradient_is_skipped_too(shop, tmp_path, monkeypatch):
    options = train_options(shop, tmp_path, eval_every=0)
    run, buffer = one_step(options)
    before = [parameter.detach().clone() for parameter in run.learner.parameters]
    run.learner.parameters[0].register_hook(lambda grad: grad * float("inf"))
    metrics = training.update(run.learner, buffer, options, step=0)
    assert metrics["skipped_minibatches"] == 1 and "total_loss" not in metrics
    assert all(torch.equal(one, other) for one, other in zip(before, run.learner.parameters, strict=True))


def test_an_update_makes_the_better_answers_likelier(shop, tmp_path):
    options = train_options(shop, tmp_path, eval_every=0, lr=1e-3, epochs=4)
    run, buffer = one_step(options)

    def likelihood():
        with torch.no_grad():
            return torch.stack([run.policy.log_probs(item.prompts, item.completions, item.action_mask, 1.0)[0].sum(1)
                                for item in buffer.items])  # (B, G)

    before = likelihood()
    training.update(run.learner, buffer, options, step=0)
    change = likelihood() - before
    assert (change[:, 0] > change[:, 1:].mean(1)).all()


def test_bfloat16_starts_from_ratio_one_and_keeps_small_updates(shop, tmp_path):
    options = train_options(shop, tmp_path, eval_every=0, dtype="bfloat16", lr=1e-6)
    run, buffer = one_step(options)
    before = [parameter.detach().clone() for parameter in run.learner.parameters]
    metrics = training.update(run.learner, buffer, options, step=0)
    assert metrics["ratio"] == 1 and metrics["log_prob_gap"] > 0
    changes = [(one, other) for one, other in zip(before, run.learner.parameters, strict=True)
               if not torch.equal(one, other)]
    assert len(changes) > 0.9 * len(before)
    lost = sum(int((one.bfloat16() == other.bfloat16()).sum()) for one, other in changes)
    assert lost > 0.9 * sum(one.numel() for one, _ in changes), "in bfloat16 weights this update would have vanished"


def test_groups_without_signal_leave_the_weights_alone(shop, tmp_path):
    options = train_options(shop, tmp_path, eval_every=0, weight_decay=0.0, kl_weight=0.0)
    run, buffer = one_step(options, advantages=[0.0] * 4)
    before = [parameter.detach().clone() for parameter in run.learner.parameters]
    training.update(run.learner, buffer, options, step=0)
    assert all(torch.equal(one, other) for one, other in zip(before, run.learner.parameters, strict=True))


def test_without_kl_no_reference_is_loaded(shop, tmp_path):
    options = train_options(shop, tmp_path, kl_weight=0.0, max_steps=1, eval_every=0)
    _, reference, _ = training.load_models(options, None)
    assert reference is None
    training.train(options)
    assert "kl_divergence" not in tags(options.log_dir)


@pytest.mark.parametrize("train_vision", [False, True])
def test_a_bfloat16_reference_holds_its_matrices_in_bfloat16(shop, tmp_path, train_vision):
    options = train_options(shop, tmp_path, dtype="bfloat16", train_vision=train_vision)
    _, reference, _ = training.load_models(options, None)
    vision = {id(parameter) for module in reference.family.vision_modules(reference.model)
              for parameter in module.parameters()}
    kept = [parameter for parameter in reference.model.parameters()
            if parameter.dim() < 2 or (train_vision and id(parameter) in vision)]
    assert {parameter.dtype for parameter in kept} == {torch.float32}
    assert {parameter.dtype for parameter in reference.model.parameters()} == {torch.float32, torch.bfloat16}
    assert sum(parameter.dtype == torch.float32 for parameter in reference.model.parameters()) == len(kept)
    assert {buffer.dtype for buffer in reference.model.buffers() if buffer.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("changes", [{}, {"train_vision": True}, {"lora_rank": 4}])
def test_bfloat16_starts_from_a_kl_of_zero(shop, tmp_path, changes):
    options = train_options(shop, tmp_path, dtype="bfloat16", max_steps=1, eval_every=0, preflight=False, **changes)
    training.train(options)
    assert tags(options.log_dir)["kl_divergence"][0][1] < 1e-9


def test_rounding_stays_out_of_later_optimizer_steps(shop, tmp_path):
    """With weights that stand still every ratio is 1; against the log-probs of sampling some tokens were clipped."""
    options = train_options(shop, tmp_path, eval_every=0, dtype="bfloat16", lr=1e-30, minibatch_size=1, epochs=2,
                            clip_eps=1e-3)
    run, buffer = one_step(options)
    sampled = [item.old_log_probs for item in buffer.items]
    metrics = training.update(run.learner, buffer, options, step=0)
    assert metrics["clip_fraction"] == 0 and metrics["ratio"] == pytest.approx(1, abs=1e-6)
    gaps = [item.old_log_probs - before for item, before in zip(buffer.items, sampled, strict=True)]
    tokens = torch.cat([gap[item.action_mask] for gap, item in zip(gaps, buffer.items, strict=True)])
    assert metrics["log_prob_gap"] == pytest.approx(float(tokens.abs().max())) and metrics["log_prob_gap"] > 0
    assert metrics["first_ratio"] == pytest.approx(float(tokens.exp().mean()), rel=1e-6)


def test_the_first_ratio_is_against_sampling(shop, tmp_path):
    """Not against the log-probs that take their place in bfloat16: those give 1 whatever was sampled."""
    options = train_options(shop, tmp_path, eval_every=0, dtype="bfloat16")
    run, buffer = one_step(options)
    for item in buffer.items:
        item.old_log_probs = item.old_log_probs - 0.5 * item.action_mask
    metrics = training.update(run.learner, buffer, options, step=0)
    assert metrics["ratio"] == 1 and metrics["first_ratio"] == pytest.approx(math.exp(0.5), rel=0.05)


def test_the_vision_of_other_weights_is_not_shared(shop, tmp_path):
    state = weights(shop / "model")
    torch.save({name: tensor + 1 if "merger" in name else tensor for name, tensor in state.items()},
               tmp_path / "model_step1.pt")
    options = train_options(shop, tmp_path, checkpoint_path=str(tmp_path / "model_step1.pt"))
    policy, reference, shares_vision = training.load_models(options, None)
    name = next(name for name in state if "merger" in name)
    assert not shares_vision and torch.equal(reference.model.state_dict()[name], state[name])
    assert torch.equal(policy.model.state_dict()[name], state[name] + 1)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


def test_starting_from_other_weights_keeps_the_reference(shop, tmp_path):
    first = training.train(train_options(shop, tmp_path / "a", max_steps=2, lr=1e-2, eval_every=0))
    options = train_options(shop, tmp_path / "b", max_steps=1, eval_every=0, checkpoint_path=str(first))
    policy, reference, shares_vision = training.load_models(options, None)
    assert shares_vision
    head = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(policy.model.state_dict()[head], weights(first)[head])
    assert torch.equal(reference.model.state_dict()[head], weights(shop / "model")[head])
    training.train(options)
    assert tags(options.log_dir)["kl_divergence"][0][1] > 0


@pytest.mark.parametrize(("changes", "rates"), [
    ({"lr_scheduler": "constant"}, [1.0, 1.0, 1.0, 1.0]),
    ({"lr_scheduler": "linear"}, [1.0, 0.75, 0.5, 0.25]),
    ({"lr_scheduler": "linear", "min_lr_ratio": 0.2}, [1.0, 0.8, 0.6, 0.4]),
    ({"lr_scheduler": "cosine"}, [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ({"lr_scheduler": "constant", "warmup_steps": 2}, [0.5, 1.0, 1.0, 1.0]),
    ({"lr_scheduler": "linear", "warmup_steps": 2}, [0.5, 1.0, 1.0, 0.5]),
])
def test_learning_rates(changes, rates):
    options = TrainOptions(lr=1.0, max_steps=4, **changes)
    assert [training.learning_rate(step, options) for step in range(4)] == pytest.approx(rates)


def test_held_out_products_are_never_trained_on(shop, tmp_path):
    options = train_options(shop, tmp_path)
    train, held_out = training.load_products(options)
    assert train and held_out
    assert not {sample.product_id for sample in train} & {sample.product_id for sample in held_out}
    with pytest.raises(DataError, match="eval_fraction"):
        training.load_products(replace(options, eval_fraction=0.999999))


def test_a_photo_that_breaks_during_the_run_costs_its_group_only(shop, tmp_path, said, tokenizer, image_processor):
    broken = write_shop(tmp_path, tokenizer, image_processor)
    options = train_options(broken, tmp_path, batch_size=8, max_steps=1, eval_every=0, eval_fraction=0.0)
    for photo in sorted((broken / "photos").iterdir())[:2]:
        os.truncate(photo, 40)
    training.train(options)
    curves = tags(options.log_dir)
    assert curves["failed_rollouts"][0][1] == 2 and "".join(said).count("no rollout") == 2


def test_photos_of_the_next_step_are_opened_beside_the_computing(shop, tmp_path, monkeypatch):
    opened = []
    good = rollout.PromptMaker.__call__

    def watched(make, sample):
        opened.append((sample.row, threading.current_thread() is threading.main_thread()))
        return good(make, sample)

    monkeypatch.setattr(rollout.PromptMaker, "__call__", watched)
    training.train(train_options(shop, tmp_path, eval_every=0, batch_size=2, max_steps=3, eval_fraction=0.0,
                                 exact_path=True, preflight=False))
    assert len(opened) == 6 and len({row for row, _ in opened}) == 6
    assert not any(by_main for _, by_main in opened)


@pytest.mark.parametrize("asked", [False, True])
def test_the_main_process_alone_fetches_photos_and_only_when_asked(shop, tmp_path, monkeypatch, asked):
    done = []
    good = training.load_products
    monkeypatch.setattr(loading, "download_missing", lambda path, *_: done.append(Path(path).name))
    monkeypatch.setattr(training, "load_products", lambda options: done.append("read") or good(options))
    options = train_options(shop, tmp_path, eval_every=0, eval_path=str(shop / "data.xlsx"), download_missing=asked)
    training.prepare(options, training.Processes())
    assert done == ["data.xlsx"] * (2 * asked) + ["read"]

    class Second(training.Processes):
        def once(self, work, *problems):
            return None  # what the main process did

    done.clear()
    monkeypatch.setattr(training, "find_resume", lambda options: None)
    training.prepare(options, Second())
    assert done == ["read"]


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True},
                                     {"dtype": "bfloat16", "gradient_checkpointing": True, "lora_rank": 4},
                                     {"dtype": "bfloat16", "train_vision": True, "rollout_batch_size": 1}])
def test_ways_of_training_pass_the_guard(shop, tmp_path, said, changes):
    training.train(train_options(shop, tmp_path, eval_every=0, max_steps=2, **changes))
    assert any("fast path against one answer at a time" in line for line in said)
    assert not any("skipped" in line or "no rollout" in line for line in said)


def test_both_paths_give_the_same_curves(shop, tmp_path):
    runs = [train_options(shop, tmp_path / str(exact_path), eval_every=0, exact_path=exact_path)
            for exact_path in (False, True)]
    with float64():
        for options in runs:
            training.train(options)
    fast, slow = (tags(options.log_dir) for options in runs)
    for name in ("returns", "answer_length", "total_loss", "kl_divergence", "entropy", "grad_norm", "ratio"):
        assert [value for _, value in fast[name]] == pytest.approx([value for _, value in slow[name]], rel=1e-6,
                                                                   abs=1e-9), name
