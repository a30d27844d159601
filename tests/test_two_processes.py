"""The training program in two processes (gloo, CPU): what one does with twice the products; faults in one of them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, write_shop
from safetensors.torch import load_file
from training_worker import CASES, RESUMED, give_worth, options_of_case

import rollout
import train_vlm_parallel as training

WORKER = Path(__file__).parent / "training_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, image_processor):
    """A shop in which two processes trained every case, and one process what they are measured by."""
    folder = write_shop(tmp_path_factory.mktemp("two"), tokenizer, image_processor)
    for part in (tiny_model(tokenizer, ["full_attention"] * 2), tokenizer, image_processor):
        part.save_pretrained(folder / "dense")
    good = rollout.score_answer
    give_worth()
    for name in CASES:
        if name.startswith("none"):
            training.train(options_of_case(folder, name, 4))
    for name in RESUMED:
        begun = options_of_case(folder, name, 2, max_steps=2)
        training.train(replace(begun, batch_size=4, sharding="none"))
    rollout.score_answer = good
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(WORKER), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == 2 * (len(CASES) + len(RESUMED) + 2)
    return folder


def last_weights(folder, name, batch_size, step=5):
    run = folder / name / str(batch_size) / f"step_{step:06d}"
    return load_file(next(run.glob("*model.safetensors")))


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", [*CASES, *RESUMED])
def test_two_processes_train_as_one_does(folder, name):
    measure = "none, full, hybrid" if name in RESUMED else name.replace("fsdp", "none")
    alone = last_weights(folder, measure, 4)
    assert difference(last_weights(folder, name, 2), alone) < 1e-5
    if "LoRA" not in name:
        start = load_file(folder / CASES.get(name, {}).get("model_path", "model") / "model.safetensors")
        assert difference(alone, start) > 3e-4  # five steps of 1e-4


def test_a_process_whose_rollouts_fail_changes_nothing_else(folder):
    """What is left are the other's products, sharded or not."""
    one, other = (load_file(folder / f"failing {sharding}" / "step_000002" / "model.safetensors")
                  for sharding in ("none", "fsdp"))
    assert difference(one, other) < 1e-5
    assert difference(one, load_file(folder / "model" / "model.safetensors")) > 1e-4
    assert all(torch.isfinite(value).all() for value in one.values())
