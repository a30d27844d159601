"""One of two processes that train, case after case, as one process does with twice the products. Run by
test_two_processes.py: training_worker.py FOLDER, with a shop in it."""

import faulthandler
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_MODULES_CACHE"] = os.environ.get("HF_MODULES_CACHE", "modules") + os.environ.get("RANK", "")

from ground.commands import import_for_good  # noqa: E402

if __name__ == "__main__":
    import_for_good("rounding")  # and with it nearly everything

import shortage  # noqa: E402
import split_loading  # noqa: E402
import split_policies  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from kill_at_random import settings  # noqa: E402
from loguru import logger  # noqa: E402

import reward  # noqa: E402
import rollout  # noqa: E402
import train_vlm_parallel as training  # noqa: E402
import update  # noqa: E402
from config import TrainOptions  # noqa: E402
from ground.options import parse_options  # noqa: E402
from models import shared_prefix  # noqa: E402
from models.checkpointing import repeated_layers  # noqa: E402
from models.family import ModelError  # noqa: E402
from models.policy import Policy  # noqa: E402
from models.sharding import whole  # noqa: E402
from rounding import float64  # noqa: E402
from runs import train_options  # noqa: E402
from training import guard  # noqa: E402

LEARNING = {"scale_advantages": "batch", "entropy_weight": 0.01, "ref_sync_every": 1, "ref_sync_mix": 0.6}
SUPERVISED = {"sft_steps": 1, "sft_lr": 2e-4, "sft_weight": 0.5, "scale_rewards_each": True,
              "look_weight": 0.1}
LOOK = {"look_weight": 0.1, "train_vision": True, "missing_photos": "text_only"}
# name: the options, beside those of both; what one process does with twice the --batch_size is the measure. The shop's
# model has both kinds of layers.
CASES = {
    "none, full, hybrid": {},
    "fsdp, full, hybrid": {"sharding": "fsdp"},
    "none, LoRA, hybrid": {"lora_rank": 4},
    "fsdp, LoRA, hybrid": {"lora_rank": 4, "sharding": "fsdp"},
    "none, vision": {"train_vision": True, "missing_photos": "text_only"},
    "fsdp, vision": {"train_vision": True, "missing_photos": "text_only", "sharding": "fsdp"},
    "none, supervised": SUPERVISED,
    "fsdp, supervised": {**SUPERVISED, "sharding": "fsdp"},
    "fsdp, supervised, LoRA": {**SUPERVISED, "lora_rank": 4, "sharding": "fsdp"},
    "none, supervised, LoRA": {**SUPERVISED, "lora_rank": 4},
    "none, look": LOOK,
    "fsdp, look": {**LOOK, "sharding": "fsdp"},
    "none, options": LEARNING,
    "fsdp, options": {**LEARNING, "sharding": "fsdp"},
    "fsdp, offload": {"sharding": "fsdp", "offload": True},
}
RESUMED = {  # from what one process began
    "none, resumed": {},
    "fsdp, resumed": {"sharding": "fsdp"},
    "fsdp, options, resumed": {**LEARNING, "sharding": "fsdp"},
    "fsdp, supervised, LoRA, resumed": {**SUPERVISED, "lora_rank": 4, "sharding": "fsdp"},
    "fsdp, offload, resumed": {"sharding": "fsdp", "offload": True},
}


def options_of_case(folder, name, batch_size, **changes):
    """Options of a case: three steps, a product's answers sampled by a seed of its own."""
    settings = dict(batch_size=batch_size, eval_fraction=0.0, eval_every=0, preflight=False, show_every=0, max_steps=3,
                    save_every=3, lr=1e-4, rollout_batch_size=2, output_dir=str(folder / name / str(batch_size)),
                    log_dir=str(folder / "logs")) | (CASES | RESUMED)[name] | changes
    return train_options(folder, folder, **settings)


CONFIGS = sorted((ROOT / "configs").glob("minicpm*.yaml"))
STEPS = 12  # of the run that was killed
FOR_SEVERAL = [path for path in CONFIGS if "x80gb" in path.name]  # they ask for several processes


