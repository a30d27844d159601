"""A case of gpu.py, done: our steps and TRL's, in seconds, bytes and launches."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import count
from cases import LABEL, Case
from config import TrainOptions
from gpu_models import SIZES, GpuCase, random_model, random_weights
from gpu_trace import idle_share, launches_a_token, multiply_adds, peak_flops, vision_work
from meter import Meter
from models.footprint import Work, footprint, shape_of
from models.loading import DTYPES, choose_device, settle_dtype
from models.policy import load_policy
from models.preparing import worker_count
from models.processes import ALONE, Processes
from models.sharding import gathered
from ours import TEMPLATE, computed_step, make_run
from rollout import PromptEncoder, rollout_groups
from sheets.samples import Sample
from training.preflight import GIB, peak_memory
from training.upkeep import Run

RANK = 32


def settings_of(case: GpuCase, options: Any, folder: Path, processes: Processes) -> TrainOptions:
    """The options of a training run that does the case's steps."""
    split = processes.world > 1 and not case.lora
    return settle_dtype(TrainOptions(
        model_path=str(folder), group_size=case.group_size, max_length=options.answer_tokens, temperature=1.0,
        batch_size=options.products, rollout_batch_size=options.products, micro_batch_size=options.micro_batch_size,
        lora_rank=RANK if case.lora else None, gradient_checkpointing=not case.lora, lr=1e-6, kl_weight=0.01,
        sharding="fsdp" if split else "none", device=options.device), options.device)


