"""TensorBoard: scalars that say what they mean, options as a table, and what the candidates of a product look like."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from loguru import logger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from config import TrainOptions
from evidence import measures
from evidence.evaluation import FIGURES
from loss import decoupled_advantages, group_advantages
from models.processes import Processes
from own_reward import Scorer
from replay_buffer import Experience
from reward import SUCCESS_REWARD, RewardParts
from rollout import Group, PromptEncoder, products_together, rollout_groups
from sheets.samples import PhotoError, Sample, load_photos

HELD_OUT_SHOWN = 3  # held-out products whose candidates are shown at each evaluation, always the same
_PHOTO_HEIGHT, _LONGEST = 128, 400  # pixels of a photo; characters of a text or an answer

MEANINGS = {
    "returns": "mean reward of the step's sampled answers; the curve to watch",
    "success_rate": "share of sampled answers with a reward of 0.9 or more",
    "valid_rate": "share of sampled answers in which a size can be read",
    "zero_variance_share": "share of groups whose answers all earn the same, so that nothing is learnt from them",
    "trained_groups": "groups that the update learns from: all, or those with spread where resample_flat is given",
    "answer_length": "mean tokens of an answer, the stop token included",
    "truncated_share": "share of answers that hit max_length without a stop token",
    "failed_rollouts": "products of the step that gave no group, or no lesson in a supervised step; the log says why",
    "total_loss": "the policy loss plus kl_weight times the KL term, less entropy_weight times the entropy, plus "
                  "sft_weight times the supervised loss; in a supervised step that alone. With "
                  "loss_type grpo about 0 at each step's first update, since a group's advantages average to zero; "
                  "dapo and dr_grpo give a long answer more weight than a short one, so not there, nor where "
                  "mask_truncated leaves answers out or entropy is rewarded. Watch returns instead",
    "supervised_loss": "mean -log-prob of the tokens of labels' answers, in nats, stop token included: in sft_steps, "
                       "and where sft_weight adds it to the loss",
    "kl_divergence": "how far the policy has moved from the reference policy, per token (k3 estimate); a few tenths "
                     "are a lot, a steep rise says that the learning rate is too high. In bfloat16 about 1e-5 of it is "
                     "rounding where products are put together in other passes than for the reference, else none",
    "look": "how far the policy's answers lie from its own with grey pictures in place of the photos, per token (k3 "
            "estimate, 2 at most); what look_weight rewards",
    "entropy": "mean entropy of the next token, in nats; near 0 all answers of a group are alike and learning ends",
    "ratio": "mean of pi / pi_old over tokens; 1 when nothing has moved since sampling",
    "first_ratio": "the same before any weight of the step has moved, against what was sampled: 1, in bfloat16 within "
                   "rounding, or sampling and update differ",
    "log_prob_gap": "largest difference between log-probs at sampling and at the update, before any weight has moved",
    "clip_fraction": "share of tokens that the clip holds back: the ratio lies above its range and the advantage is "
                     "positive, or below it and the advantage negative",
    "grad_norm": "the gradient's norm before clipping",
    "optimizer_steps": "optimizer steps made; 0 in a step that moved nothing",
    "skipped_minibatches": "minibatches left out for a loss or gradient that was not finite",
    "lr": "the learning rate",
    "errors/largest": "mean error of the largest side, cut off at 1; a side that an answer lacks counts as 1",
    "errors/middle": "mean error of the middle side, cut off at 1",
    "errors/smallest": "mean error of the smallest side, cut off at 1",
    "held_out/products": "held-out products that were answered",
    "held_out/answers": "answers to held-out products",
    **{f"held_out/{key}": f"on products that training never sees: {figure.meaning}" for key, figure in FIGURES.items()},
}

# The page to open first, http://localhost:6006/#custom_scalars: what every curve of MEANINGS shares a chart with.
PAGE = "custom_scalars"
LAYOUT = {
    "rewards": {
        "mean reward: sampled, held out": ("returns", "held_out/mean_reward"),
        "share with reward >= 0.9: sampled, held out": ("success_rate", "held_out/success_rate"),
        "held out: share within 5, 10, 20 %": ("held_out/within_5", "held_out/within_10", "held_out/within_20"),
        "share of readable answers: sampled, held out": ("valid_rate", "held_out/valid_rate"),
    },
    "loss, KL, entropy": {
        "loss": ("total_loss", "supervised_loss"),
        "KL from the reference policy": ("kl_divergence",),
        "entropy": ("entropy",),
        "answering otherwise without photos": ("look",),
        "gradient norm": ("grad_norm",),
        "learning rate": ("lr",),
    },
    "errors": {
        "sampled: error of each side": ("errors/largest", "errors/middle", "errors/smallest"),
        "held out: median error of each side, of the volume": (
            "held_out/largest_error", "held_out/middle_error", "held_out/smallest_error", "held_out/volume_error"),
        "held out: share of bad answers": ("held_out/failure_rate", "held_out/zero_rate", "held_out/slip_rate"),
    },
    "groups and answers": {
        "groups without spread": ("zero_variance_share",),
        "tokens of an answer": ("answer_length",),
        "share of answers cut off": ("truncated_share",),
        "groups trained on, products that gave none": ("trained_groups", "failed_rollouts"),
        "held out: products, answers": ("held_out/products", "held_out/answers"),
    },
    "is the update sound": {
        "ratio, before any weight has moved and over the step": ("first_ratio", "ratio"),
        "largest gap between log-probs of sampling and update": ("log_prob_gap",),
        "share of tokens clipped": ("clip_fraction",),
        "optimizer steps, minibatches skipped": ("optimizer_steps", "skipped_minibatches"),
    },
    "time": {"seconds a step": ("seconds/.*",)},
}


class Curves(SummaryWriter):
    """A writer whose scalars carry their meaning (MEANINGS) as a description."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point; the description is what TensorBoard shows beside the curve's title."""
        meaning = MEANINGS.get(tag) or (f"wall seconds a step spent on {tag.partition('/')[2]}"
                                        if tag.startswith("seconds/") else "")
        # Without the data class TensorBoard's fast loader takes the point for an old one and drops its description.
        described = SummaryMetadata(summary_description=meaning, data_class=DATA_CLASS_SCALAR,
                                    plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))
        point = Summary.Value(tag=tag, simple_value=float(value), metadata=described)
        self.file_writer.add_summary(Summary(value=[point]), step)

    def log_options(self, options: TrainOptions, step: int) -> None:
        """Write the first page, and the options as a table and as hyperparameters, by which runs can be compared."""
        self.add_custom_scalars({category: {title: ["Multiline", [f"{tag}$" for tag in tags]]  # a tag is a pattern
                                            for title, tags in charts.items()} for category, charts in LAYOUT.items()})
        values = asdict(options)
        self.add_text("options", _table(("option", "value"), values.items()), step)
        plain = {name: value if isinstance(value, bool | int | float | str) else str(value)
                 for name, value in values.items()}
        for summary in hparams(plain, {"returns": 0, "held_out/mean_reward": 0}):
            self.file_writer.add_summary(summary)


