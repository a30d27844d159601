"""The process that holds the model, one a device: batches come in as lines of JSON, answers go out as such.

It answers as test_model.py does, with the same code. It ends when who started it is gone.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loguru import logger
from PIL import Image

from config import AnswerOptions
from ground.commands import TIMED, log_to_console
from ground.errors import UserError
from models.family import Prompt
from prompts import build_prompt, read_template
from rollout import PromptEncoder
from sheets.photos import PhotoError, open_photos
from sheets.samples import Sample, load_photos
from test_model import open_model
from training.checkpoint import BEST_FILE
from training.trained import TrainedModel

_SIGN_OF_LIFE = 1.0  # seconds
Say = Callable[[dict[str, Any]], None]


class CountingEncoder(PromptEncoder):
    """A PromptEncoder that notes how many photos each prompt has kept."""

    def __init__(self, model: TrainedModel, decode_at_once: int):
        trained = model.options
        super().__init__(model.policy, trained.prompt_language, read_template(trained.prompt_file), 0,
                         trained.max_prompt_length, lambda sample: open_all(sample, decode_at_once))
        self.photos_used: dict[str, int] = {}

    def encode(self, sample: Sample) -> Prompt:
        """Prepare a prompt and note how many photos it kept."""
        prompt = super().encode(sample)
        self.photos_used[sample.key] = prompt.num_photos
        return prompt


def open_all(sample: Sample, at_once: int) -> list[Image.Image]:
    """Decode a product's photos, equal ones once; raises PhotoError naming the first that can't be used by its place.

    For a sheet's product its rule for such photos holds instead.
    """
    if sample.missing_photos != "drop_row":
        return load_photos(sample)
    photos = []
    for path, photo in open_photos(sample.photos, at_once):
        if isinstance(photo, PhotoError):
            raise PhotoError(f"photos[{sample.photos.index(path)}]: {photo}")
        photos.append(photo)
    return photos


def model_name(path: str) -> str:
    """Name a model by its folder, the best of a run with its step: best@420."""
    folder = Path(path)
    best = folder / BEST_FILE
    step = f"@{json.loads(best.read_text(encoding='utf-8'))['step']}" if best.is_file() else ""
    return (folder.name or path) + step


def answer_batch(model: TrainedModel, encoder: CountingEncoder, batch: dict[str, Any], seed: int
                 ) -> list[dict[str, Any]]:
    """Answer a batch's products, each with its answers or the reason why there are none."""
    samples = [Sample(index, "-", product["text"], (), tuple(product["photos"]), "request",
                      product.get("missing_photos", "drop_row"), by_content=True)
               for index, product in enumerate(batch["products"])]
    try:
        records, failures = model.answer(encoder, samples, batch["samples"], seed, batch["greedy"])
    except UserError as problem:  # of one product; the others are answered
        if len(samples) == 1:
            return [{"failure": str(problem)}]
        return [line for product in batch["products"]
                for line in answer_batch(model, encoder, {**batch, "products": [product]}, seed)]
    lines = {record.sample.row: {"answers": record.answers, "truncated": list(record.truncated),
                                 "photos_used": encoder.photos_used.get(record.sample.key, 0)} for record in records}
    lines |= {failure.sample.row: {"failure": failure.reason} for failure in failures}
    encoder.photos_used.clear()
    return [lines[index] for index in range(len(samples))]


def signs_of_life(say: Say) -> None:
    """Say every second that this process runs; end it when nobody listens any more."""
    while True:
        time.sleep(_SIGN_OF_LIFE)
        try:
            say({"alive": True})
        except OSError:
            os._exit(1)


def serve(settings: dict[str, Any], say: Say) -> None:
    """Load the model, say what it is, and answer batches until there are no more."""
    model = open_model(AnswerOptions(**settings["answer"]))
    encoder = CountingEncoder(model, settings["decode_at_once"])
    trained, seed = model.options, settings["answer"]["seed"]
    say({"ready": {"model": model_name(settings["answer"]["checkpoint_path"] or settings["answer"]["model_path"]),
                   "temperature": trained.temperature, "max_length": trained.max_length,
                   "wording": {str(count): build_prompt("{text}", range(count), trained.prompt_language,
                                                        read_template(trained.prompt_file)) for count in range(6)}}})
    for line in sys.stdin:
        say({"lines": answer_batch(model, encoder, json.loads(line), seed)})


def main() -> None:
    """Take the settings from the first line and work; what is printed goes to stderr, so that stdout stays JSON."""
    log_to_console(TIMED)
    output = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    one_at_a_time = threading.Lock()

    def say(message: dict[str, Any]) -> None:
        with one_at_a_time:
            output.write(json.dumps(message) + "\n")

    threading.Thread(target=signs_of_life, args=(say,), daemon=True).start()
    try:
        serve(json.loads(sys.stdin.readline()), say)
    except UserError as problem:
        logger.error(str(problem))
        say({"broken": str(problem)})
        sys.exit(2)
