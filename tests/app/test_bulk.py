"""Sheets: every row back with its answer, those asked one by one first, gone on with after a restart."""

import asyncio
import hashlib
import io

import pandas as pd
import pytest

import app.bulk
from app.sheet_process import Line, work
from evidence.report import write_sheet
from ground.errors import UserError
from serving import FAKE_SHEETS, png, serving
from test_api import is_error, played


def workbook(tmp_path, rows):
    write_sheet(tmp_path / "sent.xlsx", {"t": rows})
    return (tmp_path / "sent.xlsx").read_bytes()


async def send(place, content, name="sent.xlsx", **fields):
    return await place.client.post("/extract_sheet", data=fields, files={"sheet": (name, content)})


async def until(place, key, *statuses):
    while True:
        state = (await place.client.get(f"/extract_sheet/{key}")).json()
        if state["status"] in statuses:
            return state
        await asyncio.sleep(0.05)


def test_a_sheet_comes_back_with_its_answers(tmp_path, capfd):
    (tmp_path / "cache").mkdir()
    address = "https://shop.example/1.png"
    (tmp_path / "cache" / (hashlib.md5(address.encode()).hexdigest() + ".png")).write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))
    content = workbook(tmp_path, [
        {"sku": "a", "text": "mug", "sku_img": address}, {"sku": "b", "text": "a bowl", "sku_img": ""},
        {"sku": "c", "text": "vase", "sku_img": str(tmp_path / "secret.png")},
        {"sku": "d", "text": "lamp", "sku_img": "https://other.example/2.png"},
        {"sku": "e", "text": "say I don't know", "sku_img": ""},
        {"sku": "f", "text": "toy", "sku_img": f"picture:../../../../..{tmp_path}/secret.png"}])

    async def scene():
        async with serving(tmp_path, image_cache_dir=str(tmp_path / "cache")) as place:
            sent = await send(place, content, samples="2")
            assert sent.status_code == 202 and sent.json()["status"] == "queued"
            key = sent.json()["id"]
            assert is_error(await place.client.get(f"/extract_sheet/{key}/file"), 409, "not_done")
            state = await until(place, key, "done", "failed")
            assert (state["done"], state["products"], state["problem"]) == (3, 3, None)
            assert (await send(place, content, samples="2")).json() == state  # it is there already
            answer = await place.client.get(f"/extract_sheet/{key}/file")
            assert "sent.answers.xlsx" in answer.headers["content-disposition"]
            found = pd.read_excel(io.BytesIO(answer.content), dtype=str, keep_default_na=False)
            assert (await place.counts())["vlm_confidence_ratio_count"] == 3
            bad = (await send(place, b"colour\nred\n", "bad.csv")).json()["id"]
            problem = (await until(place, bad, "done", "failed"))["problem"]
            assert problem.startswith("bad.csv") and "text" in problem and str(tmp_path) not in problem
            assert (await place.client.delete(f"/extract_sheet/{bad}")).status_code == 200
            assert (await place.client.delete(f"/extract_sheet/{key}")).status_code == 200
            is_error(await place.client.get(f"/extract_sheet/{key}"), 404, "no_such_sheet")
        assert not list((tmp_path / "state" / "sheets").iterdir())
        return found

    found = played(scene)
    logged = capfd.readouterr().err
    assert "products answered" in logged and "not fetched" not in logged
    assert not any(word in logged for word in ("other.example/2", "secret.png", "vase"))
    assert found["sku"].tolist() == list("abcdef") and found["row"].tolist() == list("234567")
    assert found["size_1_cm"].tolist() == ["3", "6", "", "", "", ""]
    assert found["size_2_cm"].tolist()[:2] == ["3", "3"]  # the products answered together
    assert found["review"].tolist() == ["", "", "yes", "yes", "yes", "yes"]
    assert all("photo missing" in found["problem"][row] for row in (2, 3, 5))


def test_a_sheet_is_gone_on_with_after_a_restart(tmp_path):
    async def first():
        async with serving(tmp_path, batch_size=2, sheets=FAKE_SHEETS) as place:
            key = (await send(place, b"mug\n" * 4 + f"until-{tmp_path}/gate\n".encode() * 12, "a.csv")).json()["id"]
            while (await place.client.get(f"/extract_sheet/{key}")).json()["done"] < 4:
                await asyncio.sleep(0.01)
        return key

    async def second():
        async with serving(tmp_path, batch_size=2, sheets=FAKE_SHEETS) as place:
            state = await until(place, key, "done", "failed")
            asked = (await place.counts())["vlm_batch_size_sum"]
            return state, asked

    key = played(first)
    (tmp_path / "gate").touch()
    state, asked = played(second)
    assert state["status"] == "done" and state["products"] == 16 and asked == 12


def test_others_are_answered_meanwhile_and_a_lost_worker_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(app.bulk, "_PAUSE", 0.1)
    async def scene():
        async with serving(tmp_path, batch_size=2, sheets=FAKE_SHEETS) as place:
            key = (await send(place, b"slow\n" * 12, "a.csv")).json()["id"]
            await until(place, key, "answering")
            assert (await place.ask()).status_code == 200
            assert (await place.ask("die")).status_code == 503
            assert (await until(place, key, "done", "failed"))["status"] == "done"
    played(scene)


@pytest.mark.parametrize(("name", "content", "why"), [
    ("sheet.xlsx", b"no workbook", "sheet.xlsx"), ("sheet.csv", b"colour\nred\n", "text"),
    ("sheet.json", b"[" * 10_000, "sheet.json"), ("sheet.csv", b"text\n" + b"mug\n" * 3, "3 products, at most 2")])
def test_a_sheet_that_can_not_be_read(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    answer = {"model_path": "fake", "data_path": str(tmp_path / name), "output_path": str(tmp_path / "answers.xlsx"),
              "image_cache_dir": str(tmp_path / "photos")}
    with pytest.raises(UserError, match=why):
        work({"answer": answer, "image_cache_dir": None, "max_rows": 2, "fetch_hosts": [], "fetching": {}},
             Line(io.StringIO()))


def test_what_is_no_sheet_is_refused(tmp_path):
    async def scene():
        async with serving(tmp_path, max_sheet_mb=0.5) as place:
            is_error(await send(place, b"x", "a.exe"), 415, "wrong_sheet", "sheet")
            is_error(await send(place, b"x", "a.csv", samples="0"), 422, "bad_field", "samples")
            is_error(await send(place, b"x", "a.csv", colour="red"), 422, "unknown_field", "colour")
            is_error(await place.client.post("/extract_sheet", json={}), 415, "wrong_type", "Content-Type")
            is_error(await send(place, bytes(600_000), "a.csv"), 413, "body_too_large")
            is_error(await place.client.get("/extract_sheet/../../etc/passwd"), 404, "no_such_path")
            is_error(await place.client.get("/extract_sheet/nothing"), 404, "no_such_sheet")
    played(scene)


def test_a_product_that_kills_workers_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(app.bulk, "_PAUSE", 0.1)

    async def scene():
        async with serving(tmp_path, batch_size=4, sheets=FAKE_SHEETS) as place:
            key = (await send(place, b"mug\nbowl\ndie\nvase\n", "a.csv")).json()["id"]
            await until(place, key, "done", "failed")
            assert place.service.answerers[0].restarts == 3
        return (tmp_path / "state" / "sheets" / key / "answers.xlsx").read_text().splitlines()[1:]

    assert ["answers" in line for line in played(scene)] == [True, True, False, True]
