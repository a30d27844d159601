"""OpenAI's protocol, as far as it can be honoured: one user message, a text and photos, n answers.

What can't be honoured is refused with 400 and the name of the field, never passed over.
"""

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.refusals import Refusal
from app.waiting import Answered

_FIELDS = ("model", "messages", "n", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stream",
           "response_format")
_MOST_ANSWERS = 16


def bad(field: str, message: str) -> Refusal:
    """Say no to one field."""
    return Refusal(400, "unsupported", message, field)


@dataclass(frozen=True)
class Chat:
    """What is asked: the message's text, its photos' addresses, how many answers, sampled or greedy."""

    text: str
    photos: list[str]
    count: int
    greedy: bool


def read_chat(body: Any, about: Mapping[str, Any]) -> Chat:
    """Read a chat request; raises Refusal naming the field that can't be honoured.

    about: what is known of the model: its name, temperature and longest answer.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "bad_field", "the body must be a JSON object")
    for name in body:
        if name not in _FIELDS:
            raise bad(name[:100], f"this can't be honoured; the fields are {', '.join(_FIELDS)}")
    if body.get("model") not in (None, about["model"]):
        raise bad("model", f"the model is {about['model']}")
    if body.get("stream"):
        raise bad("stream", "an answer comes at once, there is nothing to stream")
    if body.get("top_p") not in (None, 1):
        raise bad("top_p", "answers are sampled as in training, with top_p 1")
    if body.get("response_format") not in (None, {"type": "text"}):
        raise bad("response_format", "answers are not forced into a schema; leave it out and read the JSON")
    for name in ("max_tokens", "max_completion_tokens"):
        limit = body.get(name)
        if limit is not None and (type(limit) is not int or limit < about["max_length"]):
            raise bad(name, f"an answer has up to {about['max_length']} tokens and is not cut shorter")
    return Chat(*_read_message(body.get("messages")), _count(body), _is_greedy(body, about))


def _count(body: Mapping[str, Any]) -> int:
    count = body.get("n")
    if count is not None and (type(count) is not int or not 1 <= count <= _MOST_ANSWERS):
        raise bad("n", f"a whole number from 1 to {_MOST_ANSWERS}")
    return count or 1


def _is_greedy(body: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    temperature = body.get("temperature")
    if temperature is not None and (isinstance(temperature, bool) or temperature not in (0, about["temperature"])):
        raise bad("temperature", f"0, or {about['temperature']:g} as in training")
    return temperature == 0


def _read_message(messages: Any) -> tuple[str, list[str]]:
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise bad("messages", "one user message is answered")
    message = messages[0]
    if message.get("role") != "user":
        raise bad("messages[0].role", "one user message is answered, no other turns")
    unknown = sorted(set(message) - {"role", "content"})
    if unknown:
        raise bad(f"messages[0].{unknown[0][:100]}", "a message has a role and content")
    content = message.get("content")
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise bad("messages[0].content", "a string, or a list of parts: one text, up to five image_url")
    texts, photos = [], []
    for place, part in enumerate(content):
        field = f"messages[0].content[{place}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and set(part) == {"type", "text"} and isinstance(part["text"], str):
            texts.append(part["text"])
        elif kind == "image_url" and set(part) == {"type", "image_url"}:
            photos.append(_address(part["image_url"], field))
        else:
            raise bad(field, "a part is {type: text, text} or {type: image_url, image_url: {url}}")
    if len(texts) != 1:
        raise bad("messages[0].content", f"{len(texts)} texts; one is answered, the photos stand before it")
    return texts[0], photos


def _address(image_url: Any, field: str) -> str:
    if isinstance(image_url, dict) and set(image_url) <= {"url", "detail"} and isinstance(image_url.get("url"), str):
        if image_url.get("detail", "auto") != "auto":
            raise bad(f"{field}.image_url.detail", "photos are seen as in training: auto")
        return image_url["url"]
    raise bad(f"{field}.image_url", "give {url: data:image/...;base64,...}")


def without_wording(text: str, photos: int, about: Mapping[str, Any]) -> str:
    """Take the product's text out of a message that has the wording of training around it; other texts stay.

    The wording is put around it again, so that a message in it, as serving.json gives it, is answered like a product.
    """
    before, _, behind = about["wording"].get(str(photos), "{text}").partition("{text}")
    if before + behind and text.startswith(before) and text.endswith(behind) and len(text) > len(before + behind):
        return text[len(before):len(text) - len(behind)]
    return text


def completion_of(answered: Answered, count: int, model: str) -> dict[str, Any]:
    """Write answers as a chat completion of so many choices: a greedy answer is computed once."""
    answers = list(zip(answered.answers, answered.truncated, strict=True)) * (count // len(answered.answers))
    choices = [{"index": index, "message": {"role": "assistant", "content": answer},
                "finish_reason": "length" if cut else "stop", "logprobs": None}
               for index, (answer, cut) in enumerate(answers)]
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()),
            "model": model, "choices": choices}


def models_of(model: str) -> dict[str, Any]:
    """List the one model that is served."""
    return {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "this service"}]}
