"""VLM GRPO: teach a vision-language model to read sizes off product pages.

    make demo                                                         # the embedded default, a few minutes on a CPU
    python train_vlm_parallel.py --config demo.yaml                   # the same, by hand (python demo.py comes first)
    python train_vlm_parallel.py --data_path data.xlsx --image_cache_dir image_cache_new --model_path MODEL

Each step: sample a group of answers for some products, score them, compare them within the group, and move the policy
towards the better ones by a clipped, KL-bound update. Every option: --help.
"""

import copy
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import OptionError, TrainOptions, parse_options, write_options

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    OPTIONS = parse_options(TrainOptions, "GRPO for vision-language models that read sizes off product pages.")

import torch
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from checkpoint import find_resume, keep_best, read_best, read_state, save_checkpoint
from curves import Curves, log_groups, log_held_out
from data import (
    DataError,
    Sample,
    load_samples,
    products_of_step,
    require_usable,
    split_held_out,
    summarise_problems,
)
from evaluation import evaluate, summarise
from family import ModelError
from lora import is_adapter, rank_of
from loss import VLM_GRPOLoss, group_advantages
from models import DTYPES, choose_device, freeze, load_minicpm, load_weights
from own_reward import Scorer
from policy import Policy, load_policy, parameter_table, set_trainable, warn_without_gradient
from prompts import read_template
from provenance import write_start, write_summary
from replay_buffer import Experience, ReplayBuffer, join_experiences, make_experience
from reward import SUCCESS_REWARD
from rollout import Group, PromptEncoder, rollout_groups


class BadRun(RuntimeError):
    """A run that can't go on; the text says why and what to do."""


@dataclass
class Run:
    """Everything that a training run holds."""

    policy: Policy
    reference: Policy | None  # None when kl_weight is 0
    shares_vision: bool  # policy and reference have the same frozen vision: photos are encoded once for both
    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    objective: VLM_GRPOLoss
    encoder: PromptEncoder
    scorer: Scorer
    writer: Curves
    products: list[Sample]
    held_out: list[Sample]
    start: int = 0  # steps done before this process
    bad_steps: int = 0  # in a row
    last_saved: Path | None = None


def train(options: TrainOptions) -> Path | None:
    """Train from the start (or --resume) to max_steps; returns the last checkpoint's folder."""
    run = prepare(options)
    bar = tqdm(total=options.max_steps * options.batch_size, initial=run.start * options.batch_size, unit="product",
               disable=None, dynamic_ncols=True)
    for step in range(run.start, options.max_steps):
        seconds: dict[str, float] = defaultdict(float)
        rate = learning_rate(step, options)
        products = [run.products[index] for index in
                    products_of_step(len(run.products), options.batch_size, step, options.seed)]
        with timed(seconds, "rollout"):
            groups, failures = rollout_groups(run.encoder, products, options.group_size, options.temperature,
                                              options.max_length, f"{options.seed}/{step}", options.rollout_batch_size)
            run.scorer.rescore(groups)
        with timed(seconds, "reference"):
            buffer = fill_buffer(groups, run, options)
        with timed(seconds, "update"):
            set_learning_rate(run.optimizer, rate)
            metrics = update(run, buffer, options, step)
        run.bad_steps = run.bad_steps + 1 if metrics["skipped_minibatches"] or not groups else 0
        log_step(run.writer, step + 1, options.max_steps, metrics | describe(groups, failures) | {"lr": rate}, seconds)
        log_groups(run.writer, groups, buffer.items, options, step + 1)
        bar.update(options.batch_size)
        if finish_step(run, options, step + 1):
            break
    bar.close()
    run.writer.close()
    best = read_best(options.output_dir)
    best_said = f", the best held-out reward at step {best['step']}" if best else ""
    write_summary(options.output_dir, last_checkpoint=str(run.last_saved), best=best, done=True)
    logger.info(f"done: {run.last_saved}{best_said}; curves: tensorboard --logdir {options.log_dir}")
    return run.last_saved


