"""One update: optimise the clipped loss over a step's buffer, over all processes at once.

Every process has experiences of its own, perhaps none. What the loss is a mean over is counted over all of them, the
gradients are averaged, and each optimizer step happens in all or in none.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger
from PIL import Image
from torch import Tensor, nn

from config import TrainOptions
from ground.files import disk_errors
from loss import VLM_GRPOLoss
from models.family import ModelError, Prompt
from models.memory import PassSize
from models.optimizer import make_optimizer
from models.policy import Policy
from models.processes import Processes
from models.sharding import Lockstep, gathered, whole
from models.trainable import warn_without_gradient
from replay_buffer import Experience, ReplayBuffer, join_experiences


@dataclass
class Learner:
    """What an update moves, and by what."""

    policy: Policy
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    objective: VLM_GRPOLoss
    processes: Processes = field(default_factory=Processes)
    passes: PassSize = field(default_factory=lambda: PassSize(1))  # --micro_batch_size, or less
    idle: Experience | None = None  # what a process computes that has nothing of its own, where weights are sharded
    lockstep: Lockstep | None = None  # there, too

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a share of the weights."""
        return self.lockstep is not None

    def begin_pass(self, reduces: bool) -> None:
        """Begin a forward and backward pass, in all processes. reduces: see Lockstep."""
        if self.lockstep:
            self.lockstep.begin_pass(reduces)

    def forget_gradients(self) -> None:
        """Drop every gradient, also those that a later pass would reduce."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.lockstep:
            self.lockstep.forget_gradients()


def make_learner(policy: Policy, parameters: list[nn.Parameter], options: TrainOptions,
                 processes: Processes | None = None, idle: Experience | None = None) -> Learner:
    """Put together what an update needs, as the options say. processes: all of the run; None: this one alone."""
    objective = VLM_GRPOLoss(options.clip_eps, options.kl_weight, options.clip_eps_high, options.loss_type,
                             options.max_length, options.mask_truncated, ratio_level=options.ratio_level,
                             clip_ratio_c=options.clip_ratio_c, entropy_weight=options.entropy_weight,
                             sft_weight=options.sft_weight, look_weight=options.look_weight)
    return Learner(policy, parameters, make_optimizer(parameters, options), objective, processes or Processes(),
                   PassSize(options.micro_batch_size or options.minibatch_size or options.batch_size), idle,
                   Lockstep(policy) if idle else None)


def update(learner: Learner, buffer: ReplayBuffer, options: TrainOptions, step: int) -> dict[str, float]:
    """Optimise over the buffer: one optimizer step a minibatch, `epochs` passes; returns averaged metrics.

    A minibatch with a non-finite loss or gradient changes nothing: it is skipped in all processes, logged with its
    rows, kept in output_dir for inspection and counted. optimizer_steps counts those that were made.
    """
    sums: dict[str, float] = defaultdict(float)
    first: dict[str, float] = {}  # before any weight has moved: ratio 1 and no gap, or sampling and update differ
    done = skipped = 0
    parts = learner.processes.most(buffer.parts(options.minibatch_size))  # fewer here: each is smaller, none is missing
    minibatches = list(buffer.minibatches(options.epochs, parts, f"{options.seed}/{step}"))
    if len(minibatches) > 1 and learner.policy.rounds:
        first = renew_old_log_probs(learner, buffer.items, options)
    for index, minibatch in enumerate(minibatches):
        learner.optimizer.zero_grad(set_to_none=True)
        metrics = backward(learner, minibatch, options, on_policy=len(minibatches) == 1)
        if not metrics:
            continue
        measured = {name: metrics.pop(name) for name in ("first_ratio", "log_prob_gap") if name in metrics}
        first = first or measured
        learner.processes.average_gradients(learner.parameters)
        grad_norm = float(whole(nn.utils.clip_grad_norm_(learner.parameters, options.max_grad_norm)))
        if not (math.isfinite(metrics["total_loss"]) and math.isfinite(grad_norm)):
            skipped += 1
            rows = ", ".join(source for item in minibatch for source in item.sources)
            logger.warning(f"step {step + 1}: loss {metrics['total_loss']}, gradient norm {grad_norm}: "
                           f"minibatch {index} skipped, weights unchanged; its products: {rows}")
            if skipped == 1:
                keep_bad_batch(minibatch, options, step, learner.processes)
            continue
        if step == 0 and index == 0 and grad_norm > 0:
            warn_without_gradient(learner.policy)
        try:
            learner.optimizer.step()
        except torch.OutOfMemoryError as problem:
            raise ModelError("out of memory in the optimizer's step, in which some weights may have moved: go on from "
                             "the last checkpoint with --resume auto, and train less of the model (--lora_rank) or "
                             "share it out (--sharding fsdp)") from problem
        done += 1
        for name, value in (metrics | {"grad_norm": grad_norm}).items():
            sums[name] += value
    learner.optimizer.zero_grad(set_to_none=True)
    return {name: value / done for name, value in sums.items()} | first | {"optimizer_steps": done,
                                                                           "skipped_minibatches": skipped}


def keep_bad_batch(minibatch: Sequence[Experience], options: TrainOptions, step: int, processes: Processes) -> None:
    """Write a process's share of a step's first skipped minibatch to output_dir/bad_batch_step_N.pt, to look at.

    ReplayBuffer().load_state_dict(torch.load(path)) reads it back.
    """
    share = "" if processes.world == 1 else f"_process_{processes.rank}"
    path = Path(options.output_dir) / f"bad_batch_step_{step + 1:06d}{share}.pt"
    try:
        with disk_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(ReplayBuffer(items=list(minibatch)).state_dict(), path)
    except OSError as problem:
        path.unlink(missing_ok=True)
        logger.warning(f"{path}: not written: {problem}")


def renew_old_log_probs(learner: Learner, items: Sequence[Experience], options: TrainOptions) -> dict[str, float]:
    """Replace old_log_probs, before any weight has moved, by those that the update's passes compute.

    In bfloat16 those of sampling differ from them by rounding: from the second optimizer step on it would enter ratio
    and clipping. Returns first_ratio and log_prob_gap of all processes: how far apart they lay.
    """
    objective, processes = learner.objective, learner.processes
    tokens = processes.total(torch.tensor(sum(int(objective.mask(item).sum()) for item in items),
                                          device=learner.policy.device))
    if not tokens:
        return {}
    ratio, gap = torch.zeros(2, device=learner.policy.device)
    for item, log_probs in log_probs_under(learner.policy, items, learner.passes, options.temperature):
        ratio += objective.mean_ratio(log_probs, item) * (objective.mask(item).sum() / tokens)
        gap = torch.maximum(gap, largest_gap(log_probs, item))
        item.old_log_probs = log_probs
    return {"first_ratio": float(processes.total(ratio)), "log_prob_gap": processes.most(float(gap))}


def largest_gap(log_probs: Tensor, batch: Experience) -> Tensor:
    """How far log-probs (N, T) lie at most from those of sampling, over all that was sampled."""
    gaps = (log_probs - batch.old_log_probs).abs()
    return (gaps if batch.taught is None else gaps.masked_fill(batch.taught[:, None], 0.0)).max()


def log_probs_under(policy: Policy, items: Sequence[Experience], passes: PassSize, temperature: float,
                    features: bool = True) -> list[tuple[Experience, Tensor]]:
    """Take each experience's log-probs (G, T) under a policy, without gradient; features False encodes photos anew.

    Raises ModelError where there is no memory for one alone.
    """
    def score(together: Sequence[Experience]) -> Tensor:
        batch = join_experiences(together)
        return policy.log_probs(batch.prompts, batch.completions, batch.action_mask, temperature,
                                batch.features if features else None, with_entropy=False)[0]

    found = []
    with torch.no_grad(), gathered(policy):
        for together, log_probs in passes.passes(by_length(items), score, "taking log-probs"):
            if log_probs is None:
                raise no_memory(together[0].sources)
            rows = log_probs.split([len(item.rewards) for item in together])
            found += [(item, own[:, :item.action_mask.shape[1]]) for item, own in zip(together, rows, strict=True)]
    return found


def no_memory(sources: Sequence[str]) -> ModelError:
    """The error of a run that has no memory for one product."""
    return ModelError(f"out of memory with one product a pass, {', '.join(sources) or 'the largest'}: lower "
                      "--max_pixels, --max_slice_nums, --max_prompt_length or --group_size, or try "
                      "--gradient_checkpointing, --lora_rank or --sharding fsdp; then go on with --resume auto")


def backward(learner: Learner, minibatch: Sequence[Experience], options: TrainOptions, on_policy: bool
             ) -> dict[str, float]:
    """Accumulate the minibatch's gradient over micro-batches; returns the metrics of the whole minibatch, over all
    processes; none when no process has a token to learn from.

    on_policy: this is the only minibatch since sampling. In bfloat16 the log-probs of sampling and of this pass differ
    by rounding, so the ratio is then taken against those of this pass. first_ratio and log_prob_gap are against those
    of the buffer.
    Where memory runs out, all of it is done again with passes of half as many products: in all processes together
    where weights are sharded, else in each by itself.
    """
    policy, objective, processes = learner.policy, learner.objective, learner.processes
    counted = torch.tensor([sum(int(count(item).sum()) for item in minibatch) for count in
                            (objective.size, objective.mask, objective.taught_mask)], device=policy.device)
    counts = processes.total(counted)
    if not counts.any():
        return {}
    while True:
        sums, shortage = accumulate(learner, minibatch, options, on_policy, counts)
        shortages = list(filter(None, processes.gather(shortage) if learner.sharded else [shortage]))
        if not shortages:
            break
        learner.forget_gradients()
        least = min(shortages, key=lambda each: each.products)
        if not learner.passes.halve(least.products, "updating", least.problem):
            raise no_memory(least.sources)
    gap = sums.pop("log_prob_gap")
    totals = processes.total(torch.stack(list(sums.values()))).tolist()
    metrics = dict(zip(sums, totals, strict=True)) | {"log_prob_gap": processes.most(float(gap))}
    known = {"total_loss": True, "supervised_loss": bool(counts[2])}
    return {name: value for name, value in metrics.items() if known.get(name, bool(counts[1]))}


@dataclass(frozen=True)
class Shortage:
    """A pass of an update that ran out of memory."""

    products: int  # a pass at most
    sources: list[str]  # of those that it befell
    problem: str


def accumulate(learner: Learner, minibatch: Sequence[Experience], options: TrainOptions, on_policy: bool,
               counts: Tensor) -> tuple[dict[str, Tensor], Shortage | None]:
    """Run every micro-batch forward and backward; returns this process's share of the metrics, its largest
    log_prob_gap, and the shortage of memory that spoilt all of it.

    counts: what the loss, the metrics and the supervised loss are means over, in all processes.
    """
    names = ("total_loss", "first_ratio", "log_prob_gap", "supervised_loss", "ratio", "clip_fraction", "entropy",
             *(["kl_divergence"] if options.kl_weight else []), *(["look"] if options.look_weight else []))
    sums = {name: torch.zeros((), device=learner.policy.device) for name in names}
    batches = list(micro_batches(minibatch, learner.passes.products or 1))
    passes = learner.processes.most(len(batches)) if learner.sharded else len(batches)
    shortage = None
    for index in range(passes):
        items = batches[index] if index < len(batches) and not shortage else []
        learner.begin_pass(reduces=not options.reduce_once or index + 1 == passes)
        problem = None
        try:
            differentiate(learner, items, options, on_policy, counts, sums)
        except torch.OutOfMemoryError as error:
            problem = str(error)
        if problem is None:
            continue
        # Outside of the except block: the error holds on to what the pass had computed.
        shortage = Shortage(min(learner.passes.products or 1, len(minibatch)),
                            [source for item in items for source in item.sources], problem)
        if not learner.sharded:
            break
        catch_up(learner, options)
    return sums, shortage


def differentiate(learner: Learner, items: Sequence[Experience], options: TrainOptions, on_policy: bool, counts: Tensor,
                  sums: dict[str, Tensor]) -> None:
    """Run a micro-batch forward and backward, and add its share to the metrics; see accumulate."""
    objective = learner.objective
    size, tokens, taught = counts.clamp(min=1)
    batch, log_probs, entropy, blind = log_probs_of(learner, items, options)
    if batch is None:
        (0.0 * log_probs.sum()).backward()
        return
    gap = largest_gap(log_probs.detach(), batch)
    share = objective.mask(batch).sum() / tokens
    first_ratio = objective.mean_ratio(log_probs.detach(), batch) * share
    if on_policy and learner.policy.rounds:
        batch.old_log_probs = log_probs.detach()
    terms = objective.terms(log_probs, batch, entropy, blind)
    loss = terms.total_loss * (objective.size(batch) / size)
    supervised = torch.zeros_like(loss)
    if batch.taught is not None:
        supervised = objective.supervised(log_probs, batch) * (objective.taught_mask(batch).sum() / taught)
        loss = loss + objective.sft_weight * supervised
    (loss * learner.processes.world).backward()  # gradients are averaged over the processes, the loss is summed
    sums["log_prob_gap"] = torch.maximum(sums["log_prob_gap"], gap)
    for name, value in (("first_ratio", first_ratio), ("total_loss", loss), ("supervised_loss", supervised)):
        sums[name] += value.detach()
    for name in sums.keys() & vars(terms).keys() - {"total_loss"}:
        sums[name] += getattr(terms, name).detach() * share


def catch_up(learner: Learner, options: TrainOptions) -> None:
    """After a sharded pass that ran out of memory here, take part in what it still holds for the other processes."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    try:
        learner.lockstep.make_up(lambda: (0.0 * log_probs_of(learner, [], options)[1].sum()).backward())
    except torch.OutOfMemoryError as problem:
        raise no_memory([]) from problem


