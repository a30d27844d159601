"""Checkpoints: written whole or not at all, found again, pruned, resumed from.

A checkpoint is a folder that transformers loads by itself (safetensors weights, tokenizer, image processor), with
options.yaml and, for --resume, trainer_state.pt beside the weights. With --lora_rank it holds the adapter instead of
the weights, as peft writes it. checksums.json, written last, has the SHA-256 of every other file.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from config import TrainOptions
from ground.errors import OptionError
from ground.files import disk_errors, whole_folder, write_json
from ground.options import read_options, split_reward, write_options
from models.policy import Policy

OPTIONS_FILE = "options.yaml"
STATE_FILE = "trainer_state.pt"
PROMPT_FILE = "prompt.txt"
CHECKSUMS_FILE = "checksums.json"
BEST, BEST_FILE = "best", "best.json"
REWARD_FILE = "own_reward_{}.py"
_NAME = re.compile(r"step_(\d+)$")


def save_checkpoint(policy: Policy, options: TrainOptions, step: int, state: dict[str, Any],
                    weights: dict[str, Tensor] | None = None) -> Path:
    """Write output_dir/step_N with weights, tokenizer, processor, options and trainer state; then prune old ones.

    weights: the whole ones, where the policy holds only a share.
    The folder appears under its name only when every file in it is on the disk; raises OSError when the disk fails,
    and then leaves the earlier checkpoints alone.
    """
    final = Path(options.output_dir) / f"step_{step:06d}"
    with whole_folder(final) as folder, disk_errors():
        save_model(policy, options, options.model_path, folder, weights)
        torch.save(state, folder / STATE_FILE)
        write_checksums(folder)
    prune_checkpoints(Path(options.output_dir), options.keep_last)
    return final


def save_model(policy: Policy, options: TrainOptions, base_path: str, folder: Path,
               weights: dict[str, Tensor] | None = None) -> None:
    """Write the model, or its adapter, with the options it was trained with; base_path: the model it came from."""
    policy.save(base_path, folder, weights)
    write_options(options, folder / OPTIONS_FILE)
    if options.prompt_file:
        shutil.copyfile(options.prompt_file, folder / PROMPT_FILE)
    for number, spec in enumerate(options.reward, start=1):
        if file := split_reward(spec)[0]:
            shutil.copyfile(file, folder / REWARD_FILE.format(number))


def keep_best(policy: Policy, options: TrainOptions, step: int, rewards: Mapping[str, float],
              weights: dict[str, Tensor] | None = None) -> None:
    """Keep these weights in output_dir/best, with the held-out products' mean rewards that speak for them.

    weights: the whole ones, where the policy holds only a share.
    """
    with whole_folder(Path(options.output_dir) / BEST) as folder, disk_errors():
        save_model(policy, options, options.model_path, folder, weights)
        write_json(folder / BEST_FILE, {"step": step, "mean_reward": fmean(rewards.values()), "rewards": rewards})


def is_better(rewards: Mapping[str, float], best: Mapping[str, Any] | None) -> bool:
    """Tell whether rewards by product are better, on average over the products that both answered; without any, yes."""
    earlier = best.get("rewards", {}) if best else {}
    common = rewards.keys() & earlier.keys()
    return not common or fmean(rewards[name] for name in common) > fmean(earlier[name] for name in common)


def read_best(output_dir: str) -> dict[str, Any] | None:
    """The step and held-out mean reward of output_dir/best, and each product's; None when there is none."""
    path = Path(output_dir) / BEST / BEST_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_checksums(folder: Path) -> None:
    """Write down the SHA-256 of every file that the folder holds."""
    write_json(folder / CHECKSUMS_FILE, _checksums(folder))


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS_FILE:
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint's files with their checksums; says which file is wrong and how, None when all are right."""
    try:
        wanted = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        found = _checksums(folder)
    except (OSError, ValueError) as problem:
        return f"{CHECKSUMS_FILE} can't be read ({problem})"
    for name, checksum in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != checksum:
            return f"{name} has changed since it was written, by its checksum"
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    found = [(int(match.group(1)), path) for path in output_dir.glob("step_*") if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def prune_checkpoints(output_dir: Path, keep_last: int) -> None:
    """Remove all but the newest keep_last checkpoints; 0 keeps all."""
    if keep_last > 0:
        for path in list_checkpoints(output_dir)[:-keep_last]:
            shutil.rmtree(path)


def find_resume(options: TrainOptions) -> Path | None:
    """Resolve --resume: the named folder, or the newest checkpoint of output_dir for "auto"; None starts afresh.

    A fresh run never mixes with the checkpoints of an earlier one: OptionError, unless --overwrite_output_dir. What
    a killed run had half written is thrown away.
    """
    for path in Path(options.output_dir).glob("step_*.partial"):
        shutil.rmtree(path)
    if options.resume is None:
        earlier = list_checkpoints(Path(options.output_dir))
        if earlier and not options.overwrite_output_dir:
            raise OptionError(f"--output_dir {options.output_dir} holds {len(earlier)} checkpoints of an earlier run: "
                              "go on from them with --resume auto, name another folder, or throw them away with "
                              "--overwrite_output_dir")
        for path in (*earlier, Path(options.output_dir) / BEST):
            shutil.rmtree(path, ignore_errors=True)
        return None
    if options.resume == "auto":
        found = list_checkpoints(Path(options.output_dir))
        if not found:
            logger.info(f"--resume auto: no checkpoint in {options.output_dir} yet, starting from the beginning")
            shutil.rmtree(Path(options.output_dir) / BEST, ignore_errors=True)  # of the start that was cut off
            return None
        return newest_whole(found)
    path = Path(options.resume)
    if not (path / STATE_FILE).is_file():
        raise OptionError(f"--resume {path}: no checkpoint folder with a {STATE_FILE}; give one, or auto")
    if damage := find_damage(path):
        raise OptionError(f"--resume {path}: this checkpoint is damaged: {damage}; give an earlier one, or auto")
    return path


def newest_whole(found: list[Path]) -> Path:
    """The newest of some checkpoints, oldest first, that is not damaged; names those that are.

    Raises OptionError when all are.
    """
    for path in reversed(found):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning(f"--resume auto: {path} is damaged: {damage}; looking at the checkpoint before it")
    raise OptionError(f"--resume auto: every checkpoint in {found[0].parent} is damaged (see the warnings above); "
                      "start again with --overwrite_output_dir instead of --resume")


# Options that a resumed run may change freely; any other difference means other steps than without the stop.
# Of batch_size only its product with the number of processes counts: see check_products.
_FREE = {"batch_size", "preflight", "gpu_ids", "sharding", "offload", "gradient_checkpointing", "checkpoint_path",
         "trust_remote_code", "device", "num_threads", "image_cache_dir", "download_missing", "on_bad_row",
         "rollout_batch_size", "prompt_cache_mb", "micro_batch_size", "max_bad_steps", "max_kl", "min_entropy",
         "output_dir", "log_dir", "save_every", "keep_last", "eval_every", "eval_samples", "show_every", "save_best",
         "stop_after", "resume", "overwrite_output_dir", "prompt_file"}


def read_state(path: Path, options: TrainOptions, world: int = 1) -> dict[str, Any]:
    """Read a checkpoint's trainer state; warns of every option that differs from the run it continues.

    world: how many processes there are. Raises OptionError when they take another number of products a step.
    """
    saved = read_options(path / OPTIONS_FILE)
    if saved.optimizer != options.optimizer:
        raise OptionError(f"--optimizer {options.optimizer}: the run in {path} had {saved.optimizer}, which holds its "
                          "moments in another way: give that, or start anew from its weights with --checkpoint_path")
    free = _FREE | ({"max_steps"} if options.lr_scheduler == "constant" else set())
    for name, before in asdict(saved).items():
        now = getattr(options, name)
        if before != now and name not in free:
            logger.warning(f"--{name} is {now} now, the run being resumed had {before}: it goes on, but not as it "
                           "would have without the stop")
    state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)  # read where it is used
    check_products(state, options, world, path)
    if options.minibatch_size and world != state["world"]:
        logger.warning(f"--minibatch_size {options.minibatch_size} on {world} processes instead of {state['world']}: "
                       "each optimizer step takes other products than it would have without the stop")
    return state


def check_products(state: dict[str, Any], options: TrainOptions, world: int, path: Path) -> None:
    """Refuse another number of products a step: the place in the sheet is counted in steps. Raises OptionError."""
    before, now = state["products_per_step"], options.batch_size * world
    if now == before:
        return
    if before % world:
        fitting = ", ".join(str(count) for count in range(1, before + 1) if before % count == 0)
        advice = f"no --batch_size gives {before} on {world} processes: take one of these numbers of them: {fitting}"
    else:
        advice = f"give --batch_size {before // world}"
    raise OptionError(f"--batch_size {options.batch_size} x {world} processes = {now} products a step; the run in "
                      f"{path} took {before}, and would go on at another place of the sheet: {advice}")