def finish_step(run: Run, options: TrainOptions, step: int) -> bool:
    """After `step` steps: evaluate and save when it is time; returns whether the run should end early.

    Stops a run that has gone bad.
    """
    last, stop = step == options.max_steps, False
    if run.bad_steps >= options.max_bad_steps:
        raise BadRun(f"{run.bad_steps} steps in a row gave nothing to learn from (see the warnings above): stopped at "
                     f"step {step}; the last checkpoint is {run.last_saved}")
    if options.eval_every and run.held_out and (step % options.eval_every == 0 or last):
        summary = log_evaluation(run, options, step)
        if summary and keep_best(run.policy, options, step, summary["mean_reward"]):
            logger.info(f"stopping at step {step}: no better held-out reward for {options.stop_after} evaluations")
            last = stop = True
    if step % options.save_every == 0 or last:
        state = {"step": step, "bad_steps": run.bad_steps, "optimizer": run.optimizer.state_dict()}
        run.last_saved = save_checkpoint(run.policy, options, step, state)
    return stop


def prepare(options: TrainOptions) -> Run:
    """Read the sheet, load the models, take up a resumed run's state."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    torch.manual_seed(options.seed)
    products, held_out = load_products(options)
    scorer = Scorer(options.reward)
    logger.info(scorer.check(products[0]))
    resume_from = find_resume(options)
    policy, reference, shares_vision = load_models(options, resume_from)
    parameters = set_trainable(policy, options.train_vision)
    logger.info(f"what trains:\n{parameter_table(policy)}")
    objective = VLM_GRPOLoss(options.clip_eps, options.kl_weight, options.clip_eps_high, options.loss_type,
                             options.max_length, options.mask_truncated)
    encoder = PromptEncoder(policy, options.prompt_language, read_template(options.prompt_file),
                            options.prompt_cache_mb, options.max_prompt_length)
    optimizer = make_optimizer(parameters, options)
    start, bad_steps = 0, 0
    if resume_from:
        state = read_state(resume_from, options)
        optimizer.load_state_dict(state["optimizer"])
        start, bad_steps = state["step"], state["bad_steps"]
        logger.info(f"resuming from {resume_from} at step {start} of {options.max_steps}"
                    + (": nothing left to do" if start >= options.max_steps else ""))
    write_options(options, Path(options.output_dir) / "options.yaml")
    write_start(options, products, held_out, start)
    writer = Curves(options.log_dir, purge_step=start + 1 if resume_from else 0)
    writer.log_options(options, start)
    run = Run(policy, reference, shares_vision, parameters, optimizer, objective, encoder, scorer, writer, products,
              held_out, start, bad_steps, resume_from)
    if not options.exact_path:
        check_shared_prefix(run, options)
    if options.eval_every and held_out and not resume_from:
        log_evaluation(run, options, 0)
    return run


def check_shared_prefix(run: Run, options: TrainOptions) -> None:
    """Compare the shared-prefix scores of one real product with plain rows; raises ModelError if they differ."""
    groups, failures = rollout_groups(run.encoder, run.products[:1], 3, options.temperature, options.max_length,
                                      "shared prefix", 1)
    if not groups:
        logger.warning(f"the shared-prefix path could not be checked: {failures[0]}")
        return
    group, gaps = groups[0], []
    with torch.no_grad():
        for policy in filter(None, (run.policy, run.reference)):
            shared, exact = (policy.log_probs([group.prompt], group.completions, group.action_mask,
                                              options.temperature, exact_path=exact_path)[0]
                             for exact_path in (False, True))
            gaps.append(float((shared - exact).abs().max()))
    limit = 1e-3 if options.dtype == "float32" else 0.5  # bfloat16 rounds differently in differently shaped products
    logger.info(f"shared prefix against plain rows: log-probs within {max(gaps):.1e}")
    if not all(gap < limit for gap in gaps):  # not max(gaps): it can pass over a NaN
        raise ModelError(f"scoring a group on one shared-prefix row gives log-probs {max(gaps):.2g} away from those of "
                         "plain rows: this model needs --exact_path")


def load_products(options: TrainOptions) -> tuple[list[Sample], list[Sample]]:
    """Read the sheet(s): products to train on and held-out products. Every row left out is logged."""
    samples = read_sheet(options.data_path, options)
    if options.eval_path:
        return samples, read_sheet(options.eval_path, options)
    training, held_out = split_held_out(samples, options.eval_fraction)
    if not training:
        raise DataError(f"{options.data_path}: all {len(samples)} usable products are held out by --eval_fraction "
                        f"{options.eval_fraction}; lower it, or give held-out products with --eval_path")
    if options.eval_fraction and not held_out:
        logger.warning(f"{options.data_path}: --eval_fraction {options.eval_fraction} of {len(samples)} products holds "
                       "out none, so nothing is evaluated; give held-out products with --eval_path")
    return training, held_out


def read_sheet(path: str, options: TrainOptions) -> list[Sample]:
    """Read one sheet, log each row with a problem; raises DataError when no row can be used."""
    samples, problems = load_samples(path, options.image_cache_dir, options.missing_photos)
    logger.info(f"{path}: {len(samples)} products, {sum(len(sample.photos) for sample in samples)} photos")
    if samples and problems:
        logger.warning(f"{path}: rows with problems\n{summarise_problems(problems)}")
    require_usable(samples, problems, path, options.image_cache_dir)
    return samples


def load_models(options: TrainOptions, resume_from: Path | None) -> tuple[Policy, Policy | None, bool]:
    """Load the policy and its frozen reference (none when kl_weight is 0).

    The third value says whether both have the same frozen vision, so that photos are encoded once for both.
    """
    if options.lora_rank:
        policy = load_adapted(options, resume_from)
        return policy, policy.without_adapter() if options.kl_weight else None, True
    device, dtype = choose_device(options.device), DTYPES[options.dtype]
    model, tokenizer, image_processor = load_minicpm(options.model_path, trust_remote_code=options.trust_remote_code)
    reference_model = freeze(copy.deepcopy(model)) if options.kl_weight else None
    weights = str(resume_from) if resume_from else options.checkpoint_path
    if weights:
        load_weights(model, weights)
    policy = Policy(model.to(device), tokenizer, image_processor, dtype, options.max_slice_nums,
                    options.max_pixels, options.exact_path)
    if reference_model is None:
        return policy, None, False
    vision = policy.family.vision_modules
    shares_vision = not options.train_vision and all(
        torch.equal(one.to(device), other) for mine, theirs in
        zip(vision(reference_model), vision(model), strict=True)
        for one, other in zip(mine.parameters(), theirs.parameters(), strict=True))
    for parameter in reference_model.parameters():  # not its buffers: positions in bfloat16 would be other positions
        parameter.data = parameter.data.to(dtype)
    reference = Policy(reference_model.to(device), tokenizer, image_processor, dtype, options.max_slice_nums,
                       options.max_pixels, options.exact_path)
    return policy, reference, shares_vision


def load_adapted(options: TrainOptions, resume_from: Path | None) -> Policy:
    """Load the base with an adapter on it: the resumed run's, that of --checkpoint_path, or a new one."""
    weights = str(resume_from) if resume_from else options.checkpoint_path
    if weights and not is_adapter(weights):
        raise OptionError(f"{weights} holds no adapter: with --lora_rank give whole weights as --model_path, so that "
                          "the adapter, and the reference policy, start from them")
    policy = load_policy(options.model_path, options, options.device, options.trust_remote_code)
    if not weights:
        policy.add_adapter(options.lora_rank, options.lora_alpha, options.model_path)
        return policy
    policy.load_weights(weights)
    wanted = (options.lora_rank, options.lora_alpha or 2 * options.lora_rank)
    if rank_of(policy.adapter) != wanted:
        raise OptionError("--lora_rank {} --lora_alpha {}: the adapter in {} has {} and {}; give those".format(
            *wanted, weights, *rank_of(policy.adapter)))
    return policy