def fitted_sample(encoder: PromptEncoder, case: GpuCase, folder: Path) -> Sample:
    """A product of five photos whose text fills its prompt up to the case's length, where the photos leave room."""
    side, rng = SIZES[case.model].sides[case.prompt_tokens], random.Random(case.name)
    photos = tuple(folder / f"{index}.jpg" for index in range(5))
    for path in photos:
        coarse = (side // 8, side // 8)
        Image.frombytes("RGB", coarse, rng.randbytes(3 * coarse[0] * coarse[1])).resize((side, side)).save(path)
    sample = Sample(row=0, product_id="bench", text="a", label=LABEL, photos=photos, sheet="bench.xlsx")
    missing = case.prompt_tokens - len(encoder.encode(sample).input_ids)
    return replace(sample, text="".join(rng.choices("abcdefgh 0123456789", k=max(1, 1 + missing))))


class Steps:
    """Steps on a run, photos of the next one prepared beside each."""

    def __init__(self, run: Run, settings: TrainOptions, sample: Sample, rewards: Sequence[float], meter: Meter):
        self.run, self.settings, self.sample, self.rewards, self.meter, self.done = run, settings, sample, rewards, \
            meter, 0

    def products(self, step: int) -> list[Sample]:
        """The products of a step: the same photos, but not the same rows, so that they are prepared anew."""
        count = self.settings.batch_size
        return [replace(self.sample, row=step * count + index) for index in range(count)]

    def step(self) -> dict[str, float]:
        """Do a step; returns its seconds by phase."""
        self.run.products = self.products(self.done)
        self.meter.restart()
        with self.meter.phase("prepare"):
            self.run.encoder.prefetch([*self.run.products, *self.products(self.done + 1)])
            for sample in self.run.products:
                self.run.encoder.encode(sample)
        computed_step(self.run, self.settings, self.done, self.meter, self.rewards)
        self.meter.charge()
        self.run.encoder.forget(self.run.products)
        self.done += 1
        return dict(self.meter.seconds)

    def sample_answers(self, tokens: int) -> None:
        """Sample answers of so many tokens to a step's products."""
        with gathered(self.run.policy):
            rollout_groups(self.run.encoder, self.products(0), self.settings.group_size, 1.0, tokens, "launches",
                           self.settings.rollout_batch_size)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Wall seconds, the GPU's work done."""
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def measure(case: GpuCase, options: Any, folder: Path, processes: Processes) -> dict[str, Any]:
    """Measure our side of a case."""
    device, settings = choose_device(options.device), settings_of(case, options, folder, processes)
    with random_weights(device):
        run = make_run(settings, processes=processes)
    run.encoder = PromptEncoder(run.policy, template=TEMPLATE, workers=worker_count(options.workers, device))
    sample = fitted_sample(run.encoder, case, folder)
    steps = Steps(run, settings, sample, case.rewards, Meter(clock=clock_of(device)))
    steps.step()  # kernels are chosen, graphs captured, Adam's moments made
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    repeats = [steps.step() for _ in range(options.steps)]
    prompt = run.encoder.encode(sample)
    photo_tokens = int(run.policy.family.photo_positions(run.policy.model, prompt).sum())
    work = count.Work(len(prompt.input_ids), case.group_size, options.answer_tokens, vision_work(
        run.policy, photo_tokens * SIZES[case.model].patches, photo_tokens), train_vision=False)
    seconds = statistics.median(sum(repeat.values()) for repeat in repeats)
    generated = options.products * case.group_size * options.answer_tokens
    most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    peak, flops = peak_flops(device, options.peak_tflops), 2 * options.products * multiply_adds(run.policy, work)
    return {"prompt_tokens": work.prompt, "repeats": repeats, "seconds": seconds,
            "tokens_a_second": generated / statistics.median(repeat["generate"] for repeat in repeats),
            "share_of_peak": peak and flops / seconds / peak, "peak_gib": most / GIB,
            "counted_gib": counted_gib(run, settings, work.prompt, photo_tokens, processes), "dtype": settings.dtype,
            "launches_a_token": launches_a_token(steps.sample_answers, device, options.answer_tokens),
            "idle_share": idle_share(steps.step, device)}


def counted_gib(run: Run, settings: TrainOptions, prompt_tokens: int, photo_tokens: int, processes: Processes
                ) -> float:
    """The peak that docs/scaling.md counts, GiB."""
    policy = run.policy
    vision = sum(parameter.numel() for module in policy.family.vision_modules(policy.model)
                 for parameter in module.parameters())
    shape = shape_of(policy.family.language_model(policy.model), policy.family.head(policy.model), vision)
    work = Work(prompt_tokens, photo_tokens, run.learner.passes.products or 1, settings.rollout_batch_size)
    return footprint(shape, settings, work, processes.world, policy.device.type == "cuda").peak / GIB


def measure_trl(case: GpuCase, options: Any, folder: Path, vllm: bool = False) -> dict[str, Any]:
    """Measure TRL's side of a case, with transformers' generate or with vLLM; in halves where memory runs out."""
    settings = settings_of(case, options, folder, ALONE)
    with random_weights(choose_device(options.device)):
        policy = load_policy(settings.model_path, replace(settings, lora_rank=None), options.device, False)
    sample = fitted_sample(PromptEncoder(policy, template=TEMPLATE), case, folder)
    targets, model_class = policy.family.lora_targets(policy.model), type(policy.model)
    policy = None
    for micro_batch in [size for size in range(options.trl_micro_batch, 0, -1) if case.group_size % size == 0]:
        free()
        try:
            repeats = trl_steps(case, options, settings, sample, (model_class, targets), micro_batch, vllm)
        except torch.OutOfMemoryError:
            continue
        return {"micro_batch": micro_batch, "repeats": repeats,
                "seconds": statistics.median(sum(repeat.values()) for repeat in repeats)}
    raise torch.OutOfMemoryError("TRL: not even one answer at a time")


def trl_steps(case: GpuCase, options: Any, settings: TrainOptions, sample: Sample, parts: tuple[type, list[str]],
              micro_batch: int, vllm: bool) -> list[dict[str, float]]:
    """Do steps by TRL; returns the seconds by phase of all but the first."""
    import trl_side

    device, folder = choose_device(options.device), Path(settings.model_path)
    meter, repeats = Meter(clock=clock_of(device)), []
    model = random_model(parts[0], str(folder), DTYPES[settings.dtype], device)
    trainer = trl_side.make_trainer(
        folder, folder / "trl", Case(case.prompt_tokens, case.group_size, train_vision=False),
        [sample] * (options.products * (1 + options.steps)), micro_batch, False, meter, model, options.products,
        (RANK, parts[1]), vllm, use_cpu=device.type == "cpu", bf16=settings.dtype == "bfloat16",
        max_completion_length=options.answer_tokens)
    trl_side.run_steps(trainer, lambda step: repeats.append(dict(meter.seconds)))
    return repeats[1:]


def free() -> None:
    """Give back what no one holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