def log_probs_of(learner: Learner, items: Sequence[Experience], options: TrainOptions
                 ) -> tuple[Experience | None, Tensor, Tensor, Tensor | None]:
    """Join experiences: (batch, its log_probs (N, T) under the policy, entropy (N, T), log_probs where the policy sees
    grey pictures (N, T)); batch None without any, the last None without look_weight.

    Grey pictures are seen in the same pass; a product without photos has the same log_probs twice.
    Where weights are sharded, every pass gathers every layer in all processes: one without products, or without photos
    while the vision trains, computes the idle product as well, with no part in the loss.
    """
    needs_idle = learner.sharded and (
        not items or (options.train_vision and not any(prompt.photos for item in items for prompt in item.prompts)))
    blinds = [item.blind for item in items if item.blind is not None]
    joined = join_experiences([*items, *blinds, *([learner.idle] if needs_idle else [])])
    log_probs, entropy = learner.policy.log_probs(joined.prompts, joined.completions, joined.action_mask,
                                                  options.temperature, joined.features)
    if not items:
        return None, log_probs, entropy, None
    batch = join_experiences(items) if needs_idle or blinds else joined
    rows, columns = batch.action_mask.shape
    own, blind, start = log_probs[:rows, :columns], None, rows
    if options.look_weight:
        parts = []
        for item, seen in zip(items, own.detach().split([len(item.rewards) for item in items]), strict=True):
            if item.blind is not None:
                seen = log_probs[start:start + len(seen), :columns]
                start += len(seen)
            parts.append(seen)
        blind = torch.cat(parts)
    if needs_idle:  # the idle rows take part in the backward pass, too, or their layers would not
        own = own + 0.0 * log_probs[start:].sum()
    return batch, own, entropy[:rows, :columns], blind