def fill_buffer(groups: Sequence[Group], run: Run, options: TrainOptions) -> ReplayBuffer:
    """Turn groups into experiences: advantages within each group, log-probs under the reference policy."""
    buffer = ReplayBuffer()
    for group in groups:
        rewards = torch.tensor([part.reward for part in group.rewards], device=run.policy.device)  # (G,)
        advantages = group_advantages(rewards, std_floor=options.std_floor, scale=options.scale_advantages)
        buffer.append(make_experience(
            group.prompt, group.completions, group.action_mask, action_log_probs=group.old_log_probs,
            log_probs_ref=None, returns=rewards, advantages=advantages, truncated=group.truncated,
            sources=(f"{group.sample.sheet} row {group.sample.row}",),
            features=None if options.train_vision else (group.features,)))
    if run.reference is None:
        return buffer
    with torch.no_grad():
        for items in micro_batches(buffer.items, options.micro_batch_size):
            batch = join_experiences(items)
            ref_log_probs, _ = run.reference.log_probs(batch.prompts, batch.completions, batch.action_mask,
                                                       options.temperature,
                                                       batch.features if run.shares_vision else None)
            for item, rows in zip(items, ref_log_probs.split([len(item.returns) for item in items]), strict=True):
                item.log_probs_ref = rows[:, :item.action_mask.shape[1]]
    return buffer


