"""What a training run holds, and what keeps it going between steps: held-out answers, checkpoints, an end in time."""

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from config import TrainOptions
from evidence.evaluation import Record, evaluate, summarise
from models.policy import Policy
from models.processes import Interruption, Processes
from models.sharding import gathered, load_optimizer_state, load_whole_weights, whole_optimizer_state, whole_weights
from own_reward import Scorer
from rollout import PromptEncoder, products_together
from sheets.samples import Sample
from training.checkpoint import is_better, keep_best, read_best, read_state, save_checkpoint
from training.curves import Curves, log_held_out, warn_of_failures
from training.provenance import write_summary
from update import Learner


class BadRun(RuntimeError):
    """A run that can't go on; the text says why and what to do."""


class Interrupted(RuntimeError):
    """A run that a signal stopped, its state saved; the text says how to go on."""


@dataclass
class Run:
    """Everything that a training run holds."""

    learner: Learner
    teacher: Learner  # the same, for supervised steps
    reference: Policy | None  # None when kl_weight is 0
    shares_vision: bool  # policy and reference have the same frozen vision: photos are encoded once for both
    encoder: PromptEncoder
    scorer: Scorer
    writer: Curves | None  # None in all processes but the main one
    products: list[Sample]
    held_out: list[Sample]
    blanking: PromptEncoder | None = None  # makes prompts with grey pictures, where look_weight wants them
    start: int = 0  # steps done before this process
    first: dict[str, float] = field(default_factory=dict)  # KL and entropy of the run's first step
    bad_steps: list[str] = field(default_factory=list)  # the last ones, in a row: why each moved no weight
    last_saved: Path | None = None

    @property
    def policy(self) -> Policy:
        """The policy that trains."""
        return self.learner.policy

    @property
    def processes(self) -> Processes:
        """All processes of the run."""
        return self.learner.processes


def count_bad_step(run: Run, metrics: dict[str, float], step: int) -> None:
    """Note why a step moved no weight; one that moved them ends the row of bad ones."""
    if metrics["optimizer_steps"]:
        run.bad_steps = []
        return
    why = ("loss or gradient not finite" if metrics["skipped_minibatches"] else
           "no product could be opened" if "trained_groups" not in metrics else
           "no answer could be sampled" if "returns" not in metrics else
           "every group without spread, however often sampled (--resample_flat)" if not metrics["trained_groups"] else
           "every answer left out by --mask_truncated")
    run.bad_steps = [*run.bad_steps, why]
    if run.processes.main:
        logger.warning(f"step {step}: no optimizer step: {why}")


def finish_step(run: Run, options: TrainOptions, step: int, interruption: Interruption) -> bool:
    """After `step` steps: evaluate and save when it is time; returns whether the run should end early.

    Stops a run that was told to or has gone bad.
    """
    last, stop = step == options.max_steps, False
    if len(run.bad_steps) >= options.max_bad_steps:
        causes = ", ".join(f"{why} in {count}" for why, count in Counter(run.bad_steps).items())
        raise BadRun(f"{len(run.bad_steps)} steps in a row made no optimizer step: {causes} (see the warnings above). "
                     f"Stopped at step {step}; the last checkpoint is {run.last_saved}")
    signalled = run.processes.most(interruption.signal)
    due = last or step == options.sft_steps or options.eval_every and step % options.eval_every == 0
    if options.eval_every and run.held_out and due and not signalled:
        records = log_evaluation(run, options, step)
        if records and keep_if_best(run, options, step, records):
            logger.info(f"stopping at step {step}: no better held-out reward for {options.stop_after} evaluations")
            stop = True
    if step % options.save_every == 0 or last or stop or signalled:
        save(run, options, step)
    if signalled and not last:
        raise Interrupted(f"{signal.Signals(signalled).name}: stopped after step {step}; go on with --resume auto from "
                          f"{run.last_saved}")
    return stop


