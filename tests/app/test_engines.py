"""The service before engines: the same answers, several in turn, one that fails left out for a while."""

import asyncio
import base64
import io
import json
import shutil

import pytest
from PIL import Image

import app.engines
from app.engines import as_sent
from app.refusals import Refusal
from serving import data_url, png, serving
from test_api import played


def notes(folder, **example):
    """A folder as export.py writes it, as far as the service reads it."""
    folder.mkdir(exist_ok=True)
    (folder / "serving.json").write_text(json.dumps({
        "user_message": {f"{count} photos": f"How large, by {count} photos? {{text}} In cm." for count in range(6)},
        "sampling": {"temperature": 0.7, "max_new_tokens": 64},
        "example": {"text": "mug", "photos": [],
                    "greedy_answer": '{"length": 3, "width": 1, "height": 1, "unit": "cm"}', **example}}))
    return str(folder)


def without_times(answer):
    assert answer.status_code == 200, answer.text
    return {**answer.json(), "ms": None}


def test_the_service_before_itself_answers_the_same(tmp_path, said):
    async def scene():
        async with serving(tmp_path / "a", batch_size=1) as behind, serving(
                tmp_path / "b", model_path=notes(tmp_path / "served"),
                engine=[f"http://127.0.0.1:{behind.port}/v1"]) as place:
            for asked in ({}, {"samples": 1}, {"samples": 2, "photos": [data_url(png(1)), data_url(png(2))]},
                          {"photos": [data_url(png(1))] * 3}):
                one, other = await behind.ask("a mug", **asked), await place.ask("a mug", **asked)
                if len(asked.get("photos", ())) < 3:
                    assert without_times(one) == without_times(other)
                else:  # equal photos are sent once
                    assert other.json()["photos_used"] == 1 and "1 of 3 photos" in other.json()["warnings"][0]
            assert (await place.client.get("/health")).json()["workers"][0]["state"] == "ready"
            assert [one.status_code for one in await asyncio.gather(*(place.ask() for _ in range(40)))] == [200] * 40
            broken = await place.ask("mug", photos=[data_url(png(1)), data_url(png(2)[:80])])
            assert broken.status_code == 422 and broken.json()["error"]["param"] == "photos[1]"
            refused = await place.ask("bad photo")  # by the engine
            assert refused.status_code == 422 and "the engine refuses it" in refused.json()["error"]["message"]
    played(scene)
    assert not any("otherwise" in line for line in said)


def test_an_engine_that_answers_the_example_otherwise_is_named(tmp_path, said):
    async def scene(**example):
        async with serving(tmp_path / "a") as behind, serving(
                tmp_path / "b", model_path=notes(tmp_path / "served", **example),
                engine=[f"http://127.0.0.1:{behind.port}/v1"]):
            pass
    asyncio.run(scene(greedy_answer="{}"))
    assert sum("answers serving.json's example otherwise" in line for line in said) == 1
    said.clear()
    (tmp_path / "served" / "example_0.png").write_bytes(png())
    asyncio.run(scene(photos=["example_0.png"],
                      greedy_answer='{"length": 3, "width": 2, "height": 1, "unit": "cm"}'))
    asyncio.run(scene(photos=["example_0.png", "gone.png"]))
    assert ["otherwise" in line for line in said if line.startswith("WARNING")] == [False]


async def engine(how):
    """A stand-in that lists a model and then fails in some way; how many it was asked."""
    asked = []

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        models = head.startswith(b"GET")
        asked.append(head.split()[1])
        body = b'{"data": [{"id": "m"}]}' if models else how
        status = b"200 OK" if models or not (how.startswith(b"5") or b"error" in how) else b"500 Oh"
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (status, len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", asked


@pytest.mark.parametrize("how", [b"500", b"no JSON", b"{}", b'{"choices": []}', b'{"choices": [3, 4]}',
                                 b'{"error": {"message": "it chokes on: mug"}}'])
def test_an_engine_that_fails_is_left_out_and_the_other_answers(tmp_path, how, monkeypatch):
    monkeypatch.setattr(app.engines, "_FIRST_PAUSE", 60.0)

    async def scene():
        server, address, asked = await engine(how)
        async with serving(tmp_path / "a") as behind, serving(
                tmp_path / "b", model_path=notes(tmp_path / "served", photos=1), ready=False,
                engine=[address, f"http://127.0.0.1:{behind.port}/v1"]) as place:
            while any(one.state == "loading" for one in place.service.answerers):
                await asyncio.sleep(0.01)
            answers = await asyncio.gather(*(place.ask() for _ in range(10)))
            assert [answer.status_code for answer in answers] == [200] * 10
            states = (await place.client.get("/health")).json()
            assert states["status"] == "degraded" and states["workers"][0]["problem"]
            assert "mug" not in states["workers"][0]["problem"], "it goes into the log"
            tried = len(asked)
            await asyncio.gather(*(place.ask() for _ in range(10)))
            assert len(asked) == tried, "it is left out for a while"
        server.close()
    played(scene)


def test_engines_that_are_all_gone(tmp_path):
    async def scene():
        async with serving(tmp_path / "b", model_path=notes(tmp_path / "served"), ready=False,
                           engine=["http://127.0.0.1:1/v1"]) as place:
            answer = await place.ask()
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
            async with serving(tmp_path / "a") as behind:
                place.service.answerers[0].address = f"http://127.0.0.1:{behind.port}/v1"
                await place.until_ready()
                assert (await place.ask()).status_code == 200
            answer = await place.ask()
            assert answer.status_code == 503 and answer.json()["error"]["code"] in ("engine_failed", "not_ready")
    played(scene)


def test_photos_are_sent_as_training_saw_them(tmp_path):
    def sent(name, picture, **more):
        picture.save(tmp_path / name, **more)
        (url,) = as_sent([tmp_path / name])
        head, _, content = url.partition(";base64,")
        return head, base64.b64decode(content)

    red = Image.new("RGB", (24, 16), "red")
    for name, kind in (("a.png", "png"), ("a.jpg", "jpeg"), ("a.webp", "webp")):
        assert sent(name, red) == (f"data:image/{kind}", (tmp_path / name).read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    head, content = sent("turned.jpg", red, exif=exif)
    assert head == "data:image/png" and Image.open(io.BytesIO(content)).size == (16, 24)
    head, content = sent("clear.png", Image.new("RGBA", (9, 9), (0, 0, 0, 0)))
    assert Image.open(io.BytesIO(content)).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert sent("a.gif", red)[0] == "data:image/png"
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    assert len(as_sent([tmp_path / "a.png", tmp_path / "a.jpg", tmp_path / "copy.png"])) == 2
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(Refusal) as refused:
        as_sent([tmp_path / "a.png", tmp_path / "bad.png"])
    assert refused.value.field == "photos[1]"
    assert app.engines.Engine.hopeless is False