def options_of_config(path, folder, output):
    """A ready YAML's options for one step of a tiny model on a CPU in its place."""
    places = {"model_path": folder / "model", "data_path": folder / "data.xlsx", "image_cache_dir": folder / "photos",
              "prompt_file": folder / "prompt.txt", "output_dir": output / "run", "log_dir": output / "logs"}
    flags = [word for name, value in places.items() for word in (f"--{name}", str(value))]
    return parse_options(TrainOptions, "", ["--config", str(path), *flags, "--device", "cpu", "--gpu_ids",
                                            "--max_steps", "1", "--max_length", "8", "--num_threads", "1"])


def give_worth():
    """Let answers of tiny models be worth something: their lengths in letters, to the hundred."""
    def score(answer, label):
        good = reward.score_answer(answer, label)
        return replace(good, reward=len(answer) % 100 / 100)

    rollout.score_answer = score


def watch_products():
    """Note the rows that this process rolls out, or learns the labels of, each step; returns the list."""
    rows = []
    good, lessons_of = training.rollout_groups, training.lessons_of

    def taught(encoder, samples, options):
        rows.append([sample.row for sample in samples])
        return lessons_of(encoder, samples, options)

    training.lessons_of = taught

    def watched(encoder, samples, group_size, *args):
        if group_size == 4:  # the start-up check takes 3
            rows.append([sample.row for sample in samples])
        return good(encoder, samples, group_size, *args)

    training.rollout_groups = watched
    return rows


def gathered_over_processes(thing):
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def check_line(rows, products):
    """No product comes twice in a pass over the sheet, in both processes together; every one comes."""
    line = [row for step in zip(*gathered_over_processes(rows), strict=True) for turn in zip(*step, strict=True)
            for row in turn]
    assert len(line) == 3 * 2 * 2
    for start in range(0, len(line), products):
        assert len(set(line[start:start + products])) == min(products, len(line) - start), line


def failing_rollouts(folder, sharding):
    """All rollouts of the second process fail: the first trains on."""
    good, said = rollout.PromptEncoder.encode, []

    def broken(encoder, sample):
        raise rollout.PhotoError("planted")

    sink = logger.add(lambda line: said.append(str(line)), format="{message}")
    if dist.get_rank() == 1:
        rollout.PromptEncoder.encode = broken
    training.train(options_of_case(folder, f"{sharding}, full, hybrid", 2, max_steps=2,
                                   output_dir=str(folder / f"failing {sharding}")))
    rollout.PromptEncoder.encode = good
    logger.remove(sink)
    assert sum("no rollout" in line for line in said) == 4 * dist.get_rank()


def dropped_half_way(folder, sharding):
    """One product of the second process has no room even alone, half-way through the layers, and comes last."""
    good, hopeless, said = Policy.sample, [], []

    def sample(policy, prompts, *args):
        if len(prompts) > 1:
            hopeless[:] = prompts[-1:]
        if not any(prompts[-1] is each for each in hopeless):
            return good(policy, prompts, *args)
        layer = repeated_layers(policy._language_model)[-2]
        with mock.patch.object(layer, "forward", side_effect=torch.OutOfMemoryError("planted")):
            return good(policy, prompts, *args)

    sink = logger.add(lambda line: said.append(str(line)), format="{message}")
    with mock.patch.object(Policy, "sample", sample if dist.get_rank() == 1 else good):
        training.train(options_of_case(folder, f"{sharding}, full, hybrid", 2, max_steps=2, exact_path=True,
                                       output_dir=str(folder / f"dropped {sharding}")))
    logger.remove(sink)
    assert sum("no rollout" in line and "out of memory" in line for line in said) == dist.get_rank()


def planted_nan(folder, sharding):
    """A NaN in the second process's gradient: both skip the step, and have the same weights after the next."""
    options = options_of_case(folder, f"{sharding}, full, hybrid", 2, output_dir=str(folder / f"NaN {sharding}"))
    run = training.prepare(options, training.join("cpu"))
    good, passes, skipped = update.accumulate, [], []

    def planted(learner, *args):
        found = good(learner, *args)
        passes.append(1)
        if len(passes) == 1 and dist.get_rank() == 1:
            local(learner.parameters[0].grad).view(-1)[0] = float("nan")
        return found

    before = whole_parameters(run)
    update.accumulate = planted
    for step in range(2):
        with training.gathered(run.policy):
            groups, _ = training.rollout_groups(run.encoder, training.products_at(step, run, options), 4, 1.0, 8,
                                                f"0/{step}", 2)
        buffer = training.fill_buffer(groups, run, options)
        skipped.append(update.update(run.learner, buffer, options, step)["skipped_minibatches"])
        after = whole_parameters(run)
        assert step or all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    update.accumulate = good
    assert skipped == [1, 0] and not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for value in after:
        main_value = value.clone()
        dist.broadcast(main_value, 0)
        assert torch.isfinite(value).all() and torch.equal(value, main_value)
    assert (Path(options.output_dir) / f"bad_batch_step_000001_process_{dist.get_rank()}.pt").is_file()


