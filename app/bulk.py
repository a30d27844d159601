"""Sheets in, sheets back: kept on the disk until they are answered and fetched, gone on with after a restart.

One at a time is at work, in a process of its own; its products wait behind those that are asked one by one.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loguru import logger
from starlette.datastructures import UploadFile
from starlette.requests import Request

from app.crew import LONGEST_LINE, ROOT
from app.intake import FETCH_SECONDS
from app.refusals import Refusal
from app.waiting import Answered, Product, Waiting
from config import ServiceOptions
from ground.files import whole_file, write_json

COMMAND = (sys.executable, "-c", "from app.sheet_process import main; main()")
_KINDS = (".xlsx", ".xlsm", ".xls", ".xlsb", ".ods", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
_NOTE, _ANSWERS, _PHOTOS = "note.json", "answers.xlsx", "photos"
_TRIES, _PAUSE = 3, 3.0  # for a product whose worker is lost, seconds between them


@dataclass(eq=False)
class Sheet:
    """A sheet that was sent, in a folder of its own."""

    folder: Path
    name: str
    samples: int
    status: str = "queued"
    products: int = 0
    problem: str = ""
    task: asyncio.Task | None = None

    @property
    def data_path(self) -> Path:
        """The sheet itself, under a name of ours."""
        return self.folder / f"sheet{Path(self.name).suffix.lower()}"

    @property
    def answers_path(self) -> Path:
        """The sheet with the answers."""
        return self.folder / _ANSWERS

    def report(self) -> dict[str, Any]:
        """How far it is; done: products answered."""
        journal = self.folder / f"{_ANSWERS}.journal"
        done = self.products if self.status == "done" else max(0, _lines(journal) - 1)
        return {"id": self.folder.name, "name": self.name, "status": self.status, "done": done,
                "products": self.products, "problem": self.problem or None}


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


class Bulk:
    """The sheets that were sent."""

    def __init__(self, options: ServiceOptions, waiting: Waiting, count: Callable[[Product, Answered], Any],
                 command: tuple[str, ...] = COMMAND):
        self._options, self._waiting, self._count, self.command = options, waiting, count, command
        self._root = Path(options.state_dir) / "sheets"
        self._sheets: dict[str, Sheet] = {}
        self._one = asyncio.Semaphore(1)

    def go_on(self) -> None:
        """Take up what an earlier service left: sheets that are answered, and those that are not."""
        for note in sorted(self._root.glob(f"*/{_NOTE}")):
            kept = json.loads(note.read_text(encoding="utf-8"))
            sheet = Sheet(note.parent, kept["name"], kept["samples"])
            self._sheets[note.parent.name] = sheet
            if sheet.answers_path.is_file():
                sheet.status = "done"
            else:
                sheet.task = asyncio.create_task(self._answer(sheet))

    async def stop(self) -> None:
        """Stop the work; what is answered stays on the disk."""
        tasks = [sheet.task for sheet in self._sheets.values() if sheet.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def take(self, request: Request) -> dict[str, Any]:
        """Take a sheet in; the same one again goes on, or is there already. Raises Refusal."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            raise Refusal(415, "wrong_type", "send multipart/form-data with a file named sheet", "Content-Type")
        if sum(one.status in ("queued", "reading", "answering") for one in self._sheets.values()
               ) > self._options.sheets_waiting:
            raise Refusal(429, "busy", "too many sheets wait already", retry_after=60)
        async with request.form(max_files=1, max_fields=10) as form:
            upload, samples = self._fields(dict(form))
            content = await upload.read()
        name = Path((upload.filename or "").replace("\\", "/")).name[-100:]
        if Path(name).suffix.lower() not in _KINDS:
            raise Refusal(415, "wrong_sheet", f"send one of {', '.join(_KINDS)}", "sheet")
        key = hashlib.sha256(json.dumps([name, samples, hashlib.sha256(content).hexdigest()]).encode()).hexdigest()[:32]
        self._forget_old()
        sheet = self._sheets.get(key)
        if sheet is None or sheet.status == "failed":
            sheet = self._sheets[key] = Sheet(self._root / key, name, samples)
            await asyncio.to_thread(self._keep, sheet, content)
            sheet.task = asyncio.create_task(self._answer(sheet))
        return sheet.report()

    def _fields(self, form: dict[str, Any]) -> tuple[UploadFile, int]:
        unknown = sorted(set(form) - {"sheet", "samples"})
        if unknown:
            raise Refusal(422, "unknown_field", "the fields are sheet, samples", unknown[0][:100])
        if not isinstance(form.get("sheet"), UploadFile):
            raise Refusal(422, "bad_field", "send the sheet as a file", "sheet")
        samples = form.get("samples", str(self._options.samples))
        if samples not in map(str, range(1, 17)):
            raise Refusal(422, "bad_field", "samples must be a whole number from 1 to 16", "samples")
        return form["sheet"], int(samples)

    def _keep(self, sheet: Sheet, content: bytes) -> None:
        sheet.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(sheet.data_path) as partial:
            partial.write_bytes(content)
        write_json(sheet.folder / _NOTE, {"name": sheet.name, "samples": sheet.samples})

    def _forget_old(self) -> None:
        for key, sheet in list(self._sheets.items()):
            age = time.time() - (sheet.folder / _NOTE).stat().st_mtime
            if sheet.status in ("done", "failed") and age > 3600 * self._options.sheet_hours:
                self.forget(key)

    def find(self, key: str) -> Sheet:
        """Find a sheet by its id; raises Refusal."""
        if key not in self._sheets:
            raise Refusal(404, "no_such_sheet", "no sheet of this id is here; send it again")
        return self._sheets[key]

    def forget(self, key: str) -> None:
        """Stop the work on a sheet and remove it."""
        sheet = self.find(key)
        if sheet.task:
            sheet.task.cancel()
        del self._sheets[key]
        shutil.rmtree(sheet.folder, ignore_errors=True)

    async def _answer(self, sheet: Sheet) -> None:
        async with self._one:
            sheet.status = "reading"
            process = await asyncio.create_subprocess_exec(
                *self.command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LONGEST_LINE,
                env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True)
            try:
                await self._say(process, self._settings(sheet))
                while line := await process.stdout.readline():
                    message = json.loads(line)
                    if "ask" in message:
                        lines = await asyncio.gather(*(self._line_of(product) for product in message["ask"]))
                        await self._say(process, {"lines": lines})
                    elif "products" in message:
                        sheet.products, sheet.status = message["products"], "answering"
                    elif "broken" in message:
                        problem = message["broken"].replace(str(sheet.data_path), sheet.name)
                        sheet.status, sheet.problem = "failed", problem.replace(str(sheet.folder), "")
                    else:
                        sheet.status = "done"
                if sheet.status not in ("done", "failed"):
                    sheet.status, sheet.problem = "failed", "the process that read it ended early; see the log"
            except ConnectionError:
                sheet.status, sheet.problem = "failed", "the process that read it ended early; see the log"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            logger.info(f"sheet {sheet.folder.name[:8]}: {sheet.status}, {sheet.products} products")

    async def _line_of(self, product: dict[str, Any]) -> dict[str, Any]:
        """Answer one product of a sheet; a worker that is lost meanwhile is waited for."""
        asked = Product(product["text"], tuple(map(Path, product["photos"])), product["samples"], product["greedy"],
                        missing_photos=product["missing_photos"])
        for left in reversed(range(_TRIES)):
            try:
                answered = await self._waiting.ask_for_sheet(asked)
            except Refusal as refusal:
                if refusal.status != 503 or not left:
                    return {"failure": refusal.message}
                asked = replace(asked, alone=True)
                await asyncio.sleep(_PAUSE)
            else:
                self._count(asked, answered)
                return {"answers": answered.answers}
        raise AssertionError("unreachable")

    async def _say(self, process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
        process.stdin.write(json.dumps(message).encode() + b"\n")
        await process.stdin.drain()

    def _settings(self, sheet: Sheet) -> dict[str, Any]:
        options = self._options
        answer = {name: getattr(options, name) for name in ("model_path", "checkpoint_path", "accept_at", "seed")}
        answer |= {"data_path": str(sheet.data_path), "output_path": str(sheet.answers_path),
                   "image_cache_dir": str(sheet.folder / _PHOTOS), "num_samples": sheet.samples, "reward": ["size"],
                   "eval_batch_size": 2 * options.batch_size * max(1, len(options.devices))}
        return {"answer": answer, "image_cache_dir": options.image_cache_dir, "max_rows": options.max_rows,
                "fetch_hosts": [host.lower() for host in options.fetch_hosts],
                "fetching": {"retries": 0, "timeout": FETCH_SECONDS, "deadline": FETCH_SECONDS,
                             "max_file_mb": max(1, int(options.max_photo_mb))}}
