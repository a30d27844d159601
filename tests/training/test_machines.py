"""hsdp: two machines of two processes each train as one process does; what it wants of a machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shortage
from safetensors.torch import load_file
from training_worker import give_worth

import rollout
from models.family import ModelError
from models.processes import Processes, grid_of
from rounding import float64
from runs import write_shop

WORKER = Path(__file__).parent / "machines_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, image_processor):
    """A shop in which four processes trained, and one process what they are measured by."""
    folder = write_shop(tmp_path_factory.mktemp("machines"), tokenizer, image_processor)
    good = rollout.score_answer
    give_worth()
    with float64():
        shortage.train(folder, "alone", 8, eval_every=0)
        shortage.train(folder, "alone, LoRA", 8, eval_every=0, lora_rank=4)
    rollout.score_answer = good
    paths = os.pathsep.join(str(path) for path in (WORKER.parent, WORKER.parents[1], WORKER.parents[2]))
    done = subprocess.run([sys.executable, str(WORKER), str(folder)], capture_output=True, text=True, timeout=900,
                          env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0 and done.stdout.count("done") == 4, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("name", "measure"), [("hsdp", "alone"), ("hsdp, backward", "alone"),
                                               ("hsdp, LoRA", "alone, LoRA")])
def test_two_machines_train_as_one_process_does(folder, name, measure):
    """Saved and resumed in between; short of memory in one process; adapters."""
    found, wanted = (load_file(next((folder / "shortage" / which / "step_000002").glob("*model.safetensors")))
                     for which in (name, measure))
    assert found.keys() == wanted.keys()
    assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-9


@pytest.mark.parametrize(("sizes", "here"), [([2, 2, 1], 2), ([3, 3, 3], 2), ([0, 0], 0)])
def test_machines_of_unequal_size_are_refused(monkeypatch, sizes, here):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", f"{here}")
    monkeypatch.setattr(Processes, "gather", lambda self, _: [(size, rank % max(size, 1)) for rank, size in
                                                              enumerate(sizes)])
    with pytest.raises(ModelError, match="as many processes on each.*--sharding fsdp"):
        grid_of(Processes(0, len(sizes)), 0, "cpu")
