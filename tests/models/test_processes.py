"""Launching by --gpu_ids: which GPUs, and what becomes of the command line."""

import sys

import pytest
import torch

from ground.errors import OptionError
from models import processes


def test_absent_gpus_are_named_with_those_that_are_there(monkeypatch):
    with pytest.raises(OptionError, match="no GPU 0, 1 here; there are: none"):
        processes.launch([0, 1], "train.py", [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    with pytest.raises(OptionError, match=r"no GPU 2, -1 here; there are: 0 \(card 0\), 1 \(card 1\)"):
        processes.launch([0, 2, -1], "train.py", [])


@pytest.mark.parametrize(("shown", "names"), [(None, "3,1"), ("4,5,6,7", "7,5")])
def test_torchrun_gets_a_process_a_gpu(monkeypatch, shown, names):
    called = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(processes.os, "execve", lambda *args: called.extend(args))
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    processes.launch([3, 1], "train.py", ["--lr", "1e-6"])
    program, command, environment = called
    assert program == sys.executable and command[-5:] == ["--nproc_per_node", "2", "train.py", "--lr", "1e-6"]
    assert environment["CUDA_VISIBLE_DEVICES"] == names
