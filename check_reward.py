"""Rewards before training: how an answer is read and what it earns; how much there is to gain on a sheet.

    python check_reward.py '{"length": 12, "width": 8, "height": 15}' --label "12 x 8 x 15 cm"
    python check_reward.py --model_path MODEL --data_path data.xlsx    # before GPU hours are spent

Torch is imported only for a sheet.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    from config import CheckRewardOptions
    from ground.commands import start

    start(CheckRewardOptions, "How an answer is read and scored; what a sheet holds for RL to gain.")

from collections.abc import Sequence
from statistics import fmean, pstdev

from loguru import logger

from config import CheckRewardOptions
from evidence.measures import unit_slip, volume_error
from own_reward import Scorer
from reward import SUCCESS_REWARD, RewardParts
from sheets.cells import DataError
from sheets.samples import Sample
from sizes.answers import read_answer
from sizes.labels import parse_label

_TINY = 0.01  # a group whose rewards spread less has hardly any signal


def explain(options: CheckRewardOptions) -> str:
    """Say how an answer was read, how far each side is off, and what it earns."""
    label = parse_label(options.label, "--label")
    sample = Sample(row=1, product_id="-", text=options.text, label=label, photos=(), sheet="command line")
    parts = Scorer(options.reward)(options.answer, sample)
    reading = read_answer(options.answer)
    written = ", ".join(map(_size_as_read, reading.sizes, reading.units))
    lines = [f"answer:  {options.answer}", f"label:   {_sizes(sorted(label, reverse=True))} cm, largest first",
             f"read:    {written or 'nothing'}"]
    if parts.reason:
        lines.append(f"         {parts.reason}")
    for place, (true, error) in enumerate(zip(sorted(label, reverse=True), parts.errors, strict=True)):
        size = parts.compared[place]
        found = f"missing for {true:g}" if size is None else f"{size:g} for {true:g}"
        lines.append(f"side {place + 1}:  {found}: off by {error:.1%}")
    return "\n".join([*lines, *_remarks(parts, label), *_earned(parts)])


def _size_as_read(size: float | None, unit: str) -> str:
    if size is None:
        return "unreadable"
    return f"{size:g} cm" if unit == "cm" else f"{size:g} cm (given in {unit})"


def _remarks(parts: RewardParts, label: Sequence[float]) -> list[str]:
    lines = []
    volume, slip = volume_error(parts.sizes, label), unit_slip(parts.sizes, label)
    if volume is not None:
        lines.append(f"volume:  off by {volume:.1%}")
    if slip is not None:
        lines.append(f"unit:    every side is {slip:g} times the true one: the wrong unit?")
    return lines


def _earned(parts: RewardParts) -> list[str]:
    if parts.named:
        return [*(f"part:    {name} {value:+.4f}" for name, value in parts.named),
                f"reward:  {parts.reward:.4f}, the sum of the parts"]
    mean = fmean(parts.errors)
    return [f"reward:  {parts.reward:.4f} = max(0, 1 - {mean:.4f}), the mean error"]


def _sizes(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


def examine(options: CheckRewardOptions) -> str:
    """Answer a sheet's products in groups, as training would, and say what there is to learn from."""
    import torch

    from config import TrainOptions
    from evidence.evaluation import in_chunks
    from models.loading import settle_dtype
    from sheets.samples import load_samples
    from sheets.summary import require_usable, summarise_problems
    from training.trained import asked_otherwise, open_trained, options_of, scorer_of

    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    trained = asked_otherwise(options_of(options.model_path) or TrainOptions(), options.prompt_language,
                              options.prompt_file, options.temperature, options.max_length)
    trained = settle_dtype(trained, options.device)
    scorer = scorer_of(trained, options.reward, options.trust_remote_code)
    cache = options.image_cache_dir or trained.image_cache_dir
    samples, problems = load_samples(options.data_path, cache, trained.missing_photos, reading=options,
                                     partial_labels=trained.partial_labels)
    require_usable(samples, problems, options.data_path, cache)
    if problems:
        logger.warning(f"{options.data_path}: rows with problems\n{summarise_problems(problems)}")
    logger.info(scorer.check(samples[0]))
    model = open_trained(trained, options.model_path, None, options.device, options.trust_remote_code, scorer,
                         options.eval_batch_size)
    encoder, groups, greedy = model.encoder(), [], []
    for chunk in in_chunks(encoder, samples[:options.max_products], options.eval_batch_size, "answering"):
        found, failures = model.answer(encoder, chunk, options.group_size, options.seed)
        groups += found
        greedy += model.answer(encoder, chunk, 1, options.seed, greedy=True)[0]
        for failure in failures:
            logger.warning(f"not answered: {failure}")
    if not groups or not greedy:
        raise DataError("no product could be answered; see the warnings above")
    return "\n".join([f"{len(groups)} products x {options.group_size} answers at temperature {trained.temperature}",
                      *head_room([group.rewards for group in groups], [record.reward for record in greedy],
                                 fmean(part.valid for group in groups for part in group.parts))])


def head_room(groups: Sequence[Sequence[float]], greedy: Sequence[float], readable: float) -> list[str]:
    """Say what groups of rewards hold for GRPO to learn from, and give a verdict."""
    mean, best = fmean(map(fmean, groups)), fmean(map(max, groups))
    alike = fmean(max(group) == min(group) for group in groups)
    tiny = fmean(max(group) > min(group) and pstdev(group) < _TINY for group in groups)
    success = fmean(reward >= SUCCESS_REWARD for group in groups for reward in group)
    lines = [f"readable answers                 {readable:.1%}",
             f"groups with a signal             {1 - alike - tiny:.1%}",
             f"  all answers earn the same      {alike:.1%}",
             f"  spread below {_TINY}              {tiny:.1%}",
             f"mean reward                      {mean:.3f}",
             f"greedy                           {fmean(greedy):.3f}",
             f"best of {len(groups[0]):<3}                      {best:.3f}",
             f"head-room, best - mean           {best - mean:.3f}",
             f"answers with reward >= 0.9       {success:.1%}"]
    return [*lines, verdict(readable, 1 - alike - tiny, mean, best)]


def verdict(readable: float, signal: float, mean: float, best: float) -> str:
    """Say in a sentence whether RL can help here, and what to do where it can't."""
    if readable < 0.5:
        return ("verdict: most answers can't be read: mend the prompt, or fine-tune on a few written answers first; RL "
                "would mostly teach the format")
    if signal < 0.2:
        return ("verdict: most groups give nothing to learn from: raise --temperature or --group_size, or the products "
                "are too easy or too hard for this model")
    if best - mean < 0.05:
        return ("verdict: little to gain: even the best answers of a group are hardly better than the average one; "
                "check the labels and what the photos show, rather than train")
    return (f"verdict: RL can help: better answers are sampled already, and making them the rule would lift the mean "
            f"from {mean:.2f} towards {best:.2f}")


def main(options: CheckRewardOptions) -> None:
    """Explain an answer, or examine a sheet."""
    print(explain(options) if options.data_path is None else examine(options))
