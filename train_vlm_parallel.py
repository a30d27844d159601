"""VLM GRPO: teach a vision-language model to read sizes off product pages.

    make demo                                                         # the embedded default, a few minutes on a CPU
    python train_vlm_parallel.py --config configs/demo.yaml           # the same, by hand (python demo.py comes first)
    python train_vlm_parallel.py --data_path data.xlsx --image_cache_dir image_cache_new --model_path MODEL
    python train_vlm_parallel.py --gpu_ids 0 1 2 3 --sharding fsdp ...        # four GPUs of this machine
    torchrun --nproc_per_node 8 --nnodes 2 ... train_vlm_parallel.py ...      # two machines

Each step: sample a group of answers for some products, score them, compare them within the group, and move the policy
towards the better ones by a clipped, KL-bound update. The first --sft_steps learn the labels instead. Every option:
--help.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    from config import TrainOptions
    from ground.commands import start

    start(TrainOptions, "GRPO for vision-language models that read sizes off product pages.")

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from config import TrainOptions
from evidence.evaluation import blank_photos
from ground.errors import OptionError
from ground.options import check_reference, write_options
from loss import VLM_GRPOLoss, decoupled_advantages, group_advantages
from models.footprint import splits
from models.loading import settle_dtype
from models.optimizer import allocate_state, learning_rate, set_learning_rate
from models.preparing import worker_count
from models.processes import Processes, interruptible, join, join_alone, launch, leave, started_by_torchrun
from models.sharding import gathered
from models.trainable import parameter_table, set_trainable
from own_reward import Scorer
from prompts import read_template
from replay_buffer import Experience, ReplayBuffer
from rollout import Group, PromptEncoder, RolloutFailure, products_together, rollout_groups, sample_flat_again
from sheets.cells import DataError
from sheets.order import products_of_step
from sheets.samples import Sample
from training.checkpoint import find_resume, read_best
from training.curves import PAGE, Bounds, Curves, describe, log_groups, log_step, warn_of_failures
from training.guard import check_fast_path
from training.lessons import add_blinds, check_lessons, lessons_of, with_label
from training.preflight import preflight
from training.provenance import write_start, write_summary
from training.setup import fetch_photos, load_models, load_products, set_up_log
from training.upkeep import BadRun, Interrupted, Run, count_bad_step, finish_step, log_evaluation, take_up
from update import answers_a_product, log_probs_under, make_idle, make_learner, update


def train(options: TrainOptions) -> Path | None:
    """Train from the start (or --resume) to max_steps; returns the last checkpoint's folder."""
    processes = join(options.device, options.sharding)
    if options.offload:
        join_alone(options.device)
    options = settle_dtype(options, options.device)
    check_reference(options)  # which knows only now whether the reference policy is held in bfloat16
    run = prepare(options, processes)
    per_step = options.batch_size * run.processes.world
    bar = tqdm(total=options.max_steps * per_step, initial=run.start * per_step, unit="product",
               disable=None if run.processes.main else True, dynamic_ncols=True)
    bounds = Bounds(options, run.first)
    learnt = run.start >= options.max_steps  # nothing left to do is no failure
    with interruptible() as interruption:
        for step in range(run.start, options.max_steps):
            seconds: dict[str, float] = defaultdict(float)
            rate = learning_rate(step, options)
            products = products_at(step, run, options)
            coming = products_at(step + 1, run, options) if step + 1 < options.max_steps else []
            run.encoder.prefetch([*products, *coming])
            if run.blanking and step >= options.sft_steps:
                run.blanking.prefetch([sample for sample in products if sample.photos])
            set_learning_rate(run.learner.optimizer, rate)
            if step < options.sft_steps:
                groups, trained, buffer = [], [], ReplayBuffer()
                metrics = supervise(run, products, options, step, seconds)
            else:
                with timed(seconds, "rollout"), gathered(run.policy):
                    groups, trained, failures = roll_out(run, products, options, f"{options.seed}/{step}")
                with timed(seconds, "reference"):
                    buffer = fill_buffer(trained, run, options)
                with timed(seconds, "update"):
                    metrics = update(run.learner, buffer, options, step)
                metrics |= describe(groups, trained, failures, run.processes)
            metrics["lr"] = rate
            learnt = learnt or "returns" in metrics or "supervised_loss" in metrics
            count_bad_step(run, metrics, step + 1)
            sync_reference(run, options, step + 1)
            if run.writer:
                log_step(run.writer, step + 1, options.max_steps, metrics, seconds)
                log_groups(run.writer, groups, trained, buffer.items, options, step + 1)
                bounds.look(metrics, step + 1)
            bar.update(per_step)
            if finish_step(run, options, step + 1, interruption):
                break
    bar.close()
    if not learnt:
        raise BadRun("no product could be rolled out in any step, so nothing was learnt (see the warnings above); "
                     "python check_data.py shows what is wrong with a sheet")
    if run.writer:
        close(run, options)
    return run.last_saved


