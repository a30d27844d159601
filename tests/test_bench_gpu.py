"""The benchmark for GPUs: every line of it on a CPU with tiny models; what it counts, by hand."""

import importlib.util
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import count
import gpu
import gpu_trace
from config import TrainOptions
from gpu_models import FIRST, QUICK, REST, SIZES, GpuCase, cases_named, random_model, random_weights, write_folder
from ground.errors import OptionError
from models.family import ModelError
from models.loading import family_of
from models.policy import load_policy
from models.processes import Processes
from models.weights import native_class

CPU = torch.device("cpu")


def test_quick_measures_every_figure(tmp_path, capsys):
    gpu.main(gpu.GpuOptions(device="cpu", quick=True, no_trl=True, peak_tflops=0.001, json=str(tmp_path / "gpu.json")))
    report, said = json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr().out
    assert report["device"] == "CPU" and report["left"] == [] and len(report["cases"]) == 2
    for result in report["cases"]:
        ours, name = result["ours"], result["case"]["name"]
        assert len(ours["repeats"]) == 1 and set(ours["repeats"][0]) == set(gpu.PHASES)
        assert ours["seconds"] == pytest.approx(sum(ours["repeats"][0].values()))
        assert ours["tokens_a_second"] == pytest.approx(2 * 4 * 6 / ours["repeats"][0]["generate"])
        assert ours["share_of_peak"] > 0 and ours["launches_a_token"] > 50 and ours["peak_gib"] > 0.1
        assert ours["idle_share"] is None and ours["dtype"] == "float32" and ours["prompt_tokens"] >= 60
        assert said.count(f"| {name} (") == 2  # at once, and in the table at the end


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: bench/requirements.txt")
def test_trl_does_its_steps_beside_ours(tmp_path):
    gpu.main(gpu.GpuOptions(device="cpu", quick=True, only="Qwen", json=str(tmp_path / "gpu.json")))
    result, = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert result["trl"]["micro_batch"] == 4 and set(result["trl"]["repeats"][0]) == set(gpu.PHASES)


def test_cases_come_once_in_order_of_interest():
    names = [case.name for case in cases_named("", quick=False)]
    assert len(set(names)) == len(names) == 4 * 3 * 3 * 2 and names[:len(FIRST)] == [case.name for case in FIRST]
    assert names[0] == "Qwen2.5-VL-3B, LoRA, 1700, 12" and cases_named("", quick=False)[0].trl
    assert {case.name for case in (*FIRST, *REST)} == set(names)
    assert [case.model for case in cases_named("7B, full, 3000", quick=False)] == ["Qwen2.5-VL-7B"] * 3
    with pytest.raises(OptionError, match="--only 8B: no such case; known: tiny Qwen2.5-VL, LoRA, 60, 4;"):
        cases_named("8B", quick=True)


def test_what_time_does_not_allow_is_named(tmp_path, capsys, monkeypatch):
    def measured(case, options, processes):
        time.sleep(0.2)
        return {"case": {"name": case.name}, "ours": {"failed": "planted"}}

    monkeypatch.setattr(gpu, "measure_case", measured)
    options = gpu.GpuOptions(device="cpu", quick=True, minutes=0.3 / 60, json=str(tmp_path / "gpu.json"))
    gpu.main(options)
    left = QUICK[1].name
    assert f"left out, for they would have ended behind --minutes 0.005: {left}" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["left"] == [left]


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), ModelError("CUDA out of "
                                                                                                  "memory.")])
def test_a_case_without_memory_is_a_line_of_the_table(problem, monkeypatch):
    def short(*_):
        raise problem

    monkeypatch.setattr(gpu, "measure", short)
    options = gpu.GpuOptions(device="cpu", no_trl=True)
    result = gpu.measure_case(QUICK[0], options, Processes())
    assert gpu.table([result]).splitlines()[2] == \
        "| tiny Qwen2.5-VL, LoRA, 60, 4 | CUDA out of memory. |  |  |  |  |  | - | - | - | - |"
    with pytest.raises(type(problem)):  # the other processes would wait for this one
        gpu.measure_case(QUICK[0], options, Processes(0, 2))


def test_a_line_of_the_table():
    ours = {"prompt_tokens": 1697, "repeats": [{"prepare": 0.25, "generate": 1, "reference": 0.5, "train": 2}],
            "seconds": 3.75, "tokens_a_second": 6144.2, "share_of_peak": 0.256, "peak_gib": 20.04, "counted_gib": 19.5,
            "launches_a_token": 799.6, "idle_share": 0.031}
    result = {"case": {"name": "M"}, "ours": ours, "trl": {"seconds": 30.0}, "trl_vllm": {"failed": "no"}}
    assert gpu.table([result]).splitlines()[2] == ("| M (1697) | 0.25 / 1.00 / 0.50 / 2.00 / 3.75 | 6,144 | 26% | "
                                                   "20.0 (19.5) | 800 | 3% | 30.00 | 8.0 | no | - |")


