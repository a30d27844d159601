"""The task of bench/learning.py: the demo's products for a tiny Qwen2.5-VL, which TRL trains as well as ours.

The demo's own model is a MiniCPM-V-4.6, for which TRL's trainer has no processor without torchvision. Everything else
is the demo's: how products are drawn, worded and photographed, the warm-up that stands in for pretraining, held-out
products, four sampled answers each.
"""

import time
from typing import Any

import torch

import demo

CHAT = ("{% for message in messages %}<|im_start|>{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}")
PATCH, MERGED = 8, 2  # a photo token covers 16 x 16 pixels


def make_parts(seed: int) -> tuple[Any, Any, Any]:
    """Make the demo's tokenizer with Qwen's markers, a Qwen2.5-VL of the demo's size, fp32, and its image processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = demo.make_tokenizer(seed)
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    torch.manual_seed(seed)
    text = {"vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "tie_word_embeddings": True, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]}}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 96, "depth": 2,
              "patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": MERGED, "window_size": 64,
              "fullatt_block_indexes": [0, 1]}
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(
        "qwen2_5_vl", text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
    for weight in model.model.visual.parameters():  # initialised for weights that are loaded later
        if weight.dim() >= 2:
            torch.nn.init.xavier_uniform_(weight.view(len(weight), -1))
    pixels = demo.PIXELS ** 2
    processor = Qwen2VLImageProcessorPil(patch_size=PATCH, temporal_patch_size=2, merge_size=MERGED,
                                         size={"shortest_edge": pixels, "longest_edge": pixels})
    return tokenizer, model, processor


class Clock:
    """CPU seconds of this process, stopped while answers are looked at."""

    def __init__(self) -> None:
        self.used = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Let it run."""
        self._since = time.process_time()

    def stop(self) -> float:
        """Stop it; returns the seconds that it ran in all."""
        if self._since is not None:
            self.used += time.process_time() - self._since
            self._since = None
        return self.used
