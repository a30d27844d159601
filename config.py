"""Every option, declared once: typed, grouped for --help, read from a YAML file, checked before weights load.

jsonargparse does the parsing: it reads flags and YAML through the same types, keeps the names flat and imports in a
tenth of a second. Ours are the declarations, the checks between options and the hint at the nearest right name.
"""

import difflib
import math
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

DEFAULT_DATA_PATH = "data.xlsx"
T = TypeVar("T")
REWARD = ("a reward of your own, file.py:function, or file.py:function:weight; repeat to add several up; size is the "
          "built-in one, which is alone when none is given")
REWARD_AGAIN = "score with this reward (see train_vlm_parallel.py --help); default: the one of the training run"
_REWARD = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)(?::(?P<weight>[^:]+))?|size(?::(?P<size_weight>[^:]+))?")
TRUST_REMOTE_CODE = ("run the Python files that come with the model, with your rights; MiniCPM-o and the MiniCPM-V "
                     "before 4.6 need it")


class OptionError(ValueError):
    """A wrong value or combination of options; the text names the option and the way out."""


def option(default: Any, text: str) -> Any:
    """Declare one option: its default and the sentence that --help shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class ModelOptions:
    """Model"""

    model_path: str = option("openbmb/MiniCPM-o-2_6", "folder or hub name of the policy; its frozen copy is the "
                                                      "reference policy")
    checkpoint_path: str | None = option(None, "start from these weights instead: a checkpoint folder or a plain "
                                               "model_stepN.pt state dict; the reference policy stays model_path; "
                                               "with lora_rank a checkpoint folder with an adapter")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    train_vision: bool = option(False, "train the vision tower and its projection too, not only the language model")
    # No lora_dropout: sampling and scoring must see the same network.
    lora_rank: int | None = option(None, "train adapters of this rank on every linear layer of the language model "
                                         "instead of its weights; the reference policy is the same model with "
                                         "the adapters off; default: train the weights")
    lora_alpha: int | None = option(None, "adapters are scaled by lora_alpha / lora_rank; default: 2 * lora_rank")
    quantize: Literal["none", "4bit"] = option("none", "4bit: keep the frozen model under the adapters in 4 bits; "
                                                       "needs lora_rank and bitsandbytes")
    max_slice_nums: int | None = option(None, "slices a photo may be cut into; default: the model's own; for models "
                                              "that cut photos, as MiniCPM does and Qwen does not")
    max_pixels: int | None = option(None, "pixels of a photo at most, larger ones are scaled down; default: the "
                                          "model's own")
    exact_path: bool = option(False, "sample and score every answer on a row of its own instead of a group that shares "
                                     "its prompt: the same numbers, slower")
    gradient_checkpointing: bool = option(False, "keep only what enters a layer and compute the rest again in the "
                                                 "backward pass: less memory, a third more time")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute; auto takes the GPU when there is one")
    gpu_ids: tuple[int, ...] = option((), "GPUs of this machine to train on, a process each: 0 1 2 3; default: the "
                                          "first one. For more machines: torchrun")
    sharding: Literal["none", "fsdp"] = option("none", "with several processes, none: each holds all weights and "
                                                       "gradients; fsdp: each holds its share of them")
    dtype: Literal["float32", "bfloat16"] = option("float32", "compute dtype; trainable weights stay float32")
    num_threads: int | None = option(None, "CPU threads for torch; default: torch's own choice")


@dataclass
class SheetOptions:
    """How to read a sheet"""

    column: list[str] = field(default_factory=list, metadata={
        "help": "FIELD=NAME, what a column of your sheet is: text, label, sku_id, category or photo; repeat for each; "
                "default: columns of these names, photos in sku_img, spu_img_1, spu_img_2, ..."})
    sheet_name: str | None = option(None, "worksheet of an .xlsx; default: the first that is not hidden")
    encoding: str | None = option(None, "encoding of a .csv or .jsonl; default: UTF-8, or a guess that is logged")


MissingPhotos = Literal["use_rest", "drop_row", "text_only", "placeholder"]


@dataclass
class DataOptions(SheetOptions):
    """Data"""

    data_path: str = option(DEFAULT_DATA_PATH, "the sheet, .xlsx, .csv or .jsonl: text, label, photo addresses, sku_id")
    image_cache_dir: str = option("image_cache_new", "folder with the photos, named md5(address) + extension")
    missing_photos: MissingPhotos = option(
        "use_rest", "a row with missing or broken photos: use_rest trains on the others and leaves the row out when "
                    "none is left; drop_row leaves it out when any is missing; text_only trains even without any; "
                    "placeholder puts grey pictures in their place, to try things out")
    on_bad_row: Literal["skip", "stop"] = option("skip", "rows that can't be trained on: skip names them and trains on "
                                                         "the others; stop ends before any weight loads")
    download_missing: bool = option(False, "fetch photos that are not in image_cache_dir before training, as "
                                           "download_images.py does; otherwise the network is never used")
    eval_path: str | None = option(None, "a sheet of held-out products; instead of eval_fraction")
    eval_sheet_name: str | None = option(None, "worksheet of eval_path")
    eval_fraction: float = option(0.1, "share of the products held out from data_path, chosen by a hash of the product")
    prompt_language: Literal["zh", "en"] = option("zh", "wording of the prompt")
    prompt_file: str | None = option(None, "your own wording: a UTF-8 text file that contains {text}")
    max_prompt_length: int | None = option(None, "tokens of a prompt at most; a longer one loses whole photos from the "
                                                 "end; default: no limit")


@dataclass
class FetchOptions:
    """How to fetch photos"""

    workers: int = option(16, "photos fetched at the same time")
    retries: int = option(4, "further tries after a busy server, a broken connection or a body cut short")
    timeout: float = option(20.0, "seconds to wait for a connection, and for the next bytes")
    deadline: float = option(120.0, "seconds that one photo may take to arrive")
    max_file_mb: int = option(20, "MiB of a photo, at most")
    allow_private: bool = option(False, "fetch from private, loopback and link-local addresses too")


@dataclass
class RolloutOptions:
    """Rollout"""

    batch_size: int = option(16, "products a step on each process")
    group_size: int = option(12, "candidates a product")
    max_length: int = option(64, "new tokens of a candidate, at most")
    temperature: float = option(0.7, "sampling temperature; log-probs are taken at the same one")
    rollout_batch_size: int = option(4, "products sampled together; more is faster and takes more memory")
    prompt_cache_mb: int = option(512, "host memory for prepared prompts and photos, in MiB")


@dataclass
class LossOptions:
    """Reward and loss"""

    reward: list[str] = field(default_factory=list, metadata={"help": REWARD})
    kl_weight: float = option(0.01, "weight of the KL term towards the reference policy; 0 leaves it out of the loss")
    clip_eps: float = option(0.2, "the ratio is clipped to [1 - clip_eps, 1 + clip_eps]")
    clip_eps_high: float | None = option(None, "another upper clip: 1 + clip_eps_high (clip-higher)")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = option(
        "grpo", "grpo: mean over the tokens of an answer, then over answers; dapo: mean over all tokens; "
                "dr_grpo: sum over tokens divided by answers x max_length")
    scale_advantages: bool = option(True, "divide a group's advantages by its standard deviation")
    std_floor: float = option(0.0, "lower bound for that standard deviation, against noise blown up to full size")
    mask_truncated: bool = option(False, "leave answers that hit max_length without a stop token out of the loss")


@dataclass
class OptimizerOptions:
    """Optimizer"""

    lr: float = option(5e-6, "AdamW's peak learning rate")
    lr_scheduler: Literal["constant", "linear", "cosine"] = option("constant", "course of the rate after the warm-up")
    min_lr_ratio: float = option(0.0, "linear and cosine end at this share of lr")
    warmup_steps: int = option(0, "steps in which the rate rises linearly to lr")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay, on matrices only")
    adam_betas: tuple[float, float] = option((0.9, 0.999), "AdamW's betas")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    epochs: int = option(1, "passes over a step's buffer")
    minibatch_size: int | None = option(None, "products an optimizer step; default: the whole buffer")
    micro_batch_size: int = option(1, "products a forward and backward pass; changes memory and speed, not the "
                                      "result; 0 starts with what fits the GPU (on a CPU, with all) and halves when "
                                      "memory runs out")
    max_bad_steps: int = option(5, "stop after so many steps in a row with a non-finite loss or gradient")
    max_kl: float = option(10.0, "warn of every step whose mean KL from the reference is above")
    min_entropy: float = option(0.0, "warn of every step whose mean entropy, in nats a token, is below")


@dataclass
class RunOptions:
    """Run"""

    max_steps: int = option(1000, "steps in all; one step is a rollout and its update")
    output_dir: str = option("outputs/vlm_grpo", "checkpoints, options.yaml and train.log")
    overwrite_output_dir: bool = option(False, "throw away the checkpoints of an earlier run in output_dir")
    log_dir: str = option("runs/vlm_grpo_parallel", "TensorBoard logs")
    save_every: int = option(100, "steps between checkpoints; the last step is always saved")
    keep_last: int = option(3, "checkpoints kept, the newest; 0 keeps all")
    eval_every: int = option(100, "steps between evaluations on held-out products; 0 for none")
    show_every: int = option(50, "steps between tables of candidates in TensorBoard; 0 for none")
    eval_samples: int = option(1, "answers sampled a held-out product at each evaluation")
    save_best: bool = option(True, "keep the checkpoint with the best held-out mean reward in output_dir/best")
    stop_after: int = option(0, "stop after so many evaluations in a row without a better held-out mean reward; 0: go "
                                "on to max_steps")
    seed: int = option(0, "seed of the data order and of every sampled token")
    preflight: bool = option(True, "run the largest product forward and backward before the first step and say what "
                                   "memory it took")
    resume: str | None = option(None, "auto: go on from the newest whole checkpoint in output_dir; or a checkpoint "
                                     "folder")


@dataclass
class TrainOptions(RunOptions, OptimizerOptions, LossOptions, RolloutOptions, DataOptions, ModelOptions):
    """All options of a training run, flat."""

    def check(self) -> None:
        """Refuse values and combinations that can't work; raises OptionError naming the option."""
        check_ranges(self, _RANGES)
        check_prompt_file(self.prompt_file)
        check_rewards(self.reward)
        if not self.eval_path and self.eval_fraction == 0 and self.eval_every:
            raise OptionError("--eval_every needs held-out products: give --eval_path or an --eval_fraction above 0, "
                              "or turn it off with --eval_every 0")
        if self.group_size < 2:
            raise OptionError("--group_size 1 gives every candidate advantage 0, so nothing is learnt: take 2 or more")
        if self.minibatch_size is not None and self.minibatch_size > self.batch_size:
            raise OptionError(f"--minibatch_size {self.minibatch_size} is more than the --batch_size "
                              f"{self.batch_size} products of a step")
        if self.lr_scheduler == "constant" and self.min_lr_ratio:
            raise OptionError("--min_lr_ratio needs --lr_scheduler linear or cosine")
        if self.warmup_steps > self.max_steps:
            raise OptionError(f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}")
        self.check_lora()
        if self.stop_after and not self.eval_every:
            raise OptionError(f"--stop_after {self.stop_after} needs evaluations: give --eval_every")
        if self.stop_after and not self.save_best:
            raise OptionError(f"--stop_after {self.stop_after} without --save_best would throw the best weights away")
        if self.resume and self.overwrite_output_dir:
            raise OptionError("--resume and --overwrite_output_dir contradict each other: take one")
        check_data(self)

    def check_lora(self) -> None:
        """Refuse options that need an adapter without one, or that it can't be trained with; raises OptionError."""
        if self.lora_rank is None:
            for name, default in (("lora_alpha", None), ("quantize", "none")):
                if getattr(self, name) != default:
                    raise OptionError(f"--{name} {getattr(self, name)} needs --lora_rank: without adapters every "
                                      "weight trains")
        elif self.train_vision:
            raise OptionError("--train_vision and --lora_rank contradict each other: adapters are on the language "
                              "model only; take one")