def keep_if_best(run: Run, options: TrainOptions, step: int, records: Sequence[Record]) -> bool:
    """Keep the weights apart if their held-out reward is the best so far; returns whether to stop for lack of one.

    Compared are products that both evaluations answered. A disk that fails costs a warning: the best before stays.
    """
    if not options.save_best:
        return False
    rewards = {f"{record.sample.sheet} row {record.sample.row}": record.reward for record in records}
    best = run.processes.once(lambda: read_best(options.output_dir))
    if not is_better(rewards, best):
        return 0 < options.stop_after * options.eval_every <= step - best["step"]
    weights = whole_weights(run.policy, keep=run.processes.main) if run.learner.sharded else None
    try:
        run.processes.once(lambda: keep_best(run.policy, options, step, rewards, weights), OSError)
    except OSError as problem:
        if run.processes.main:
            logger.warning(f"the best weights so far, of step {step}, could not be kept: {problem}")
    return False


def save(run: Run, options: TrainOptions, step: int) -> None:
    """Write a checkpoint; every process gives its share, the main one writes.

    A disk that fails, because it is full perhaps, costs a warning; after the last step it costs the run.
    """
    main, world = run.processes.main, run.processes.world
    weights = whole_weights(run.policy, keep=main) if run.learner.sharded else None
    state = {"step": step, "first": run.first, "why_bad": run.bad_steps, "world": world,
             "products_per_step": options.batch_size * world,
             "optimizer": whole_optimizer_state(run.learner.optimizer, keep=main)}
    if run.reference and (options.ref_sync_every or 0 < options.sft_steps <= step):
        state["reference"] = whole_weights(run.reference, keep=main)
    try:
        run.last_saved = run.processes.once(lambda: save_checkpoint(run.policy, options, step, state, weights), OSError)
    except OSError as problem:
        kept = f"no checkpoint of step {step} ({problem}); the last one is {run.last_saved}"
        if step == options.max_steps:
            raise BadRun(f"{kept}: make room and go on from it with --resume auto") from problem
        if main:
            logger.warning(f"{kept}; the run goes on and tries again in {options.save_every} steps at most")


def log_evaluation(run: Run, options: TrainOptions, step: int) -> list[Record]:
    """Answer the held-out products at the training temperature, each process its share; log how good the answers are
    and return those of all."""
    with gathered(run.policy):
        records, failures = evaluate(run.encoder, run.held_out[run.processes.rank::run.processes.world],
                                     options.eval_samples, options.temperature, options.max_length, options.seed,
                                     products_together(options, run.policy), run.scorer,
                                     show=run.processes.main)
        if run.writer:
            log_held_out(run.writer, run.encoder, run.held_out, options, run.scorer, step)
    warn_of_failures("held-out", failures)
    records = [record for share in run.processes.gather(records) for record in share]
    if run.writer is None:
        return records
    summary = summarise(records)
    for name, value in summary.items():
        run.writer.add_scalar(f"held_out/{name}", value, step)
    if summary:
        logger.info(f"held-out after step {step}: reward {summary['mean_reward']:.3f} | >=0.9 "
                    f"{summary['success_rate']:.0%} | zero {summary['zero_rate']:.1%} | {summary['products']} products")
    write_summary(options.output_dir, step=step, held_out=summary)
    return records


def take_up(run: Run, options: TrainOptions, resume_from: Path) -> None:
    """Take up the optimizer and the place of the run that is resumed."""
    state = read_state(resume_from, options, run.processes.world)
    load_optimizer_state(run.learner.optimizer, state["optimizer"])
    if run.reference and "reference" in state:
        load_whole_weights(run.reference, state["reference"])
    elif run.reference and 0 < options.sft_steps <= state["step"]:  # all steps so far were supervised
        run.reference.move_towards(run.policy, 1.0)
    run.start, run.first, run.bad_steps = state["step"], state.get("first", {}), state.get("why_bad", [])
    logger.info(f"resuming from {resume_from} at step {run.start} of {options.max_steps}"
                + (": nothing left to do" if run.start >= options.max_steps else ""))
