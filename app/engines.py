"""Engines that others keep, vLLM, SGLang or any that speaks OpenAI's protocol, in place of worker processes.

Asked as serving.json says: its wording, photos before the text, the sampling of training. Read as everywhere else.
"""

import asyncio
import base64
import io
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from loguru import logger
from PIL import Image

from app.metrics import Metrics
from app.refusals import Refusal
from app.waiting import Job, Product, Waiting
from config import ServiceOptions
from sheets.photos import LARGEST_SIDE, PhotoError, content_key, open_photo

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds that an engine which fails is left out
_TRIES = 3  # for a request, at engines that fail
_CONNECT_SECONDS = 5.0
_SENT_AS_IS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}
_TURNED = 0x0112  # EXIF's tag


class EngineFailed(Exception):
    """An engine that can't be reached, or gives no answer that can be used; the text says why."""


class Engine:
    """One engine and what is known of it; keep() asks it what waits, several products at a time."""

    hopeless = False  # it may come later

    def __init__(self, address: str, options: ServiceOptions, waiting: Waiting, metrics: Metrics):
        self.address = address.rstrip("/")
        self._options, self._waiting, self._metrics = options, waiting, metrics
        self._notes = json.loads((Path(options.model_path) / "serving.json").read_text(encoding="utf-8"))
        self._session = requests.Session()
        self._session.trust_env = False
        if options.engine_key_file:
            key = Path(options.engine_key_file).read_text(encoding="utf-8").strip()
            self._session.headers["Authorization"] = f"Bearer {key}"
        self._session.mount("http", requests.adapters.HTTPAdapter(pool_maxsize=options.batch_size))
        self._threads = ThreadPoolExecutor(options.batch_size, "engine")
        self._decoding = asyncio.Semaphore(options.decode_at_once)
        self._at_work, self._pause, self._failing = 0, _FIRST_PAUSE, False
        self.state, self.problem, self.restarts, self.about = "loading", "", 0, {}

    def report(self) -> dict[str, Any]:
        """What /health says of it."""
        return {"device": self.address, "state": self.state, "restarts": self.restarts, "problem": self.problem}

    async def keep(self) -> None:
        """Ask the engine what waits, until cancelled; one that fails is left out for a while, longer each time."""
        while True:
            try:
                await self._meet()
                await self._work()
            except EngineFailed as failed:
                if str(failed) != self.problem:
                    logger.error(f"engine {self.address}: {failed}; left out for {self._pause:g} s")
                if self.state == "ready":
                    self.restarts += 1
                    self._metrics.restarts.labels(self.address).inc()
                self.state, self.problem = "restarting", str(failed)
            await asyncio.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    async def _meet(self) -> None:
        """Learn the model's name, and warn where it answers the example otherwise than the model that was exported."""
        model = self._options.engine_model or (await self._call("/models"))["data"][0]["id"]
        sampling = self._notes["sampling"]
        self.about = {"model": model, "temperature": sampling["temperature"], "max_length": sampling["max_new_tokens"],
                      "wording": {name.split()[0]: text for name, text in self._notes["user_message"].items()}}
        if self.state == "loading":
            await self._check_example()
        self.state, self.problem = "ready", ""
        logger.info(f"engine {self.address}: ready with {model}")

    async def _check_example(self) -> None:
        example, folder = self._notes["example"], Path(self._options.model_path)
        named = example["photos"]  # their number, as a folder of an older version has it, names none
        files = [folder / name for name in named] if isinstance(named, list) else []
        if named and not (files and all(path.is_file() for path in files)):
            logger.warning(f"{folder}: the photos of serving.json's example are not there, so the engine's answer is "
                           "not compared: write the folder anew with export.py")
            return
        answers, _, _ = await self._answer(Product(example["text"], tuple(files), 1, greedy=True))
        if answers[0].strip() != example["greedy_answer"].strip():
            logger.warning(f"engine {self.address} answers serving.json's example otherwise than the model that was "
                           f"exported: {answers[0]!r}, not {example['greedy_answer']!r}. See that it serves this "
                           "folder, with its chat template and photo budget")

    async def _work(self) -> None:
        """Ask several products at a time until one fails because of the engine."""
        self._waiting.takers, self._failing = self._waiting.takers + 1, False
        asking = [asyncio.create_task(self._ask_on(place / 1000)) for place in range(self._options.batch_size)]
        try:
            await asyncio.wait(asking, return_when=asyncio.FIRST_EXCEPTION)
            await asyncio.gather(*(task for task in asking if task.done()))
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            self._waiting.takers -= 1
            if not self._waiting.takers:
                self._waiting.refuse_all(Refusal(503, "engine_failed", "no engine answers, try again", retry_after=5))

    async def _ask_on(self, linger: float) -> None:
        """Ask one product after the other. linger: so that of several engines the least busy one takes the next."""
        while True:
            (job,) = await self._waiting.take(1, linger)
            if self._failing:
                self._waiting.give_back(job, _TRIES)
                return
            await self._answer_job(job)

    async def _answer_job(self, job: Job) -> None:
        began, self._at_work = time.monotonic(), self._at_work + 1
        try:
            answers, photos_used, truncated = await self._answer(job.product)
            job.succeed(answers, photos_used, truncated)
            self._pause = _FIRST_PAUSE
            self._waiting.done(self._at_work, time.monotonic() - began)
        except Refusal as refusal:
            job.fail(refusal)
        except (EngineFailed, asyncio.CancelledError):
            self._failing, job.tries = True, job.tries + 1
            self._waiting.give_back(job, _TRIES)  # to another engine, if there is one
            raise
        finally:
            self._at_work -= 1

    async def _answer(self, product: Product) -> tuple[list[str], int, list[bool]]:
        """Ask the engine one product; raises Refusal for what the product is to blame for, else EngineFailed."""
        async with self._decoding:
            photos = await asyncio.to_thread(as_sent, product.photos)
        body = self._body(product, photos)
        found = await self._call("/chat/completions", body)
        try:
            answers = [choice["message"]["content"] or "" for choice in found["choices"]]
            cut = [choice.get("finish_reason") == "length" for choice in found["choices"]]
        except (KeyError, TypeError, AttributeError):
            raise EngineFailed("its answer is no chat completion") from None
        if len(answers) != body["n"] or not all(isinstance(answer, str) for answer in answers):
            raise EngineFailed(f"{len(answers)} answers instead of {body['n']}")
        return answers, len(photos), cut

    def _body(self, product: Product, photos: Sequence[str]) -> dict[str, Any]:
        wording = self.about["wording"][str(len(photos))]
        content = [{"type": "image_url", "image_url": {"url": photo}} for photo in photos]
        content.append({"type": "text", "text": wording.replace("{text}", product.text)})
        return {"model": self.about["model"], "messages": [{"role": "user", "content": content}],
                "n": product.samples, "temperature": 0 if product.greedy else self.about["temperature"], "top_p": 1,
                "max_tokens": self.about["max_length"]}

    async def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._call_and_wait, path, body)

    def _call_and_wait(self, path: str, body: dict[str, Any] | None) -> Any:
        try:
            answer = self._session.request("POST" if body else "GET", self.address + path, json=body,
                                           timeout=(_CONNECT_SECONDS, self._options.deadline), allow_redirects=False)
        except requests.RequestException as problem:
            raise EngineFailed(f"it can't be reached: {type(problem).__name__}") from None
        if body and answer.status_code in (400, 413, 422):
            raise Refusal(422, "not_answered", f"the engine refuses it: {_reason(answer)}")
        if answer.status_code != 200:
            # What it says of a product may repeat it, and this goes into the log.
            raise EngineFailed(f"HTTP {answer.status_code}" + ("" if body else f": {_reason(answer)}"))
        try:
            return answer.json()
        except ValueError:
            raise EngineFailed("its answer is no JSON") from None


