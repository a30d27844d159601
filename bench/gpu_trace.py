"""What a step asks of a GPU: operations by counting, launches and idle time by torch's profiler."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import count
from ground.errors import OptionError
from models.checkpointing import repeated_layers
from models.policy import Policy

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
# Dense bfloat16, 10^12 operations a second, as their makers give it; the first name that is found counts.
PEAKS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H20": 148, "A100": 312,
         "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A6000": 155, "RTX 4090": 165,
         "RTX 5090": 209, "RTX 3090": 71}


def peak_flops(device: torch.device, asked: float | None) -> float | None:
    """The GPU's peak in operations a second; None on a CPU. Raises OptionError for a GPU that isn't in the table."""
    if asked is not None:
        return asked * 1e12
    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    known = [peak for part, peak in PEAKS.items() if part in name]
    if not known:
        raise OptionError(f"{name}: its bfloat16 peak is not known here; give it with --peak_tflops")
    return known[0] * 1e12


class Read:
    """A language model's multiply-adds as count.py wants them, read off its layers; a delta net's rule is left out."""

    def __init__(self, policy: Policy):
        language, head = policy.family.language_model(policy.model), policy.family.head(policy.model)
        self.token = sum(_products(layer) for layer in language.layers)
        self.pair = sum(2 * layer.self_attn.o_proj.in_features for layer in language.layers
                        if hasattr(layer, "self_attn"))
        self.logits = head.in_features * head.out_features


def _products(module: nn.Module) -> int:
    """Multiply-adds of a token through a module's linear layers; an adapter's are left out."""
    return sum(part.in_features * part.out_features for name, part in module.named_modules()
               if isinstance(part, nn.Linear) and "lora_" not in name)


def vision_work(policy: Policy, patches: int, tokens: int) -> int:
    """Multiply-adds of a product's photos; attention between patches is left out."""
    modules = policy.family.vision_modules(policy.model)
    layers = sum(_products(layer) for module in modules for layer in repeated_layers(module))
    return patches * layers + tokens * (sum(map(_products, modules)) - layers)


def multiply_adds(policy: Policy, work: count.Work) -> float:
    """Multiply-adds of a product's step; frozen matrices under an adapter have no gradient of their own."""
    phases: dict[str, float] = count.our_way(Read(policy), work)
    if policy.adapter is not None:
        phases["train"] *= 2 / 3
    return sum(phases.values())


def traced(work: Callable[[], Any], device: torch.device) -> tuple[list[Any], float]:
    """Do work under the profiler; what it saw, and the seconds it took."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
    return list(profiler.events()), seconds


def launches(events: Sequence[Any], device: torch.device) -> int:
    """Launches of kernels, graphs and copies; on a CPU operations that call no other."""
    if device.type == "cuda":
        return sum(event.name.startswith(LAUNCHES) for event in events)
    return sum(event.name.startswith("aten::") and not event.cpu_children for event in events)


def launches_a_token(sample: Callable[[int], Any], device: torch.device, tokens: int) -> float:
    """How many launches a further token costs; sample: writes answers of so many tokens."""
    few = tokens // 2
    counted = [launches(traced(lambda length=length: sample(length), device)[0], device) for length in (few, tokens)]
    return (counted[1] - counted[0]) / (tokens - few)


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """The time that is covered by intervals, begin and end."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def idle_share(work: Callable[[], Any], device: torch.device) -> float | None:
    """The share of the time in which the GPU does nothing; None on a CPU."""
    events, seconds = traced(work, device)
    on_gpu = [(event.time_range.start, event.time_range.end) for event in events
              if event.device_type == DeviceType.CUDA]
    return 1 - busy(on_gpu) / 1e6 / seconds if on_gpu else None
