"""Photos in worker processes: the same prompts to the bit, a row's errors its own, killed processes replaced."""

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import run as comparing
import test_model as answering
import train_vlm_parallel as training
from config import AnswerOptions, CompareOptions
from conftest import native_policy
from models import preparing
from models.preparing import NoSharedMemory, Preparer, worker_count
from rollout import PromptEncoder, PromptError, rollout_groups
from runs import train_options, weights
from sheets.samples import PhotoError, Sample, load_photos
from tiny import noise_photo
from training.trained import TrainedModel

ROOT = Path(__file__).resolve().parents[2]


def sample_of(folder, row, photos=1, size=(64, 64), text="box"):
    paths = []
    for index in range(photos):
        paths.append(folder / f"{row}_{index}.png")
        noise_photo(row * 10 + index, size).save(paths[-1])
    return Sample(row=row, product_id=f"p{row}", text=text, label=(12.0, 8.0, 15.0), photos=tuple(paths),
                  sheet="sheet.xlsx")


def tensors_of(prompt):
    return {"input_ids": prompt.input_ids, **prompt.photos}


def assert_same(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def die_on_row_4(sample):
    """What a photo could do to a process."""
    if sample.row == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return load_photos(sample)


def take_long(sample):
    time.sleep(0.3)
    return load_photos(sample)


@pytest.mark.parametrize("kind", ["dense", "qwen2_5_vl", "smolvlm", "remote"])
def test_the_same_prompts_to_the_bit(kind, request, tokenizer, image_processor, tmp_path, logged):
    policy = request.getfixturevalue("remote_policy") if kind == "remote" else native_policy(kind, tokenizer,
                                                                                             image_processor)
    samples = [sample_of(tmp_path, 2, 2, (128, 96)), sample_of(tmp_path, 3), sample_of(tmp_path, 4, 0),
               sample_of(tmp_path, 5, 3)]
    limit = len(PromptEncoder(policy).encode(samples[1]).input_ids)  # some lose photos
    here, there = (PromptEncoder(policy, max_prompt_length=limit, workers=workers) for workers in (0, 1))
    there.prefetch(samples)
    logged.clear()
    for sample in samples:
        prompt = there.encode(sample)
        assert_same(prompt, here.encode(sample))
        assert prompt.num_photos == here.encode(sample).num_photos
    assert there._preparer.workers == 1, logged  # it was not done here after all
    assert len([line for line in logged if "row 5 (p5): 1 of 3 photos used" in line]) == 2  # by each encoder


def test_what_goes_wrong_with_a_row_is_its_own_failure(remote_policy, tmp_path, logged):
    samples = [replace(sample_of(tmp_path, row, photos=2), missing_photos="use_rest") for row in range(2, 6)]
    samples[1].photos[0].write_bytes(b"<html>not a photo</html>")  # the other one will do, and it is said
    samples[2].photos[0].write_bytes(b"")
    samples[2].photos[1].unlink()
    noise_photo(1, (500, 8)).save(samples[3].photos[0])
    remote_policy.max_pixels = 600  # leaves that photo 3 pixels high: the processor takes its rows for colours
    encoder = PromptEncoder(remote_policy, workers=1)
    encoder.prefetch(samples)
    groups, failures = rollout_groups(encoder, samples, 2, 0.7, 4, "0", 2)
    assert [group.sample.row for group in groups] == [2, 3]
    assert [failure.sample.row for failure in failures] == [4, 5]
    assert "none of its 2 photos can be used" in str(failures[0]) and "the model's processor fails" in str(failures[1])
    encoder.forget(samples)
    encoder.encode(samples[1])
    assert [line for line in logged if "row 3 (p3): photo" in line and "a web page" in line] == [
        next(line for line in logged if "row 3 (p3)" in line)]  # once
    assert any("row 4 (p4): photo" in line and "it is empty" in line for line in logged)


def test_a_product_that_kills_its_process_twice_is_named(dense_policy, tmp_path, logged):
    samples = [sample_of(tmp_path, row) for row in range(2, 8)]
    encoder = PromptEncoder(dense_policy, open_photos=die_on_row_4, workers=2)
    encoder.encode(samples[0])
    encoder.prefetch(samples)
    for sample in samples:
        if sample.row == 4:
            with pytest.raises(PhotoError, match="killed, and again when it did nothing else"):
                encoder.encode(sample)
        else:
            assert_same(encoder.encode(sample), PromptEncoder(dense_policy).encode(sample))
    assert any("row 4 (p4): the process that prepared it" in line for line in logged)
    assert encoder._preparer.workers == 2


def say_where():
    return (torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.is_initialized(),
            signal.getsignal(signal.SIGINT) == signal.SIG_IGN)


def test_processes_killed_from_outside_are_replaced(dense_policy, tmp_path):
    samples = [sample_of(tmp_path, row) for row in range(2, 9)]
    encoder = PromptEncoder(dense_policy, open_photos=take_long, workers=2)
    encoder.encode(samples[0])
    pool = encoder._preparer._pool
    assert pool.submit(say_where).result() == (1, "", False, True)  # threads, GPUs, CUDA, deaf to Ctrl-C
    encoder.prefetch(samples)
    os.kill(next(iter(pool._processes)), signal.SIGKILL)  # at work
    for sample in samples:
        assert_same(encoder.encode(sample), PromptEncoder(dense_policy).encode(sample))
    for _ in range(2):
        encoder.forget(samples)
        assert_same(encoder.encode(samples[3]), PromptEncoder(dense_policy).encode(samples[3]))
        for process in encoder._preparer._pool._processes:
            with suppress(ProcessLookupError):  # of the pool before, perhaps
                os.kill(process, signal.SIGKILL)  # idle
    assert encoder._preparer.workers == 2 and encoder._preparer._pool is not pool


@dataclass(frozen=True)
class LateFamily:
    """A family whose code can't be imported in another process."""

    @contextmanager
    def importing(self):
        raise ImportError("no module named makers_code")
        yield


def test_where_no_process_can_be_had_it_is_said_and_done_here(dense_policy, tmp_path, logged, monkeypatch):
    samples = [sample_of(tmp_path, row) for row in (2, 3)]
    wanted = [PromptEncoder(dense_policy).encode(sample) for sample in samples]
    unpicklable = PromptEncoder(dense_policy, open_photos=lambda sample: load_photos(sample), workers=2)
    late = PromptEncoder(dense_policy, workers=2)
    late._preparer._parts = lambda: replace(dense_policy.prompt_parts(), family=LateFamily())
    for encoder, why in ((unpicklable, "image processor can't be sent to them"), (late, "none can be started")):
        logged.clear()
        for sample, prompt in zip(samples, wanted, strict=True):
            assert_same(encoder.encode(sample), prompt)
        assert [why in line for line in logged if "in this process, not in 2 worker processes" in line] == [True]


def test_without_shared_memory_it_is_said_and_done_here(dense_policy, tmp_path, logged, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(NoSharedMemory, match="No space left"):
        preparing._sent(torch.zeros(preparing._BY_VALUE))
    assert preparing._sent(torch.zeros(8)).tolist() == [0.0] * 8  # that small, it needs none

    def begin(preparer, sample):
        future = preparing.Future()
        future.set_exception(NoSharedMemory("No space left on device"))
        return future

    monkeypatch.setattr(Preparer, "_begin", begin)
    encoder = PromptEncoder(dense_policy, workers=2)
    sample = sample_of(tmp_path, 2)
    assert_same(encoder.encode(sample), PromptEncoder(dense_policy).encode(sample))
    assert any("shared memory is short" in line and "shm-size" in line for line in logged)


def test_many_products_leave_nothing_behind(dense_policy, tmp_path):
    """Neither open files nor shared memory: those of a prompt would end a long run."""
    encoder = PromptEncoder(dense_policy, cache_mb=1, workers=1)
    samples = [replace(sample_of(tmp_path, 2, 5, (128, 128)), row=row) for row in range(2, 40)]

    def held():
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8").count("/dev/shm/torch_")
        return len(os.listdir("/proc/self/fd")) + mapped

    encoder.encode(samples[0])
    before = held()
    for start in range(0, len(samples), 4):
        encoder.prefetch(samples[start:start + 8])
        kept = [encoder.encode(sample) for sample in samples[start:start + 4]]
    assert kept[0].num_bytes > preparing._BY_VALUE
    encoder.forget(samples)
    assert held() <= before + 4  # the last one may linger, not 38


def test_prompts_are_pinned_for_a_gpu(dense_policy, tmp_path, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    sample = sample_of(tmp_path, 2)
    for workers in (0, 1):
        pinned.clear()
        encoder = PromptEncoder(dense_policy, workers=workers)
        encoder._preparer._pinned = True
        assert_same(encoder.encode(sample), PromptEncoder(dense_policy).encode(sample))
        assert len(pinned) == len(tensors_of(encoder.encode(sample)))
    elsewhere = SimpleNamespace(device=torch.device("cuda"), prompt_parts=dense_policy.prompt_parts)
    assert PromptEncoder(elsewhere)._preparer._pinned and not PromptEncoder(dense_policy)._preparer._pinned


def test_how_many_workers(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(16), raising=False)
    assert (worker_count(None, cpu), worker_count(None, gpu)) == (0, 8)
    assert (worker_count(3, cpu), worker_count(0, gpu)) == (3, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun's: processes on this machine
    assert worker_count(None, gpu) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2))
    assert worker_count(None, gpu) == 0


def test_a_run_with_workers_is_the_same_to_the_bit(shop, tmp_path, monkeypatch):
    folders = [training.train(train_options(shop, tmp_path / str(workers), workers=workers, max_steps=2, eval_every=2,
                                            preflight=False)) for workers in (0, 2)]
    one, other = map(weights, folders)
    assert all(torch.equal(one[name], other[name]) for name in one)
    # And the commands that open what was trained take their own --workers, not the run's.
    asked = []
    monkeypatch.setattr(TrainedModel, "encoder", lambda model, workers=0: asked.append(workers) or 1 / 0)
    for command, options in ((comparing, CompareOptions(checkpoint_path=str(folders[1]), workers=3, device="cpu")),
                             (answering, AnswerOptions(model_path=str(folders[1]), workers=4, device="cpu",
                                                       data_path=str(shop / "data.xlsx"),
                                                       output_path=str(tmp_path / "answers.xlsx"))),
                             (answering, AnswerOptions(model_path=str(folders[1]), text="box 1", device="cpu"))):
        with pytest.raises(ZeroDivisionError):
            command.main(options)
    assert asked == [3, 4, 0]  # one product alone is not worth a process


def test_workers_end_with_the_process_that_they_work_for():
    done = subprocess.Popen([sys.executable, Path(__file__).with_name("idle_workers.py")], stdout=subprocess.PIPE,
                            text=True)
    try:
        workers = [psutil.Process(int(number)) for number in done.stdout.readline().split()]
    finally:
        done.kill()
        done.wait()
    assert workers and not psutil.wait_procs(workers, timeout=60)[1]


def test_a_prompt_error_keeps_its_words_across_processes():
    for problem in (PromptError("too long"), PhotoError("gone")):
        again = pickle.loads(pickle.dumps(problem))
        assert type(again) is type(problem) and str(again) == str(problem)