def _reason(answer: requests.Response) -> str:
    """What an engine says of a refusal; short, for it may repeat what was sent."""
    try:
        body = answer.json()
        error = body.get("error", body)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
    except (ValueError, AttributeError):
        return "no reason given"


def as_sent(paths: Sequence[Path]) -> list[str]:
    """Write photos as data: URLs, equal ones once; raises Refusal naming the first that can't be used by its place."""
    distinct: dict[str, int] = {}
    for place, path in enumerate(paths):
        distinct.setdefault(content_key(path), place)
    sent = []
    for place in distinct.values():
        try:
            sent.append(_data_url(paths[place]))
        except PhotoError as problem:
            raise Refusal(422, "bad_photo", str(problem), f"photos[{place}]") from None
    return sent


def _data_url(path: Path) -> str:
    """A photo as it is where every engine sees it as training did: upright, opaque, in 8 bits; else as a PNG that is.
    """
    photo = open_photo(path)
    with Image.open(path) as opened:
        kind = _SENT_AS_IS.get(opened.format or "")
        plain = opened.mode in ("RGB", "L") and opened.getexif().get(_TURNED, 1) == 1 \
            and not opened.has_transparency_data and max(opened.size) <= LARGEST_SIDE
    if kind and plain:
        content = path.read_bytes()
    else:
        buffer = io.BytesIO()
        photo.save(buffer, "PNG")
        kind, content = "png", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
