"""Weights that wait in the host's memory: in one process, what is trained without. In two: test_two_processes.py."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import train_vlm_parallel as training
from ground.errors import OptionError
from ground.options import check_options
from models.processes import join_alone, leave
from rounding import float64
from runs import train_options, weights


@pytest.fixture
def alone():
    """A process group of this process."""
    join_alone("cpu")
    yield
    leave()


SETTINGS = dict(eval_every=0, save_every=1, keep_last=0, batch_size=4, micro_batch_size=2, max_steps=2, max_length=4,
                preflight=False, show_every=0)


def test_one_process_trains_as_without_and_goes_on_to_the_bit(shop, tmp_path, alone):
    split = dict(SETTINGS, sharding="fsdp", offload=True)
    with float64():
        wanted = weights(training.train(train_options(shop, tmp_path / "whole", **SETTINGS)))
        last = training.train(train_options(shop, tmp_path / "split", **split))
    found, start = weights(last), weights(shop / "model")
    assert max(float((wanted[name] - found[name]).abs().max()) for name in wanted) < 1e-9
    assert max(float((wanted[name] - start[name]).abs().max()) for name in wanted) > 1e-3
    resumed = train_options(shop, tmp_path / "split", **split, resume=str(last.with_name("step_000001")))
    with float64():
        again = training.train(resumed)
    assert again == last and all(torch.equal(weights(again)[name], tensor) for name, tensor in found.items())


def test_weights_gradients_and_moments_are_shares_on_the_host(shop, tmp_path, alone):
    options = train_options(shop, tmp_path, sharding="fsdp", offload=True, dtype="bfloat16", eval_every=0,
                            exact_path=True)
    run = training.prepare(options, training.Processes())
    assert all(isinstance(parameter, DTensor) for parameter in run.learner.parameters)
    for policy in (run.policy, run.reference):
        units = [module for module in policy.root.modules() if hasattr(module, "_get_fsdp_state")]
        assert len(units) > 2
        groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
        assert all(parameter.offload_to_cpu for group in groups for parameter in group.fsdp_params)
    assert run.learner.optimizer.param_groups[0]["fused"]


def test_a_group_of_one_is_made_once(alone):
    group = dist.group.WORLD
    join_alone("cpu")
    assert dist.group.WORLD is group and dist.get_world_size() == 1


def test_what_it_can_not_go_with_is_refused(shop, tmp_path):
    with pytest.raises(OptionError, match="--offload needs --sharding fsdp"):
        check_options(train_options(shop, tmp_path, offload=True))
    with pytest.raises(OptionError, match="--offload and --lora_rank contradict each other"):
        check_options(train_options(shop, tmp_path, offload=True, sharding="fsdp", lora_rank=4))
