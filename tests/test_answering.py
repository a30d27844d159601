"""A sheet through test_model.py: every row once and in order, killed and resumed, out of memory, photos by address."""

import multiprocessing
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pandas as pd
import pytest
import torch

import test_model as answering
from config import AnswerOptions
from evidence.journal import Journal
from evidence.report import write_sheet
from ground.options import check_options, write_options
from models.policy import Policy
from rounding import float64
from runs import train_options
from sheets.cells import DataError
from sheets.samples import PhotoError, cached_photo_path
from tiny import noise_photo


def options_for(shop, folder, **changes):
    settings = dict(model_path=str(shop / "model"), data_path=str(shop / "data.xlsx"), num_samples=2, device="cpu",
                    image_cache_dir=str(shop / "photos"), prompt_file=str(shop / "prompt.txt"),
                    output_path=str(folder / "out.xlsx"), num_threads=1)
    options = AnswerOptions(**{**settings, **changes})
    check_options(options)
    return options


def sheet_of(path, name="answers"):
    return pd.read_excel(path, sheet_name=name, dtype=str, keep_default_na=False)


def test_300_rows_killed_and_resumed(shop, tmp_path):
    rows = [{"text": f"box {index}", "note": f"n{index}", "sku_img": "" if index % 7 else "gone.png"}
            for index in range(300)]
    write_sheet(tmp_path / "many.xlsx", {"products": rows})
    model = shutil.copytree(shop / "model", tmp_path / "model")
    write_options(train_options(shop, tmp_path), model / "options.yaml")
    options, whole = (options_for(shop, tmp_path, data_path=str(tmp_path / "many.xlsx"), model_path=str(model),
                                  output_path=str(tmp_path / name)) for name in ("out.xlsx", "whole.xlsx"))
    journal = tmp_path / "out.xlsx.journal"
    with float64():  # what is resumed is answered in other batches
        process = multiprocessing.get_context("fork").Process(target=answering.main, args=(options,))
        process.start()  # nothing outlives its end but the journal
        deadline = time.monotonic() + 600
        while process.is_alive() and time.monotonic() < deadline:
            if journal.is_file() and journal.read_bytes().count(b"\n") > 40:
                break
            time.sleep(0.01)
        process.kill()
        process.join()
    done = journal.read_bytes().count(b"\n") - 1
    assert 40 <= done < 257, "killed too early or too late to show anything"
    with journal.open("a") as file:
        file.write('{"row": 299, "line": {"answ')  # what a kill in the middle of a line leaves
    with float64():
        answering.main(options)
        answering.main(whole)
    resumed, at_once = sheet_of(tmp_path / "out.xlsx"), sheet_of(tmp_path / "whole.xlsx")
    assert resumed["row"].tolist() == [str(row) for row in range(2, 302)]
    assert resumed["text"].tolist() == [row["text"] for row in rows]
    assert resumed["note"].tolist() == [row["note"] for row in rows]
    assert resumed.equals(at_once)
    unanswered = resumed[resumed["answer"] == ""]
    assert set(unanswered["row"]) >= {str(index + 2) for index in range(0, 300, 7)}
    assert unanswered["problem"].str.contains("photo missing").sum() == 43
    assert not journal.exists()


def test_the_same_product_is_answered_alike_in_any_row_and_alone(shop, tmp_path, capsys):
    one, other = sorted((shop / "photos").iterdir())[:2]
    copy = shutil.copy(one, tmp_path / "copy.png")
    write_sheet(tmp_path / "twice.xlsx", {"t": [
        {"text": "box 1", "sku_img": str(one)}, {"text": "box 1", "sku_img": str(other)}, {"text": "box 2"},
        {"text": "<b>box 1</b>", "sku_img": str(copy)}]})
    with float64():
        answering.main(options_for(shop, tmp_path, data_path=str(tmp_path / "twice.xlsx"), num_samples=3))
        capsys.readouterr()
        answering.main(options_for(shop, tmp_path, data_path=None, text="box 1", image=[str(copy)], num_samples=3))
    sheet = sheet_of(tmp_path / "out.xlsx")
    answers, sure = sheet["answer"].tolist(), float(sheet["confidence"].tolist()[0])
    assert answers[0] == answers[3] and answers[0] not in answers[1:3]
    assert f"confidence: {sure:.3f}" in capsys.readouterr().out and 0 < sure < 1


