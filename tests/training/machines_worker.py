"""Four processes as two machines of two, which train with hsdp. Run by test_machines.py: machines_worker.py FOLDER,
with a shop in it. They are forked from one process that has imported everything."""

import faulthandler
import os
import sys
from pathlib import Path

import shortage
import torch.distributed as dist
import training_worker
from loguru import logger

import train_vlm_parallel as training
from models.sharding import own_part
from rounding import float64

PROCESSES, ON_EACH, PORT = 4, 2, 29000 + os.getpid() % 2000
# name: the place of a shortage, in which process, and the options
CASES = {"hsdp": (None, None, {"max_steps": 1}), "hsdp, backward": ("update, backward", 3, {}),
         "hsdp, LoRA": (None, None, {"lora_rank": 4})}


def train(folder):
    """Every case; an assertion that fails ends the process with its traceback."""
    rank = dist.get_rank()
    for name, (place, where, changes) in CASES.items():
        shortage.train(folder, name, 2, place if rank == where else None, sharding="hsdp", eval_every=0, **changes)
    resumed = shortage.options_of(folder, "hsdp", 2, sharding="hsdp", eval_every=0, resume="auto")
    run = training.prepare(resumed, training.join("cpu", "hsdp"))
    for parameter in run.policy.model.parameters():
        assert len(own_part(parameter)) <= -(-len(parameter) // ON_EACH) and run.start == 1
    shortage.train(folder, "hsdp", 2, sharding="hsdp", eval_every=0, resume="auto")


def main(rank):
    """One of the processes."""
    faulthandler.dump_traceback_later(600, exit=True)  # one that hangs says where
    os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{PROCESSES}", LOCAL_RANK=f"{rank % ON_EACH}",
                      LOCAL_WORLD_SIZE=f"{ON_EACH}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{PORT}")
    logger.remove()
    dist.init_process_group("gloo")
    training_worker.give_worth()
    with float64():
        train(Path(sys.argv[1]))
    print(f"process {rank}: done", flush=True)


if __name__ == "__main__":
    children = []
    for rank in range(PROCESSES):
        child = os.fork()
        if not child:
            main(rank)
            os._exit(0)
        children.append(child)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
