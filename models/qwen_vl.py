"""Qwen2.5-VL and Qwen3-VL (dense): native transformers classes; a vision tower with its merger, a Qwen text model.

Photos go in whole, at most max_pixels large. Positions have three axes (M-RoPE: time, height, width). Qwen3-VL also
adds features of earlier vision layers to its first decoder layers (deepstack).
Prompt ids are built here from tokenizer and PIL image processor: the full processor wants a video processor, and
that wants torchvision. Counts follow Qwen2_5_VLProcessor and Qwen3VLProcessor (transformers 5.23.0).
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models import qwen_vision
from models.family import (
    AtBirth,
    Family,
    ModelError,
    Prompt,
    chat_parts,
    device_of,
    joined_on,
    load_tokenizer,
    prompt_ids,
)
from models.weights import load_checked, native_class
from sheets.photos import PhotoError

_MARKERS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
_PLACEHOLDER = _MARKERS["image_token_id"]
_CHANNELS = 3
_THINNEST = 200  # the image processor refuses photos more than so many times as long as wide


class Qwen25VL(Family):
    """Qwen2.5-VL, any size."""

    model_types = ("qwen2_5_vl",)
    vision_names = ("model.visual",)  # its mergers are inside
    cuts_slices = False

    def load(self, model_path: str, dtype: torch.dtype, quantization: Any = None, at_birth: AtBirth | None = None
             ) -> tuple[nn.Module, Any, Any]:
        """Load (model, tokenizer, image processor); raises OSError when files are missing."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        tokenizer = load_tokenizer(model_path)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(model_path)
        model = load_checked(native_class(model_path), model_path, at_birth, dtype=dtype,
                             quantization_config=quantization)
        _check_parts(model_path, model.config, tokenizer, image_processor)
        return model, tokenizer, image_processor

    def make_lean(self, model: nn.Module) -> None:
        """Let the vision tower compute as qwen_vision does."""
        qwen_vision.make_lean(model.model.visual)

    def encode_prompt(self, tokenizer: Any, image_processor: Any, text: str, photos: Sequence[Image.Image],
                      max_slice_nums: int | None = None, max_pixels: int | None = None) -> Prompt:
        """Put the photos before the text of one user turn and expand each into its placeholders.

        Raises PhotoError for a photo too long and thin for the image processor.
        """
        parts = chat_parts(tokenizer, text, len(photos), _PLACEHOLDER)
        if not photos:
            return Prompt(prompt_ids(tokenizer, parts, []))
        for number, photo in enumerate(photos, 1):
            if max(photo.size) > _THINNEST * min(photo.size):
                raise PhotoError(f"photo {number} is {photo.size[0]} x {photo.size[1]} pixels, more than {_THINNEST} "
                                 "times as long as wide: this model takes no such photo")
        encoded = image_processor(list(photos), return_tensors="pt", size=_pixel_bounds(image_processor, max_pixels))
        counts = encoded["image_grid_thw"].prod(-1) // image_processor.merge_size ** 2  # (photos,)
        input_ids = prompt_ids(tokenizer, parts, [_PLACEHOLDER * count for count in counts.tolist()])  # (P,)
        pixels = qwen_vision.one_frame(encoded["pixel_values"], _CHANNELS, image_processor.temporal_patch_size)
        return Prompt(input_ids, {"pixel_values": pixels,                         # (patches, values of a patch)
                                  "image_grid_thw": encoded["image_grid_thw"]})   # (photos, 3) patches: 1, high, wide

    def photo_features(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Pack the photos of all prompts into one vision pass and split the features again."""
        with_photos = [prompt for prompt in prompts if prompt.photos]
        if not with_photos:
            return [None] * len(prompts)
        device = device_of(model)
        pixels = joined_on(device, [prompt.photos["pixel_values"] for prompt in with_photos])
        grids = torch.cat([prompt.photos["image_grid_thw"] for prompt in with_photos])  # stay on the host
        out = model.model.get_image_features(pixels, grids, **qwen_vision.arguments(model.model.visual, grids, device))
        counts = [int(self.photo_positions(model, prompt).sum()) for prompt in with_photos]
        split = iter(self._features(out).split(counts))
        return [next(split) if prompt.photos else None for prompt in prompts]

    def _features(self, out: Any) -> Tensor:
        """The vision output as one tensor (photo tokens, width)."""
        return torch.cat(out.pooler_output)

    def photo_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Mark the image placeholders: (P,) bool."""
        return prompt.input_ids == model.config.image_token_id

    def positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Number the prompt on three axes, as the model's own forward does: (3, P)."""
        kinds = self.photo_positions(model, prompt).int()[None]  # 1 for a photo token, 0 for text
        positions, _ = model.model.get_rope_index(prompt.input_ids[None], mm_token_type_ids=kinds,
                                                  image_grid_thw=prompt.photos.get("image_grid_thw"))  # (3, 1, P)
        return positions[:, 0]

    def language_model(self, model: nn.Module) -> nn.Module:
        """The Qwen text model."""
        return model.model.language_model

    def head(self, model: nn.Module) -> nn.Module:
        """The language model head."""
        return model.lm_head

    def never_sampled(self, model: nn.Module, tokenizer: Any) -> list[int]:
        """Photo and video markers."""
        return sorted(tokenizer.convert_tokens_to_ids(list(_MARKERS.values())))


class Qwen3VL(Qwen25VL):
    """Qwen3-VL, any dense size. Features are the merger's and the deepstack layers' side by side."""

    model_types = ("qwen3_vl",)

    def _features(self, out: Any) -> Tensor:
        """The vision output as one tensor (photo tokens, hidden * (1 + deepstack layers))."""
        return torch.cat([torch.cat(layer) for layer in (out.pooler_output, *out.deepstack_features)], dim=-1)

    def decoder_arguments(self, model: nn.Module, features: Sequence[Tensor | None], photo_mask: Tensor
                          ) -> dict[str, Any]:
        """The deepstack features of all rows, one tensor (photo tokens of all rows, hidden) a decoder layer."""
        present = [rows for rows in features if rows is not None]
        if not present:
            return {}
        hidden = model.config.text_config.hidden_size
        deepstack = torch.cat([rows[:, hidden:] for rows in present])
        return {"visual_pos_masks": photo_mask, "deepstack_visual_embeds": list(deepstack.split(hidden, dim=-1))}


def _pixel_bounds(image_processor: Any, max_pixels: int | None) -> dict[str, int]:
    """The image processor's smallest and largest number of pixels, both bounded by max_pixels."""
    least, most = image_processor.size["shortest_edge"], image_processor.size["longest_edge"]
    most = min(most, max_pixels or most)
    return {"shortest_edge": min(least, most), "longest_edge": most}


def _check_parts(model_path: str, config: Any, tokenizer: Any, image_processor: Any) -> None:
    """Refuse a tokenizer or image processor that belongs to another model; raises ModelError."""
    vocabulary = tokenizer.get_vocab()
    for name, marker in _MARKERS.items():
        if vocabulary.get(marker) != getattr(config, name):
            raise ModelError(f"{model_path}: config.json says {name} {getattr(config, name)}, the tokenizer has "
                             f"{marker} at {vocabulary.get(marker)}; take the model's own tokenizer")
    vision = config.vision_config
    wanted = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    given = (image_processor.patch_size, image_processor.temporal_patch_size, image_processor.merge_size)
    if wanted != given:
        raise ModelError(f"{model_path}: config.json says patch, temporal patch and merge size {wanted}, "
                         f"preprocessor_config.json {given}; take the model's own image processor")
