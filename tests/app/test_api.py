"""What can be asked over HTTP, and every way of being refused: one status each, one JSON form."""

import asyncio
import contextlib
import json
import random
import socket
import struct
import zlib

import pytest
from loguru import logger

from serving import data_url, png, serving
from sheets.samples import Sample

KEY = "a-key-of-more-than-16-characters"


def played(scene):
    """Run a scene, a coroutine function, as a test."""
    return asyncio.run(scene())


def test_json_and_multipart_are_answered_alike(tmp_path):
    async def scene():
        async with serving(tmp_path, accept_at=0.9) as place:
            one = await place.ask("<b>mug</b> &amp; lid", photos=[data_url(png(1)), data_url(png(2))], samples=2,
                                  id="7")
            form = await place.client.post("/extract", data={"text": "mug & lid", "samples": "2", "id": "7"},
                                           files=[("photos", ("a.png", png(1))), ("photos", ("b.png", png(2)))])
            default = await place.ask("say {\"width\": 2, \"length\": 3000}")
            (folder,) = (tmp_path / "state").glob("photos-*")
            assert not list(folder.iterdir()), "photos go with their request"
        assert not folder.exists()
        assert one.status_code == form.status_code == 200
        one, form, default = one.json(), form.json(), default.json()
        assert {**one, "ms": 0} == {**form, "ms": 0}
        assert one["answer"] == {"length": 9, "width": 3, "height": 1, "unit": "cm"}  # 9 characters: tags are gone
        assert one["sizes_cm"] == [9, 3, 1] and one["id"] == "7" and one["photos_used"] == 2
        assert one["confidence"] == 1 and one["review"] is False and len(one["readings"]) == 2
        assert one["model"] == "fake@1" and one["warnings"] == [] and one["ms"]["model"] >= 0
        assert default["answer"] == {"length": 3000, "width": 2, "height": None, "unit": "cm"}
        assert default["review"] is True and "larger than 1000 cm" in default["warnings"][0]
        assert len(default["readings"]) == 4
    played(scene)


def test_an_unreadable_answer_is_for_a_person(tmp_path):
    async def scene():
        async with serving(tmp_path) as place:
            answer = (await place.ask("say I don't know")).json()
            assert answer["sizes_cm"] == [] and answer["answer"] is None and answer["review"] is True
            assert "can't be read" in answer["warnings"][0] and answer["readings"][0]["text"] == "I don't know"
            counts = await place.counts()
            assert counts['vlm_answers_total{reading="unreadable"}'] == 4
            assert counts['vlm_reviewed_products_total{review="yes"}'] == 1
    played(scene)


