"""Serve a trained model over HTTP; app/run.sh starts and stops it.

    python app/server.py --model_path outputs/vlm_grpo/best
    python app/server.py --engine http://127.0.0.1:8001/v1 --model_path served
"""

if __name__ == "__main__":  # before anything heavy is imported, so that --help and a misspelt option answer at once
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's folder instead of this one
    from config import ServiceOptions
    from ground.commands import start

    start(ServiceOptions, "Serve a trained model over HTTP.", "app.server")

import asyncio
import contextlib
import ipaddress
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from loguru import logger

from app.web import Service, make_app
from config import ServiceOptions
from ground.commands import TIMED, log_to_console
from ground.errors import OptionError
from ground.files import write_text

ROOT = Path(__file__).resolve().parent.parent
READY_FILE = "ready"  # in state_dir: how the service is and where, for run.sh
_SPARE_SECONDS = 5  # that what was refused at the end of the drain has to be told
_LOOK_EVERY = 0.2  # seconds


class Server(uvicorn.Server):
    """uvicorn, told of the end by a signal: what was accepted is answered, within the time for it."""

    def __init__(self, config: uvicorn.Config, service: Service, listening: socket.socket):
        super().__init__(config)
        self._service, self.listening, self._address = service, listening, address_of(listening)
        self._state = Path(service.options.state_dir) / READY_FILE
        self.hopeless = ""  # why no model can be opened

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to end, at a signal; at a second Ctrl-C at once. The signal is not raised once more: status 0."""
        self._service.waiting.ending = self._service.waiting.ending or time.monotonic()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def watch(self) -> None:
        """Write down how the service is, end it when there is no hope, give up what still waits when it drains."""
        written, waiting = "", self._service.waiting
        while True:
            status = self._service.health()["status"]
            if status != written:
                with contextlib.suppress(OSError):  # a full disk must not keep the service from ending
                    write_text(self._state, f"{status}: {self._address}\n")
                written = status
            if all(getattr(one, "hopeless", False) for one in self._service.answerers):
                self.hopeless, self.should_exit = self._service.answerers[0].problem, True
            if waiting.ending and time.monotonic() - waiting.ending > self._service.options.drain_seconds:
                waiting.give_up()
            await asyncio.sleep(_LOOK_EVERY)


def demo_model() -> str:
    """Find the demo's trained model; raises OptionError saying how to make it."""
    steps = yaml.safe_load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"))["max_steps"]
    folder = ROOT / "outputs/demo" / f"step_{steps:06d}"
    if not folder.is_dir():
        raise OptionError(f"--model_path is missing, and the demo's trained model is not there ({folder}): name a "
                          "trained model, or make the demo's with make demo")
    return str(folder)


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before any model loads; raises OptionError when it is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # The protocol is named, or asyncio would leave Nagle's delay of 40 ms on.
        listening = socket.socket(found[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(found[4])
    except OSError as problem:
        raise OptionError(f"--host {host} --port {port} can't be listened at: {problem.strerror or problem}. Another "
                          "program may have the port: give another --port") from None
    listening.set_inheritable(False)
    return listening


def address_of(listening: socket.socket) -> str:
    """Write where the service is to be found."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ipaddress.ip_address(host.partition("%")[0]).version == 6 else \
        f"http://{host}:{port}"


async def serve(server: Server) -> None:
    """Serve until a signal ends it."""
    watching = asyncio.create_task(server.watch())
    try:
        await server.serve([server.listening])
    finally:
        watching.cancel()


def main(options: ServiceOptions) -> int:
    """Serve; status 2 when the model can't be opened."""
    log_to_console(TIMED)
    if not options.model_path and not options.checkpoint_path:
        options = replace(options, model_path=demo_model())
    listening = listen(options.host, options.port)
    Path(options.state_dir).mkdir(parents=True, exist_ok=True)
    service = Service(options)
    config = uvicorn.Config(make_app(service), log_config=None, access_log=False, server_header=False, ws="none",
                            lifespan="on", backlog=4096, timeout_keep_alive=15,
                            timeout_graceful_shutdown=int(options.drain_seconds + _SPARE_SECONDS))
    server = Server(config, service, listening)
    logger.info(f"listening at {address_of(listening)}")
    try:
        asyncio.run(serve(server))
    finally:
        (Path(options.state_dir) / READY_FILE).unlink(missing_ok=True)
    if server.hopeless:
        logger.error(server.hopeless)
        return 2
    logger.info("ended")
    return 0
