"""Recording a token's work as a CUDA graph, played through with stand-ins for CUDA: no GPU is needed."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from models import sampling
from models.sampling import Repeated


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins that count replays; `fails` lets a recording end in that error."""
    state = SimpleNamespace(replays=0, fails=None, modes=[])

    @contextmanager
    def graph(recording, capture_error_mode):
        state.modes.append(capture_error_mode)
        yield
        if state.fails:
            raise state.fails

    def replay():
        state.replays += 1

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (("CUDAGraph", lambda: SimpleNamespace(replay=replay)), ("graph", graph),
                           ("Stream", lambda: stream), ("current_stream", lambda: stream),
                           ("stream", lambda stream: nullcontext())):
        monkeypatch.setattr(sampling.torch.cuda, name, stand_in)
    monkeypatch.setattr(Repeated, "_can_be", True)
    return state


def test_work_is_recorded_once_a_shape_and_replayed(cuda):
    calls = []
    token = Repeated(lambda: calls.append(1), recorded=True)
    for _ in range(5):
        token()
    assert (len(calls), cuda.replays, cuda.modes) == (2, 4, ["thread_local"])  # done once, recorded once, replayed
    token.begin_anew()
    token()
    token()
    assert (len(calls), cuda.replays) == (4, 5)


def test_work_that_cant_be_recorded_is_done_each_time_and_it_is_said_once(cuda, said):
    cuda.fails = RuntimeError("operation not permitted when stream is capturing")
    done = []
    for _ in range(2):
        token = Repeated(lambda: done.append(1), recorded=True)
        for _ in range(4):
            token()
    assert cuda.replays == 0 and len(cuda.modes) == 1  # tried once for all
    assert len(done) == 4 + 1 + 4  # the attempt ran the work's Python, but nothing on the device
    assert "".join(said).count("can't be recorded as a CUDA graph, which is slower: operation not permitted") == 1


def test_a_recording_without_memory_is_for_the_caller_to_halve(cuda):
    cuda.fails = torch.OutOfMemoryError("planted")
    token = Repeated(lambda: None, recorded=True)
    token()
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        token()
    assert Repeated._can_be
