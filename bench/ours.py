"""Our side of the benchmark: one step of the program on one product."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cases import ANSWER_TOKENS, Case, seeded_rewards
from config import TrainOptions
from meter import Meter
from models.footprint import splits
from models.processes import ALONE, Processes
from models.sharding import gathered
from models.trainable import set_trainable
from own_reward import Scorer
from rollout import Group, PromptEncoder, rollout_groups
from sheets.samples import Sample
from train_vlm_parallel import fill_buffer, load_models
from training.upkeep import Run
from update import make_idle, make_learner, update

TEMPLATE = "{text}"


def step_options(model_folder: Path, case: Case) -> TrainOptions:
    """Options of a step on one product."""
    return TrainOptions(model_path=str(model_folder), group_size=case.group_size, max_length=ANSWER_TOKENS,
                        temperature=1.0, batch_size=1, rollout_batch_size=1, micro_batch_size=1, lr=1e-6,
                        kl_weight=0.01, train_vision=case.train_vision, device="cpu", num_threads=1)


def make_run(options: TrainOptions, template: str | None = TEMPLATE, processes: Processes = ALONE) -> Run:
    """Load policy and reference as a training run does."""
    policy, reference, shares_vision = load_models(options, None, processes)
    parameters, idle = set_trainable(policy, options.train_vision), None
    if splits(options, processes.world):
        idle = make_idle(policy, options.group_size, options.train_vision)
    learner = make_learner(policy, parameters, options, processes, idle)
    return Run(learner, learner, reference, shares_vision, PromptEncoder(policy, template=template), Scorer(), None, [],
               [])  # no supervised steps here


def our_step(run: Run, options: TrainOptions, step: int, meter: Meter, rewards: Sequence[float] | None = None
             ) -> list[Group]:
    """Do one step on run.products, their photos read and prepared anew; rewards: stand in for those of the answers."""
    with meter.phase("prepare"):
        run.encoder = PromptEncoder(run.policy, template=run.encoder.template)
        for sample in run.products:
            run.encoder.encode(sample)
    return computed_step(run, options, step, meter, rewards)


def computed_step(run: Run, options: TrainOptions, step: int, meter: Meter, rewards: Sequence[float] | None = None
                  ) -> list[Group]:
    """Do what comes behind the photos of a step on run.products."""
    with meter.phase("generate"), gathered(run.policy):
        groups, failures = rollout_groups(run.encoder, run.products, options.group_size, options.temperature,
                                          options.max_length, f"bench/{step}", options.rollout_batch_size)
        if failures:
            raise RuntimeError(str(failures[0]))
        for group in groups if rewards else ():
            group.parts = [replace(part, reward=reward) for part, reward in zip(group.parts, rewards, strict=True)]
    with meter.phase("reference"):
        buffer = fill_buffer(groups, run, options)
    with meter.phase("train"):
        update(run.learner, buffer, options, step)
    return groups


def measured_step(run: Run, options: TrainOptions, case: Case, sample: Sample, step: int, meter: Meter) -> list[Group]:
    """Do one step on a sample with the meter started at its beginning and charged at its end."""
    run.products = [sample]
    meter.restart()
    groups = our_step(run, options, step, meter, seeded_rewards(case))
    meter.charge()
    run.encoder = PromptEncoder(run.policy, template=run.encoder.template)  # nothing is kept for the next step
    return groups


def reference_log_probs(run: Run, group: Group, rows: int) -> torch.Tensor:
    """Score the first rows of a group under the reference, (rows, T)."""
    with torch.no_grad():
        return run.reference.log_probs([group.prompt], group.completions[:rows], group.action_mask[:rows], 1.0)[0]
