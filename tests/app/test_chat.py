"""OpenAI's protocol: what is honoured, and that nothing else is passed over in silence."""

import asyncio
import json

import pytest

from serving import data_url, png, serving
from test_api import is_error, played

PHOTO = {"type": "image_url", "image_url": {"url": data_url(png())}}


def message(*content):
    return [{"role": "user", "content": list(content) if len(content) != 1 else content[0]}]


def text(words="mug"):
    return {"type": "text", "text": words}


def answers(completion):
    assert completion.status_code == 200, completion.text
    choices = completion.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [json.loads(choice["message"]["content"]) for choice in choices]


def test_one_message_is_answered(tmp_path):
    async def scene():
        async with serving(tmp_path) as place:
            async def chat(**body):
                return await place.client.post("/v1/chat/completions", json=body)

            listed = (await place.client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in listed] == ["fake@1"]
            plain = await chat(messages=message("mug"))
            assert answers(plain) == [{"length": 3, "width": 1, "height": 1, "unit": "cm"}]  # one, as the protocol says
            assert plain.json()["object"] == "chat.completion" and plain.json()["model"] == "fake@1"
            assert plain.json()["choices"][0]["finish_reason"] == "stop"
            parts = message(PHOTO, {**PHOTO, "image_url": {"url": data_url(png(2)), "detail": "auto"}}, text())
            many = await chat(messages=parts, n=16, temperature=0.7, model="fake@1", top_p=1, max_tokens=64,
                              max_completion_tokens=100, stream=False, response_format={"type": "text"})
            assert len(answers(many)) == 16 and answers(many)[0]["width"] == 3
            assert len(answers(await chat(messages=message("mug"), n=3, temperature=0))) == 3
    played(scene)


def test_the_wording_of_training_is_put_around_a_text_once(tmp_path):
    async def scene():
        async with serving(tmp_path) as place:
            for words in ("mug", "How large, by 0 photos? mug In cm.", "How large, by 1 photos? mug In cm."):
                found = answers(await place.client.post("/v1/chat/completions", json={"messages": message(words)}))
                assert found[0]["length"] == (len(words) if "1" in words else 3)
            two = "How large, by 2 photos? a mug In cm."
            found = answers(await place.client.post("/v1/chat/completions", json={"messages": message(
                PHOTO, {"type": "image_url", "image_url": {"url": data_url(png(2))}}, text(two))}))
            assert found[0]["length"] == 5
    played(scene)


@pytest.mark.parametrize(("body", "field"), [
    ({"messages": message("mug"), "seed": 1}, "seed"),
    ({"messages": message("mug"), "tools": []}, "tools"),
    ({"messages": message("mug"), "stream": True}, "stream"),
    ({"messages": message("mug"), "top_p": 0.9}, "top_p"),
    ({"messages": message("mug"), "temperature": 0.5}, "temperature"),
    ({"messages": message("mug"), "temperature": False}, "temperature"),
    ({"messages": message("mug"), "n": 0}, "n"),
    ({"messages": message("mug"), "n": 17}, "n"),
    ({"messages": message("mug"), "n": "4"}, "n"),
    ({"messages": message("mug"), "model": "gpt-5"}, "model"),
    ({"messages": message("mug"), "max_tokens": 10}, "max_tokens"),
    ({"messages": message("mug"), "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": []}, "messages"),
    ({}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    ({"messages": message("mug") * 2}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": message(text(), text())}, "messages[0].content"),
    ({"messages": message(PHOTO, PHOTO)}, "messages[0].content"),
    ({"messages": message({"type": "video_url"}, text())}, "messages[0].content[0]"),
    ({"messages": message({"type": "image_url", "image_url": "x"}, text())}, "messages[0].content[0].image_url"),
    ({"messages": message({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}, text())},
     "messages[0].content[0].image_url.detail"),
])
def test_what_can_not_be_honoured_is_named(body, field):
    from app.chat import read_chat
    from app.refusals import Refusal

    about = {"model": "fake@1", "temperature": 0.7, "max_length": 64}
    with pytest.raises(Refusal) as refused:
        read_chat(body, about)
    assert refused.value.status == 400 and refused.value.field == field


def test_the_log_names_a_product_alike_however_it_is_asked(tmp_path, logged):
    async def scene():
        async with serving(tmp_path) as place:
            form = [("photos", ("a.png", png(1))), ("photos", ("b.png", png(2)))]
            assert (await place.client.post("/extract", data={"text": "mug"}, files=form)).status_code == 200
            assert (await place.ask("mug", photos=[data_url(png(1)), data_url(png(2))])).status_code == 200
            parts = message(PHOTO, {"type": "image_url", "image_url": {"url": data_url(png(2))}}, text())
            assert (await place.client.post("/v1/chat/completions", json={"messages": parts})).status_code == 200
            assert (await place.ask("mug", photos=[data_url(png(2)), data_url(png(1))])).status_code == 200
    played(scene)
    asked = [line.partition(", product ")[2].strip() for line in logged if "product " in line]
    assert len(asked) == 4 and len(set(asked[:3])) == 1 and asked[3] != asked[0]
    assert asked[0].endswith(", 3 characters, 2 photos")


def test_photos_of_a_chat_are_looked_at_too(tmp_path):
    async def scene():
        async with serving(tmp_path) as place:
            async def chat(*content, **headers):
                return await place.client.post("/v1/chat/completions", headers=headers,
                                               content=json.dumps({"messages": message(*content)}))

            kind = {"content-type": "application/json"}
            broken = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
            is_error(await chat(PHOTO, broken, text(), **kind), 422, "bad_photo", "image_url 2")
            is_error(await chat(*[PHOTO] * 6, text(), **kind), 422, "too_many_photos", "photos")
            is_error(await chat(text(" "), **kind), 400, "unsupported", "messages[0].content")
            is_error(await chat(text()), 415, "wrong_type", "Content-Type")
            done = await asyncio.gather(*(chat(*[PHOTO] * 5, text(), **kind) for _ in range(3)))
            assert [one.status_code for one in done] == [200] * 3
    played(scene)
