"""What a training run reads: its sheets, with a word on every row that is left out or odd, and its models."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from loguru import logger
from torch import nn

from config import SheetOptions, TrainOptions
from ground.commands import TIMED, log_to_console
from ground.errors import OptionError
from ground.options import held_out_sheet
from models.footprint import splits
from models.loading import DTYPES, choose_device, choose_dtype, freeze, load_weights
from models.lora import is_adapter, rank_of
from models.policy import Policy, Root, load_policy
from models.processes import ALONE, Processes
from models.sharding import own_part, splitter
from sheets.cells import DataError
from sheets.checks import count_kinds, leaks, look_over
from sheets.fetch import download_missing
from sheets.order import split_held_out
from sheets.samples import RowProblem, Sample, load_samples
from sheets.summary import (
    WITHOUT_PHOTOS,
    count_photos,
    describe_labels,
    obey_bad_rows,
    require_usable,
    summarise_problems,
)


def set_up_log(output_dir: str) -> None:
    """Log to the console, and to output_dir/train.log; all but the main process warn only."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        log_to_console(f"{{time:HH:mm:ss}} {{level:<7}} process {rank}: {{message}}", "WARNING")
        return
    log_to_console(TIMED)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    logger.add(Path(output_dir) / "train.log", format="{time:YYYY-MM-DD HH:mm:ss} {level:<7} {message}")


def fetch_photos(options: TrainOptions) -> None:
    """Fetch what the sheet(s) name and the cache lacks; of several processes one alone may fill a cache."""
    download_missing(options.data_path, options.image_cache_dir, options)
    if options.eval_path:
        download_missing(options.eval_path, options.image_cache_dir, held_out_sheet(options))


def load_products(options: TrainOptions) -> tuple[list[Sample], list[Sample]]:
    """Read the sheet(s): products to train on and held-out products. Every row left out is logged."""
    samples = read_sheet(options.data_path, options, options)
    if options.eval_path:
        held_out = read_sheet(options.eval_path, options, held_out_sheet(options))
        if samples[0].sheet == held_out[0].sheet:  # another folder's file of the same name
            held_out = [replace(sample, sheet=options.eval_path) for sample in held_out]
        log_findings(options.eval_path, list(leaks(samples, held_out)))
        return samples, held_out
    training, held_out = split_held_out(samples, options.eval_fraction)
    if not training:
        raise DataError(f"{options.data_path}: all {len(samples)} usable products are held out by --eval_fraction "
                        f"{options.eval_fraction}; lower it, or give held-out products with --eval_path")
    if options.eval_fraction and not held_out:
        logger.warning(f"{options.data_path}: --eval_fraction {options.eval_fraction} of {len(samples)} products holds "
                       "out none, so nothing is evaluated; give held-out products with --eval_path")
    return training, held_out


def read_sheet(path: str, options: TrainOptions, reading: SheetOptions) -> list[Sample]:
    """Read one sheet, log each row with a problem; raises DataError when no row can be used."""
    samples, problems = load_samples(path, options.image_cache_dir, options.missing_photos, reading=reading,
                                     partial_labels=options.partial_labels)
    logger.info(f"{path}: {len(samples)} products, {count_photos(samples, problems)}; {describe_labels(samples)}")
    if samples and problems:
        logger.warning(f"{path}: rows with problems\n{summarise_problems(problems)}")
    require_usable(samples, problems, path, options.image_cache_dir, WITHOUT_PHOTOS)
    obey_bad_rows(problems, path, options.on_bad_row)
    log_findings(path, look_over(samples))
    return samples


def log_findings(path: str, findings: Sequence[RowProblem]) -> None:
    """Say what may be wrong with rows that are trained on."""
    if findings:
        counts = ", ".join(f"{kind} ({count} rows)" for kind, count in count_kinds(findings).items())
        logger.warning(f"{path}: to look at (python check_data.py shows each): {counts}; the first: row "
                       f"{findings[0].row} ({findings[0].product_id}): {findings[0].problem}")


def load_models(options: TrainOptions, resume_from: Path | None, processes: Processes = ALONE
                ) -> tuple[Policy, Policy | None, bool]:
    """Load the policy and its frozen reference (none when kl_weight is 0 or every step is supervised).

    The reference of an adapter is the model under it; behind supervised steps, that with a copy of the adapter. With
    sharding each of several processes reads its share of them only. The third value says whether both have the same
    frozen vision, so that photos are encoded once for both.
    """
    compares = options.kl_weight > 0 and options.sft_steps < options.max_steps
    dtype = DTYPES[choose_dtype(options.dtype, choose_device(options.device))]
    split = splitter(dtype, processes.grid, options.offload) if splits(options, processes.world) else None
    if options.lora_rank:
        policy = load_adapted(options, resume_from, split)
        if not compares:
            return policy, None, True
        return policy, policy.with_reference_adapter() if options.sft_steps else policy.without_adapter(), True
    parts = options.model_path, options, options.device, options.trust_remote_code
    policy = load_policy(*parts, split)
    vision = [parameter for module in policy.family.vision_modules(policy.model) for parameter in module.parameters()]
    weights = str(resume_from) if resume_from else options.checkpoint_path
    same_vision = True
    if weights:
        before = [own_part(parameter).clone() for parameter in vision]
        load_weights(policy.model, weights)
        same_vision = all(torch.equal(own_part(now), then) for now, then in zip(vision, before, strict=True))
    if not compares:
        return policy, None, False
    shares_vision = not options.train_vision and all(processes.gather(same_vision))

    def hold(model: nn.Module) -> Root | None:
        hold_in(dtype, model, () if shares_vision else policy.family.vision_modules(model))
        return split and split(model)

    reference = load_policy(*parts, hold, trains=False)
    freeze(reference.model)
    return policy, reference, shares_vision


def hold_in(dtype: torch.dtype, model: nn.Module, spared: Sequence[nn.Module]) -> None:
    """Hold a frozen model's matrices in the dtype that they are multiplied in; it computes what the policy does.

    Autocast rounds the policy's matrices to it as well, but neither vectors nor the sums between layers. Spared modules
    stay as they are. Buffers do too: positions in bfloat16 would be other positions.
    """
    kept = {id(parameter) for module in spared for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter.dim() >= 2 and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)


def load_adapted(options: TrainOptions, resume_from: Path | None, split: Callable[..., Root] | None = None) -> Policy:
    """Load the base with an adapter on it: the resumed run's, that of --checkpoint_path, or a new one.

    split: splits the base over the processes; the adapter is small, and whole in each.
    """
    weights = str(resume_from) if resume_from else options.checkpoint_path
    if weights and not is_adapter(weights):
        raise OptionError(f"{weights} holds no adapter: with --lora_rank give whole weights as --model_path, so that "
                          "the adapter, and the reference policy, start from them")
    policy = load_policy(options.model_path, options, options.device, options.trust_remote_code, split)
    if not weights:
        policy.add_adapter(options.lora_rank, options.lora_alpha, options.model_path)
        return policy
    policy.load_weights(weights)
    wanted = (options.lora_rank, options.lora_alpha or 2 * options.lora_rank)
    if rank_of(policy.adapter) != wanted:
        raise OptionError("--lora_rank {} --lora_alpha {}: the adapter in {} has {} and {}; give those".format(
            *wanted, weights, *rank_of(policy.adapter)))
    return policy