@dataclass
class CompareOptions(SheetOptions):
    """What to compare"""

    model_path: str | None = option(None, "the model before; default: the one the checkpoint was trained from")
    checkpoint_path: str = option("", "the model after: a checkpoint folder or a plain model_stepN.pt state dict")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    data_path: str | None = option(None, "the sheet; default: the held-out products of the training run")
    image_cache_dir: str | None = option(None, "folder with the photos; default: that of the training run")
    rows: Literal["held_out", "all"] = option("held_out", "held_out products only, or every row of the sheet")
    num_samples: int = option(4, "answers sampled a product with each model, at the training temperature")
    greedy: bool = option(False, "only one greedy answer a product, no sampled ones")
    ablate: bool = option(False, "also answer without photos, with blank ones and with other products' photos")
    also: list[str] = field(default_factory=list, metadata={
        "help": "another checkpoint or model to answer too, with its own options; repeat for more"})
    reward: list[str] = field(default_factory=list, metadata={"help": REWARD_AGAIN})
    accept_error: float = option(0.2, "share of wrong answers at most among those to be accepted without review")
    max_products: int | None = option(None, "look at the first so many products only")
    eval_batch_size: int = option(8, "products answered together")
    seed: int = option(0, "seed of the sampled answers")
    output_dir: str | None = option(None, "where compare.html, .xlsx and .json go; default: compare/ beside the "
                                          "checkpoint")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    num_threads: int | None = option(None, "CPU threads for torch")

    def check(self) -> None:
        """Refuse values that can't work; raises OptionError naming the option."""
        check_ranges(self, _RANGES)
        check_columns(self)
        check_rewards(self.reward)
        if not self.checkpoint_path:
            raise OptionError("--checkpoint_path is missing: give the checkpoint folder or model_stepN.pt to compare")
        for path in self.also:
            if not Path(path).exists() and path.count("/") != 1:  # one slash: perhaps a hub name
                raise OptionError(f"--also {path}: no such checkpoint or model folder")


