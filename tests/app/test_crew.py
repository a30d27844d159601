"""Worker processes and the queue: batches, an end to the queue, deadlines, clients that leave, workers that are lost.
"""

import asyncio
import os
import signal

import pytest

import app.crew
from app.metrics import Metrics
from app.refusals import Refusal
from app.waiting import Product, Waiting
from config import LimitOptions
from serving import serving
from test_api import is_error


def play(scene):
    """Run a scene, a coroutine function, as a test."""
    asyncio.run(scene())


class Gate:
    """Holds a worker until it is opened, so that what comes meanwhile must wait, however fast this machine is."""

    def __init__(self, folder, place, **more):
        self.path, self._place = folder / "gate", place
        self.held = asyncio.ensure_future(place.ask(f"until {self.path}", **more))

    async def closed(self):
        """Wait until the worker is held."""
        while not (await self._place.counts()).get("vlm_batch_size_count"):
            await asyncio.sleep(0.01)

    async def until_waiting(self, count):
        while len(self._place.service.waiting) != count:
            await asyncio.sleep(0.01)

    async def open(self):
        self.path.touch()
        assert (await self.held).status_code == 200


def together(answers):
    """How many products each was answered with: the fake worker says so."""
    return [answer.json()["answer"]["height"] for answer in answers]


def test_products_are_answered_together_as_they_come(tmp_path):
    async def scene():
        async with serving(tmp_path, batch_size=4, batch_wait_ms=0) as place:
            gate = Gate(tmp_path, place)
            await gate.closed()
            asked = [asyncio.ensure_future(place.ask(f"m{'u' * index}g", samples=3)) for index in range(4)]
            await gate.until_waiting(4)
            asked += [asyncio.ensure_future(place.ask("mug", samples=1 + index % 2)) for index in range(4)]
            await gate.until_waiting(8)
            await gate.open()
            answers = await asyncio.gather(*asked)
            assert together(answers) == [4] * 4 + [2] * 4  # one batch for each number of samples
            counts = await place.counts()
        assert counts["vlm_batch_size_count"] == 4 and counts["vlm_batch_size_sum"] == 9
        assert counts['vlm_requests_total{endpoint="/extract",outcome="200"}'] == 9
        assert counts["vlm_queue_seconds_count"] == 9
    play(scene)


def test_a_first_product_is_waited_with_for_others():
    async def scene():
        waiting = Waiting(LimitOptions(batch_wait_ms=60_000), Metrics())
        waiting.takers = 1
        taking = asyncio.ensure_future(waiting.take(2))
        asks = [asyncio.ensure_future(waiting.ask(Product("mug")))]
        await asyncio.sleep(0.01)
        assert not taking.done()
        asks.append(asyncio.ensure_future(waiting.ask(Product("mug"))))
        await asyncio.sleep(0)
        assert len(await waiting.take(2)) == 2  # enough for a batch: not waited
        for task in [taking, *asks]:
            task.cancel()
    play(scene)


def test_the_nearest_in_length_go_with_the_first():
    async def scene():
        waiting = Waiting(LimitOptions(batch_wait_ms=0), Metrics())
        waiting.takers = 1
        asks = [asyncio.ensure_future(waiting.ask(Product("x" * length)))
                for length in (100, 5000, 110, 4000, 90, 101)]
        sheets = [asyncio.ensure_future(waiting.ask_for_sheet(Product("of a sheet")))]
        await asyncio.sleep(0)
        first = await waiting.take(4)
        assert sorted(len(job.product.text) for job in first) == [90, 100, 101, 110]
        second = await waiting.take(4)
        assert [job.product.text[:3] for job in second] == ["xxx", "xxx", "of "]  # a sheet's fill what is left
        for task in asks + sheets:
            task.cancel()
    play(scene)


def test_a_full_queue_says_so_at_once(tmp_path):
    async def scene():
        async with serving(tmp_path, queue_size=8, batch_size=4) as place:
            gate = Gate(tmp_path, place)
            await gate.closed()
            asked = [asyncio.ensure_future(place.ask()) for _ in range(100)]
            while sum(task.done() for task in asked) < 92:
                await asyncio.sleep(0.01)
            await gate.open()
            answers = await asyncio.gather(*asked)
            statuses = [answer.status_code for answer in answers]
            assert (statuses.count(200), statuses.count(429)) == (8, 92)
            refused = next(answer for answer in answers if answer.status_code == 429)
            is_error(refused, 429, "busy")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await place.ask()).status_code == 200
    play(scene)


def test_who_would_wait_too_long_is_told_so():
    async def scene():
        waiting = Waiting(LimitOptions(max_wait=3), Metrics())
        waiting.takers = 2
        waiting.done(1, 1.0)  # a second a product
        asks = [asyncio.ensure_future(waiting.ask(Product("mug"))) for _ in range(6)]
        await asyncio.sleep(0)
        with waiting.admission():
            pass
        asks.append(asyncio.ensure_future(waiting.ask(Product("mug"))))
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as refused, waiting.admission():
            pass
        assert refused.value.status == 429 and refused.value.retry_after == 3.5
        for task in asks:
            task.cancel()
    play(scene)


