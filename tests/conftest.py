"""Fixtures that tests share, and what holds for every test: no network, so many threads.

Nothing heavy is imported at the head: the process that only hands tests out reads this file too.
"""

import gc
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="remote_code_")  # the code of stand-in models is copied there
# Threads of torch, here and in every process that a test starts: TEST_TORCH_THREADS=2 make test tries two.
os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_TORCH_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # more threads than cores would else wait for each other at work

import pytest
from loguru import logger


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Look for no garbage among what the test files import, then or later: it stays, and is a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup():
    """As many threads for every test, whatever the one before asked for: how many there are decides how sums round."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tokenizer():
    """The demo's tokenizer."""
    import demo

    return demo.make_tokenizer(seed=0)


@pytest.fixture(scope="session")
def image_processor():
    """A processor that slices: photos above 64 x 64 pixels get an overview and up to four slices."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    return MiniCPMV4_6ImageProcessorPil(max_slice_nums=4, scale_resolution=64, patch_size=16, downsample_mode="4x",
                                        use_image_id=True)


@pytest.fixture(scope="session")
def standin(tmp_path_factory, tokenizer):
    """A model folder with code of its own; read only."""
    import standin_minicpm

    return standin_minicpm.write_standin(tmp_path_factory.mktemp("standin") / "model", tokenizer)


@pytest.fixture
def remote_policy(standin):
    """A tiny policy whose code comes with the model."""
    from models.loading import load_minicpm
    from models.policy import Policy

    return Policy(*load_minicpm(str(standin), trust_remote_code=True))


def native_policy(kind, tokenizer, image_processor):
    """A tiny policy of a kind of which transformers has the code."""
    from models.policy import Policy
    from tiny import parts_of

    return Policy(*parts_of(kind, tokenizer, image_processor))


@pytest.fixture(params=["dense", "hybrid", "v47", "remote", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"])
def policy(request, tokenizer, image_processor):
    """A tiny policy of each kind: MiniCPM-V-4.6 with both kinds of text model, 4.7, remote code, Qwen, SmolVLM."""
    if request.param == "remote":
        return request.getfixturevalue("remote_policy")
    return native_policy(request.param, tokenizer, image_processor)


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def qwen_policy(request, tokenizer, image_processor):
    """A tiny policy of each Qwen family."""
    return native_policy(request.param, tokenizer, image_processor)


@pytest.fixture
def logged():
    """Every log line of the test from INFO on, without its level."""
    lines = []
    sink = logger.add(lambda line: lines.append(str(line)), level="INFO", format="{message}")
    yield lines
    logger.remove(sink)


@pytest.fixture
def said():
    """Every log line of the test."""
    lines = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{level} {message}")
    yield lines
    logger.remove(sink)


class Bar:
    """A progress bar that keeps what it was told."""

    made: list["Bar"] = []

    def __init__(self, total, initial=0, desc="", **_):
        self.title, self.total, self.shown = desc, total, [initial]
        Bar.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count):
        self.shown.append(self.shown[-1] + count)


@pytest.fixture
def bars(monkeypatch):
    """The bars over products that are answered during the test."""
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr("evidence.evaluation.tqdm", Bar)
    return Bar.made


@pytest.fixture
def dense_policy(tokenizer, image_processor):
    """A tiny policy with attention layers only."""
    return native_policy("dense", tokenizer, image_processor)


@pytest.fixture(scope="session")
def shop(tmp_path_factory, tokenizer, image_processor):
    """See write_shop; read only."""
    from runs import write_shop

    return write_shop(tmp_path_factory.mktemp("shop"), tokenizer, image_processor)
