"""MiniCPM-V-4.6 and 4.7: native transformers classes; SigLIP tower, merger, Qwen3.5 text model (delta net, attention).

Prompt ids are built here from tokenizer and PIL image processor: the full processor wants a video processor, and
that wants torchvision. Layout and counts follow MiniCPMV4_6Processor.replace_image_token (transformers 5.23.0).
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models.family import AtBirth, Family, ModelError, Prompt, chat_parts, device_of, prompt_ids, shrink
from models.weights import load_checked, native_class

_MARKERS = ("image_token", "video_token", "image_start_token", "image_end_token", "slice_start_token",
            "slice_end_token", "image_id_start_token", "image_id_end_token")


class MiniCPMV46(Family):
    """MiniCPM-V-4.6, any size."""

    model_types = ("minicpmv4_6",)
    vision_names = ("model.vision_tower", "model.merger")

    def load(self, model_path: str, dtype: torch.dtype, quantization: Any = None, at_birth: AtBirth | None = None
             ) -> tuple[nn.Module, Any, Any]:
        """Load (model, tokenizer, image processor); raises OSError when files are missing."""
        from transformers import AutoTokenizer
        from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

        tokenizer = AutoTokenizer.from_pretrained(model_path)
        missing = [name for name in _MARKERS if getattr(tokenizer, name, None) is None]
        if missing:
            raise ModelError(f"{model_path}: the tokenizer lacks {', '.join(missing)}; take the model's own tokenizer")
        image_processor = MiniCPMV4_6ImageProcessorPil.from_pretrained(model_path)
        model = load_checked(native_class(model_path), model_path, at_birth, dtype=dtype,
                             quantization_config=quantization)
        if model.config.image_token_id != tokenizer.image_token_id:
            raise ModelError(f"{model_path}: config.json says image_token_id {model.config.image_token_id}, the "
                             f"tokenizer {tokenizer.image_token_id}")
        if model.config.downsample_mode != image_processor.downsample_mode:
            raise ModelError(f"{model_path}: config.json says downsample_mode {model.config.downsample_mode}, "
                             f"preprocessor_config.json {image_processor.downsample_mode}")
        return model, tokenizer, image_processor

    def encode_prompt(self, tokenizer: Any, image_processor: Any, text: str, photos: Sequence[Image.Image],
                      max_slice_nums: int | None = None, max_pixels: int | None = None) -> Prompt:
        """Put the photos before the text of one user turn and expand each into its slices' placeholders.

        max_pixels scales a photo down before it is cut, so fewer slices come of it.
        """
        parts = chat_parts(tokenizer, text, len(photos), tokenizer.image_token)
        if not photos:
            return Prompt(prompt_ids(tokenizer, parts, []))
        options = {} if max_slice_nums is None else {"max_slice_nums": max_slice_nums}
        encoded = image_processor([shrink(photo, max_pixels) for photo in photos], return_tensors="pt", **options)
        input_ids = prompt_ids(tokenizer, parts, _photo_spans(tokenizer, image_processor, encoded))
        return Prompt(input_ids, {"pixel_values": encoded["pixel_values"],    # (1, 3, patch, all patches * patch)
                                  "target_sizes": encoded["target_sizes"]})   # (slices, 2) patches high, wide

    def photo_features(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Pack the slices of all prompts into one NaViT row and split the features again."""
        with_photos = [prompt for prompt in prompts if prompt.photos]
        if not with_photos:
            return [None] * len(prompts)
        pixels = torch.cat([prompt.photos["pixel_values"] for prompt in with_photos], dim=-1)
        sizes = torch.cat([prompt.photos["target_sizes"] for prompt in with_photos])  # stays on the CPU: only counted
        pixels = pixels.to(device_of(model))
        slices = model.model.get_image_features(pixels, sizes).pooler_output  # per slice (tokens, d)
        counts = [len(prompt.photos["target_sizes"]) for prompt in with_photos]
        grouped = iter(torch.cat(slices[sum(counts[:i]):sum(counts[:i + 1])]) for i in range(len(counts)))
        return [next(grouped) if prompt.photos else None for prompt in prompts]

    def photo_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Mark the image placeholders: (P,) bool."""
        return prompt.input_ids == model.config.image_token_id

    def language_model(self, model: nn.Module) -> nn.Module:
        """The Qwen3.5 text model."""
        return model.model.language_model

    def head(self, model: nn.Module) -> nn.Module:
        """The language model head."""
        return model.lm_head

    def never_sampled(self, model: nn.Module, tokenizer: Any) -> list[int]:
        """Photo, slice and video markers."""
        return sorted({tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)) for name in _MARKERS})


class MiniCPMV47(MiniCPMV46):
    """MiniCPM-V-4.7, any size: the same parts, with positions that lay a photo's slices out on its canvas (M-RoPE)."""

    model_types = ("minicpmv4_7",)

    def positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Number the prompt on three axes, as the model's own forward does: (3, P)."""
        kinds = self.photo_positions(model, prompt).int()[None]  # 1 for a photo token, 0 for text
        positions, _ = model.model.get_rope_index(prompt.input_ids[None], mm_token_type_ids=kinds,
                                                  target_sizes=prompt.photos.get("target_sizes"))  # (3, 1, P)
        return positions[:, 0]


def _photo_spans(tokenizer: Any, image_processor: Any, encoded: Any) -> list[str]:
    """Placeholders per photo: an overview, then the grid's slices row by row, a line break between rows."""
    divisor = 4 if image_processor.downsample_mode == "4x" else 16  # patches that merge into one token
    counts = (encoded["target_sizes"].prod(-1) // divisor).tolist()
    spans, start = [], 0
    for index, (slices, (rows, columns)) in enumerate(zip(encoded["num_patches_per_image"], encoded["grids"],
                                                          strict=True)):
        overview, *tiles = counts[start:start + slices]
        start += slices
        span = f"{tokenizer.image_start_token}{tokenizer.image_token * overview}{tokenizer.image_end_token}"
        lines = [tiles[row * columns:(row + 1) * columns] for row in range(rows)]
        span += "\n".join("".join(f"{tokenizer.slice_start_token}{tokenizer.image_token * count}"
                                  f"{tokenizer.slice_end_token}" for count in line) for line in lines)
        if image_processor.use_image_id:
            span = f"{tokenizer.image_id_start_token}{index}{tokenizer.image_id_end_token}{span}"
        spans.append(span)
    return spans
