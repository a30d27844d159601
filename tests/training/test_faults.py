"""What goes wrong in a long run, planted one by one: damaged checkpoints, full disks, bad numbers, no memory."""

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import rollout
import train_vlm_parallel as training
import update
from config import TrainOptions
from ground.errors import OptionError
from ground.files import whole_folder
from models.family import ModelError
from models.memory import PassSize
from models.optimizer import allocate_state
from models.policy import Policy
from replay_buffer import ReplayBuffer
from rounding import float64
from runs import one_step, tags, train_options, weights, write_shop
from sheets.photos import PhotoError
from training import checkpoint, curves
from training.checkpoint import find_damage, list_checkpoints, write_checksums
from training.preflight import largest_product


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory):
    """The options of a run of three steps, each saved; read only."""
    options = train_options(shop, tmp_path_factory.mktemp("finished"), save_every=1, eval_every=0)
    training.train(options)
    return options


@pytest.fixture
def copied(finished, tmp_path):
    """The options of a copy of that run."""
    shutil.copytree(finished.output_dir, tmp_path / "run")
    return replace(finished, output_dir=str(tmp_path / "run"), log_dir=str(tmp_path / "logs"), dtype="float32")


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "harm", "said_of_it"), [
    ("model.safetensors", truncate, "has changed"), ("model.safetensors", flip, "has changed"),
    ("trainer_state.pt", flip, "has changed"), ("tokenizer.json", flip, "has changed"),
    ("model.safetensors", Path.unlink, "is missing"), ("checksums.json", truncate, "can't be read"),
    ("checksums.json", Path.unlink, "can't be read")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(finished, copied, said, name, harm, said_of_it):
    newest, before = Path(copied.output_dir) / "step_000003", Path(copied.output_dir) / "step_000002"
    harm(newest / name)
    with pytest.raises(OptionError, match=f"step_000003: this checkpoint is damaged: {name} {said_of_it}"):
        training.find_resume(replace(copied, resume=str(newest)))
    assert training.find_resume(replace(copied, resume="auto")) == before
    assert f"step_000003 is damaged: {name} {said_of_it}" in "".join(said)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, copied):
    flip(Path(copied.output_dir) / "step_000003" / "model.safetensors")
    resumed = training.train(replace(copied, resume="auto"))
    assert find_damage(resumed) is None and same_weights(resumed, Path(finished.output_dir) / "step_000003")


def test_nothing_whole_is_not_a_new_start(copied):
    for path in list_checkpoints(Path(copied.output_dir)):
        flip(path / "model.safetensors")
    with pytest.raises(OptionError, match="every checkpoint in .* is damaged"):
        training.find_resume(replace(copied, resume="auto"))


def test_checksums_are_those_of_sha256sum(finished):
    folder = Path(finished.output_dir) / "step_000003"
    sums = json.loads((folder / "checksums.json").read_text())
    assert sums.keys() == {path.name for path in folder.iterdir()} - {"checksums.json"}
    done = subprocess.run(["sha256sum", *sums], cwd=folder, capture_output=True, text=True, check=True)
    assert dict(reversed(line.split()) for line in done.stdout.splitlines()) == sums


def test_a_half_written_checkpoint_is_cleared_away(copied):
    partial = Path(copied.output_dir) / "step_000004.partial"
    partial.mkdir()
    assert training.find_resume(replace(copied, resume="auto")).name == "step_000003" and not partial.exists()


def test_another_number_of_products_a_step_is_refused(copied):
    found = Path(copied.output_dir) / "step_000002"  # three products a step on one process
    with pytest.raises(OptionError, match="--batch_size 2 x 1 processes = 2 .* took 3, .*: give --batch_size 3"):
        checkpoint.read_state(found, replace(copied, batch_size=2))
    with pytest.raises(OptionError, match="no --batch_size gives 3 on 2 processes: .*: 1, 3"):
        checkpoint.read_state(found, copied, world=2)


