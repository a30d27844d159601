"""The service on a port of this machine, in the test's own event loop, with a worker that has no model."""

import asyncio
import base64
import io
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn

from app.crew import Worker
from app.server import Server, listen, serve
from app.web import Service, make_app
from config import ServiceOptions
from tiny import noise_photo

FAKE = (sys.executable, str(Path(__file__).parent / "fake_worker.py"))
FAKE_SHEETS = (sys.executable, str(Path(__file__).parent / "fake_sheet_process.py"))


class Place:
    """A running service: a client to ask it with, and its inside."""

    def __init__(self, service, server, client, port):
        self.service, self.server, self.client, self.port = service, server, client, port

    async def ask(self, text="mug", **more):
        return await self.client.post("/extract", json={"text": text, **more})

    async def until_ready(self):
        while (await self.client.get("/health")).json()["status"] != "ready":
            await asyncio.sleep(0.02)

    async def counts(self):
        lines = (await self.client.get("/metrics", headers=self.client.headers)).text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name[:1] != "#"}


@asynccontextmanager
async def serving(folder, command=FAKE, answerers=None, headers=None, ready=True, sheets=None, **changes):
    """Serve while the block runs; sheets: the command that reads them; changes: to the options."""
    options = ServiceOptions(**{"model_path": "fake", "state_dir": str(folder / "state"), "port": 0, **changes})
    Path(options.state_dir).mkdir(parents=True, exist_ok=True)
    service = Service(options, answerers)
    service.bulk.command = sheets or service.bulk.command
    if answerers is None and not options.engine:
        service.answerers = [Worker(device, options, service.waiting, service.metrics, command)
                             for device in options.devices]
    config = uvicorn.Config(make_app(service), log_config=None, access_log=False, server_header=False,
                            lifespan="on", ws="none", timeout_graceful_shutdown=20)
    server = Server(config, service, listen("127.0.0.1", 0))
    port = server.listening.getsockname()[1]
    running = asyncio.create_task(serve(server))
    while not server.started:
        await asyncio.sleep(0.01)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=headers, trust_env=False,
                                 limits=httpx.Limits(max_connections=None)) as client:
        place = Place(service, server, client, port)
        try:
            async with asyncio.timeout(120):
                if ready:
                    await place.until_ready()
                yield place
        finally:
            server.should_exit = True
            await running


def png(seed=1, size=(32, 32)):
    """The bytes of a photo."""
    buffer = io.BytesIO()
    noise_photo(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
