"""Try one model on one product, or on a sheet.

    python test_model.py --model_path demo/model --text "mug, grid 5 cm" --image front.png --image side.png
    python test_model.py --model_path outputs/demo/step_000420 --data_path demo/held_out.xlsx

A checkpoint brings the prompt, photo budget and sampling it was trained with; an adapter brings the model under it.
"""

import sys
from pathlib import Path
from typing import Any

from config import AnswerOptions, OptionError, TrainOptions, parse_options, sheet_options

if __name__ == "__main__":
    OPTIONS = parse_options(AnswerOptions, "Try one model on one product, or on a sheet.")

import torch
from loguru import logger

from checkpoint import options_of
from data import DataError, PhotoError, Sample, load_samples, require_usable, summarise_problems
from evaluation import evaluate
from family import ModelError
from lora import base_of, is_adapter
from policy import load_policy
from prompts import read_template
from report import answer_line, sizes_text, write_sheet
from reward import LabelError, RewardParts, parse_label
from rollout import PromptEncoder


def load(options: AnswerOptions) -> tuple[PromptEncoder, TrainOptions]:
    """Load the model with the prompt and photo budget it was trained with, where that is known."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    trained = options_of(options.checkpoint_path or options.model_path)
    if trained is None:
        logger.info("no options.yaml with this model: default prompt and photo budget")
        trained = TrainOptions()
    model_path, weights = options.model_path, options.checkpoint_path
    if not weights and is_adapter(model_path):
        model_path, weights = "", model_path
    if not model_path:  # an adapter or a plain state dict needs the model it belongs to
        whole = Path(weights).is_dir()
        model_path = base_of(weights) if is_adapter(weights) else weights if whole else trained.model_path
    policy = load_policy(model_path, trained, options.device, options.trust_remote_code)
    if weights:
        policy.load_weights(weights)
    own_wording = options.prompt_file or options.prompt_language
    template = read_template(options.prompt_file if own_wording else trained.prompt_file)
    return PromptEncoder(policy, options.prompt_language or trained.prompt_language, template,
                         trained.prompt_cache_mb, trained.max_prompt_length), trained


def answer_product(options: AnswerOptions) -> None:
    """Answer one product from the command line and print the answer, how it was read, and its reward."""
    label = parse_label(options.label) if options.label else ()
    photos = tuple(Path(path) for path in options.image)
    for path in photos:
        if not path.is_file():
            raise PhotoError(f"--image {path}: no such file")
    encoder, trained = load(options)
    sample = Sample(row=1, product_id="-", text=str(options.text), label=label, photos=photos, sheet="command line")
    records, failures = evaluate(encoder, [sample], 1, trained.temperature if options.sample else None,
                                 trained.max_length, options.seed, 1)
    if failures:
        raise DataError(failures[0].reason)
    print(f"answer: {records[0].answers[0]}")
    print(reading(records[0].parts[0], bool(label)))


def reading(parts: RewardParts, labelled: bool) -> str:
    """Say how an answer was read and, with a label, what it is worth."""
    lines = [f"read:   {sizes_text(parts.sizes)} cm, largest first" if parts.sizes else f"read:   {parts.reason}"]
    if labelled:
        errors = ", ".join(f"{error:.1%}" for error in parts.errors)
        lines.append(f"reward: {parts.reward:.4f} (errors, largest side first: {errors})")
    return "\n".join(lines)


def answer_sheet(options: AnswerOptions) -> None:
    """Answer every product of a sheet and write the sheet back with answers, sizes and rewards."""
    encoder, trained = load(options)
    data_path = str(options.data_path)
    samples, problems = load_samples(data_path, options.image_cache_dir or trained.image_cache_dir,
                                     trained.missing_photos, require_label=False,
                                     reading=sheet_options(options, trained, own_sheet=True))
    if samples and problems:
        logger.warning(f"{data_path}: rows with problems\n{summarise_problems(problems)}")
    require_usable(samples, problems, data_path, options.image_cache_dir or trained.image_cache_dir)
    records, failures = evaluate(encoder, samples, 1, trained.temperature if options.sample else None,
                                 trained.max_length, options.seed, options.eval_batch_size)
    rows: list[dict[str, Any]] = [answer_line(record) for record in records]
    notes = [{"row": problem.row, "product_id": problem.product_id, "problem": problem.problem} for problem in problems]
    for failure in failures:
        logger.warning(f"not answered: {failure}")
        notes.append({"row": failure.sample.row, "product_id": failure.sample.product_id, "problem": failure.reason})
    path = Path(options.output_path or Path(data_path).with_suffix(".answers.xlsx").name)
    write_sheet(path, {"answers": rows, "problems": notes})
    rewards = [line["reward"] for line in rows if line["reward"] is not None]
    mean = f", mean reward {sum(rewards) / len(rewards):.3f} on {len(rewards)} labelled" if rewards else ""
    print(f"{len(rows)} products answered{mean}; {len(failures)} not answered; written to {path}")


def main(options: AnswerOptions) -> int:
    """Answer; problems that the user can mend end with one message and status 2."""
    logger.remove()
    logger.add(sys.stderr, format="{level:<7} {message}")
    try:
        answer_product(options) if options.text is not None else answer_sheet(options)
    except LabelError as problem:
        logger.error(f"--label: {problem}")
        return 2
    except (OptionError, DataError, PhotoError, ModelError) as problem:
        logger.error(str(problem))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