def test_the_same_number_of_products_a_step_goes_on(copied, said):
    state = checkpoint.read_state(Path(copied.output_dir) / "step_000002", replace(copied, batch_size=1), world=3)
    assert state["step"] == 2 and not said
    checkpoint.read_state(Path(copied.output_dir) / "step_000002", replace(copied, batch_size=1, minibatch_size=1), 3)
    assert "on 3 processes instead of 1" in "".join(said)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 900 KiB, which holds one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk],
                                      capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_costs_a_warning_and_keeps_the_old_checkpoint(shop, tmp_path, small_disk, said):
    options = train_options(shop, tmp_path, output_dir=str(small_disk / "run"), log_dir=str(small_disk / "logs"),
                            save_every=1, eval_every=0, max_steps=3)
    with pytest.raises(training.BadRun, match="no checkpoint of step 3 .*step_000001.*: make room"):
        training.train(options)
    assert "no checkpoint of step 2" in "".join(said)
    assert [path.name for path in (small_disk / "run").glob("step_*")] == ["step_000001"]
    assert find_damage(small_disk / "run" / "step_000001") is None


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), SafetensorError("I/O error"),
                                     RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")])
def test_a_run_outlives_a_save_that_fails(shop, tmp_path, said, monkeypatch, problem):
    good, calls = torch.save, []

    def full_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise problem
        good(*args)

    monkeypatch.setattr(checkpoint.torch, "save", full_once)
    options = train_options(shop, tmp_path, save_every=1, eval_every=0)
    training.train(options)
    assert "no checkpoint of step 2" in "".join(said)
    assert [path.name for path in list_checkpoints(Path(options.output_dir))] == ["step_000001", "step_000003"]


def test_other_errors_while_saving_are_not_taken_for_a_full_disk(shop, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(RuntimeError, match="something else"):
        training.train(train_options(shop, tmp_path, max_steps=1, eval_every=0))


def test_a_folder_that_is_replaced_is_whole_at_any_time(tmp_path):
    final = tmp_path / "step_000001"
    for content in ("one", "two"):
        with whole_folder(final) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "file").write_text(content)
            write_checksums(folder)
        assert find_damage(final) is None and (final / "inner" / "file").read_text() == content
    with pytest.raises(ZeroDivisionError), whole_folder(final):
        raise ZeroDivisionError
    assert (final / "inner" / "file").read_text() == "two" and list(tmp_path.iterdir()) == [final]


def test_sigterm_during_a_save_lets_it_finish(shop, tmp_path, monkeypatch):
    good = checkpoint.save_model

    def interrupted(*args):
        if not list_checkpoints(Path(options.output_dir)):  # a second signal would end the process at once
            os.kill(os.getpid(), signal.SIGTERM)
        good(*args)

    monkeypatch.setattr(checkpoint, "save_model", interrupted)
    options = train_options(shop, tmp_path, save_every=1, max_steps=5, eval_every=0)
    with pytest.raises(training.Interrupted, match="SIGTERM: stopped after step 2; go on with --resume auto"):
        training.train(options)
    found = list_checkpoints(Path(options.output_dir))
    assert [path.name for path in found] == ["step_000001", "step_000002"] and not any(map(find_damage, found))


def test_a_photo_deleted_during_the_run_costs_its_group_only(shop, tmp_path, said, monkeypatch, tokenizer,
                                                             image_processor):
    own = write_shop(tmp_path, tokenizer, image_processor)
    good = training.finish_step

    def delete_photos(run, options, step, interruption):
        for photo in (own / "photos").iterdir():
            photo.unlink()
        good(run, options, step, interruption)

    monkeypatch.setattr(training, "finish_step", delete_photos)
    options = train_options(own, tmp_path, batch_size=8, eval_fraction=0.0, max_steps=3, eval_every=0,
                            prompt_cache_mb=0)
    assert training.train(options).name == "step_000003"
    assert sum("no rollout" in line and "data.xlsx row" in line for line in said) == 2 * 7  # one row has no photo


