"""A shop of ten products, runs of a few seconds on it, and what they leave behind."""

import io
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_vlm_parallel as training
from config import TrainOptions
from evidence.report import write_sheet
from sheets.samples import cached_photo_path
from tiny import noise_photo, tiny_model


def write_shop(folder, tokenizer, image_processor):
    """A model folder, a sheet with photos (eight good rows, one unlabelled, one without its photo) and prompt.txt."""
    model = tiny_model(tokenizer, ["linear_attention", "full_attention"])
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    rows = []
    for index in range(10):
        address = f"https://shop.invalid/{index}.png"
        if index != 9:
            noise_photo(index, (96, 64)).save(cached_photo_path(address, folder / "photos"))
        rows.append({"sku_id": f"00{index}", "text": f"box {index}", "sku_img": "" if index == 3 else address,
                     "label": "" if index == 8 else f"{index + 1} 8 15"})
    write_sheet(folder / "data.xlsx", {"products": rows})
    (folder / "prompt.txt").write_text("{text}", encoding="utf-8")
    return folder


def train_options(shop, output, **changes):
    """Options of a run of a few seconds on the shop."""
    settings = dict(model_path=str(shop / "model"), data_path=str(shop / "data.xlsx"),
                    image_cache_dir=str(shop / "photos"), prompt_file=str(shop / "prompt.txt"),
                    output_dir=str(output / "run"), log_dir=str(output / "logs"), device="cpu", batch_size=3,
                    group_size=4, max_length=8, temperature=1.0, lr=1e-3, max_steps=3, eval_fraction=0.3, eval_every=2,
                    save_every=2, num_threads=torch.get_num_threads())
    return TrainOptions(**{**settings, **changes})


def as_flags(options):
    """The command line that gives these options."""
    flags = []
    for name, value in asdict(options).items():
        if isinstance(value, list):
            flags += [word for item in value for word in (f"--{name}", item)]
        elif value is not None:
            flags += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value).lower()
                                     if isinstance(value, bool) else str(value)])]
    return flags


def run_here(script, *argv):
    """Run a script as a command in this process: an interpreter and torch of its own take seconds."""
    path, out, err = str(Path(__file__).resolve().parent.parent / script), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [path, *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
    return subprocess.CompletedProcess(argv, end.value.code, out.getvalue(), err.getvalue())


def weights(folder):
    """The weights of a checkpoint."""
    return load_file(folder / "model.safetensors")


def tags(log_dir):
    """The curves of a run: tag to steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def one_step(options, advantages=None):
    """A prepared run and the buffer of one rollout; the tiny model's answers are worthless, so advantages are set."""
    run = training.prepare(replace(options, eval_every=0, kl_weight=0.0), training.Processes())
    groups, _ = training.rollout_groups(run.encoder, run.products[:3], 4, 1.0, 8, "0/0", 3)
    buffer = training.fill_buffer(groups, run, options)
    for item in buffer.items:
        item.advantages = torch.tensor(advantages or [1.5, -0.5, -0.5, -0.5])
    return run, buffer