def close(run: Run, options: TrainOptions) -> None:
    """Say where everything is; in the main process."""
    run.writer.close()
    best = read_best(options.output_dir)
    best_said = f", the best held-out reward at step {best['step']}" if best else ""
    best_facts = best and {name: best[name] for name in ("step", "mean_reward")}
    write_summary(options.output_dir, last_checkpoint=str(run.last_saved), best=best_facts, done=True)
    logger.info(f"done: {run.last_saved}{best_said}; curves: tensorboard --logdir {options.log_dir}, to be "
                f"opened at http://localhost:6006/#{PAGE}")


def products_at(step: int, run: Run, options: TrainOptions) -> list[Sample]:
    """The products that this process rolls out in one step, the first step being 0."""
    return [run.products[index] for index in
            products_of_step(len(run.products), options.batch_size, step, options.seed, run.processes.rank,
                             run.processes.world)]


def roll_out(run: Run, products: Sequence[Sample], options: TrainOptions, seed: str
             ) -> tuple[list[Group], list[Group], list[RolloutFailure]]:
    """Sample and score a group for each product; also returns those to train on, and what failed."""
    def sample(some: Sequence[Sample], own_seed: str) -> tuple[list[Group], list[RolloutFailure]]:
        groups, failures = rollout_groups(run.encoder, some, options.group_size, options.temperature,
                                          options.max_length, own_seed, products_together(options, run.policy))
        run.scorer.rescore(groups)
        return groups, failures

    groups, failures = sample(products, seed)
    trained, failed_again = sample_flat_again(groups, options.resample_flat,
                                              lambda flat, number: sample(flat, f"{seed}/{number}"),
                                              options.scale_rewards_each)
    return groups, trained, [*failures, *failed_again]


def supervise(run: Run, products: Sequence[Sample], options: TrainOptions, step: int, seconds: dict[str, float]
              ) -> dict[str, float]:
    """One supervised step: learn the products' labels, written as answers; returns its metrics."""
    with timed(seconds, "lessons"):
        lessons, failures = lessons_of(run.encoder, products, options)
    warn_of_failures("no lesson", failures)
    with timed(seconds, "update"):
        metrics = update(run.teacher, ReplayBuffer(lessons), replace(options, epochs=1), step)
    return metrics | {"failed_rollouts": sum(run.processes.gather(len(failures)))}


def sync_reference(run: Run, options: TrainOptions, step: int) -> None:
    """Every ref_sync_every steps, move the reference policy towards the policy (TR-DPO, arXiv 2404.09656); after the
    supervised steps, all the way."""
    if run.reference and step == options.sft_steps:
        run.reference.move_towards(run.policy, 1.0)
    elif options.ref_sync_every and step > options.sft_steps and step % options.ref_sync_every == 0:
        run.reference.move_towards(run.policy, options.ref_sync_mix)


