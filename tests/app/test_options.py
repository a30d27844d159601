"""Options of the service that can't work, or aren't safe, are refused before anything is loaded."""

import re
import socket
from pathlib import Path

import pytest

from app.door import read_keys
from app.server import demo_model, listen
from config import ServiceOptions
from ground.errors import OptionError
from ground.options import check_options

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("changes", "said"), [
    ({"host": "0.0.0.0"}, "--host 0.0.0.0 can be reached from other machines, so it needs keys"),
    ({"host": "::"}, "needs keys"), ({"key_file": "gone"}, "--key_file gone: no such file"),
    ({"devices": ()}, "--devices is empty"), ({"devices": ("cuda:0",)}, "--devices cuda:0"),
    ({"engine": ["127.0.0.1:8001"]}, "--engine 127.0.0.1:8001"),
    ({"engine": ["http://u:p@host/v1"]}, "give an address such as"),
    ({"engine": ["http://host/v1"], "model_path": "demo"}, "--engine needs the wording"),
    ({"samples": 17}, r"--samples 17: must be in \[1, 16\]"), ({"port": 70_000}, "--port"),
    ({"queue_size": 0}, "--queue_size 0: must be above 0"),
])
def test_options_that_can_not_work(changes, said):
    with pytest.raises(OptionError, match=said):
        check_options(ServiceOptions(**changes))


def test_other_options_pass(tmp_path):
    (tmp_path / "keys").write_text("k" * 16)
    (tmp_path / "serving.json").write_text("{}")
    check_options(ServiceOptions())
    check_options(ServiceOptions(host="0.0.0.0", key_file=str(tmp_path / "keys"), devices=("0", "1")))
    check_options(ServiceOptions(engine=["http://127.0.0.1:8001/v1", "https://engines.example"],
                                 model_path=str(tmp_path)))


@pytest.mark.parametrize("content", ["", "# a comment\n", "short\n", "k" * 16 + "\nshort\n"])
def test_keys_that_are_none(tmp_path, content):
    (tmp_path / "keys").write_text(content)
    with pytest.raises(OptionError, match="openssl rand"):
        read_keys(str(tmp_path / "keys"))


def test_without_a_model_the_demo_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("app.server.ROOT", tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text("max_steps: 7\n")
    with pytest.raises(OptionError, match="make demo"):
        demo_model()
    (tmp_path / "outputs/demo/step_000007").mkdir(parents=True)
    assert demo_model() == str(tmp_path / "outputs/demo/step_000007")


def test_a_port_that_is_taken():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        assert taken.proto == socket.IPPROTO_TCP, "each answer would be 40 ms late"
        with pytest.raises(OptionError, match="give another --port"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_the_readme_asks_with_photos_that_the_demo_draws(tmp_path):
    import random

    import demo

    rng = random.Random(0)
    demo.write_catalogue(tmp_path, "held_out", (demo.draw_product(rng) for _ in range(13)), rng)
    drawn = {path.name for path in (tmp_path / "image_cache").iterdir()}
    for name in ("README.md", "README_zh.md"):
        asked = re.findall(r"@demo/image_cache/(\S+)", (ROOT / name).read_text(encoding="utf-8"))
        assert len(asked) == 2 and set(asked) <= drawn