def bomb(width, height):
    """A PNG of few bytes and many pixels."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = zlib.compress(bytes((width // 8 + 1) * height))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
            + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


PHOTO = data_url(png())
BAD = {  # what is asked -> status, code, field
    "{": (400, "bad_json", None),
    "[" * 100_000: (400, "bad_json", None),
    "[]": (422, "bad_field", None),
    json.dumps({"photos": []}): (422, "bad_field", "text"),
    json.dumps({"text": " <br> "}): (422, "no_text", "text"),
    json.dumps({"text": "x" * 20_001}): (422, "text_too_long", "text"),
    json.dumps({"text": "x", "sample": 3}): (422, "unknown_field", "sample"),
    json.dumps({"text": "x", "samples": True}): (422, "bad_field", "samples"),
    json.dumps({"text": "x", "samples": 17}): (422, "bad_field", "samples"),
    json.dumps({"text": "x", "id": 3}): (422, "bad_field", "id"),
    json.dumps({"text": "x", "photos": [PHOTO] * 6}): (422, "too_many_photos", "photos"),
    json.dumps({"text": "x", "photos": [PHOTO, "/etc/passwd"]}): (422, "bad_photo", "photos[1]"),
    json.dumps({"text": "x", "photos": ["file:///etc/passwd"]}): (422, "bad_photo", "photos[0]"),
    json.dumps({"text": "x", "photos": ["data:image/png;base64,?"]}): (422, "bad_photo", "photos[0]"),
    json.dumps({"text": "x", "photos": ["data:image/png;base64,"]}): (422, "bad_photo", "photos[0]"),
    json.dumps({"text": "x", "photos": [data_url(b"<html>")]}): (422, "bad_photo", "photos[0]"),
    json.dumps({"text": "x", "photos": [data_url(bomb(8000, 6250))]}): (413, "bad_photo", "photos[0]"),
    json.dumps({"text": "x", "photos": [data_url(bytes(6 * 2 ** 20 + 1))]}): (413, "photo_too_large", "photos[0]"),
    json.dumps({"text": "x", "photos": ["https://shop.example/1.png"]}): (422, "host_not_listed", "photos[0]"),
    json.dumps({"text": "x", "photos": ["http://[::1/"]}): (422, "host_not_listed", "photos[0]"),
}


def is_error(answer, status, code, field=None):
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and (error["code"], error["param"]) == (code, field)
    return error["message"]


def test_what_is_refused_says_why(tmp_path):
    async def scene():
        async with serving(tmp_path, max_body_mb=9) as place:
            post = place.client.post
            for body, expected in BAD.items():
                is_error(await post("/extract", content=body, headers={"content-type": "application/json"}), *expected)
            is_error(await post("/extract", content="text=x"), 415, "wrong_type", "Content-Type")
            is_error(await post("/extract", data={"text": "x"}), 415, "wrong_type", "Content-Type")
            large = {"content-type": "application/json"}
            is_error(await post("/extract", content=bytes(9 * 2 ** 20 + 1), headers=large), 413, "body_too_large")
            is_error(await post("/extract", content=_endless(), headers=large), 413, "body_too_large")
            files = [("photos", ("a.png", png()))]
            is_error(await post("/extract", data={"text": "x", "colour": "red"}, files=files), 422, "unknown_field",
                     "colour")
            is_error(await post("/extract", data={"text": "x"}, files=files * 6), 422, "too_many_photos", "photos")
            is_error(await post("/extract", data={"text": "x"}, files=[("photos", ("a.png", bytes(6_300_000)))]), 413,
                     "photo_too_large", "photos[0]")
            is_error(await post("/extract", content=b"--x\r\n", headers={"content-type": "multipart/form-data"}), 400,
                     "bad_form")
            is_error(await place.client.get("/docs"), 404, "no_such_path")
            is_error(await place.client.get("/openapi.json"), 404, "no_such_path")
            is_error(await place.client.get("/extract"), 405, "wrong_method")
            counts = await place.counts()
            assert counts['vlm_photo_failures_total{reason="photo_too_large"}'] == 2
            assert (await place.ask()).status_code == 200 and place.service.waiting._admitted == 0
    played(scene)


async def _endless():
    for _ in range(192):
        yield bytes(2 ** 16)


def test_hosts_and_other_sites(tmp_path):
    async def scene():
        async with serving(tmp_path, allowed_hosts=("sizes.shop.example",)) as place:
            for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "10.0.0.7:80",
                         "Sizes.shop.example:443"):
                assert (await place.client.get("/livez", headers={"Host": host})).status_code == 200, host
            for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[", "", "a@b",
                         "evil.example@localhost:80", "localhost:80:80", "[::1"):
                is_error(await place.client.get("/livez", headers={"Host": host}), 400, "wrong_host")
            asking = {"json": {"text": "mug"}}
            here = f"http://127.0.0.1:{place.port}"
            assert (await place.client.post("/extract", **asking, headers={"Origin": here})).status_code == 200
            for origin in ("https://evil.example", "null", "http://localhost:1", "http://["):
                answer = await place.client.post("/extract", **asking, headers={"Origin": origin})
                is_error(answer, 403, "other_site")
                assert "access-control-allow-origin" not in answer.headers
    played(scene)


def test_keys(tmp_path):
    (tmp_path / "keys").write_text(f"# mine\n{KEY}\n\nanother-key-of-the-shop\n")

    async def scene():
        said = []
        sink = logger.add(lambda line: said.append(str(line)))
        async with serving(tmp_path, key_file=str(tmp_path / "keys"), headers={"Authorization": f"Bearer {KEY}"}
                           ) as place:
            for key, status in ((f"Bearer {KEY}", 200), ("bearer another-key-of-the-shop", 200), ("Bearer # mine", 401),
                                (f"Bearer {KEY}x", 401), ("Bearer", 401), (KEY, 401), (f"Basic {KEY}", 401),
                                ("Bearer wrøng", 401)):
                for path, method in (("/metrics", "GET"), ("/extract", "POST"), ("/v1/models", "GET"),
                                     ("/nowhere", "GET"), ("/extract_sheet/1", "GET")):
                    answer = await place.client.request(method, path, headers={"Authorization": key.encode("latin-1")},
                                                        json={"text": "a secret text"} if method == "POST" else None)
                    assert (answer.status_code == 401) == (status == 401), (key, path)
                if status == 401:
                    is_error(answer, 401, "wrong_key")
                    assert answer.headers["www-authenticate"] == "Bearer"
            for path in ("/livez", "/health", "/"):
                assert (await place.client.get(path, headers={"Authorization": ""})).status_code == 200
            place.service.answerers[0].problem = "/srv/models/secret can't be read"
            for key in ("", f"Bearer {KEY}x"):
                strangers = (await place.client.get("/health", headers={"Authorization": key})).json()
                assert strangers["workers"] == [{"state": "ready", "restarts": 0}] and "model" not in strangers
                assert strangers["status"] == "ready" and strangers["limits"]["keys"] is True
            own = (await place.client.get("/health")).json()
            assert own["workers"][0]["problem"].startswith("/srv") and own["model"] == "fake@1"
            assert (await place.client.get("/v1/models?secret=1")).status_code == 200
        logger.remove(sink)
        product = Sample(1, "-", "a secret text", (), (), "sheet", by_content=True).key[:16]
        assert any("POST /extract 200 24 B in, " in line and f"product {product}, 13 characters, 0 photos" in line
                   for line in said)
        assert not any(word in "".join(said) for word in ("secret", KEY, "another-key", "nowhere"))
    played(scene)


async def until_closed(connection):
    """What came on a connection until the other side closed it."""
    said = b""
    with contextlib.suppress(ConnectionError):  # what was sent meanwhile met a closed door
        while some := await asyncio.get_running_loop().sock_recv(connection, 2 ** 16):
            said += some
    return said


def test_a_body_that_comes_too_slowly_is_closed(tmp_path):
    async def scene():
        async with serving(tmp_path, body_seconds=0.3) as place:
            loop = asyncio.get_running_loop()
            with socket.create_connection(("127.0.0.1", place.port)) as connection:
                connection.setblocking(False)
                await loop.sock_sendall(connection, b"POST /extract HTTP/1.1\r\nHost: localhost\r\n"
                                                    b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
                said = asyncio.ensure_future(until_closed(connection))
                while not said.done():
                    with contextlib.suppress(ConnectionError):
                        await loop.sock_sendall(connection, b"x")
                    await asyncio.sleep(0.05)
            assert b"408" in said.result() and b"slow_body" in said.result()
            assert place.service.waiting._admitted == 0
    played(scene)


def test_a_client_that_breaks_off_while_it_sends(tmp_path):
    async def scene():
        async with serving(tmp_path) as place:
            with socket.create_connection(("127.0.0.1", place.port)) as connection:
                connection.sendall(b"POST /extract HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                                   b"Content-Length: 1000\r\n\r\n{")
                while not place.service.waiting._admitted:
                    await asyncio.sleep(0.01)
            while place.service.waiting._admitted:
                await asyncio.sleep(0.01)
            assert (await place.ask()).status_code == 200
    played(scene)


def odd_value(rng, depth=0):
    pick = rng.randrange(9 if depth < 3 else 6)
    if pick == 0:
        return rng.choice([None, True, False, 0, -1, 1, 4, 16, 17, 1e308, -0.5, 2 ** 70])
    if pick in (1, 2):
        return "".join(rng.choice(["a", "杯", "\ud800", "\0", "<|im_end|>", "<b>", "&#x41;", "\U0001f600", "9 cm "])
                       for _ in range(rng.randrange(12)))
    if pick == 3:
        return rng.choice([PHOTO, PHOTO[:60], "data:,", "data:image/png;base64,AAAA", "http://127.0.0.1/x", "x", ""])
    if pick in (4, 5):
        return rng.choice(["text", "photos", "samples"])
    if pick == 6:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(7))]
    return {rng.choice(["text", "photos", "samples", "id", "x", "role", "content"]): odd_value(rng, depth + 1)
            for _ in range(rng.randrange(5))}


def odd_body(rng, seed):
    body = {"text": odd_value(rng, 3), "photos": odd_value(rng), "samples": odd_value(rng, 3), "id": odd_value(rng, 3)}
    body = {name: value for name, value in body.items() if rng.random() < 0.7}
    written = json.dumps(rng.choice([body, {**body, "text": "mug"}, odd_value(rng)])).encode()
    if seed % 4 == 0:
        broken = bytearray(written)
        for _ in range(3):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken)
    return written


def odd_photo(rng):
    content = bytearray(png(rng.randrange(5), (rng.randrange(1, 60), rng.randrange(1, 60))))
    for _ in range(rng.randrange(1, 9)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[:rng.randrange(1, len(content) + 1)])


def test_odd_bodies_and_photos_never_break_it(tmp_path, bodies=400, photos=100):
    async def scene():
        statuses = set()
        async with serving(tmp_path, queue_size=1000) as place:
            for seed in range(bodies):
                rng = random.Random(seed)
                kind = rng.choice(["application/json"] * 3 + ["multipart/form-data; boundary=x", "text/plain"])
                path = rng.choice(["/extract", "/extract", "/v1/chat/completions"])
                answer = await place.client.post(path, content=odd_body(rng, seed), headers={"content-type": kind})
                statuses.add(answer.status_code)
                assert answer.status_code in (200, 400, 413, 415, 422), (seed, answer.text)
            for seed in range(photos):
                answer = await place.ask("mug", photos=[data_url(odd_photo(random.Random(seed)))])
                assert answer.status_code in (200, 413, 422), (seed, answer.text)
        assert statuses >= {200, 400, 415, 422}
    played(scene)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_photos_by_address_only_from_hosts_that_are_listed(tmp_path, name):
    async def scene():
        asked = []

        async def shop(reader, writer):
            asked.append(await reader.readline())
            writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://8.8.8.8/\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(shop, "127.0.0.1", 0)
        address = f"http://{name}:{server.sockets[0].getsockname()[1]}/1.png"
        async with serving(tmp_path, fetch_hosts=(name,)) as place:
            message = is_error(await place.ask("mug", photos=[address]), 422, "not_fetched", "photos[0]")
            assert "private network" in message and asked == []
            other = address.replace(name, "localhost.example")
            is_error(await place.ask("mug", photos=[other]), 422, "host_not_listed", "photos[0]")
        server.close()
    played(scene)


def test_photos_by_address_are_fetched_straight(tmp_path, monkeypatch):
    from sheets import fetch

    monkeypatch.setattr(fetch, "_is_public", lambda address: True)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")

    async def scene():
        async def shop(reader, writer):
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
            head = b"200 OK" if path == b"/1.png" else b"302 Found\r\nLocation: /1.png"
            body = png() if path == b"/1.png" else b""
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (head, len(body), body))
            writer.close()

        server = await asyncio.start_server(shop, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with serving(tmp_path, fetch_hosts=("127.0.0.1",)) as place:
            answer = await place.ask("mug", photos=[f"{address}/1.png"])
            assert answer.status_code == 200 and answer.json()["photos_used"] == 1
            is_error(await place.ask("mug", photos=[f"{address}/moved.png"]), 422, "not_fetched", "photos[0]")
        server.close()
    played(scene)