def test_a_bad_batch_is_kept_for_inspection(shop, tmp_path, said):
    options = train_options(shop, tmp_path)
    run, buffer = one_step(options)
    run.learner.parameters[0].register_hook(lambda grad: grad * float("nan"))
    update.update(run.learner, buffer, options, step=6)
    kept = ReplayBuffer()
    kept.load_state_dict(torch.load(Path(options.output_dir) / "bad_batch_step_000007.pt", weights_only=True))
    assert {item.sources for item in kept.items} == {item.sources for item in buffer.items}
    assert all(any(torch.equal(one.completions, other.completions) for other in buffer.items) for one in kept.items)


def test_a_full_disk_costs_no_more_than_the_bad_batch(tmp_path, said, monkeypatch):
    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    monkeypatch.setattr(update.torch, "save", full)
    update.keep_bad_batch([], TrainOptions(output_dir=str(tmp_path)), 6, training.Processes(1, 2))
    assert "bad_batch_step_000007_process_1.pt: not written" in "".join(said) and not list(tmp_path.iterdir())


def test_a_run_in_which_nothing_was_rolled_out_is_no_success(shop, tmp_path, monkeypatch):
    def broken(encoder, sample):
        raise PhotoError("planted")

    options = train_options(shop, tmp_path, eval_every=0, max_steps=2)
    monkeypatch.setattr(rollout.PromptEncoder, "encode", broken)
    assert training.main(options) == 3
    assert not json.loads((Path(options.output_dir) / "run.json").read_text()).get("done")
    monkeypatch.undo()
    assert training.main(replace(options, resume="auto")) == 0  # nothing left to do
    assert training.main(replace(options, resume="auto", max_steps=3)) == 0


def test_bounds_warn(said):
    first = {}
    bounds = curves.Bounds(TrainOptions(max_kl=0.5, min_entropy=0.1), first)
    steps = [(0.25, 2.0), None, (0.75, 0.2), (0.8125, 0.19), (1.0, 0.1), (1.5, 0.0625), (0.5, 1.0), (1.75, 0.03)]
    for step, found in enumerate(steps, start=1):
        bounds.look({"failed_rollouts": 3} if found is None else dict(zip(("kl_divergence", "entropy"), found,
                                                                          strict=True)), step)
    assert first == {"kl_divergence": 0.25, "entropy": 2.0}
    assert [(line.split()[2], line.split()[3]) for line in said] == [
        ("4:", "KL"), ("4:", "entropy"),  # 0.5625 above, 9.5 % left; then twice and half as much
        ("6:", "KL"), ("6:", "entropy"), ("8:", "entropy")]
    assert "KL 0.812, 0.562 above the first step's (--max_kl)" in said[0]
    assert "entropy 0.19, 9.5% of the first step's (--min_entropy)" in said[1]


def test_a_policy_that_runs_away_or_collapses_is_told_of_unasked(said):
    bounds = curves.Bounds(TrainOptions(), {})
    for step, (kl, entropy) in enumerate([(0.0, 0.6), (0.3, 0.3), (1.1, 0.05)], start=1):
        bounds.look({"kl_divergence": kl, "entropy": entropy}, step)
    assert len(said) == 2 and all("step 3" in line for line in said)


def test_bounds_are_counted_from_the_first_step_of_a_resumed_run_too(shop, tmp_path, said):
    options = train_options(shop, tmp_path, eval_every=0, max_steps=1)
    state = torch.load(training.train(options) / "trainer_state.pt", weights_only=True)
    assert state["first"].keys() == {"kl_divergence", "entropy"}
    path = tmp_path / "run" / "step_000001" / "trainer_state.pt"
    torch.save(state | {"first": {"kl_divergence": -9.0, "entropy": 1e6}}, path)
    checkpoint.write_checksums(path.parent)
    training.train(replace(options, resume="auto", max_steps=3))
    assert sum("step 2: KL" in line or "step 2: entropy" in line for line in said) == 2
    assert not any("step 3: KL" in line or "step 3: entropy" in line for line in said)


