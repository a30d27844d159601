"""Models from folders and hub names: which family, what stops an answer, weights from checkpoints.

A new family is one file and one entry in FAMILIES.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors import SafetensorError
from torch import Tensor, nn

from config import TrainOptions
from ground.commands import import_for_good
from models import lora, weights
from models.family import AtBirth, Family, ModelError
from models.minicpm_remote import MiniCPMRemote
from models.minicpm_v46 import MiniCPMV46, MiniCPMV47
from models.qwen_vl import Qwen3VL, Qwen25VL
from models.smolvlm import SmolVLM

FAMILIES: tuple[Family, ...] = (MiniCPMV46(), MiniCPMV47(), MiniCPMRemote(), Qwen25VL(), Qwen3VL(), SmolVLM())
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def family_of(model_type: str) -> Family:
    """Find the family of a config.json's model_type; raises ModelError naming the known ones."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise ModelError(f"model_type {model_type!r} is of no family this program knows; known: {known}")


def stop_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's and the generation config's end, and the usual chats' ends."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids.update(configured if isinstance(configured, list) else [configured])
    vocabulary = tokenizer.get_vocab()
    ids.update(vocabulary.get(token) for token in ("<|im_end|>", "<|endoftext|>", "<end_of_utterance>"))
    ids.discard(None)
    if not ids:
        raise ModelError("the tokenizer names no end-of-text token, so no answer could ever stop")
    return sorted(ids)


def load_minicpm(model_path: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False,
                 quantize: str = "none", at_birth: AtBirth | None = None) -> tuple[nn.Module, Any, Any]:
    """Load (model, tokenizer, image processor) from a folder or hub name, whatever its family.

    trust_remote_code: allow a family to run the Python files in the model's folder. quantize "4bit" holds the language
    model in 4 bits. at_birth: see family.AtBirth. Raises ModelError naming the path, and the known families when it is
    of none.
    """
    import_for_good("transformers.modeling_utils")  # most of what any family imports
    from transformers import PretrainedConfig
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    looks_local = model_path.startswith((".", "/", "~")) or model_path.count("/") != 1
    if looks_local and not (Path(model_path) / "config.json").is_file():
        raise ModelError(f"--model_path {model_path}: no folder with a config.json there")
    try:
        model_type = PretrainedConfig.get_config_dict(model_path)[0].get("model_type", "")
        if not model_type:
            raise ModelError(f"--model_path {model_path}: no folder with a model's config.json there, and not to be "
                             "had from the hub")
        family = family_of(model_type)
        if family.runs_remote_code and not trust_remote_code:
            raise ModelError(f"--model_path {model_path}: a {model_type} model runs Python files that come with its "
                             "weights, with your rights. Read them, or trust who wrote them, then say so with "
                             "--trust_remote_code; nothing of it has been run or fetched")
        if Path(model_path).is_dir():
            weights.check_files(Path(model_path))
        model, tokenizer, image_processor = family.load(
            model_path, dtype, lora.four_bit(family, dtype) if quantize == "4bit" else None, at_birth)
    except (OSError, SafetensorError) as problem:
        raise ModelError(f"--model_path {model_path}: {problem}") from problem
    if quantize == "4bit":
        lora.keep_gradients(model)
    return model, tokenizer, image_processor


def load_weights(model: nn.Module, path: str) -> None:
    """Load weights in place from a checkpoint folder (safetensors) or a plain model_stepN.pt state dict.

    Raises ModelError, the model as it was, when the file can't be read or does not fit, naming the tensors that differ.
    """
    names, own = fitting_names(model, path), model.state_dict()
    with torch.no_grad():
        for name, stored in weights.stored_tensors(Path(path)):
            if name in names:
                weights.fill(own[names[name]], stored)


def fitting_names(model: nn.Module, path: str) -> dict[str, str]:
    """Compare a file's tensors with a model's, reading none; returns the model's names of those to load, by the file's.

    Raises ModelError when the file can't be read or does not fit, naming the tensors that differ.
    """
    if lora.is_adapter(path):
        raise ModelError(f"{path}: an adapter, not a model's weights: train it on with train_vlm_parallel.py "
                         "--lora_rank, or merge it with python export.py")
    off = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()  # parts that this program leaves out
    shapes = {name: weights.shape_of(stored) for name, stored in weights.stored_tensors(Path(path))
              if not any(re.search(pattern, name) for pattern in off)}
    own, tied = model.state_dict(), set(getattr(model, "all_tied_weights_keys", None) or ())
    names = _own_names(model, shapes, own)
    odd = {"missing": own.keys() - names.values() - tied,
           "too many": {name for name in shapes if names[name] not in own},
           "of another shape": {name for name, shape in shapes.items() if names[name] in own
                                and own[names[name]].shape != shape}}
    if any(odd.values()):
        raise ModelError(f"{path}: these weights are of another model: {weights.say_odd(odd)}")
    return names


def _own_names(model: nn.Module, stored: Iterable[str], own: Mapping[str, Tensor]) -> dict[str, str]:
    """A model's own names of stored tensors: transformers saves some models (Qwen2.5-VL) under other names."""
    names = {name: name for name in stored}
    if names.keys() <= own.keys() or not type(model).__module__.startswith("transformers."):
        return names
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return {name: name if name in own else rename_source_key(name, renamings, [], model.base_model_prefix, own)[0]
            for name in names}


def choose_device(name: str) -> torch.device:
    """Resolve --device; raises ModelError when a GPU is asked for and none is there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: no GPU is visible here; take --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> str:
    """Resolve the compute dtype: auto is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        return name
    return "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether this device multiplies in bfloat16 by itself: a GPU of compute capability 8.0 or more does."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def settle_dtype(options: TrainOptions, device: str) -> TrainOptions:
    """Put the dtype that will be computed in into the options, and say which; float32 on a GPU switches TF32 on."""
    target = choose_device(device)
    dtype = choose_dtype(options.dtype, target)
    if dtype == "float32" and target.type == "cuda":
        torch.set_float32_matmul_precision("high")
        logger.info("computing in float32, products of matrices in TF32: their factors are rounded to 10 bits behind "
                    "the point")
    elif dtype != options.dtype and target.type == "cuda":
        logger.info(f"computing in {dtype}, which this GPU has")
    return replace(options, dtype=dtype)


def freeze(model: nn.Module) -> nn.Module:
    """Switch every gradient off: the reference policy."""
    return model.requires_grad_(False)