@dataclass
class AnswerOptions(SheetOptions):
    """What to answer"""

    model_path: str = option("", "a model folder, hub name or checkpoint folder")
    checkpoint_path: str | None = option(None, "weights to use instead: a checkpoint folder or model_stepN.pt")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    text: str | None = option(None, "the product's text")
    image: list[str] = field(default_factory=list, metadata={"help": "a photo's path or address; repeat for up to "
                                                                          "five"})
    label: str | None = option(None, "the true size, if known: prints the reward")
    data_path: str | None = option(None, "a sheet instead of one product")
    image_cache_dir: str | None = option(None, "folder with photos by address; default: as in training")
    output_path: str | None = option(None, "the sheet to write; default: the sheet's name + .answers.xlsx")
    num_samples: int = option(4, "answers sampled a product; the one that agrees most with the others counts, and how "
                                 "far they agree is the confidence; 1: one greedy answer, no confidence")
    accept_at: float | None = option(None, "confidence from which an answer needs no review, as run.py prints it")
    reward: list[str] = field(default_factory=list, metadata={"help": REWARD_AGAIN})
    prompt_language: Literal["zh", "en"] | None = option(None, "wording of the prompt; default: as in training")
    prompt_file: str | None = option(None, "your own wording; default: as in training")
    eval_batch_size: int = option(8, "products answered together; halved when memory runs out")
    seed: int = option(0, "seed of the sampled answers")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    num_threads: int | None = option(None, "CPU threads for torch")

    def check(self) -> None:
        """Refuse values and combinations that can't work; raises OptionError naming the option."""
        check_ranges(self, _RANGES)
        check_columns(self)
        check_prompt_file(self.prompt_file)
        check_rewards(self.reward)
        if not self.model_path and not self.checkpoint_path:
            raise OptionError("--model_path is missing: give a model folder, a hub name or a checkpoint folder")
        if (self.text is None) == (self.data_path is None):
            raise OptionError("give either --text (with --image for each photo) or --data_path")
        if self.data_path and (self.image or self.label):
            raise OptionError("--image and --label go with --text; a sheet brings its own photos and labels")
        if len(self.image) > 5:
            raise OptionError(f"--image: {len(self.image)} photos, at most 5 a product")