def micro_batches(items: Sequence[Experience], size: int) -> Iterator[list[Experience]]:
    """Cut experiences into batches of at most `size` products, similar prompt lengths together."""
    ordered = sorted(items, key=lambda item: item.sequences.shape[1] - item.action_mask.shape[1])
    for start in range(0, len(ordered), size):
        yield ordered[start:start + size]


def update(run: Run, buffer: ReplayBuffer, options: TrainOptions, step: int) -> dict[str, float]:
    """Optimise over the buffer: one optimizer step a minibatch, `epochs` passes; returns averaged metrics.

    A minibatch with a non-finite loss or gradient changes nothing: it is skipped, logged with its rows and counted.
    """
    sums: dict[str, float] = defaultdict(float)
    first: dict[str, float] = {}  # before any weight has moved: ratio 1 and no gap, or sampling and scoring differ
    done = skipped = 0
    minibatches = buffer.minibatches(options.epochs, options.minibatch_size, f"{options.seed}/{step}")
    for index, minibatch in enumerate(minibatches):
        run.optimizer.zero_grad(set_to_none=True)
        metrics = backward(run, minibatch, options, on_policy=index == 0)
        gap = metrics.pop("log_prob_gap")
        first = first or {"first_ratio": metrics["ratio"], "log_prob_gap": gap}
        grad_norm = torch.nn.utils.clip_grad_norm_(run.parameters, options.max_grad_norm)
        if not (math.isfinite(metrics["total_loss"]) and bool(torch.isfinite(grad_norm))):
            skipped += 1
            rows = ", ".join(source for item in minibatch for source in item.sources)
            logger.warning(f"step {step + 1}: loss {metrics['total_loss']}, gradient norm {float(grad_norm)}: "
                           f"minibatch {index} skipped, weights unchanged; its products: {rows}")
            continue
        if step == 0 and index == 0 and float(grad_norm) > 0:
            warn_without_gradient(run.policy)
        run.optimizer.step()
        done += 1
        for name, value in (metrics | {"grad_norm": float(grad_norm)}).items():
            sums[name] += value
    run.optimizer.zero_grad(set_to_none=True)
    return {name: value / done for name, value in sums.items()} | first | {"skipped_minibatches": skipped}


def backward(run: Run, minibatch: Sequence[Experience], options: TrainOptions, on_policy: bool) -> dict[str, float]:
    """Accumulate the minibatch's gradient over micro-batches; returns the metrics of the whole minibatch.

    on_policy: no weight has moved since sampling. In bfloat16 sampled and rescored log-probs differ by rounding,
    so the ratio is then taken against the rescored ones, and the gap is logged.
    """
    policy, objective = run.policy, run.objective
    total_size = sum(int(objective.size(item)) for item in minibatch)
    total_tokens = sum(int(objective.mask(item).sum()) for item in minibatch)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=policy.device))
    for items in micro_batches(minibatch, options.micro_batch_size):
        batch = join_experiences(items)
        log_probs, entropy = policy.log_probs(batch.prompts, batch.completions, batch.action_mask, options.temperature,
                                              batch.features)
        gap = (log_probs.detach() - batch.action_log_probs).abs().max()
        sums["log_prob_gap"] = torch.maximum(sums["log_prob_gap"], gap)
        if on_policy and policy.dtype != torch.float32:
            batch.action_log_probs = log_probs.detach()
        loss, _ = objective(log_probs, batch, entropy)
        loss = loss * (objective.size(batch) / max(total_size, 1))
        loss.backward()
        sums["total_loss"] += loss.detach()
        tokens = objective.mask(batch).sum() / max(total_tokens, 1)
        for name, value in objective.metrics.items():
            sums[name] += value * tokens
    return {name: float(value) for name, value in sums.items()}