def prepare(options: TrainOptions, processes: Processes) -> Run:
    """Read the sheet, load the models, take up a resumed run's state."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    torch.manual_seed(options.seed)
    if options.download_missing:
        processes.once(lambda: fetch_photos(options), DataError)
    products, held_out = load_products(options)
    if options.look_weight and not any(sample.photos for sample in products):
        raise OptionError(f"--look_weight {options.look_weight} needs photos, and no product of {options.data_path} "
                          "has any: leave it out")
    scorer = Scorer(options.reward)
    logger.info(scorer.check(products[0]))
    resume_from = processes.once(lambda: find_resume(options), OptionError)
    policy, reference, shares_vision = load_models(options, resume_from, processes)
    parameters = set_trainable(policy, options.train_vision)
    logger.info(f"what trains:\n{parameter_table(policy)}")
    workers = worker_count(options.workers, policy.device)
    asking = (policy, options.prompt_language, read_template(options.prompt_file), options.prompt_cache_mb,
              options.max_prompt_length)
    encoder = PromptEncoder(*asking, workers=workers)
    if workers:
        logger.info(f"photos are prepared in {workers} worker processes")
    if not options.exact_path:
        check_fast_path(policy, reference, shares_vision, encoder, products, options, processes)
    if options.sft_steps or options.sft_weight:
        check_lessons(policy, products, options.max_length)
    idle = lesson_idle = None
    if splits(options, processes.world):
        idle, lesson_idle = (make_idle(policy, answers, options.train_vision)
                             for answers in (answers_a_product(options), 1))
    learner = make_learner(policy, parameters, options, processes, idle)
    teacher = replace(learner, objective=VLM_GRPOLoss(options.clip_eps, 0.0, sft_weight=1.0), idle=lesson_idle)
    run = Run(learner, teacher, reference, shares_vision, encoder, scorer, None, products, held_out,
              PromptEncoder(*asking, blank_photos) if options.look_weight else None, last_saved=resume_from)
    if resume_from:
        take_up(run, options, resume_from)
    if processes.main:
        write_options(options, Path(options.output_dir) / "options.yaml")
        write_start(options, products, held_out, run.start)
        run.writer = Curves(options.log_dir, purge_step=run.start + 1 if resume_from else 0)
        run.writer.log_options(options, run.start)
    if options.preflight and run.start < options.max_steps:
        preflight(learner, reference, shares_vision, encoder, products, options)
    if not learner.optimizer.state:
        allocate_state(learner.optimizer, learner.parameters, learner.processes)
    if options.eval_every and held_out and not resume_from:
        log_evaluation(run, options, 0)
    return run


def fill_buffer(groups: Sequence[Group], run: Run, options: TrainOptions) -> ReplayBuffer:
    """Turn groups into experiences: advantages within each group, log-probs under the reference policy."""
    buffer = ReplayBuffer()
    for group, advantages in zip(groups, advantages_of(groups, run, options), strict=True):
        rewards = torch.tensor(group.rewards, device=run.policy.device)  # (G,)
        item = Experience(
            group.completions, group.action_mask, group.old_log_probs, None, rewards, advantages, group.truncated,
            (group.prompt,), None if options.train_vision else (group.features,),
            (f"{group.sample.sheet} row {group.sample.row}",))
        buffer.append(with_label(item, run.policy, group.sample.label) if options.sft_weight else item)
    if run.blanking:
        warn_of_failures("photos not blanked", add_blinds(buffer.items, run.blanking,
                                                          [group.sample for group in groups], options))
    if run.reference is None:
        return buffer
    for item, ref_log_probs in log_probs_under(run.reference, buffer.items, run.learner.passes,
                                               options.temperature, run.shares_vision):
        item.ref_log_probs = ref_log_probs
    return buffer


def advantages_of(groups: Sequence[Group], run: Run, options: TrainOptions) -> list[Tensor]:
    """How much better or worse each answer is than its group: a tensor (G,) a group."""
    device, gather = run.policy.device, run.processes.gather
    if options.scale_rewards_each:
        return [each.to(device) for each in decoupled_advantages([group.rewards_each() for group in groups],
                                                                 std_floor=options.std_floor, gather=gather)]
    step_rewards = [reward for group in groups for reward in group.rewards]
    if options.scale_advantages == "batch":
        step_rewards = [reward for share in gather(step_rewards) for reward in share]
    return [group_advantages(torch.tensor(group.rewards, device=device), std_floor=options.std_floor,
                             scale=options.scale_advantages, batch_rewards=torch.tensor(step_rewards, device=device))
            for group in groups]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall seconds of a block to seconds[name]."""
    begin = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - begin


def main(options: TrainOptions) -> int:
    """Train; status 3 for a run that went bad, 4 for one that a signal stopped."""
    set_up_log(options.output_dir)
    if options.gpu_ids and not started_by_torchrun():
        launch(options.gpu_ids, __file__, sys.argv[1:])
    status = 0
    try:
        record(train)(options)  # so that torchrun shows the traceback of the process that failed first
    except BadRun as problem:
        logger.error(str(problem))
        status = 3
    except Interrupted as problem:
        logger.warning(str(problem))
        status = 4
    leave()  # not after a UserError: it may be this process's alone, which then waits for no other
    return status