@dataclass
class DoctorOptions(SheetOptions):
    """What to explain"""

    answer: str | None = field(default=None, metadata={"help": "an answer as a model gives it", "positional": True})
    label: str | None = option(None, "the true size that goes with it")
    text: str = option("", "the product's text, for a reward of your own that reads it")
    reward: list[str] = field(default_factory=list, metadata={"help": REWARD})
    data_path: str | None = option(None, "a sheet instead of one answer: answers its products in groups")
    model_path: str = option("", "the model that answers: a folder, hub name or checkpoint")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    image_cache_dir: str | None = option(None, "folder with the sheet's photos; default: as in training")
    prompt_language: Literal["zh", "en"] | None = option(None, "wording of the prompt; default: as in training")
    prompt_file: str | None = option(None, "your own wording; default: as in training")
    group_size: int = option(12, "answers a product")
    temperature: float | None = option(None, "sampling temperature; default: that of training")
    max_length: int | None = option(None, "new tokens of an answer at most; default: as in training")
    max_products: int | None = option(64, "look at the first so many products only")
    eval_batch_size: int = option(8, "products answered together")
    seed: int = option(0, "seed of the sampled answers")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    num_threads: int | None = option(None, "CPU threads for torch")

    def check(self) -> None:
        """Refuse values and combinations that can't work; raises OptionError naming the option."""
        check_ranges(self, _RANGES)
        check_prompt_file(self.prompt_file)
        check_rewards(self.reward)
        if (self.answer is None) == (self.data_path is None):
            raise OptionError("give either an answer with its --label, or a --data_path with a --model_path")
        if self.answer is not None and self.label is None:
            raise OptionError("--label is missing: give the true size that goes with the answer")
        if self.data_path is not None and not self.model_path:
            raise OptionError("--model_path is missing: give the model that is to answer the sheet")