def out_of_memory_above(products, monkeypatch):
    """Plant an OutOfMemoryError in every pass of more than so many products; returns the sizes tried."""
    good, sizes = update.log_probs_of, []

    def limited(learner, items, options):
        sizes.append(len(items))
        if len(items) > products:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nDetails")
        return good(learner, items, options)

    monkeypatch.setattr(update, "log_probs_of", limited)
    return sizes


def test_micro_batches_halve_when_memory_runs_out(shop, tmp_path, said, monkeypatch):
    settings = dict(eval_every=0, batch_size=5, max_steps=2)
    with float64():
        wanted = training.train(train_options(shop, tmp_path / "a", **settings))
        sizes = out_of_memory_above(2, monkeypatch)
        found = training.train(train_options(shop, tmp_path / "b", **settings, micro_batch_size=0, preflight=False))
    assert sizes == [5, 2, 2, 1, 2, 2, 1]
    assert "out of memory with 5 products a pass while updating: going on with 2" in "".join(said)
    one, other = weights(wanted), weights(found)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-9


def test_the_pre_flight_meets_the_shortage_first(shop, tmp_path, said, monkeypatch):
    sizes = out_of_memory_above(2, monkeypatch)
    training.train(train_options(shop, tmp_path, eval_every=0, batch_size=5, max_steps=1, micro_batch_size=0))
    assert sizes == [5, 2, 2, 1, 2, 2, 1]  # five times the largest product, then the five of the step


def short_of_memory(name, monkeypatch):
    """Leave one of a policy's passes room for two products; returns the sizes tried."""
    good, sizes = getattr(Policy, name), []

    def limited(policy, prompts, *args, **more):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return good(policy, prompts, *args, **more)

    monkeypatch.setattr(Policy, name, limited)
    return sizes


def test_every_pass_halves_and_no_product_is_lost(shop, tmp_path, said, monkeypatch):
    """Sampling, held-out evaluation, reference and update have room for two products at most, each from then on."""
    settings = dict(batch_size=5, rollout_batch_size=5, micro_batch_size=5, max_steps=2, eval_every=1, epochs=2)
    with float64():
        wanted = training.train(train_options(shop, tmp_path / "a", **settings))
        sizes = out_of_memory_above(2, monkeypatch)
        tried = {name: short_of_memory(name, monkeypatch) for name in ("sample", "log_probs")}
        found = training.train(train_options(shop, tmp_path / "b", **settings, preflight=False))
    assert [size for size in tried["sample"] if size > 2] == [5] and [size for size in sizes if size > 2] == []
    assert [size for size in tried["log_probs"] if size > 2] == [5]  # the reference comes first
    assert "while sampling: going on with 2 (no more is known)" in "".join(said)
    assert "while taking log-probs: going on with 2" in "".join(said)
    one, other = weights(wanted), weights(found)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-9
    assert tags(tmp_path / "a/logs")["returns"] == tags(tmp_path / "b/logs")["returns"]


def test_log_probs_are_taken_in_the_passes_of_an_update(shop, tmp_path, monkeypatch):
    """Other passes would pad, and so round, otherwise."""
    run, buffer = one_step(train_options(shop, tmp_path))
    items = [replace(item, prompts=(replace(item.prompts[0], input_ids=item.prompts[0].input_ids[:length]),))
             for item, length in zip(buffer.items, (9, 5, 7), strict=True)]
    taken = []

    def log_probs(prompts, completions, *_, **__):
        taken.append([len(prompt.input_ids) for prompt in prompts])
        return torch.zeros(completions.shape), None

    monkeypatch.setattr(run.learner.policy, "log_probs", log_probs)
    update.log_probs_under(run.learner.policy, items, PassSize(2), 1.0)
    assert taken == [[len(item.prompts[0].input_ids) for item in some] for some in update.micro_batches(items, 2)]
    assert taken == [[5, 7], [9]]


