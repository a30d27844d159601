"""A worker process without a model: it says what it was asked, and does on request what a worker should not do."""

import json
import sys
import threading
import time
from pathlib import Path


def say(message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def answer(product, batch):
    text, number = product["text"], batch["samples"]
    if text == "bad photo":
        return {"failure": "photos[0]: it is damaged"}
    written = text.removeprefix("say ") if text.startswith("say ") else json.dumps(
        {"length": len(text), "width": len(product["photos"]) + 1, "height": len(batch["products"]), "unit": "cm"})
    return {"answers": [written] * number, "truncated": [False] * number, "photos_used": len(product["photos"])}


def sign():
    while not silent.wait(0.1):
        say({"alive": True})


silent = threading.Event()
settings = json.loads(sys.stdin.readline())
if settings["answer"]["model_path"] == "broken":
    say({"broken": "no such model"})
    sys.exit(2)
time.sleep(2.5 if settings["answer"]["model_path"] == "late" else 0)
threading.Thread(target=sign, daemon=True).start()
wording = {str(count): f"How large, by {count} photos? {{text}} In cm." for count in range(6)}
say({"ready": {"model": "fake@1", "temperature": 0.7, "max_length": 64, "wording": wording}})
for line in sys.stdin:
    batch = json.loads(line)
    texts = [product["text"] for product in batch["products"]]
    if "die" in texts:
        sys.exit(1)
    if "fall silent" in texts:
        silent.set()
        time.sleep(60)
    if "hang" in texts:
        time.sleep(60)
    for text in texts:
        while text.startswith("until") and not Path(text[6:]).exists():
            time.sleep(0.01)
    time.sleep(0.3 if "slow" in texts else 0)
    say({"lines": [answer(product, batch) for product in batch["products"]]})
