"""What an update learns from beside sampled answers: labels, written as the answer that is asked for, and the same
answers where the photos are blanked."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from loguru import logger
from torch import Tensor

from config import TrainOptions
from models.family import Prompt
from models.policy import Policy
from models.sharding import gathered
from prompts import write_answer
from replay_buffer import Experience, join_experiences
from rollout import PromptEncoder, PromptError, RolloutFailure, products_together
from sheets.samples import PhotoError, Sample
from sizes.labels import Label


def lessons_of(encoder: PromptEncoder, products: Sequence[Sample], options: TrainOptions
               ) -> tuple[list[Experience], list[RolloutFailure]]:
    """Make a lesson of each product: a group of one answer, its label's; also returns those that gave none."""
    prepared, failures = encode(encoder, products, options)
    lessons = []
    for index, prompt, features in prepared:
        sample = products[index]
        lesson = taught(encoder.policy, prompt, sample.label)
        lesson.features = None if options.train_vision else (features,)
        lesson.sources = (f"{sample.sheet} row {sample.row}",)
        lessons.append(lesson)
    return lessons, failures


def encode(encoder: PromptEncoder, products: Sequence[Sample], options: TrainOptions
           ) -> tuple[list[tuple[int, Prompt, Tensor | None]], list[RolloutFailure]]:
    """Prepare products' prompts and encode their photos, fewer together where memory runs out.

    Returns each product's place, prompt and photo features; and those that can't be opened, or for which alone there is
    no memory.
    """
    prompts: list[tuple[int, Prompt]] = []
    prepared, failures = [], []
    for index, sample in enumerate(products):
        try:
            prompts.append((index, encoder.encode(sample)))
        except (PhotoError, PromptError) as problem:
            failures.append(RolloutFailure(sample, str(problem)))

    def encode_photos(some: Sequence[tuple[int, Prompt]]) -> list[Tensor | None]:
        return encoder.policy.photo_features([prompt for _, prompt in some])

    with torch.no_grad(), gathered(encoder.policy):
        for some, features in encoder.policy.sampled_together.passes(prompts, encode_photos, "encoding photos",
                                                                     products_together(options, encoder.policy)):
            if features is None:
                failures.append(RolloutFailure(products[some[0][0]], "out of memory while encoding its photos; smaller "
                                               "or fewer photos take less"))
            else:
                prepared += [(index, prompt, own) for (index, prompt), own in zip(some, features, strict=True)]
    return prepared, failures


def taught(policy: Policy, prompt: Prompt, label: Label) -> Experience:
    """The label's answer to a prompt, as a group of one."""
    ids = answer_ids(policy, prompt, label)[None].to(policy.device)  # (1, T)
    zeros, yes = torch.zeros(ids.shape, device=policy.device), torch.ones(1, dtype=torch.bool, device=policy.device)
    return Experience(ids, torch.ones_like(ids, dtype=torch.bool), zeros, None, zeros[:, 0], zeros[:, 0],
                      torch.zeros_like(yes), (prompt,), taught=yes)


def answer_ids(policy: Policy, prompt: Prompt, label: Label) -> Tensor:
    """Tokenize a label's answer: (T,), the stop token included, which is the one that ends the prompt's own turn."""
    ids = policy.tokenizer(write_answer(label), add_special_tokens=False)["input_ids"]
    ends = prompt.input_ids[torch.isin(prompt.input_ids, policy.stop_ids.cpu())]
    eos = policy.tokenizer.eos_token_id
    stop = int(ends[-1]) if len(ends) else int(policy.stop_ids[0]) if eos is None else eos
    return torch.tensor([*ids, stop])


def with_label(item: Experience, policy: Policy, label: Label) -> Experience:
    """Put the label's answer behind a product's sampled ones."""
    item.taught = torch.zeros(len(item.rewards), dtype=torch.bool, device=policy.device)
    joined = join_experiences([item, taught(policy, item.prompts[0], label)])
    joined.prompts, joined.features, joined.sources = item.prompts, item.features, item.sources
    return joined


def check_lessons(policy: Policy, products: Sequence[Sample], max_length: int) -> None:
    """Say what the longest lesson is; warn where no sampled answer could be as long."""
    longest = max(products, key=lambda sample: len(write_answer(sample.label)))
    answer = write_answer(longest.label)
    count = len(policy.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1
    logger.info(f"supervised answers, the longest: {answer}, {count} tokens, of {longest.sheet} row {longest.row}")
    if count > max_length:
        logger.warning(f"--max_length {max_length} cuts sampled answers before they are as long: give {count} or more")


def add_blinds(items: Sequence[Experience], encoder: PromptEncoder, products: Sequence[Sample], options: TrainOptions
               ) -> list[RolloutFailure]:
    """Give every experience of a product with photos its twin, with the prompt that an encoder of blanked photos makes;
    returns the products that got none."""
    shown = [(item, sample) for item, sample in zip(items, products, strict=True) if sample.photos]
    prepared, failures = encode(encoder, [sample for _, sample in shown], options)
    for index, prompt, features in prepared:
        item, _ = shown[index]
        item.blind = replace(item, prompts=(prompt,), features=None if options.train_vision else (features,))
    return failures
