"""The process with the model answers as test_model.py does: the same code, the same answers, whatever is beside."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import test_model as answering
from app.worker import CountingEncoder, answer_batch, model_name
from config import AnswerOptions
from ground.options import write_options
from rounding import float64
from runs import train_options

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model_path(shop, tmp_path_factory):
    import shutil

    folder = shutil.copytree(shop / "model", tmp_path_factory.mktemp("served") / "best")
    write_options(train_options(shop, folder), folder / "options.yaml")
    (folder / "prompt.txt").write_text("{text}")
    (folder / "best.json").write_text('{"step": 42, "mean_reward": 0.5}')
    return folder


def batch(*products, samples=3, greedy=False):
    return {"products": [{"text": text, "photos": [str(path) for path in photos]} for text, photos in products],
            "samples": samples, "greedy": greedy}


def test_answers_are_those_of_test_model(shop, model_path, capsys):
    photos = sorted((shop / "photos").iterdir())
    with float64():
        model = answering.open_model(AnswerOptions(model_path=str(model_path), device="cpu"))
        encoder = CountingEncoder(model, 2)
        together = answer_batch(model, encoder, batch(("box 1", photos[:2]), ("a longer text, box 2", []),
                                                      ("box 3", [photos[2], photos[2]])), 0)
        alone = answer_batch(model, encoder, batch(("box 1", photos[:2])), 0)
        greedy = answer_batch(model, encoder, batch(("box 1", photos[:2]), samples=1, greedy=True), 0)
        fewer = answer_batch(model, encoder, batch(("box 1", photos[:2]), samples=2), 0)
        for samples in (3, 1):
            answering.main(AnswerOptions(model_path=str(model_path), device="cpu", text="box 1", num_samples=samples,
                                         image=[str(path) for path in photos[:2]]))
    said = capsys.readouterr().out
    assert alone[0]["answers"] == together[0]["answers"] and len(set(alone[0]["answers"])) > 1
    assert fewer[0]["answers"] == alone[0]["answers"][:2]
    assert any(f"answer: {answer}\n" in said for answer in alone[0]["answers"])
    assert f"answer: {greedy[0]['answers'][0]}\n" in said
    assert [line["photos_used"] for line in together] == [2, 0, 1]
    assert all(type(cut) is bool for line in together for cut in line["truncated"])
    assert model_name(str(model_path)) == "best@42"


def test_a_broken_photo_fails_its_product_alone(shop, model_path, tmp_path):
    good = sorted((shop / "photos").iterdir())[0]
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:200])
    model = answering.open_model(AnswerOptions(model_path=str(model_path), device="cpu"))
    lines = answer_batch(model, CountingEncoder(model, 2), batch(("box", [good, broken]), ("box", [good])), 0)
    assert lines[0]["failure"].startswith("photos[1]: it is") and len(lines[1]["answers"]) == 3


def test_the_web_process_knows_no_torch():
    code = "import sys, app.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


async def accepted(client):
    """How many products wait or were taken."""
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(("vlm_batch_size_sum", "vlm_queue_length")))


def test_the_service_as_a_user_meets_it(shop, model_path, tmp_path):
    """Started as a command, asked, and ended by SIGTERM while it answers: nothing is lost, no process is left."""
    command = [sys.executable, "app/server.py", "--model_path", str(model_path), "--port", "0", "--devices", "cpu",
               "--state_dir", str(tmp_path / "state")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines = []
    while not any("ready with best@42" in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    address = re.search(r"http://\S+", "".join(lines))[0]
    while (tmp_path / "state" / "ready").read_text() != f"ready: {address}\n":
        time.sleep(0.05)
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

    async def scene():
        async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
            asked = [asyncio.ensure_future(client.post("/extract", json={"text": f"box {index}"}))
                     for index in range(20)]
            while (await accepted(client)) < 20:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asked)

    answers = asyncio.run(scene())
    assert [answer.status_code for answer in answers] == [200] * 20
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()
    assert not os.path.exists(f"/proc/{worker}") and not (tmp_path / "state" / "ready").exists()
    json.loads(answers[0].text)
