"""Models from folders and hub names: which family, what stops an answer, weights from checkpoints.

A new family is one file and one entry in FAMILIES.
"""

import copy
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import lora
from models.family import Family, ModelError
from models.minicpm_remote import MiniCPMRemote
from models.minicpm_v46 import MiniCPMV46, MiniCPMV47
from models.qwen_vl import Qwen3VL, Qwen25VL
from models.smolvlm import SmolVLM

FAMILIES: tuple[Family, ...] = (MiniCPMV46(), MiniCPMV47(), MiniCPMRemote(), Qwen25VL(), Qwen3VL(),
                                SmolVLM())
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
                 quantize: str = "none") -> tuple[nn.Module, Any, Any]:
    """Load (model, tokenizer, image processor) from a folder or hub name, whatever its family.

    trust_remote_code: allow a family to run the Python files in the model's folder. quantize "4bit" holds the language
    model in 4 bits. Raises ModelError naming the path, and the known families when it is of none.
    """
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
        model, tokenizer, image_processor = family.load(
            model_path, dtype, lora.four_bit(family, dtype) if quantize == "4bit" else None)
    except OSError as problem:
        raise ModelError(f"--model_path {model_path}: {problem}") from problem
    if quantize == "4bit":
        lora.keep_gradients(model)
    return model, tokenizer, image_processor


def load_weights(model: nn.Module, path: str) -> None:
    """Load weights in place from a checkpoint folder (safetensors) or a plain model_stepN.pt state dict.

    Raises ModelError when the file can't be read or does not fit the model, naming the first tensors that differ.
    """
    source = Path(path)
    if lora.is_adapter(path):
        raise ModelError(f"{path}: an adapter, not a model's weights: train it on with train_vlm_parallel.py "
                         "--lora_rank, or merge it with python export.py")
    off = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()  # parts that this program leaves out
    state = {name: tensor for name, tensor in _read_tensors(source).items()
             if not any(re.search(pattern, name) for pattern in off)}
    own, tied = model.state_dict(), set(getattr(model, "all_tied_weights_keys", None) or ())
    renamed = not state.keys() <= own.keys() and type(model).__module__.startswith("transformers.")
    if source.is_dir() and renamed:
        state, wrong, missing = _read_renamed(model, source)
    else:
        wrong = [name for name, tensor in state.items() if name not in own or own[name].shape != tensor.shape]
        missing = [name for name in own if name not in state and name not in tied]
    if wrong or missing:
        raise ModelError(f"{path}: these weights are of another model; not in it or of another shape: {wrong[:3]}, "
                         f"missing: {missing[:3]}")
    model.load_state_dict(state, strict=False)


def _read_tensors(source: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if source.is_file():
        return torch.load(source, map_location="cpu", weights_only=True)
    if not source.is_dir():
        raise ModelError(f"{source}: no such checkpoint folder or .pt file")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{source}: no .safetensors file in this folder")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _read_renamed(model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Read a folder as transformers does, which saves some models (Qwen2.5-VL) under other names than their own.

    Returns the tensors by the model's names, then the names that don't fit and those that are missing.
    """
    # The model's own config decides the shapes; a copy, since loading writes into it.
    loaded, report = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), dtype=torch.float32,
                                                 output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = sorted({*report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])})
    return loaded.state_dict(), wrong, sorted(report["missing_keys"])


def choose_device(name: str) -> torch.device:
    """Resolve --device; raises ModelError when a GPU is asked for and none is there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: no GPU is visible here; take --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def freeze(model: nn.Module) -> nn.Module:
    """Switch every gradient off: the reference policy."""
    return model.requires_grad_(False)
