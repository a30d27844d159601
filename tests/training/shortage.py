"""Memory for one product alone, planted in each kind of pass, and a run that meets it: in one process, or in two that
training_worker.py starts. Used by test_shortage.py and test_two_processes.py."""

from contextlib import ExitStack
from unittest import mock

import torch
import torch.distributed as dist
from loguru import logger
from torch.distributed.fsdp import FSDPModule

import train_vlm_parallel as training
import update
from models.checkpointing import repeated_layers
from models.family import ModelError
from models.policy import Policy
from runs import train_options

# Where it is planted: in which part of the loop, what is then said, and in which of the policy's passes.
PLACES = {"sampling": ("roll_out", "sampling", "sample"),
          "reference": ("fill_buffer", "taking log-probs", "log_probs"),
          "update, forward": ("update", "updating", "forward"),
          "update, backward": ("update", "updating", "backward"),
          "evaluation": ("log_evaluation", "sampling", "sample")}

# In two processes: where it is planted, in which of them, and the options beside.
CASES = {f"{sharding}, {place}": (place, [1], {"sharding": sharding}) for place in PLACES
         for sharding in ("none", "fsdp")}
CASES |= {"fsdp": (None, [], {"sharding": "fsdp"}),
          "fsdp, one by one": (None, [], {"sharding": "fsdp", "micro_batch_size": 1}),
          "fsdp, reduced once": (None, [], {"sharding": "fsdp", "micro_batch_size": 1, "reduce_once": True}),
          "fsdp, reduced once, backward": ("update, backward", [0], {"sharding": "fsdp", "reduce_once": True}),
          "fsdp, both": ("update, backward", [0, 1], {"sharding": "fsdp", "gradient_checkpointing": True}),
          "fsdp, vision": ("update, forward", [0], {"sharding": "fsdp", "train_vision": True})}


class Shortage:
    """Raises wherever more products are computed than there is room for; knows how often it did."""

    def __init__(self, room=1):
        self.room, self.raised = room, 0

    def meet(self, products):
        if products > self.room:
            self.raised += 1
            raise torch.OutOfMemoryError(f"planted: {products} products")

    def plant(self, within, kind, stack):
        """Plant it in one kind of pass, during one function of the program."""
        good_part = getattr(training, within)
        owner, name = (update, "log_probs_of") if kind in ("forward", "backward") else (Policy, kind)
        good = getattr(owner, name)

        def whole_pass(policy, prompts, *args, **more):
            self.meet(len(prompts))
            return good(policy, prompts, *args, **more)

        def half_a_pass(learner, items, options):
            """Layers before this one were gathered, others will be."""
            def layer(module, args, output):
                hidden = output[0] if isinstance(output, tuple) else output  # (B, L, d)
                if kind == "forward":
                    self.meet(len(items))
                else:
                    hidden.register_hook(lambda _: self.meet(len(items)))

            handle = repeated_layers(learner.policy._language_model)[-2].register_forward_hook(layer)
            try:
                return good(learner, items, options)
            finally:
                handle.remove()

        def part(*args, **more):
            with mock.patch.object(owner, name, half_a_pass if owner is update else whole_pass):
                return good_part(*args, **more)

        stack.enter_context(mock.patch.object(training, within, part))


def options_of(folder, name, batch_size, **changes):
    """Two steps with two products a pass in all kinds of them; the sheet holds the held-out products, too."""
    settings = dict(batch_size=batch_size, rollout_batch_size=2, micro_batch_size=2, eval_every=2, max_steps=2,
                    eval_path=str(folder / "data.xlsx"), save_best=False, show_every=0, preflight=False, lr=1e-4,
                    output_dir=str(folder / "shortage" / name), log_dir=str(folder / "shortage" / name / "logs"))
    return train_options(folder, folder, **settings | changes)


def train(folder, name, batch_size, place=None, **changes):
    """Train with a shortage in this process, or none: it is met once, and so many are not tried again.

    Returns how often gradients were added up over processes.
    """
    shortage, said = Shortage(), []
    sink = logger.add(lambda line: said.append(str(line)), format="{message}", level="INFO")
    with ExitStack() as stack:
        if place:
            within, doing, kind = PLACES[place]
            shortage.plant(within, kind, stack)
        stack.enter_context(mock.patch.object(training, "check_fast_path"))  # it has tests of its own
        reduce = stack.enter_context(mock.patch.object(dist, "reduce_scatter_single", wraps=dist.reduce_scatter_single))
        training.train(options_of(folder, name, batch_size, **changes))
    logger.remove(sink)
    assert not any("no rollout" in line or "failed" in line for line in said), said
    assert shortage.raised == bool(place), (name, shortage.raised)
    if place:
        line, = [line for line in said if "out of memory" in line]
        assert f"with 2 products a pass while {doing}: going on with 1 (planted: 2 products)" in line, said
    return reduce.call_count


def refused(folder, name, plant, here, **changes):
    """Start a run that finds no room at all, by plant(stack), in some processes; returns what it says in all."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(training, "check_fast_path"))
        if here:
            plant(stack)
        try:
            training.train(options_of(folder, name, 2, eval_every=0, **changes))
        except ModelError as problem:
            return str(problem)
    raise AssertionError(f"{name}: nothing was refused")


def no_room_for_one(stack):
    """In the backward pass of an update."""
    Shortage(room=0).plant("update", "backward", stack)


def no_room_for_moments(stack):
    """When the optimizer allocates them."""
    stack.enter_context(mock.patch.object(torch.optim.AdamW, "step", side_effect=torch.OutOfMemoryError("planted")))


def no_room_for_whole_weights(stack):
    """When they are gathered."""
    stack.enter_context(mock.patch.object(FSDPModule, "unshard", side_effect=torch.OutOfMemoryError("planted")))
