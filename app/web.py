"""The HTTP service: what can be asked, and by whom it is answered. The web process computes nothing itself."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response

from app import chat
from app.bulk import Bulk
from app.crew import Worker
from app.door import Door, read_keys
from app.engines import Engine
from app.intake import Asked, Intake, Room
from app.metrics import Metrics
from app.page import page_and_policy
from app.refusals import Refusal
from app.results import result_of
from app.waiting import Answered, Product, Waiting
from config import ServiceOptions

_LEFT = 499  # what nginx calls a client that has left


class Service:
    """What the endpoints share: the queue, those who answer, and the options."""

    def __init__(self, options: ServiceOptions, answerers: Sequence[Worker | Engine] | None = None):
        self.options, self.metrics = options, Metrics()
        self.waiting = Waiting(options, self.metrics)
        self.intake = Intake(options, self.metrics)
        self.bulk = Bulk(options, self.waiting, self._result)
        self.began = time.monotonic()
        if answerers is None and options.engine:
            answerers = [Engine(address, options, self.waiting, self.metrics) for address in options.engine]
        elif answerers is None:
            answerers = [Worker(device, options, self.waiting, self.metrics) for device in options.devices]
        self.answerers = list(answerers)

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Keep those who answer up while the block runs."""
        keeping = [asyncio.create_task(answerer.keep()) for answerer in self.answerers]
        self.bulk.go_on()
        try:
            yield
        finally:
            await self.bulk.stop()
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)
            self.intake.close()

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the model; raises Refusal before it is."""
        for answerer in self.answerers:
            if answerer.about:
                return answerer.about
        raise Refusal(503, "not_ready", "the model is being loaded", retry_after=5)

    def health(self, known: bool = True) -> dict[str, Any]:
        """How the service is: ready when one of those who answer is.

        known: whoever asks may see names, addresses and paths, too.
        """
        states = [answerer.report() for answerer in self.answerers]
        ready = sum(state["state"] == "ready" for state in states)
        status = "ending" if self.waiting.ending else "ready" if ready == len(states) else \
            "degraded" if ready else states[0]["state"]
        shown = {"status": status, "workers": states, "queue": self.waiting.state(), "limits": self.page_limits(),
                 "seconds_up": round(time.monotonic() - self.began)}
        if known:
            return {**shown, "model": next((one.about["model"] for one in self.answerers if one.about), None)}
        return {**shown, "workers": [{name: state[name] for name in ("state", "restarts")} for state in states]}

    def page_limits(self) -> dict[str, Any]:
        """The limits that a client can keep to."""
        options = self.options
        return {"photos": 5, "photo_mb": options.max_photo_mb, "megapixels": options.max_megapixels,
                "text": options.max_text, "samples": options.samples, "sheet_mb": options.max_sheet_mb,
                "accept_at": options.accept_at, "keys": options.key_file is not None}

    async def extract(self, request: Request) -> dict[str, Any]:
        """Answer one product."""
        with self.waiting.admission():
            async with self.intake.product(request) as asked:
                request.scope["visit"].asked = asked.product.for_log
                return await stay(request, self._answer(asked))

    async def _answer(self, asked: Asked) -> dict[str, Any]:
        answered = await self.waiting.ask(asked.product)
        return {"id": asked.id, **self._result(asked.product, answered)}

    def _result(self, product: Product, answered: Answered) -> dict[str, Any]:
        return result_of(product, answered, self.about["model"], self.options.accept_at, self.metrics)

    async def chat(self, request: Request) -> dict[str, Any]:
        """Answer one product that is asked in OpenAI's protocol."""
        with self.waiting.admission():
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise Refusal(415, "wrong_type", "send application/json", "Content-Type")
            with self.intake.room() as room:
                product, count = await self._chat_product(request, room)
                request.scope["visit"].asked = product.for_log
                answered: Answered = await stay(request, self.waiting.ask(product))
        return chat.completion_of(answered, count, self.about["model"])

    async def _chat_product(self, request: Request, room: Room) -> tuple[Product, int]:
        async with self.intake.json_body(request) as body:
            asked = chat.read_chat(body, self.about)
            text = chat.without_wording(asked.text, len(asked.photos), self.about)
            text = self.intake.clean_text(text, "messages[0].content")
            fields = [f"image_url {place + 1}" for place in range(len(asked.photos))]
            photos, count, greedy = await self.intake.keep(asked.photos, room, fields), asked.count, asked.greedy
        del body, asked  # not held while photos are fetched
        files = await self.intake.fetch_missing(photos, room, fields)
        return Product(text, files, 1 if greedy else count, greedy, key=room.key(text, files)), count


async def stay(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Await work for as long as the client stays; when it leaves the work is cancelled and ClientDisconnect raised."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaves(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, leaving):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Refusal):
                await one


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _No:
    """A response that the door gives: one form for all that is refused."""

    def __init__(self, refusal: Refusal):
        self._refusal = refusal

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await scope["visit"].refuse(self._refusal)


async def _refused(_: Request, refusal: Refusal) -> _No:
    return _No(refusal)


async def _no_such(_: Request, problem: HTTPException) -> _No:
    codes = {404: "no_such_path", 405: "wrong_method", 400: "bad_form"}
    return _No(Refusal(problem.status_code, codes.get(problem.status_code, "refused"), str(problem.detail)))


async def _left(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=_LEFT)


async def _broken(_: Request, __: Exception) -> _No:
    return _No(Refusal(500, "internal", "something went wrong here; the service's log says what"))


def make_app(service: Service) -> Door:
    """Put the endpoints together behind the door."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=service.running,
                  exception_handlers={Refusal: _refused, HTTPException: _no_such, ClientDisconnect: _left,
                                      Exception: _broken})
    page, policy = page_and_policy()

    @app.get("/")
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8",
                        headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    @app.get("/livez")
    async def livez() -> JSONResponse:
        return JSONResponse({"status": "alive"})

    @app.get("/health")
    async def health(request: Request) -> JSONResponse:
        state = service.health(request.scope["visit"].known)
        return JSONResponse(state, 200 if state["status"] in ("ready", "degraded") else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/extract")
    async def extract(request: Request) -> JSONResponse:
        return JSONResponse(await service.extract(request), headers={"Cache-Control": "no-store"})

    @app.post("/extract_sheet", status_code=202)
    async def take_sheet(request: Request) -> JSONResponse:
        return JSONResponse(await service.bulk.take(request), 202)

    @app.get("/extract_sheet/{key}")
    async def sheet_state(key: str) -> JSONResponse:
        return JSONResponse(service.bulk.find(key).report(), headers={"Cache-Control": "no-store"})

    @app.get("/extract_sheet/{key}/file")
    async def sheet_file(key: str) -> Response:
        sheet = service.bulk.find(key)
        if sheet.status != "done":
            raise Refusal(409, "not_done", f"the sheet is {sheet.status} still", retry_after=5)
        return FileResponse(sheet.answers_path, filename=f"{Path(sheet.name).stem}.answers.xlsx",
                            headers={"Cache-Control": "no-store"})

    @app.delete("/extract_sheet/{key}")
    async def forget_sheet(key: str) -> JSONResponse:
        service.bulk.forget(key)
        return JSONResponse({"id": key, "status": "removed"})

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse(chat.models_of(service.about["model"]))

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> JSONResponse:
        return JSONResponse(await service.chat(request), headers={"Cache-Control": "no-store"})

    return Door(app, service.options, read_keys(service.options.key_file), service.metrics)