@dataclass
class ExportOptions(SheetOptions):
    """What to export"""

    checkpoint_path: str = option("", "a checkpoint folder; an adapter in it is merged into the model under it")
    output_path: str = option("", "the model folder to write; it must not be there yet")
    model_path: str | None = option(None, "the model under the adapter; default: the one it was trained on")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    data_path: str | None = option(None, "a sheet with products to compare answers on; default: the training sheet")
    image_cache_dir: str | None = option(None, "folder with its photos; default: that of the training run")
    num_products: int = option(4, "products answered by the checkpoint and by what was written")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    num_threads: int | None = option(None, "CPU threads for torch")

    def check(self) -> None:
        """Refuse values that can't work; raises OptionError naming the option."""
        check_ranges(self, _RANGES)
        check_columns(self)
        if not self.checkpoint_path:
            raise OptionError("--checkpoint_path is missing: give the checkpoint folder to export")
        if not self.output_path:
            raise OptionError("--output_path is missing: give the folder to write the model to")
        if Path(self.output_path).exists():
            raise OptionError(f"--output_path {self.output_path} is there already: name a folder that isn't")


@dataclass
class DownloadOptions(FetchOptions, SheetOptions):
    """What to download"""

    data_path: str = option(DEFAULT_DATA_PATH, "the sheet with the photo addresses")
    image_cache_dir: str = option("image_cache_new", "folder to put the photos in, named md5(address) + extension")
    report_path: str = option("download_report.xlsx", "the sheet to write: each address that failed, and why")

    def check(self) -> None:
        """Refuse values that can't work; raises OptionError naming the option."""
        check_ranges(self, _RANGES)
        check_columns(self)
        check_data_path(self.data_path)


@dataclass
class CheckOptions(DataOptions):
    """What to check"""

    max_photos: int = option(5000, "photos opened to see whether they are whole; 0 opens none")
    model_path: str | None = option(None, "folder of the model whose tokenizer counts for max_prompt_length; default: "
                                          "an estimate")
    html_path: str | None = option(None, "the page to write; default: the sheet's name + .check.html")
    output_path: str | None = option(None, "the sheet to write back; default: the sheet's name + .check.xlsx")

    def check(self) -> None:
        """Refuse values and combinations that can't work; raises OptionError naming the option."""
        check_ranges(self, _RANGES)
        check_prompt_file(self.prompt_file)
        check_data(self)


@dataclass
class DemoOptions:
    """What to make"""

    output_dir: str = option("demo", "folder for model, sheets and photos")
    products: int = option(800, "products to train on")
    held_out: int = option(96, "products held out")
    warm_up_steps: int = option(550, "steps of the warm-up before GRPO")
    seed: int = option(0, "seed of catalogue, model and warm-up")

    def check(self) -> None:
        """Refuse values that can't work; raises OptionError naming the option."""
        check_ranges(self, _RANGES)


