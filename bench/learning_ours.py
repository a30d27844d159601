"""Our arms of bench/learning.py: GRPO, supervised steps, or supervised steps and then GRPO, by the program itself."""

from collections.abc import Callable

from config import TrainOptions
from models.optimizer import learning_rate, set_learning_rate
from train_vlm_parallel import fill_buffer, products_at, roll_out, supervise, sync_reference
from training.upkeep import Run
from update import update


def run_steps(run: Run, options: TrainOptions, after: Callable[[int], bool]) -> None:
    """Train until `after`, told the number of steps done, says to stop: a training run's loop without log and files."""
    for step in range(options.max_steps):
        products = products_at(step, run, options)
        run.encoder.prefetch([*products, *products_at(step + 1, run, options)])
        set_learning_rate(run.learner.optimizer, learning_rate(step, options))
        if step < options.sft_steps:
            supervise(run, products, options, step, {"lessons": 0.0, "update": 0.0})
        else:
            _, trained, _ = roll_out(run, products, options, f"{options.seed}/{step}")
            update(run.learner, fill_buffer(trained, run, options), options, step)
        sync_reference(run, options, step + 1)
        if after(step + 1):
            return
