"""Adapters by peft: put on a model in place, load, save; and the 4-bit base that may lie under them.

The adapter sits inside the model's own linear layers, so the model keeps its class and everything that knows it goes
on working. There is no dropout in an adapter: sampling and update must see the same network.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.family import Family, ModelError
from models.weights import open_safetensors

TRAINED, REFERENCE = "default", "reference"  # the adapter that trains has peft's own name; one that a reference keeps
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def is_adapter(path: str | Path) -> bool:
    """Say whether a folder holds an adapter instead of a whole model."""
    return (Path(path) / CONFIG_FILE).is_file()


def base_of(folder: str | Path) -> str:
    """Read which model an adapter belongs to."""
    return _read_config(Path(folder)).base_model_name_or_path


def add_adapter(model: nn.Module, targets: list[str], rank: int, alpha: int, base_path: str) -> Any:
    """Put a new adapter on the named linear layers, in place; returns peft's wrapper around the same model.

    The base is frozen, the adapter float32 and, until it is trained, without effect.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)
    adapter = get_peft_model(model, config)
    config.base_model_name_or_path = base_path
    return adapter


def load_adapter(model: nn.Module, folder: str | Path) -> Any:
    """Put the adapter of a folder on the model, in place; returns peft's wrapper around the same model.

    Raises ModelError when the folder's adapter is of another kind or does not fit the model.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(folder)
    config = _read_config(folder)
    config.inference_mode = False
    base_path = config.base_model_name_or_path
    with open_safetensors(folder / WEIGHTS_FILE):
        state = load_file(folder / WEIGHTS_FILE)
    try:
        adapter = get_peft_model(model, config)
    except ValueError as problem:  # peft found none of the layers
        raise ModelError(f"{folder}: this adapter is of another model: {problem}") from problem
    config.base_model_name_or_path = base_path
    own = {name: tensor.shape for name, tensor in
           get_peft_model_state_dict(adapter, save_embedding_layers=False).items()}
    wrong = sorted(name for name in own.keys() | state.keys()
                   if name not in own or name not in state or own[name] != state[name].shape)
    if wrong:
        raise ModelError(f"{folder}: this adapter is of another model; missing, too many or of another shape: "
                         f"{wrong[:3]}")
    set_peft_model_state_dict(adapter, state)
    return adapter


def add_reference(adapter: Any) -> None:
    """Put a second adapter on the same layers, which does not train and, as it is, changes nothing."""
    adapter.add_adapter(REFERENCE, copy.deepcopy(adapter.peft_config[TRAINED]))


def part_of(name: str, adapter_name: str | None) -> bool:
    """Say whether a tensor of a model's is one of an adapter's."""
    return ".lora_" in name and f".{adapter_name}." in name


@contextmanager
def active(adapter: Any, name: str | None) -> Iterator[None]:
    """Let another adapter of the model work for the time of the block, or none."""
    if name == TRAINED:
        yield
    elif name is None:
        with adapter.disable_adapter():
            yield
    else:
        adapter.base_model.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            adapter.base_model.set_adapter(TRAINED)


def check_adapter(model: nn.Module, folder: str | Path) -> None:
    """Compare an adapter's file with the layers of a model, putting none on it; raises ModelError where it has none."""
    _read_config(Path(folder))
    layers, wrong = dict(model.named_modules()), []
    with open_safetensors(Path(folder) / WEIGHTS_FILE) as stored:
        for name in stored.keys():
            path, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            width, axis = {"A.weight": ("in_features", 1), "B.weight": ("out_features", 0)}.get(part, ("", 0))
            if getattr(layers.get(path), width, None) != stored.get_slice(name).get_shape()[axis]:
                wrong.append(name)
    if wrong:
        raise ModelError(f"{folder}: this adapter is of another model, which has no such layers: {wrong[:3]}")


def save_adapter(adapter: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapter as peft does, without its README: PeftModel.from_pretrained(base, folder) loads it.

    weights: the model's whole ones, adapter included, by the model's names; None takes the adapter's own.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        weights = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    state = get_peft_model_state_dict(adapter, state_dict=weights, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE,
              metadata={"format": "pt"})
    config = adapter.peft_config["default"]
    config.inference_mode = True  # whoever loads it elsewhere gets it frozen
    config.save_pretrained(folder)
    config.inference_mode = False


def merge_adapter(adapter: Any) -> None:
    """Add the adapter to the weights under it, in place and for good; raises ModelError when it holds NaN."""
    try:
        adapter.merge_and_unload(safe_merge=True)
    except ValueError as problem:
        raise ModelError(f"the adapter can't be merged: {problem}") from problem


def can_merge(linear: nn.Module) -> bool:
    """Whether merged_weight knows a linear layer: not one in 4 bits, one whose weights are split over processes, or one
    with an adapter that is more than a product of two matrices."""
    base = getattr(linear, "base_layer", linear)
    plain = type(base) is nn.Linear and type(base.weight) is nn.Parameter
    return plain and not getattr(linear, "lora_variant", None) and not any(getattr(linear, "lora_bias", {}).values())


def merged_weight(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A linear layer's weight, with its adapter's share where one is on it and switched on, and its bias.

    The layer stays as it is. The sum is made in the adapter's dtype.
    """
    base = getattr(linear, "base_layer", linear)
    weight = base.weight.detach()
    if base is not linear and not linear.disable_adapters and not linear.merged:
        for name in linear.active_adapters:
            weight = weight + linear.get_delta_weight(name).detach()
    return weight, None if base.bias is None else base.bias.detach()


def rank_of(adapter: Any) -> tuple[int, int]:
    """The adapter's rank and alpha."""
    config = adapter.peft_config["default"]
    return config.r, config.lora_alpha


def _read_config(folder: Path) -> Any:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(folder)
    except (TypeError, KeyError, ValueError) as problem:
        raise ModelError(f"{folder}/{CONFIG_FILE}: {problem}") from problem
    if config.peft_type != "LORA":
        raise ModelError(f"{folder}/{CONFIG_FILE}: an adapter of type {config.peft_type}; this program knows LORA")
    return config


def four_bit(family: Family, dtype: torch.dtype) -> Any:
    """Describe a base in 4 bits (nf4), vision and head left as they are; raises ModelError where it can't be had."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ModelError("4-bit weights (quantize) need bitsandbytes 0.46.1 or later, which is not installed here: "
                         "pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=[*family.vision_names, "lm_head"])


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for a CPU when an answer is sampled.

    From then on such a layer would pass no gradient on, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
