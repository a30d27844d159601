"""Models of real sizes with random weights, made on the device itself: nothing is fetched, no weight is on the disk.

What the program loads by is used as it is, but for the reading of weights. MiniCPM-o-2_6 stands as its language model
under a vision of the same size, sixteen patches a token, in Qwen2.5-VL's classes: the makers' code comes with their
weights only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import demo
from cases import MARKERS, Case, byte_tokenizer, make_tokenizer, seeded_rewards
from ground.errors import OptionError

DELTA_LAYERS = ["linear_attention"] * 3 + ["full_attention"]
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14}


@dataclass(frozen=True)
class Size:
    """A model as its config.json has it, and the side in pixels of five photos for each length of a prompt."""

    kind: str
    text: dict[str, Any]
    vision: dict[str, Any]
    sides: dict[int, int]
    tied: bool = False

    @property
    def merged(self) -> int:
        """Patches along a token, each way."""
        return self.vision.get("spatial_merge_size", 2)

    @property
    def patches(self) -> int:
        """Patches that make a token."""
        return self.merged ** 2 if self.kind == "qwen2_5_vl" else 16


def qwen(width: int, layers: int, inner: int, heads: int, keys: int, vocabulary: int, tied: bool) -> Size:
    """A Qwen2.5-VL with its own vision."""
    text = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner, "num_attention_heads": heads,
            "num_key_value_heads": keys, "vocab_size": vocabulary}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": width,
              "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    return Size("qwen2_5_vl", text, vision, {300: 196, 1700: 504, 3000: 672}, tied)


def minicpm(layers: int, text: dict[str, Any], vision: dict[str, Any], sides: dict[int, int]) -> Size:
    """A MiniCPM-V-4.6."""
    kinds = (DELTA_LAYERS * layers)[:layers]
    return Size("minicpmv4_6", text | {"num_hidden_layers": layers, "layer_types": kinds}, vision, sides, tied=True)


LANGUAGE_O26 = qwen(3584, 28, 18944, 28, 4, 151700, False).text
VISION_O26 = {"depth": 27, "num_heads": 16, "out_hidden_size": 3584, "spatial_merge_size": 4, "window_size": 112,
              "fullatt_block_indexes": list(range(27)), **SIGLIP}
SIZES = {
    "MiniCPM-V-4.6": minicpm(24, {
        "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_value_heads": 16, "vocab_size": 248320},
        {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 980, "insert_layer_id": 6, **SIGLIP},
        {300: 224, 1700: 800, 3000: 1120}),
    "Qwen2.5-VL-3B": qwen(2048, 36, 11008, 16, 2, 151936, True),
    "Qwen2.5-VL-7B": qwen(3584, 28, 18944, 28, 4, 152064, False),
    "MiniCPM-o-2_6": Size("qwen2_5_vl", LANGUAGE_O26, VISION_O26, {300: 392, 1700: 1008, 3000: 1344}),
    "tiny Qwen2.5-VL": Size("qwen2_5_vl", {
        "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512}, {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [1]}, {60: 56}),
    "tiny MiniCPM-V-4.6": minicpm(4, {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "vocab_size": 512}, {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112, "insert_layer_id": 0,
                             "hidden_size": 32, "intermediate_size": 48, "patch_size": 14}, {60: 56})}


@dataclass(frozen=True)
class GpuCase:
    """A line of the table."""

    model: str
    prompt_tokens: int = 1700
    group_size: int = 12
    lora: bool = True
    trl: bool = False  # beside TRL: with an adapter, since its reference policy else is read from the disk

    @property
    def name(self) -> str:
        """What --only looks at."""
        return f"{self.model}, {'LoRA' if self.lora else 'full'}, {self.prompt_tokens}, {self.group_size}"

    @property
    def rewards(self) -> list[float]:
        """Rewards of a group."""
        return seeded_rewards(Case(self.prompt_tokens, self.group_size))


FIRST = [GpuCase("Qwen2.5-VL-3B", trl=True), GpuCase("MiniCPM-V-4.6", lora=False), GpuCase("MiniCPM-o-2_6"),
         GpuCase("Qwen2.5-VL-3B", 3000), GpuCase("Qwen2.5-VL-3B", 300), GpuCase("Qwen2.5-VL-3B", group_size=32),
         GpuCase("Qwen2.5-VL-7B"), GpuCase("Qwen2.5-VL-3B", lora=False), GpuCase("Qwen2.5-VL-3B", group_size=8),
         GpuCase("MiniCPM-V-4.6"), GpuCase("Qwen2.5-VL-3B", 3000, 32, trl=True)]
REST = [GpuCase(model, tokens, group, lora) for model in list(SIZES)[:4] for lora in (True, False)
        for tokens in (1700, 3000, 300) for group in (12, 32, 8)]
QUICK = [GpuCase("tiny Qwen2.5-VL", 60, 4, trl=True), GpuCase("tiny MiniCPM-V-4.6", 60, 4, lora=False)]


def cases_named(part: str, quick: bool) -> list[GpuCase]:
    """The cases whose name contains a part, each once, in order of interest; raises OptionError when none does."""
    known: dict[str, GpuCase] = {}
    for case in QUICK if quick else [*FIRST, *REST]:
        known.setdefault(case.name, case)
    found = [case for case in known.values() if part in case.name]
    if not found:
        raise OptionError(f"--only {part}: no such case; known: {'; '.join(known)}")
    return found


def write_folder(name: str, folder: Path) -> Path:
    """Write config, tokenizer and image processor of a size into folder; no weights."""
    size = SIZES[name]
    tokenizer, processor, config = (_qwen_parts if size.kind == "qwen2_5_vl" else _minicpm_parts)(size)
    for part in (tokenizer, processor, config):
        part.save_pretrained(folder)
    return folder


def _qwen_parts(size: Size) -> tuple[Any, Any, Any]:
    from transformers import AutoConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer()
    token = size.vision["patch_size"] * size.merged  # pixels along a token
    processor = Qwen2VLImageProcessorPil(patch_size=size.vision["patch_size"], temporal_patch_size=2,
                                         merge_size=size.merged,
                                         size={"shortest_edge": token ** 2, "longest_edge": 1280 * token ** 2})
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(MARKERS)), strict=True))
    head = size.text["hidden_size"] // size.text["num_attention_heads"] // 2  # pairs that are rotated: on three axes
    rope = {"rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [head - 2 * (3 * head // 8), 3 * head // 8, 3 * head // 8]}
    text = size.text | _ends(tokenizer) | {"rope_parameters": rope, "max_position_embeddings": 8192}
    return tokenizer, processor, AutoConfig.for_model(size.kind, text_config=text, vision_config=size.vision,
                                                      tie_word_embeddings=size.tied, **ids)


def _minicpm_parts(size: Size) -> tuple[Any, Any, Any]:
    from transformers import AutoConfig
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    tokenizer = byte_tokenizer(demo.CHAT, eos_token=demo.MARKERS["video_token"], pad_token="<|pad|>",
                               extra_special_tokens=demo.MARKERS)
    side = min(448, size.vision["image_size"])
    processor = MiniCPMV4_6ImageProcessorPil(max_slice_nums=9, scale_resolution=side, patch_size=14)
    text = size.text | _ends(tokenizer) | {"model_type": "qwen3_5_text", "tie_word_embeddings": size.tied,
                                           "max_position_embeddings": 8192}
    pairs = size.text["head_dim"] // 8  # a quarter of the head is rotated
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                               "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]}
    vision = {name: value for name, value in size.vision.items() if name != "insert_layer_id"}
    config = AutoConfig.for_model(
        size.kind, text_config=text, vision_config=vision, insert_layer_id=size.vision["insert_layer_id"],
        image_size=side, patch_size=14, image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id, tie_word_embeddings=size.tied)
    return tokenizer, processor, config


def _ends(tokenizer: Any) -> dict[str, Any]:
    return {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}


def random_model(model_class: type[nn.Module], path: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Make the model of a folder's config on a device, always with the same weights there."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    assert isinstance(model, model_class)
    return model.eval()


@contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Load models of folders without weights in the block: they are made at random, and split where they are to be."""
    def make(model_class: type[nn.Module], path: str, at_birth: Callable[[nn.Module], Any] | None, dtype: torch.dtype,
             quantization_config: Any = None) -> nn.Module:
        model = random_model(model_class, path, dtype, device)
        if at_birth:
            at_birth(model)
        return model

    with patch("models.qwen_vl.load_checked", make), patch("models.minicpm_v46.load_checked", make):
        yield