def answers_a_product(options: TrainOptions) -> int:
    """How many answers of a product an update takes: the group, and the label's where it is taught beside; in a run of
    supervised steps alone that only."""
    return options.group_size + bool(options.sft_weight) if options.sft_steps < options.max_steps else 1


def make_idle(policy: Policy, group_size: int, train_vision: bool) -> Experience:
    """Make a product that no sheet holds, for a process without one: a grey photo while the vision trains."""
    prompt = policy.encode_prompt("-", [Image.new("RGB", (64, 64), "grey")] if train_vision else [])
    return pretend(policy, prompt, group_size, 1, None if train_vision else (None,))


def pretend(policy: Policy, prompt: Prompt, group_size: int, length: int, features: Sequence[Tensor | None] | None
            ) -> Experience:
    """Make a group of answers of one length that nobody gave; they are worth nothing."""
    completions = policy.stop_ids[:1].expand(group_size, length)
    zeros = torch.zeros(group_size, length, device=policy.device)
    return Experience(completions, torch.ones_like(completions, dtype=torch.bool), zeros, zeros, zeros[:, 0],
                      zeros[:, 0], torch.zeros(group_size, dtype=torch.bool, device=policy.device), (prompt,),
                      None if features is None else tuple(features))


def micro_batches(items: Sequence[Experience], size: int) -> Iterator[list[Experience]]:
    """Cut experiences into batches of at most `size` products, similar prompt lengths together."""
    ordered = by_length(items)
    for start in range(0, len(ordered), size):
        yield ordered[start:start + size]


def by_length(items: Sequence[Experience]) -> list[Experience]:
    """Put experiences in the order in which every pass takes them: together little is padded, and alike everywhere."""
    return sorted(items, key=lambda item: len(item.prompts[0].input_ids))
