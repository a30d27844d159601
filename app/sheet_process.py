"""The process that reads and writes one sheet, as test_model.py does, while the products are answered by the service.

Sheets come from strangers: what reading one costs, or breaks, this process alone pays. It talks in lines of JSON.
"""

import json
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from loguru import logger

from app.intake import fetch_straight
from config import AnswerOptions, FetchOptions, TrainOptions
from evidence.evaluation import Record
from ground.commands import TIMED, log_to_console
from ground.errors import UserError
from ground.options import sheet_options
from reward import score_answer
from rollout import RolloutFailure
from sheets.cells import DataError
from sheets.fetch import missing_addresses
from sheets.samples import Sample, find_cached_photo, load_samples
from test_model import answer_sheet
from training.trained import options_of

_MOST_MEMORY = 16 * 2 ** 30  # bytes of address space, torch's own included
_FETCHED_AT_ONCE = 8


@dataclass
class Line:
    """The line to the service: what is asked of it, and how far the work is."""

    output: TextIO

    def say(self, message: dict[str, Any]) -> None:
        """Tell the service."""
        self.output.write(json.dumps(message) + "\n")

    def ask(self, products: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Have products answered."""
        self.say({"ask": products})
        return json.loads(sys.stdin.readline())["lines"]


class Encoder:
    """Stands where a PromptEncoder does: here no prompts are prepared."""

    def prefetch(self, samples: Sequence[Sample]) -> None:
        """Prepare nothing."""

    def forget(self, samples: Sequence[Sample]) -> None:
        """Keep nothing."""


class RemoteModel:
    """Stands where a TrainedModel does: products are answered by the service's queue."""

    def __init__(self, trained: TrainOptions, line: Line):
        self.options, self._line = trained, line

    def encoder(self, workers: int | None) -> Encoder:
        """Nothing is prepared here."""
        return Encoder()

    def answer(self, encoder: Encoder, samples: Sequence[Sample], num_samples: int, seed: int, greedy: bool = False
               ) -> tuple[list[Record], list[RolloutFailure]]:
        """Answer a few products."""
        lines = self._line.ask([{"text": sample.text, "photos": list(sample.photos), "samples": num_samples,
                                 "greedy": greedy, "missing_photos": sample.missing_photos} for sample in samples])
        records, failures = [], []
        for sample, line in zip(samples, lines, strict=True):
            if "answers" in line:
                records.append(Record(sample, line["answers"],
                                      [score_answer(answer, sample.label) for answer in line["answers"]]))
            else:
                failures.append(RolloutFailure(sample, line["failure"]))
        return records, failures


def gather_photos(options: AnswerOptions, trained: TrainOptions, settings: dict[str, Any]) -> None:
    """Put the photos that a sheet names by address into its own folder: known ones, and those of listed hosts."""
    cache, known = Path(str(options.image_cache_dir)), settings["image_cache_dir"]
    cache.mkdir(exist_ok=True)
    wanted = []
    for address in missing_addresses(str(options.data_path), str(cache), sheet_options(options, trained, True)):
        found = known and find_cached_photo(address, known)
        if found:
            shutil.copyfile(found, cache / Path(found).name)
        elif host_of(address) in settings["fetch_hosts"]:
            wanted.append(address)
    fetching = FetchOptions(**settings["fetching"])
    with ThreadPoolExecutor(_FETCHED_AT_ONCE) as workers:
        for address, problem in zip(wanted, workers.map(lambda one: fetch_straight(one, cache, fetching), wanted),
                                    strict=True):
            if problem:
                logger.warning(f"a photo was not fetched from {host_of(address)}: {problem}")


def host_of(address: str) -> str:
    """The host of a web address; "" for what is none."""
    try:
        parts = urlsplit(address)
        return (parts.hostname or "").lower() if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""


def work(settings: dict[str, Any], line: Line) -> None:
    """Answer a sheet; raises UserError when it can't be read."""
    options = AnswerOptions(**settings["answer"], local_photos=False)
    trained = options_of(options.checkpoint_path or options.model_path) or TrainOptions()
    gather_photos(options, trained, settings)
    samples, _ = load_samples(str(options.data_path), str(options.image_cache_dir), trained.missing_photos, False,
                              sheet_options(options, trained, own_sheet=True), trained.partial_labels, False)
    if len(samples) > settings["max_rows"]:
        raise DataError(f"{len(samples):,} products, at most {settings['max_rows']:,} in one sheet: cut it")
    line.say({"products": len(samples)})
    answer_sheet(options, RemoteModel(trained, line))


def main() -> None:
    """Take the settings from the first line and work; what is printed goes to stderr, so that stdout stays JSON."""
    log_to_console(TIMED)
    logger.disable("")  # what is said of rows quotes them: it stands in the sheet that goes back, not in the log
    logger.enable("app")
    output = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    line = Line(output)
    try:
        work(json.loads(sys.stdin.readline()), line)
        line.say({"written": True})
    except UserError as problem:
        line.say({"broken": str(problem)})
    except MemoryError:
        line.say({"broken": "it takes too much memory to read"})