def warn_of_failures(what: str, failures: Sequence[Any]) -> None:
    """Name each product that could not be sampled, and the way out."""
    for failure in failures:
        way_out = "; lower --rollout_batch_size" if failure.reason.startswith("out of memory") else ""
        logger.warning(f"{what}: {failure}{way_out}")


def describe(groups: Sequence[Group], trained: Sequence[Group], failures: Sequence[Any], processes: Processes
             ) -> dict[str, float]:
    """Describe what all processes sampled: rewards, readable answers, groups without any signal, lengths; name here
    what failed here.

    groups: as sampled first, which is what the policy does. trained: those that go into the update.
    """
    warn_of_failures("no rollout", failures)
    own = [(group.rewards, [part.valid for part in group.parts],
            group.action_mask.sum(1).tolist(), group.truncated.tolist()) for group in groups]
    everywhere = processes.gather((own, len(failures), len(trained)))
    metrics: dict[str, float] = {"failed_rollouts": sum(count for _, count, _ in everywhere),
                                 "trained_groups": sum(count for _, _, count in everywhere)}
    sampled = [group for groups, *_ in everywhere for group in groups]
    if not sampled:
        return metrics
    rewards, valid, lengths, truncated = ([value for group in sampled for value in group[index]] for index in range(4))
    return metrics | {
        "returns": fmean(rewards),
        "success_rate": fmean(reward >= SUCCESS_REWARD for reward in rewards),
        "valid_rate": fmean(valid),
        "zero_variance_share": fmean(max(group[0]) == min(group[0]) for group in sampled),
        "answer_length": fmean(lengths),
        "truncated_share": fmean(truncated),
    }


def log_step(writer: Curves, step: int, steps: int, metrics: dict[str, float], seconds: dict[str, float]) -> None:
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


class Bounds:
    """Warns of a policy that has left its reference far behind, or answers the same whatever it is asked, and again
    when it is twice as far. How far is counted from the run's first step."""

    def __init__(self, options: TrainOptions, first: dict[str, float]):
        self.first = first  # KL and entropy of the first step that has any: filled here where they are not known yet
        self._max_kl, self._min_entropy = options.max_kl, options.min_entropy

    def look(self, metrics: Mapping[str, float], step: int) -> None:
        """Warn of a step's metrics if they call for it."""
        for name in ("kl_divergence", "entropy"):
            if name in metrics:
                self.first.setdefault(name, metrics[name])
        risen = metrics.get("kl_divergence", 0.0) - self.first.get("kl_divergence", 0.0)
        if risen > self._max_kl:
            self._max_kl = 2 * risen
            logger.warning(f"step {step}: KL {metrics['kl_divergence']:.3g}, {risen:.3g} above the first step's "
                           "(--max_kl): the policy has moved far from its reference; a lower --lr or a higher "
                           "--kl_weight holds it back")
        left = metrics.get("entropy", math.inf) / max(self.first.get("entropy", 0.0), 1e-9)
        if left < self._min_entropy:
            self._min_entropy = left / 2
            logger.warning(f"step {step}: entropy {metrics['entropy']:.3g}, {left:.1%} of the first step's "
                           "(--min_entropy): the answers to a product are all alike and teach little; try a lower --lr "
                           "or a higher --temperature")