def test_no_memory_for_one_product_names_it(shop, tmp_path, monkeypatch):
    out_of_memory_above(0, monkeypatch)
    options = train_options(shop, tmp_path, eval_every=0, preflight=False)
    with pytest.raises(ModelError, match="one product a pass, data.xlsx row [0-9]+: lower --max_pixels.*--lora_rank"):
        training.train(options)
    run, buffer = one_step(options)
    monkeypatch.setattr(run.learner.policy, "log_probs", out_of_memory)
    with pytest.raises(ModelError, match="one product a pass, data.xlsx row [0-9]+: lower --max_pixels"):
        update.log_probs_under(run.learner.policy, buffer.items, run.learner.passes, 1.0)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_optimizer_without_memory_says_what_helps(shop, tmp_path, monkeypatch):
    good, calls = torch.optim.AdamW.step, []

    def second_fails(optimizer, *args):
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return good(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", second_fails)
    with pytest.raises(ModelError, match="in the optimizer's step.*--resume auto.*--lora_rank"):
        training.train(train_options(shop, tmp_path, eval_every=0))
    monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory)
    with pytest.raises(ModelError, match="gradients and Adam's moments .*; nothing has been trained yet.*--lora_rank"):
        training.train(train_options(shop, tmp_path, eval_every=0))


def test_what_the_optimizer_keeps_is_there_before_the_first_step(shop, tmp_path, monkeypatch):
    """It moves nothing, and the steps are those of an optimizer that allocates as it goes."""
    wanted = training.train(train_options(shop, tmp_path / "a", eval_every=0, weight_decay=0.1))
    started = []
    monkeypatch.setattr(training, "allocate_state", lambda *parts: started.append(parts))
    found = training.train(train_options(shop, tmp_path / "b", eval_every=0, weight_decay=0.1))
    assert same_weights(found, wanted) and len(started) == 1
    run = training.prepare(train_options(shop, tmp_path / "c", eval_every=0), training.Processes())
    assert not run.learner.optimizer.state
    before = [parameter.detach().clone() for parameter in run.learner.parameters]
    allocate_state(run.learner.optimizer, run.learner.parameters, run.learner.processes)
    assert all(torch.equal(one, other) for one, other in zip(run.learner.parameters, before, strict=True))
    held = run.learner.optimizer.state
    assert all(len(held[parameter]) == 3 and not any(
        value.any() for value in held[parameter].values()) for parameter in run.learner.parameters)
    assert all(parameter.grad is None for parameter in run.learner.parameters)
    assert [group["lr"] for group in run.learner.optimizer.param_groups] == [1e-3, 1e-3]


def test_the_pre_flight_says_what_it_took_and_moves_nothing(shop, tmp_path, said):
    options = train_options(shop, tmp_path, eval_every=0, max_steps=2)
    with_it = training.train(options)
    line = next(line for line in said if "pre-flight" in line)
    assert "data.xlsx row" in line and "4 answers of 8, 1 products a pass" in line and "GiB resident" in line
    without = training.train(replace(options, output_dir=str(tmp_path / "other"), preflight=False))
    assert same_weights(with_it, without)


def test_the_largest_product_has_the_longest_prompt(shop, tmp_path):
    options = train_options(shop, tmp_path)
    run = training.prepare(replace(options, preflight=False, eval_every=0), training.Processes())
    sample, prompt = largest_product(run.encoder, run.products)
    lengths = [len(run.encoder.encode(product).input_ids) for product in run.products]
    assert len(prompt.input_ids) == max(lengths) > min(lengths) and sample in run.products
    assert largest_product(run.encoder, []) == (None, None)