_POSITIVE = ("group_size", "batch_size", "max_length", "temperature", "rollout_batch_size", "lr", "max_grad_norm",
             "epochs", "minibatch_size", "max_kl", "max_bad_steps", "max_steps", "save_every",
             "eval_samples", "num_samples", "num_products", "eval_batch_size", "max_products", "num_threads",
             "max_slice_nums", "max_pixels", "max_prompt_length", "lora_rank", "lora_alpha", "products", "held_out",
             "warm_up_steps", "workers", "timeout", "deadline", "max_file_mb")
_NOT_NEGATIVE = ("kl_weight", "std_floor", "warmup_steps", "weight_decay", "keep_last", "eval_every", "show_every",
                 "seed", "prompt_cache_mb", "stop_after", "micro_batch_size", "min_entropy", "retries", "max_photos")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: (lambda value: value > 0, "must be above 0") for name in _POSITIVE},
    **{name: (lambda value: value >= 0, "must be 0 or more") for name in _NOT_NEGATIVE},
    "eval_fraction": (lambda value: 0 <= value < 1, "must be in [0, 1)"),
    **{name: (lambda value: 0 < value < 1, "must be between 0 and 1") for name in ("clip_eps", "accept_error")},
    "clip_eps_high": (lambda value: value > 0, "must be above 0"),
    "min_lr_ratio": (lambda value: 0 <= value <= 1, "must be in [0, 1]"),
    "adam_betas": (lambda value: all(0 <= beta < 1 for beta in value), "must be two numbers in [0, 1)"),
}


def check_ranges(options: Any, ranges: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Refuse the first option out of its range; raises OptionError."""
    for item in fields(options):
        value = getattr(options, item.name)
        if value is None or item.name not in ranges:
            continue
        holds, rule = ranges[item.name]
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(number) for number in numbers) or not holds(value):
            raise OptionError(f"--{item.name} {value}: {rule}")


def check_data_path(data_path: str) -> None:
    """Refuse a sheet that isn't there; with the default name the message says how to run the demo."""
    if Path(data_path).is_file():
        return
    if data_path == DEFAULT_DATA_PATH:
        raise OptionError(f"--data_path {data_path}: no such file. Give your own sheet with --data_path, or run the "
                          "built-in demo: make demo")
    raise OptionError(f"--data_path {data_path}: no such file")


def check_data(options: DataOptions) -> None:
    """Refuse sheets that aren't there and column options that can't be read; raises OptionError."""
    check_columns(options)
    check_data_path(options.data_path)
    if options.eval_path and not Path(options.eval_path).is_file():
        raise OptionError(f"--eval_path {options.eval_path}: no such file")
    if options.eval_sheet_name and not options.eval_path:
        raise OptionError(f"--eval_sheet_name {options.eval_sheet_name} needs --eval_path")


def check_columns(options: SheetOptions) -> None:
    """Refuse a --column that is no FIELD=NAME pair; raises OptionError."""
    for pair in options.column:
        name, _, column = pair.partition("=")
        if not column.strip() or not re.fullmatch("text|label|sku_id|category|photo|sku_img|spu_img_[0-9]+",
                                                  name.strip()):
            raise OptionError(f"--column {pair}: write FIELD=NAME, the field being text, label, sku_id, category or "
                              "photo (sku_img, spu_img_1, ... work too), as in --column text=标题")


def held_out_sheet(options: DataOptions) -> SheetOptions:
    """How to read eval_path: as data_path, but its own worksheet."""
    return SheetOptions(options.column, options.eval_sheet_name, options.encoding)


def sheet_options(own: SheetOptions, trained: DataOptions, own_sheet: bool, held_out: bool = False) -> SheetOptions:
    """How to read a sheet after training: as then, or, for a sheet of one's own, as said now (columns as then)."""
    if own_sheet:
        return SheetOptions(own.column or trained.column, own.sheet_name, own.encoding)
    then = held_out_sheet(trained) if held_out else trained
    return SheetOptions(own.column or then.column, own.sheet_name or then.sheet_name, own.encoding or then.encoding)


def check_prompt_file(prompt_file: str | None) -> None:
    """Refuse a prompt file that can't be read or lacks the {text} marker; raises OptionError."""
    if prompt_file is None:
        return
    if not Path(prompt_file).is_file():
        raise OptionError(f"--prompt_file {prompt_file}: no such file")
    if "{text}" not in Path(prompt_file).read_text(encoding="utf-8"):
        raise OptionError(f"--prompt_file {prompt_file}: it must contain {{text}}, where the product's text goes")


def split_reward(spec: str) -> tuple[str, str, float]:
    """Split file.py:function:weight, the file being "" for the built-in size; raises OptionError."""
    match = _REWARD.fullmatch(spec)
    weight = match and (match["weight"] or match["size_weight"] or "1")
    try:
        number = float(weight or "nan")
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise OptionError(f"--reward {spec}: give file.py:function, file.py:function:weight, size or size:weight")
    return match["file"] or "", match["name"] or "size", number


def check_rewards(specs: Sequence[str]) -> None:
    """Refuse a reward that is misspelt, whose file is not there or that stands there twice; raises OptionError."""
    for spec in specs:
        file, _, _ = split_reward(spec)
        if file and not Path(file).is_file():
            raise OptionError(f"--reward {spec}: no such file {file}")
    if len({split_reward(spec)[:2] for spec in specs}) < len(specs):
        raise OptionError(f"--reward {' '.join(specs)}: one of them is given twice")


class _Parser(ArgumentParser):
    """jsonargparse's parser, with a hint at the nearest option name."""

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        message = re.sub(r"<class '(\w+)'>", r"\1", re.sub(r'Parser key "(\w+)"', r"--\1", message))
        names = [action.dest for action in self._actions]
        for word in message.replace("'", " ").replace("=", " ").replace(",", " ").split():
            near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), names, n=1, cutoff=0.6)
            unknown = "unrecognized" in message or "is not accepted" in message
            if unknown and word.lstrip("-") not in names and near:
                message += f"\nDid you mean --{near[0]}?"
                break
        self.exit(2, f"{self.prog}: {message.strip()}\nAll options: {self.prog} --help\n")


