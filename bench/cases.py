"""What both sides of a benchmark share: the cases, a small random Qwen2.5-VL, one product with photos of exact length.

The model's four photo markers are never sampled by either side, and one of them is its end-of-text token: no answer
stops early, so both sides generate the same number of tokens without any change to how they sample.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ground.errors import OptionError
from sheets.samples import Sample

ANSWER_TOKENS = 32
LABEL = (12.0, 8.0, 15.0)
VOCABULARY = 8192
MARKERS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
CHAT = ("{% for message in messages %}<|turn|>{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>{% endif %}")
TEXT_MODEL = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
              "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}}
VISION_MODEL = {"hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256, "depth": 4,
                "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112,
                "fullatt_block_indexes": [3]}
TOKEN_PIXELS = 28  # a photo token covers 28 x 28 pixels: 2 x 2 patches
GRIDS = {300: (6, 8), 1000: (13, 14), 3000: (24, 24)}  # prompt tokens: a photo's tokens down and across


@dataclass(frozen=True)
class Case:
    """One line of the grid."""

    prompt_tokens: int
    group_size: int
    train_vision: bool = True
    photos: int = 5

    @property
    def name(self) -> str:
        """What --cases calls it, such as 1000x12 or 1000x12frozen."""
        return f"{self.prompt_tokens}x{self.group_size}" + ("" if self.train_vision else "frozen")

    @property
    def grid(self) -> tuple[int, int]:
        """A photo's tokens, down and across."""
        return GRIDS.get(self.prompt_tokens, (2, 2))

    @property
    def photo_tokens(self) -> int:
        """Tokens of all photos."""
        return self.photos * self.grid[0] * self.grid[1]


GRID = [Case(300, 12), Case(1000, 12), Case(3000, 12), Case(1000, 32), Case(1000, 12, train_vision=False),
        Case(1000, 4), Case(3000, 4)]
QUICK = Case(100, 4)


def cases_named(names: str) -> list[Case]:
    """Find cases by their names, separated by commas; raises OptionError naming one that isn't, and the known ones."""
    known = {case.name: case for case in (*GRID, QUICK)}
    for name in names.split(","):
        if name not in known:
            raise OptionError(f"{name!r} is no case of the benchmark; known: {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def make_tokenizer() -> Any:
    """One token a byte, and the markers of a Qwen2.5-VL."""
    return byte_tokenizer(CHAT, eos_token="<|vision_end|>", pad_token="<|video_pad|>",
                          additional_special_tokens=[*MARKERS, "<|turn|>"])


def byte_tokenizer(chat: str, **special: Any) -> Any:
    """One token a byte, and special tokens: a text of n ASCII letters is n tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = chat
    return fast


def make_model(tokenizer: Any) -> Any:
    """Build the model, about six million parameters, fp32."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(list(MARKERS)), strict=True))
    text = TEXT_MODEL | {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
                         "bos_token_id": None}
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(
        "qwen2_5_vl", text_config=text, vision_config=VISION_MODEL, tie_word_embeddings=False, **ids))


def write_model(folder: Path) -> Path:
    """Write model, tokenizer and image processor into folder/model."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    processor = Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2,
                                         size={"shortest_edge": 28 * 28, "longest_edge": 1280 * 28 * 28})
    for part in (make_model(tokenizer), tokenizer, processor):
        part.save_pretrained(folder / "model")
    return folder / "model"


def make_sample(case: Case, folder: Path) -> Sample:
    """Write the case's photos, noise of exact size, and word its text so that the prompt has exact length."""
    rng = random.Random(case.name)
    down, across = case.grid
    size = (across * TOKEN_PIXELS, down * TOKEN_PIXELS)
    paths = []
    for index in range(case.photos):
        path = folder / f"{case.prompt_tokens}_{index}.png"
        Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)).save(path)
        paths.append(path)
    around = 2 * case.photos + 2  # a start and an end marker a photo, two turns
    letters = case.prompt_tokens - case.photo_tokens - around
    return Sample(row=2, product_id=case.name, text="".join(rng.choices("abcdefgh 0123456789", k=letters)), label=LABEL,
                  photos=tuple(paths), sheet="bench.xlsx")


def seeded_rewards(case: Case) -> list[float]:
    """Rewards of a group: random answers would all earn 0 and teach nothing."""
    return [index / case.group_size for index in random.Random(case.name).sample(range(case.group_size),
                                                                                   case.group_size)]