def guard_what_is_split(folder):
    """Positions late by one are caught in both processes, in bfloat16 too: weights are gathered in float32 for that."""
    good = shared_prefix.lay_out_groups

    def late(*args):
        layout = good(*args)
        return replace(layout, answers=replace(layout.answers, offsets=layout.answers.offsets + 1))

    for dtype in ("float32", "bfloat16"):
        options = options_of_case(folder, "fsdp, full, hybrid", 2, dtype=dtype, output_dir=str(folder / "guard"))
        shared_prefix.lay_out_groups = late
        try:
            training.prepare(options, training.join("cpu"))
        except ModelError as problem:
            assert "updated log-probs" in str(problem), problem
            print(f"{dtype}: a fault is caught", flush=True)
        shared_prefix.lay_out_groups = good
        with mock.patch.object(guard, "outcome_of", wraps=guard.outcome_of) as passes:
            training.prepare(options, training.join("cpu"))
        # The policy's, so that no more than a layer's activations are held.
        assert any(call.args[0].gradient_checkpointing for call in passes.call_args_list)


def local(value):
    return value.to_local() if hasattr(value, "to_local") else value


def whole_parameters(run):
    return [whole(parameter.detach()).clone() for parameter in run.learner.parameters]


def fail(folder):
    """The program in both processes, of which the second fails and the first hangs: torchrun ends both."""
    def broken(options, processes):
        processes.most(1)
        if processes.rank == 1:
            raise ZeroDivisionError("planted")
        time.sleep(600)

    training.prepare = broken
    training.main(TrainOptions(output_dir=str(folder / "failed"), device="cpu"))


def main(folder):
    """Every case; an assertion that fails ends the process with its traceback."""
    logger.remove()
    training.train(settings(folder, folder / "undisturbed", 2, STEPS))
    training.train(replace(settings(folder, folder / "killed", 2, STEPS), resume="auto"))
    split_loading.memory(folder / "large", train_options(folder, folder))
    for kind in split_loading.KINDS:
        split_loading.compare(kind, folder / "read" / kind)
    with float64():
        for case in split_policies.CASES:
            split_policies.compare(*case)
    guard_what_is_split(folder)
    give_worth()
    rows = watch_products()
    with float64():
        for name, changes in CASES.items():
            rows.clear()
            training.train(options_of_case(folder, name, 2))
            check_line(rows, 9 if "missing_photos" in changes else 8)
            print(f"{name}: done", flush=True)
        for name in RESUMED:
            training.train(options_of_case(folder, name, 2, resume="auto"))
            print(f"{name}: done", flush=True)
        for name, (place, ranks, changes) in shortage.CASES.items():
            reductions = shortage.train(folder, name, 2, place if dist.get_rank() in ranks else None, **changes)
            print(f"{name}: done, {reductions} reductions", flush=True)
        for sharding in ("none", "fsdp"):
            failing_rollouts(folder, sharding)
            dropped_half_way(folder, sharding)
            planted_nan(folder, sharding)
            print(f"faults, {sharding}: done", flush=True)
        second = dist.get_rank() == 1
        no_room = shortage.refused(folder, "no room", shortage.no_room_for_one, second, sharding="fsdp")
        assert "out of memory with one product a pass, data.xlsx row" in no_room, no_room
        no_room = shortage.refused(folder, "not whole", shortage.no_room_for_whole_weights, True, sharding="fsdp")
        assert "out of memory while gathering all weights" in no_room, no_room
        for sharding in ("none", "fsdp"):
            no_room = shortage.refused(folder, f"no moments {sharding}", shortage.no_room_for_moments, second,
                                       sharding=sharding)
            assert "no memory for gradients and Adam's moments (planted)" in no_room, no_room
        print("nothing fits: done", flush=True)
    for path in FOR_SEVERAL:
        training.train(options_of_config(path, folder, folder / path.stem))
        print(f"{path.name}: done", flush=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(1200, exit=True)  # one that hangs says where
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    fail(Path(sys.argv[1]))
