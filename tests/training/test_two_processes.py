"""The training program in two processes (gloo, CPU): what one does with twice the products; faults in one of them."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import shortage
import split_loading
import split_policies
import torch
from kill_at_random import kill_a_run, same
from safetensors.torch import load_file
from training_worker import CASES, CONFIGS, FOR_SEVERAL, RESUMED, STEPS, give_worth, options_of_case, options_of_config

import rollout
import train_vlm_parallel as training
from config import TrainOptions
from ground.options import parse_options
from models.processes import leave
from rounding import float64
from runs import tags, write_shop

WORKER = Path(__file__).parent / "training_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, image_processor):
    """A shop in which two processes trained every case, and one process what they are measured by."""
    folder = write_shop(tmp_path_factory.mktemp("two"), tokenizer, image_processor)
    good = rollout.score_answer
    give_worth()
    with float64():
        for name in CASES:
            if name.startswith("none"):
                training.train(options_of_case(folder, name, 4))
        for name in RESUMED:
            begun = options_of_case(folder, name, 2, max_steps=1)
            training.train(replace(begun, batch_size=4, sharding="none", offload=False))
        for place in (None, *shortage.PLACES):
            shortage.train(folder, f"alone, {place}", 4, place)
        shortage.train(folder, "alone, vision", 4, train_vision=True)
    rollout.score_answer = good
    kill_a_run(folder, folder / "killed", 2, 0, one_only=True, words="step 3/", steps=STEPS)  # the pair resumes it
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(WORKER), str(folder)], capture_output=True, text=True, timeout=1300)
    (folder / "said.txt").write_text(done.stdout)
    (folder / "complained.txt").write_text(done.stderr)
    cases = len(CASES) + len(RESUMED) + len(shortage.CASES) + len(FOR_SEVERAL) + 3
    assert done.stdout.count("done") == 2 * cases and done.returncode == 1, done.stderr[-3000:]  # it fails at the end
    return folder


def test_split_policies_compute_what_whole_ones_do(folder):
    """The same tokens, log-probs and gradients: compared in both processes, by split_policies.py."""
    assert (folder / "said.txt").read_text().count("equal") == 2 * len(split_policies.CASES)


def test_each_process_reads_its_share(folder):
    """The weights to the bit, and the memory that it takes: compared in both processes, by split_loading.py."""
    said = (folder / "said.txt").read_text()
    assert said.count("read alike") == 2 * len(split_loading.KINDS)
    assert said.count("of the weights") in (0, 2 * 5)  # where memory can be looked at


def test_a_fault_in_what_is_split_is_caught_in_both_dtypes(folder):
    assert (folder / "said.txt").read_text().count("a fault is caught") == 2 * 2


def last_weights(folder, name, batch_size):
    run = folder / name / str(batch_size) / "step_000003"
    return load_file(next(run.glob("*model.safetensors")))


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", [*CASES, *RESUMED])
def test_two_processes_train_as_one_does(folder, name):
    measure = {"none, resumed": "none, full, hybrid", "fsdp, resumed": "none, full, hybrid",
               "fsdp, offload": "none, full, hybrid", "fsdp, offload, resumed": "none, full, hybrid",
               "fsdp, options, resumed": "none, options",
               "fsdp, supervised, LoRA, resumed": "none, supervised, LoRA"}.get(name, name.replace("fsdp", "none"))
    alone = last_weights(folder, measure, 4)
    assert difference(last_weights(folder, name, 2), alone) < 1e-9
    if "LoRA" not in name:
        start = load_file(folder / "model" / "model.safetensors")
        assert difference(alone, start) > 2e-4  # three steps of 1e-4


@pytest.mark.parametrize("fault", ["failing", "dropped"])
def test_a_process_whose_rollouts_fail_changes_nothing_else(folder, fault):
    """What is left are the other products, sharded or not."""
    one, other = (load_file(folder / f"{fault} {sharding}" / "step_000002" / "model.safetensors")
                  for sharding in ("none", "fsdp"))
    assert difference(one, other) < 1e-9
    assert difference(one, load_file(folder / "model" / "model.safetensors")) > 1e-4
    assert all(torch.isfinite(value).all() for value in one.values())


@pytest.mark.parametrize("name", [*(f"alone, {place}" for place in shortage.PLACES), *shortage.CASES])
def test_a_shortage_of_memory_loses_no_product(folder, name):
    """Above one product a pass, in either process: those of each pass halve, and all is as it would have been."""
    found, wanted = (folder / "shortage" / which for which in
                     (name, "alone, vision" if "vision" in name else "alone, None"))
    found_weights, wanted_weights = (load_file(path / "step_000002" / "model.safetensors") for path in (found, wanted))
    assert difference(found_weights, wanted_weights) < 1e-9
    assert difference(found_weights, load_file(folder / "model" / "model.safetensors")) > 1e-4
    rewards, wanted_rewards = (tags(path / "logs")["held_out/mean_reward"] for path in (found, wanted))
    assert rewards == [(step, pytest.approx(reward, rel=1e-6)) for step, reward in wanted_rewards]


def test_gradients_are_reduced_once_if_asked_for(folder):
    said = (folder / "said.txt").read_text()
    whole, one_by_one, once = (int(re.search(f"{name}: done, (\\d+) reductions", said)[1]) for name in
                               ("fsdp", "fsdp, one by one", "fsdp, reduced once"))
    assert once == whole == one_by_one / 2 > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configs_start(folder, tmp_path, path):
    """With a tiny model, here in one process; those for several GPUs the fixture started in two."""
    if path in FOR_SEVERAL:
        tmp_path = folder / path.stem
    else:
        training.train(options_of_config(path, folder, tmp_path))
        leave()  # of a group of one, which --offload makes
    saved = {file.name for file in (tmp_path / "run" / "step_000001").iterdir()}
    assert ("adapter_model.safetensors" if "lora" in path.name else "model.safetensors") in saved
    assert parse_options(TrainOptions, "", ["--config", str(path), "--data_path", str(folder / "data.xlsx")]).gpu_ids \
        == (tuple(range(int(path.stem[-6]))) if path in FOR_SEVERAL else ())


def test_two_processes_one_of_them_killed_go_on_as_if_nothing_had_happened(folder):
    undisturbed, resumed = (folder / name / "run" / f"step_{STEPS:06d}" for name in ("undisturbed", "killed"))
    assert same(undisturbed, resumed)
    log = (folder / "killed" / "killed.log").read_text()
    assert "Signal 9 (SIGKILL) received" in log and f"step {STEPS}/" not in log


def test_a_process_that_fails_ends_the_others_with_its_traceback_on_top(folder):
    cause = (folder / "complained.txt").read_text().partition("Root Cause (first observed failure)")[2]
    assert "rank      : 1" in cause and "ZeroDivisionError: planted" in cause and "in broken" in cause
