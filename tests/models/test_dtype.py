"""What is computed in: bfloat16 where a GPU has it, said once and saved; TF32 stays out of the exact comparison."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import test_model as answering
import train_vlm_parallel as training
from config import AnswerOptions, CheckRewardOptions, CompareOptions, TrainOptions
from ground.errors import OptionError
from ground.options import read_options
from models import loading
from models.loading import choose_dtype, settle_dtype
from rollout import PromptEncoder
from run import training_options
from runs import one_step, train_options
from sheets.samples import Sample
from training import guard

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def full_precision():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def gpu(monkeypatch):
    """Let torch see a GPU of some compute capability."""
    def fake(major):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))

    return fake


@pytest.fixture
def bfloat16_here(monkeypatch):
    """Let the CPU count as a GPU that has bfloat16."""
    monkeypatch.setattr(loading, "has_bfloat16", lambda device: True)


@pytest.mark.parametrize(("major", "name", "wanted"), [
    (7, "auto", "float32"), (8, "auto", "bfloat16"), (9, "auto", "bfloat16"), (9, "float32", "float32"),
    (7, "bfloat16", "bfloat16")])
def test_auto_takes_bfloat16_where_a_gpu_has_it(gpu, major, name, wanted):
    gpu(major)
    assert choose_dtype(name, GPU) == wanted
    assert choose_dtype(name, torch.device("cpu")) == ("float32" if name == "auto" else wanted)


@pytest.mark.parametrize(("major", "dtype", "device", "precision", "said"), [
    (9, "auto", "auto", "highest", "computing in bfloat16"), (9, "bfloat16", "auto", "highest", ""),
    (9, "float32", "cuda", "high", "in TF32"), (7, "auto", "cuda", "high", "in TF32"),
    (9, "float32", "cpu", "highest", ""), (9, "auto", "cpu", "highest", "")])
def test_what_is_computed_in_is_said(gpu, logged, major, dtype, device, precision, said):
    gpu(major)
    settled = settle_dtype(TrainOptions(dtype=dtype), device)
    assert settled.dtype == choose_dtype(dtype, torch.device("cpu" if device == "cpu" else "cuda")) != "auto"
    assert torch.get_float32_matmul_precision() == precision
    assert [said in line for line in logged] == [True] * bool(said)


def test_a_run_saves_what_it_computed_in_and_is_opened_with_it(shop, tmp_path, bfloat16_here, capsys, monkeypatch):
    saved = training.train(train_options(shop, tmp_path, max_steps=1, eval_every=0, preflight=False))
    assert read_options(saved / "options.yaml").dtype == "bfloat16"
    monkeypatch.undo()
    model = answering.open_model(AnswerOptions(model_path=str(saved), device="cpu"))
    assert model.policy.dtype == torch.bfloat16
    assert training_options(CompareOptions(checkpoint_path=str(saved), device="cpu")).dtype == "bfloat16"


def test_a_model_without_options_is_asked_in_what_the_device_has(shop, bfloat16_here, monkeypatch):
    assert answering.open_model(AnswerOptions(model_path=str(shop / "model"), device="cpu")).policy.dtype == \
        torch.bfloat16
    monkeypatch.undo()
    assert answering.open_model(AnswerOptions(model_path=str(shop / "model"), device="cpu")).policy.dtype == \
        torch.float32


def test_auto_in_a_check_of_rewards(shop, bfloat16_here, monkeypatch):
    import check_reward
    import training.trained

    asked = []
    monkeypatch.setattr(training.trained, "open_trained", lambda options, *args: asked.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check_reward.main(CheckRewardOptions(
            model_path=str(shop / "model"), data_path=str(shop / "data.xlsx"), image_cache_dir=str(shop / "photos"),
            device="cpu"))
    assert asked[0].dtype == "bfloat16"


def test_a_reference_that_auto_holds_in_bfloat16_moves_no_less_than_half(shop, tmp_path, bfloat16_here):
    with pytest.raises(OptionError, match="take 0.5 or more"):
        training.train(train_options(shop, tmp_path, ref_sync_every=2, ref_sync_mix=0.1))


def test_under_tf32_the_paths_are_compared_in_full_float32_first(dense_policy, monkeypatch, logged):
    good, used = guard.slow_path, []

    def watched(policy, *args, **options):
        used.append(torch.get_float32_matmul_precision())
        return good(policy, *args, **options)

    monkeypatch.setattr(guard, "slow_path", watched)
    torch.set_float32_matmul_precision("high")
    sample = Sample(2, "p2", "mug, grid 10 cm", (1.0, 2.0, 3.0), (), sheet="sheet.xlsx")
    guard.check_fast_path(dense_policy, None, True, PromptEncoder(dense_policy), [sample], TrainOptions(max_length=4))
    assert used == ["highest", "high"] and torch.get_float32_matmul_precision() == "high"
    assert "in float32;" in logged[-1] and "in TF32;" in logged[-1]


def test_under_tf32_the_ratio_is_against_the_updates_own_log_probs(shop, tmp_path):
    options = train_options(shop, tmp_path, eval_every=0, lr=1e-30)
    run, buffer = one_step(options)
    for item in buffer.items:
        item.old_log_probs = item.old_log_probs - 0.5 * item.action_mask
    of_sampling = [item.old_log_probs for item in buffer.items]
    torch.set_float32_matmul_precision("high")
    several = replace(options, minibatch_size=1)
    assert training.update(run.learner, buffer, several, step=0)["ratio"] == pytest.approx(1, abs=1e-6)
    for item, log_probs in zip(buffer.items, of_sampling, strict=True):
        item.old_log_probs = log_probs
    assert training.update(run.learner, buffer, options, step=0)["ratio"] == 1