def test_busy_time_is_that_of_all_streams_together():
    assert gpu_trace.busy([(5, 6), (0, 2), (1, 3), (1, 1.5)]) == 4
    assert gpu_trace.busy([]) == 0


def test_idle_is_what_no_kernel_covers(monkeypatch):
    def event(kind, begin, end):
        return SimpleNamespace(device_type=kind, time_range=SimpleNamespace(start=begin, end=end))

    events = [event(DeviceType.CUDA, 0, 2e5), event(DeviceType.CUDA, 1e5, 3e5), event(DeviceType.CPU, 0, 9e5)]
    monkeypatch.setattr(gpu_trace, "traced", lambda work, device: (events, 0.4))
    assert gpu_trace.idle_share(None, torch.device("cuda")) == pytest.approx(0.25)


def test_launches_are_kernels_graphs_and_copies():
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync",
             "cudaMemsetAsync", "cudaStreamSynchronize", "cudaEventRecord", "gemm", "aten::mm"]
    events = [SimpleNamespace(name=name, cpu_children=[]) for name in names]
    assert gpu_trace.launches(events, torch.device("cuda")) == 6
    work = torch.eye(3)
    events, _ = gpu_trace.traced(lambda: work + work + work, CPU)
    assert gpu_trace.launches(events, CPU) == 2
    assert gpu_trace.launches_a_token(lambda tokens: [work + work for _ in range(5 * tokens + 7)], CPU, 4) == 5


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
                                            ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362),
                                            ("NVIDIA L4", 121), ("NVIDIA A10G", 70), ("NVIDIA A10", 125)])
def test_peaks_of_known_gpus(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu_trace.peak_flops(torch.device("cuda"), None) == peak * 1e12
    assert gpu_trace.peak_flops(torch.device("cuda"), 2.0) == 2e12
    assert gpu_trace.peak_flops(CPU, None) is None


def test_an_unknown_gpu_wants_its_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(OptionError, match="Some GPU: .* --peak_tflops"):
        gpu_trace.peak_flops(torch.device("cuda"), None)


def test_operations_are_those_of_the_counted_model(tmp_path):
    folder = write_folder("tiny Qwen2.5-VL", tmp_path)
    with random_weights(CPU):
        policy = load_policy(str(folder), TrainOptions(), "cpu", False)
    text = count.Text(layers=2, hidden=64, heads=4, kv_heads=2, head_width=16, intermediate=96, vocabulary=512)
    read = gpu_trace.Read(policy)
    assert (read.token, read.pair, read.logits) == (text.token, text.pair, text.logits)
    # Two layers of 4 x 32 x 32 and 3 x 32 x 48 a patch; a merger of 128 x 128 and 128 x 64 a token.
    assert gpu_trace.vision_work(policy, 40, 10) == 40 * 2 * (4096 + 4608) + 10 * (16384 + 8192)
    work = count.Work(prompt=3, group=2, answer=2, vision=1000, train_vision=False)
    phases = count.our_way(text, work)
    assert gpu_trace.multiply_adds(policy, work) == sum(phases.values())
    policy.add_adapter(4, None, "base")
    assert gpu_trace.Read(policy).token == text.token
    assert gpu_trace.multiply_adds(policy, work) == pytest.approx(sum(phases.values()) - phases["train"] / 3)


@pytest.mark.parametrize(("name", "total", "vision"), [
    ("MiniCPM-V-4.6", 1.30, 0.55), ("Qwen2.5-VL-3B", 3.75, 0.67), ("Qwen2.5-VL-7B", 8.29, 0.68),
    ("MiniCPM-o-2_6", 8.57, 0.95)])
def test_sizes_are_the_real_ones(tmp_path, name, total, vision):
    folder = str(write_folder(name, tmp_path))
    model = random_model(native_class(folder), folder, torch.bfloat16, torch.device("meta"))
    family = family_of(model.config.model_type)
    seen = sum(weight.numel() for module in family.vision_modules(model) for weight in module.parameters())
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e9, 2) == pytest.approx(total, abs=0.011)
    assert round(seen / 1e9, 2) == pytest.approx(vision, abs=0.011)
    assert {case.prompt_tokens for case in REST if case.model == name} == set(SIZES[name].sides)


def test_the_same_weights_each_time(tmp_path):
    folder = str(write_folder("tiny MiniCPM-V-4.6", tmp_path))
    one, other = (random_model(native_class(folder), folder, torch.float32, CPU) for _ in range(2))
    assert all(torch.equal(mine, its) for mine, its in zip(one.parameters(), other.parameters(), strict=True))
    assert GpuCase("x", 60, 4).rewards == GpuCase("y", 60, 4).rewards
