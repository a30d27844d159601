"""Merge a trained adapter into the model under it: a folder that plain transformers loads.

    python export.py --checkpoint_path outputs/vlm_grpo/step_001000 --output_path merged

Some products of the training sheet are answered greedily by base + adapter, and by the merged folder once it is read
back from the disk. Where they differ nothing is written. Weights are float32.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from config import ExportOptions, OptionError, TrainOptions, parse_options, sheet_options

if __name__ == "__main__":
    OPTIONS = parse_options(ExportOptions, "Merge a trained adapter into the model under it.")

import torch
from loguru import logger

from checkpoint import options_of, save_model, whole_folder
from data import DataError, Sample, load_samples, require_usable
from family import ModelError
from lora import base_of, is_adapter
from policy import Policy, load_policy
from prompts import read_template
from rollout import Group, PromptEncoder, rollout_groups


def export(options: ExportOptions) -> None:
    """Write the merged model to output_path; raises ModelError, and writes nothing, when it answers otherwise."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    if not is_adapter(options.checkpoint_path):
        raise OptionError(f"--checkpoint_path {options.checkpoint_path}: no adapter there; a checkpoint of a run "
                          "without --lora_rank is a model folder already")
    trained = options_of(options.checkpoint_path) or TrainOptions()
    if trained.quantize != "none":
        logger.warning(f"this adapter was trained on a base in {trained.quantize}; it is merged into, and compared on, "
                       "the base in full, whose answers can differ from those seen in training")
    trained = replace(trained, dtype="float32", quantize="none")
    samples = choose_samples(options, trained)
    with whole_folder(Path(options.output_path)) as folder:
        expected = merge(options, trained, samples, folder)
        merged = load_policy(str(folder), trained, options.device, options.trust_remote_code)
        gap = compare_answers(expected, answer(merged, samples, trained))
    print(f"{len(expected)} products answered alike, log-probs within {gap:.1e}; merged model: {options.output_path}")


def merge(options: ExportOptions, trained: TrainOptions, samples: Sequence[Sample], folder: Path) -> list[Group]:
    """Answer with base + adapter, then write the merged model; returns the answers."""
    base_path = options.model_path or base_of(options.checkpoint_path)
    policy = load_policy(base_path, trained, options.device, options.trust_remote_code)
    policy.load_weights(options.checkpoint_path)
    expected = answer(policy, samples, trained)
    policy.merge_adapter()
    save_model(policy, trained, base_path, folder)
    return expected


def choose_samples(options: ExportOptions, trained: TrainOptions) -> list[Sample]:
    """The first products of the sheet; texts made up here when the training sheet is gone."""
    path = options.data_path or trained.data_path
    if options.data_path or Path(path).is_file():
        cache = options.image_cache_dir or trained.image_cache_dir
        samples, problems = load_samples(path, cache, trained.missing_photos, require_label=False,
                                         reading=sheet_options(options, trained, bool(options.data_path)))
        require_usable(samples, problems, path, cache)
        return samples[:options.num_products]
    logger.warning(f"{path}: the training sheet is gone; answers are compared on made-up texts without photos "
                   "(--data_path takes another sheet)")
    return [Sample(row=number, product_id="-", text=f"storage box no. {number}, {10 * number} x 20 x 15 cm", label=(),
                   photos=(), sheet="made up") for number in range(1, options.num_products + 1)]


def answer(policy: Policy, samples: Sequence[Sample], trained: TrainOptions) -> list[Group]:
    """Answer each product greedily; raises DataError naming the first that can't be answered."""
    encoder = PromptEncoder(policy, trained.prompt_language, read_template(trained.prompt_file),
                            max_prompt_length=trained.max_prompt_length)
    groups, failures = rollout_groups(encoder, samples, 1, None, trained.max_length, "export", 1)
    if failures:
        raise DataError(f"not answered, so the merge can't be checked: {failures[0]}")
    return groups


def compare_answers(expected: Sequence[Group], found: Sequence[Group]) -> float:
    """Say how far apart the log-probs of the same ids are; raises ModelError with the first answer that differs."""
    gaps = [0.0]
    for one, other in zip(expected, found, strict=True):
        if not torch.equal(one.completions[one.action_mask], other.completions[other.action_mask]):
            sample = one.sample
            raise ModelError(f"the merged model answers otherwise, so nothing is written. {sample.sheet} row "
                             f"{sample.row}: base + adapter {one.answers[0]!r}, merged {other.answers[0]!r}")
        gaps.append(float((one.old_log_probs - other.old_log_probs).abs().max()))
    return max(gaps)


def main(options: ExportOptions) -> int:
    """Merge; problems that the user can mend end with one message and status 2."""
    logger.remove()
    logger.add(sys.stderr, format="{level:<7} {message}")
    try:
        export(options)
    except (OptionError, DataError, ModelError) as problem:
        logger.error(str(problem))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