def test_the_sheet_keeps_its_own_columns(shop, tmp_path, capsys):
    write_sheet(tmp_path / "own.xlsx", {"t": [
        {"answer": "theirs", "text": "box 1", "": "unnamed", "label": "12 8 15"},
        {"answer": "", "text": "", "": "", "label": ""}, {"answer": "", "text": "box 2", "": "x", "label": ""}]})
    options = options_for(shop, tmp_path, data_path=str(tmp_path / "own.xlsx"), accept_at=1.1)
    answering.main(options)
    sheet = sheet_of(tmp_path / "out.xlsx")
    assert sheet["row"].tolist() == ["2", "4"] and sheet["answer (1)"].tolist() == ["theirs", ""]
    assert sheet["column (3)"].tolist() == ["unnamed", "x"] and sheet["review"].tolist() == ["yes", "yes"]
    assert len(sheet_of(tmp_path / "out.xlsx", "review")) == 2 and "2 to review" in capsys.readouterr().out
    assert sheet["reward"].tolist()[0] != "" and sheet["reward"].tolist()[1] == ""


def test_a_journal_of_another_run_is_refused(tmp_path):
    path = tmp_path / "out.journal"
    journal = Journal(path, {"model": "a"})
    journal.add([(2, {"x": 1}), (3, {"x": 2})])
    assert Journal(path, {"model": "a"}).done == {2: {"x": 1}, 3: {"x": 2}}
    with pytest.raises(DataError, match="out.journal"):
        Journal(path, {"model": "b"})
    journal.finish()
    assert not path.exists()
    Journal(path, {"model": "a"}).add([])  # nothing was done in it yet: no obstacle
    assert path.exists() and Journal(path, {"model": "b"}).done == {} and not path.exists()


def test_fewer_products_together_when_memory_runs_out(shop, tmp_path, monkeypatch):
    good, sizes = Policy.sample, []

    def starved(self, prompts, *args, **more):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return good(self, prompts, *args, **more)

    with float64():
        answering.main(options_for(shop, tmp_path, output_path=str(tmp_path / "easy.xlsx")))
        monkeypatch.setattr(Policy, "sample", starved)
        answering.main(options_for(shop, tmp_path))
    assert sheet_of(tmp_path / "out.xlsx")["answer"].tolist() == sheet_of(tmp_path / "easy.xlsx")["answer"].tolist()
    assert sizes == [8, 4, 2, 2, 2, 2, 1]


class Shop(BaseHTTPRequestHandler):
    """Hands out one photo."""

    def do_GET(self):
        self.send_response(200 if "photo" in self.path else 404)
        self.end_headers()
        if "photo" in self.path:
            noise_photo(3).save(self.wfile, "PNG")

    def log_message(self, *args):
        pass


@pytest.fixture
def address():
    server = HTTPServer(("127.0.0.1", 0), Shop)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_one_product_with_a_photo_by_address(shop, tmp_path, address, capsys):
    options = options_for(shop, tmp_path, data_path=None, text="box 1", image=[f"{address}/photo.png?w=9"],
                          image_cache_dir=str(tmp_path / "cache"), label="12 8 15", num_samples=3,
                          allow_private=True)
    answering.main(options)
    said = capsys.readouterr().out
    assert "answer:" in said and "reward:" in said and "of 3 answers" in said
    assert cached_photo_path(f"{address}/photo.png?w=9", tmp_path / "cache").is_file()
    for wrong, why, private in ((f"{address}/gone.png", "404", True), ("http://127.0.0.1:1/x.png", "fetched", True),
                                (f"{address}/photo.png", "127.0.0.1, on a private network", False)):
        with pytest.raises(PhotoError, match=why):
            answering.fetch_photo(wrong, tmp_path / "cache", allow_private=private)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_parts_of_a_reward_are_printed(shop, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def brief(answer, label, sample):\n    return {'short': 1, 'calm': 2}\n")
    options = options_for(shop, tmp_path, data_path=None, text="box 1", label="12 8 15", num_samples=1,
                          reward=[f"{tmp_path / 'mine.py'}:brief:0.5"])
    answering.main(options)
    said = capsys.readouterr().out
    assert "reward: 1.5000" in said and "short +0.5000" in said and "calm +1.0000" in said
    assert "confidence" not in said