def parse_options(options_class: type[T], description: str, argv: Sequence[str] | None = None) -> T:
    """Read options from the command line and --config YAML files (the command line wins) and check them.

    Exits with status 2 and one message when an option is unknown, of the wrong type or in a wrong combination.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with options; flags win")
    groups = [base for base in reversed(options_class.__mro__) if "__dataclass_fields__" in vars(base)]
    declared: set[str] = set()
    for group_class in groups:
        own = [item for item in fields(group_class) if item.name not in declared]
        if not own:
            continue
        group = parser.add_argument_group(group_class.__doc__)
        for item in own:
            declared.add(item.name)
            if item.metadata.get("positional"):
                group.add_argument(item.name, help=item.metadata["help"], nargs="?", type=item.type)
            else:
                group.add_argument(f"--{item.name}", help=item.metadata["help"], **_argument_kind(item))
    namespace = parser.parse_args(argv)
    options = options_class(**_with_tuples(options_class, {name: value for name, value in vars(namespace).items()
                                                           if name in declared}))
    try:
        options.check()
    except OptionError as problem:
        parser.error(str(problem))
    return options


def _with_tuples(options_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Turn the lists that YAML and the parser give into tuples where tuples are declared."""
    tuples = {item.name for item in fields(options_class) if typing.get_origin(item.type) is tuple}
    return {name: tuple(value) if name in tuples else value for name, value in values.items()}


def _argument_kind(item: Any) -> dict[str, Any]:
    if item.type is bool:  # --flag alone means true
        return {"type": bool, "nargs": "?", "const": True, "default": item.default}
    if typing.get_origin(item.type) is tuple:
        members = typing.get_args(item.type)
        count = "*" if members[-1] is Ellipsis else len(members)
        return {"type": members[0], "nargs": count, "default": list(item.default)}
    if typing.get_origin(item.type) is list:
        return {"action": "append", "default": []}
    return {"type": item.type, "default": item.default}


def write_options(options: TrainOptions, path: Path) -> None:
    """Write the resolved options as YAML that --config reads back."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_options(path: Path) -> TrainOptions:
    """Read options that write_options wrote; unknown names (of another version) raise OptionError."""
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {item.name for item in fields(TrainOptions)}
    unknown = sorted(set(plain) - known)
    if unknown:
        raise OptionError(f"{path}: options this version does not know: {', '.join(unknown)}")
    return TrainOptions(**_with_tuples(TrainOptions, plain))
