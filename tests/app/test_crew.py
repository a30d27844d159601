"""Worker processes and the queue: batches, an end to the queue, deadlines, clients that leave, workers that are lost.
"""

import asyncio
import os
import signal

import pytest

from app.metrics import Metrics
from app.refusals import Refusal
from app.waiting import Product, Waiting
from config import LimitOptions
from serving import serving


def heights(answers):
    """How many products each was answered with: the fake worker says so."""
    return [answer.json()["answer"]["height"] for answer in answers]


def test_products_are_answered_together_as_they_come(tmp_path):
    async def scene():
        async with serving(tmp_path, batch_size=4, batch_wait_ms=100) as place:
            answers = await asyncio.gather(*(place.ask(f"m{'u' * index}g") for index in range(4)))
            assert heights(answers) == [4] * 4
            mixed = await asyncio.gather(*(place.ask("mug", samples=1 + index % 2) for index in range(4)))
            assert heights(mixed) == [2] * 4  # one batch for each number of samples
            counts = await place.counts()
        assert counts["vlm_batch_size_count"] == 3 and counts["vlm_batch_size_sum"] == 8
        assert counts['vlm_requests_total{endpoint="/extract",outcome="200"}'] == 8
        assert counts["vlm_queue_seconds_count"] == 8
    asyncio.run(scene())


def test_the_nearest_in_length_go_with_the_first():
    async def scene():
        waiting = Waiting(LimitOptions(batch_wait_ms=0), Metrics())
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
    asyncio.run(scene())


def test_a_full_queue_says_so_at_once(tmp_path):
    async def scene():
        async with serving(tmp_path, queue_size=8, batch_size=4) as place:
            answers = await asyncio.gather(*(place.ask("slow") for _ in range(100)))
            statuses = [answer.status_code for answer in answers]
            assert statuses.count(200) + statuses.count(429) == 100
            assert 8 <= statuses.count(200) <= 40
            refused = next(answer for answer in answers if answer.status_code == 429)
            assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "busy"
            assert (await place.ask()).status_code == 200
    asyncio.run(scene())


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
    asyncio.run(scene())


def test_an_answer_that_takes_too_long(tmp_path):
    async def scene():
        async with serving(tmp_path, deadline=0.2) as place:
            answer = await place.ask("slow")
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "too_slow"
            assert (await place.ask()).status_code == 200
    asyncio.run(scene())


def test_a_client_that_leaves_is_not_computed(tmp_path):
    async def scene():
        async with serving(tmp_path, batch_size=1) as place:
            first = asyncio.ensure_future(place.ask("slow"))
            while not (await place.counts()).get("vlm_batch_size_count"):
                await asyncio.sleep(0.01)
            leaving = [asyncio.ensure_future(place.ask(f"leaves {index}")) for index in range(20)]
            while len(place.service.waiting) < 20:
                await asyncio.sleep(0.01)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            assert (await first).status_code == 200 and (await place.ask()).status_code == 200
            assert (await place.counts())["vlm_batch_size_sum"] == 2, "those who left were computed"
            assert place.service.waiting._admitted == 0
    asyncio.run(scene())


@pytest.mark.parametrize(("text", "why"), [("die", "ended"), ("fall silent", "sign of life"), ("hang", "one batch")])
def test_a_lost_worker_is_said_at_once_and_started_again(tmp_path, text, why):
    async def scene():
        async with serving(tmp_path, silent_seconds=0.6, hang_seconds=1.2) as place:
            process = place.service.answerers[0]
            asked = [asyncio.ensure_future(place.ask(text)), asyncio.ensure_future(place.ask("slow", samples=2))]
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers] == [503, 503]
            assert answers[0].json()["error"]["code"] == "worker_lost" and answers[0].headers["retry-after"]
            health = await place.client.get("/health")
            assert health.status_code == 503 and why in process.problem
            await place.until_ready()
            assert (await place.ask()).status_code == 200 and process.restarts == 1
            assert (await place.counts())['vlm_worker_restarts_total{worker="auto"}'] == 1
    asyncio.run(scene())


def test_one_of_two_workers_is_lost(tmp_path):
    async def scene():
        async with serving(tmp_path, devices=("0", "1"), batch_size=1) as place:
            answers = await asyncio.gather(place.ask("die"), *(place.ask("slow") for _ in range(3)))
            assert [answer.status_code for answer in answers] == [503, 200, 200, 200]
            assert (await place.client.get("/health")).json()["status"] == "degraded"
            assert (await place.ask()).status_code == 200
    asyncio.run(scene())


def test_a_product_that_fails_alone(tmp_path):
    async def scene():
        async with serving(tmp_path, batch_wait_ms=100) as place:
            good, bad = await asyncio.gather(place.ask(), place.ask("bad photo"))
            assert good.status_code == 200 and bad.status_code == 422
            assert bad.json()["error"] == {"message": "it is damaged", "type": "invalid_request_error",
                                           "param": "photos[0]", "code": "bad_photo"}
    asyncio.run(scene())


def test_what_was_accepted_is_answered_before_the_end(tmp_path):
    async def scene():
        async with serving(tmp_path, batch_size=2) as place:
            asked = [asyncio.ensure_future(place.ask("slow")) for _ in range(8)]
            while len(place.service.waiting) < 6:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers] == [200] * 8
    asyncio.run(scene())


def test_what_can_not_be_answered_in_time_is_told_so(tmp_path):
    async def scene():
        async with serving(tmp_path, batch_size=1, drain_seconds=0.5) as place:
            asked = [asyncio.ensure_future(place.ask(text)) for text in ("slow", "hang", "slow")]
            while len(place.service.waiting) < 2:
                await asyncio.sleep(0.01)
            place.server.handle_exit(signal.SIGTERM, None)
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200, 503, 503]
    asyncio.run(scene())


def test_a_model_that_can_not_be_opened_ends_the_service(tmp_path):
    async def scene():
        async with serving(tmp_path, model_path="broken", ready=False) as place:
            while not place.server.should_exit:
                await asyncio.sleep(0.02)
            assert place.server.hopeless == "no such model"
    asyncio.run(scene())