def make_optimizer(parameters: Sequence[Tensor], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.adam_betas)


def learning_rate(step: int, options: TrainOptions) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, linear or cosine down to min_lr_ratio * lr."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    if options.lr_scheduler == "constant":
        return options.lr
    progress = (step - options.warmup_steps) / max(options.max_steps - options.warmup_steps, 1)
    left = 1 - progress if options.lr_scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return options.lr * (options.min_lr_ratio + (1 - options.min_lr_ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def describe(groups: Sequence[Group], failures: Sequence[Any]) -> dict[str, float]:
    """Describe what was sampled: rewards, readable answers, groups without any signal, lengths; name what failed."""
    for failure in failures:
        logger.warning(f"no rollout: {failure}")
    parts = [part for group in groups for part in group.rewards]
    metrics: dict[str, float] = {"failed_rollouts": len(failures)}
    if not parts:
        return metrics
    rewards = [[part.reward for part in group.rewards] for group in groups]
    lengths = torch.cat([group.action_mask.sum(1) for group in groups]).float()
    truncated = torch.cat([group.truncated for group in groups]).float()
    return metrics | {
        "returns": sum(part.reward for part in parts) / len(parts),
        "success_rate": sum(part.reward >= SUCCESS_REWARD for part in parts) / len(parts),
        "valid_rate": sum(part.valid for part in parts) / len(parts),
        "zero_variance_share": sum(max(group) == min(group) for group in rewards) / len(groups),
        "answer_length": float(lengths.mean()),
        "truncated_share": float(truncated.mean()),
    }


def log_step(writer: Curves, step: int, steps: int, metrics: dict[str, float], seconds: dict[str, float]
             ) -> None:
    """One line on the console and in train.log, one point a curve in TensorBoard."""
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    for name, value in seconds.items():
        writer.add_scalar(f"seconds/{name}", value, step)
    said = [f"step {step}/{steps}"]
    for name, title, form in (("returns", "reward", ".3f"), ("success_rate", ">=0.9", ".0%"),
                              ("total_loss", "loss", ".4f"), ("kl_divergence", "kl", ".4f"),
                              ("grad_norm", "grad", ".2f"), ("entropy", "entropy", ".2f"), ("lr", "lr", ".1e")):
        if name in metrics:
            said.append(f"{title} {metrics[name]:{form}}")
    logger.info(" | ".join([*said, f"{sum(seconds.values()):.2f} s"]))


def log_evaluation(run: Run, options: TrainOptions, step: int) -> dict[str, float]:
    """Answer the held-out products at the training temperature, log how good the answers are and return it."""
    records, failures = evaluate(run.encoder, run.held_out, options.eval_samples, options.temperature,
                                 options.max_length, options.seed, options.rollout_batch_size, run.scorer)
    for failure in failures:
        logger.warning(f"held-out: {failure}")
    log_held_out(run.writer, run.encoder, run.held_out, options, run.scorer, step)
    summary = summarise(records)
    for name, value in summary.items():
        run.writer.add_scalar(f"held_out/{name}", value, step)
    if summary:
        logger.info(f"held-out after step {step}: reward {summary['mean_reward']:.3f} | >=0.9 "
                    f"{summary['success_rate']:.0%} | zero {summary['zero_rate']:.1%} | {summary['products']} products")
    write_summary(options.output_dir, step=step, held_out=summary)
    return summary


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall seconds of a block to seconds[name]."""
    begin = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - begin


def set_up_log(output_dir: str) -> None:
    """Log to the console above the progress bar, and to output_dir/train.log."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    logger.remove()
    logger.add(lambda line: tqdm.write(line, end="", file=sys.stderr), format="{time:HH:mm:ss} {level:<7} {message}",
               colorize=False)
    logger.add(Path(output_dir) / "train.log", format="{time:YYYY-MM-DD HH:mm:ss} {level:<7} {message}")


def main(options: TrainOptions) -> int:
    """Train; problems that the user can mend end with one message and status 2 (3: a run that went bad)."""
    set_up_log(options.output_dir)
    try:
        train(options)
    except (OptionError, DataError, ModelError) as problem:
        logger.error(str(problem))
        return 2
    except BadRun as problem:
        logger.error(str(problem))
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