def test_an_answer_that_takes_too_long(tmp_path):
    async def scene():
        async with serving(tmp_path, deadline=0.5) as place:
            answer = await place.ask(f"until {tmp_path / 'gate'}")
            is_error(answer, 504, "too_slow")
            (tmp_path / "gate").touch()
            while (await place.ask()).status_code != 200:
                pass
    play(scene)


def test_a_client_that_leaves_is_not_computed(tmp_path):
    async def scene():
        async with serving(tmp_path, batch_size=1) as place:
            gate = Gate(tmp_path, place)
            await gate.closed()
            leaving = [asyncio.ensure_future(place.ask(f"leaves {index}")) for index in range(20)]
            await gate.until_waiting(20)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            await gate.until_waiting(0)
            await gate.open()
            assert (await place.ask()).status_code == 200
            assert (await place.counts())["vlm_batch_size_sum"] == 2, "those who left were computed"
            assert place.service.waiting._admitted == 0
    play(scene)


@pytest.mark.parametrize(("text", "why", "limits"), [
    ("die", "ended", {}), ("fall silent", "sign of life", {"silent_seconds": 3}),
    ("hang", "one batch", {"hang_seconds": 1.5})])
def test_a_lost_worker_is_said_at_once_and_started_again(tmp_path, text, why, limits, monkeypatch):
    monkeypatch.setattr(app.crew, "_FIRST_PAUSE", 2.0)

    async def scene():
        async with serving(tmp_path, **limits) as place:
            process = place.service.answerers[0]
            answer = await place.ask(text)
            is_error(answer, 503, "worker_lost")
            is_error(await place.ask(), 503, "not_ready")
            assert answer.headers["retry-after"]
            health = await place.client.get("/health")
            assert health.status_code == 503 and why in process.problem
            await place.until_ready()
            assert (await place.ask()).status_code == 200 and process.restarts == 1
            assert (await place.counts())['vlm_worker_restarts_total{worker="auto"}'] == 1
    play(scene)


def test_a_worker_may_be_silent_while_it_starts(tmp_path):
    async def scene():
        async with serving(tmp_path, model_path="late", silent_seconds=1) as place:
            assert place.service.answerers[0].restarts == 0
    play(scene)


def test_a_request_that_was_being_read_when_the_worker_was_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(app.crew, "_FIRST_PAUSE", 2.0)

    async def scene():
        async with serving(tmp_path) as place:
            process, read = place.service.answerers[0], asyncio.Event()

            async def body():
                yield b'{"text": '
                await read.wait()
                yield b'"mug"}'
            reading = asyncio.ensure_future(place.client.post("/extract", content=body(),
                                                              headers={"content-type": "application/json"}))
            while not place.service.waiting._admitted:
                await asyncio.sleep(0.01)
            assert (await place.ask("die")).status_code == 503
            read.set()
            is_error(await reading, 503, "not_ready")
            assert process.state != "ready"
    play(scene)


def test_one_of_two_workers_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(app.crew, "_FIRST_PAUSE", 60.0)

    async def scene():
        async with serving(tmp_path, devices=("0", "1"), batch_size=1) as place:
            answers = await asyncio.gather(place.ask("die"), *(place.ask("slow") for _ in range(3)))
            assert [answer.status_code for answer in answers] == [503, 200, 200, 200]
            assert (await place.client.get("/health")).json()["status"] == "degraded"
            assert (await place.ask()).status_code == 200
    play(scene)


def test_a_product_that_fails_alone(tmp_path):
    async def scene():
        async with serving(tmp_path) as place:
            good, bad = await asyncio.gather(place.ask(), place.ask("bad photo"))
            assert good.status_code == 200 and bad.status_code == 422
            assert bad.json()["error"] == {"message": "it is damaged", "type": "invalid_request_error",
                                           "param": "photos[0]", "code": "bad_photo"}
    play(scene)


def test_what_was_accepted_is_answered_before_the_end(tmp_path):
    async def scene():
        async with serving(tmp_path, batch_size=2) as place:
            texts = [f"until {tmp_path / 'ending'}"] * 2 + ["mug"] * 6
            asked = [asyncio.ensure_future(place.ask(text)) for text in texts]
            while place.service.waiting._admitted < 8:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            while not place.server.should_exit:
                await asyncio.sleep(0.01)
            (tmp_path / "ending").touch()
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers] == [200] * 8
    play(scene)


def test_what_can_not_be_answered_in_time_is_told_so(tmp_path):
    async def scene():
        async with serving(tmp_path, batch_size=1, drain_seconds=0.5) as place:
            asked = [asyncio.ensure_future(place.ask(text)) for text in ("hang", "mug", "mug")]
            while place.service.waiting._admitted < 3:
                await asyncio.sleep(0.01)
            place.server.handle_exit(signal.SIGTERM, None)
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers].count(503) >= 1 and answers[0].status_code == 503
            assert all(answer.status_code in (200, 503) for answer in answers)  # those before the one that hangs
    play(scene)


def test_a_model_that_can_not_be_opened_ends_the_service(tmp_path):
    async def scene():
        async with serving(tmp_path, model_path="broken", ready=False) as place:
            while not place.server.should_exit:
                await asyncio.sleep(0.02)
            assert place.server.hopeless == "no such model"
    play(scene)