def log_groups(writer: Curves, groups: Sequence[Group], trained: Sequence[Group], items: Sequence[Experience],
               options: TrainOptions, step: int) -> None:
    """Write a step's rewards and errors; every show_every steps, and at step 1, the candidates of its telling groups.

    items: the experiences made of the trained groups, in the same order.
    """
    if not groups:
        return
    writer.add_histogram("rewards", np.array([reward for group in groups for reward in group.rewards]), step)
    for side in ("largest", "middle", "smallest"):
        errors = [error for group in groups for part in group.parts
                  if (error := measures.side_error(part.errors, side)) is not None]
        if errors:
            writer.add_scalar(f"errors/{side}", fmean(min(error, 1.0) for error in errors), step)
    if trained and options.show_every and (step == 1 or step % options.show_every == 0):
        for title, place in telling(trained).items():
            log_candidates(writer, f"returns/{title}", trained[place], items[place].advantages.tolist(), step)


def telling(groups: Sequence[Group]) -> dict[str, int]:
    """Pick the groups that say most: where answers differ most, and where they are worst."""
    rewards = [group.rewards for group in groups]
    return {"widest spread": max(range(len(groups)), key=lambda place: pstdev(rewards[place])),
            "lowest reward": min(range(len(groups)), key=lambda place: fmean(rewards[place]))}


def log_held_out(writer: Curves, encoder: PromptEncoder, held_out: Sequence[Sample], options: TrainOptions,
                 scorer: Scorer, step: int) -> None:
    """Sample a group for each of a few held-out products, always the same, and write its candidates."""
    if not options.show_every:
        return
    groups, _ = rollout_groups(encoder, held_out[:HELD_OUT_SHOWN], options.group_size, options.temperature,
                               options.max_length, f"shown/{options.seed}", products_together(options, encoder.policy))
    scorer.rescore(groups)
    shown_rewards = torch.tensor([reward for group in groups for reward in group.rewards])
    advantages = [group_advantages(torch.tensor(group.rewards), std_floor=options.std_floor,
                                   scale=options.scale_advantages, batch_rewards=shown_rewards) for group in groups]
    if options.scale_rewards_each:
        advantages = decoupled_advantages([group.rewards_each() for group in groups], std_floor=options.std_floor)
    for number, (group, own) in enumerate(zip(groups, advantages, strict=True), start=1):
        log_candidates(writer, f"held_out/product {number}", group, own.tolist(), step)


def log_candidates(writer: Curves, tag: str, group: Group, advantages: Sequence[float], step: int) -> None:
    """Write a product's photos, and a table of its candidates, the best first."""
    writer.add_text(f"{tag}/candidates", candidate_table(group.sample, group.answers, group.parts, advantages), step)
    try:
        photos = load_photos(group.sample)
    except PhotoError as problem:
        logger.warning(f"not shown in TensorBoard: {problem}")
        return
    if photos:
        writer.add_image(f"{tag}/photos", photo_strip(photos), step, dataformats="HWC")


def candidate_table(sample: Sample, answers: Sequence[str], parts: Sequence[RewardParts], advantages: Sequence[float]
                    ) -> str:
    """Lay a group out as Markdown: the product, then a line a candidate, the best first."""
    order = sorted(range(len(answers)), key=lambda place: -parts[place].reward)
    rows = [(f"{parts[place].reward:.3f}", f"{advantages[place]:+.2f}",
             " x ".join(f"{size:g}" for size in parts[place].sizes) or parts[place].reason,
             ", ".join(f"{error:.0%}" for error in parts[place].errors), answers[place]) for place in order]
    label = " x ".join(f"{size:g}" for size in sorted(sample.label, reverse=True))
    return (f"**{_plain(sample.sheet)} row {sample.row}** ({_plain(sample.product_id)}), true size **{label} cm**\n\n"
            f"{_plain(sample.text)}\n\n"
            + _table(("reward", "advantage", "read, cm", "errors", "answer"), rows))


def photo_strip(photos: Sequence[Image.Image]) -> np.ndarray:
    """Put photos side by side at one height: (height, width, 3) bytes."""
    resized = [photo.resize((max(1, round(photo.width * _PHOTO_HEIGHT / photo.height)), _PHOTO_HEIGHT))
               for photo in photos]
    strip = Image.new("RGB", (sum(photo.width + 8 for photo in resized) - 8, _PHOTO_HEIGHT), "white")
    left = 0
    for photo in resized:
        strip.paste(photo, (left, 0))
        left += photo.width + 8
    return np.asarray(strip)


def _table(titles: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    lines += ["| " + " | ".join(_plain(str(cell)) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Write a text so that Markdown shows it as it is, on one line."""
    text = " ".join(text[:_LONGEST].split()) + ("..." if len(text) > _LONGEST else "")
    return "".join(char if char.isalnum() or char in " ,.:" or ord(char) > 127 else f"&#{ord(char)};" for char in text)
