"""SmolVLM, SmolVLM2 and Idefics3: native transformers classes; SigLIP tower, pixel shuffle, a Llama text model.

Every photo becomes frames of one square size: tiles, row by row, and an overview of the whole, or the overview alone.
Prompt ids are built here from tokenizer and PIL image processor: SmolVLM2's full processor wants a video processor, and
that wants torchvision. Layout and counts follow Idefics3Processor and SmolVLMProcessor (transformers 5.23.0).
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models.family import AtBirth, Family, ModelError, Prompt, chat_parts, device_of, load_tokenizer, prompt_ids
from models.weights import load_checked, native_class

_PLACEHOLDER, _AROUND, _OVERVIEW = "<image>", "<fake_token_around_image>", "<global-img>"
_MARKER = re.compile(r"<image>|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>|<video>")


class SmolVLM(Family):
    """SmolVLM (model type idefics3) and SmolVLM2, any size; Idefics3."""

    model_types = ("idefics3", "smolvlm")
    vision_names = ("model.vision_model", "model.connector")

    def load(self, model_path: str, dtype: torch.dtype, quantization: Any = None, at_birth: AtBirth | None = None
             ) -> tuple[nn.Module, Any, Any]:
        """Load (model, tokenizer, image processor); raises OSError when files are missing."""
        from transformers import AutoImageProcessor

        tokenizer = load_tokenizer(model_path)
        image_processor = AutoImageProcessor.from_pretrained(model_path, backend="pil")
        model = load_checked(native_class(model_path), model_path, at_birth, dtype=dtype,
                             quantization_config=quantization)
        placeholder = tokenizer.get_vocab().get(_PLACEHOLDER)
        if placeholder != model.config.image_token_id:
            raise ModelError(f"{model_path}: config.json says image_token_id {model.config.image_token_id}, the "
                             f"tokenizer has {_PLACEHOLDER} at {placeholder}; take the model's own tokenizer")
        if _frame_side(image_processor) != model.config.vision_config.image_size:
            raise ModelError(f"{model_path}: config.json says image_size {model.config.vision_config.image_size}, "
                             f"preprocessor_config.json max_image_size {_frame_side(image_processor)}; take the "
                             "model's own image processor")
        image_processor.image_seq_len = frame_tokens(model.config)
        return model, tokenizer, image_processor

    def check_bounds(self, model: nn.Module, image_processor: Any, max_slice_nums: int | None, max_pixels: int | None
                     ) -> None:
        """Refuse fewer pixels than one frame has; raises ModelError."""
        side = _frame_side(image_processor)
        if max_pixels is not None and max_pixels < side ** 2:
            raise ModelError(f"max_pixels {max_pixels}: this model scales every photo to frames of {side} x {side} "
                             f"pixels; give {side ** 2} or more, or max_slice_nums 1 for one frame a photo")

    def encode_prompt(self, tokenizer: Any, image_processor: Any, text: str, photos: Sequence[Image.Image],
                      max_slice_nums: int | None = None, max_pixels: int | None = None) -> Prompt:
        """Put the photos before the text of one user turn and expand each into its frames' placeholders.

        max_slice_nums bounds the tiles of a photo, the overview not among them; so does max_pixels, by their pixels.
        """
        parts = chat_parts(tokenizer, text, len(photos), _PLACEHOLDER)
        if not photos:
            return Prompt(prompt_ids(tokenizer, parts, []))
        bounds = [max_slice_nums, max_pixels and max_pixels // _frame_side(image_processor) ** 2]
        most = min((bound for bound in bounds if bound is not None), default=None)
        encoded = [image_processor([photo], return_tensors="pt", return_row_col_info=True,
                                   **_cutting(image_processor, photo, most)) for photo in photos]
        spans = [_span(each["rows"][0][0], each["cols"][0][0], image_processor.image_seq_len) for each in encoded]
        frames = torch.cat([each["pixel_values"] for each in encoded], dim=1)  # (1, frames, 3, side, side)
        return Prompt(prompt_ids(tokenizer, parts, spans), {"pixel_values": frames})

    def photo_features(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Encode the frames of all prompts in one vision pass and split the features again."""
        with_photos = [prompt for prompt in prompts if prompt.photos]
        if not with_photos:
            return [None] * len(prompts)
        frames = torch.cat([prompt.photos["pixel_values"] for prompt in with_photos], dim=1)
        features = torch.cat(model.model.get_image_features(frames.to(device_of(model))).pooler_output)  # (tokens, d)
        counts = [int(self.photo_positions(model, prompt).sum()) for prompt in with_photos]
        split = iter(features.split(counts))
        return [next(split) if prompt.photos else None for prompt in prompts]

    def photo_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Mark the image placeholders: (P,) bool."""
        return prompt.input_ids == model.config.image_token_id

    def language_model(self, model: nn.Module) -> nn.Module:
        """The Llama text model."""
        return model.model.text_model

    def head(self, model: nn.Module) -> nn.Module:
        """The language model head."""
        return model.lm_head

    def never_sampled(self, model: nn.Module, tokenizer: Any) -> list[int]:
        """Photo, tile and video markers, as far as the tokenizer has them: the 2.2B model spells tiles out."""
        return sorted(index for token, index in tokenizer.get_vocab().items() if _MARKER.fullmatch(token))


def frame_tokens(config: Any) -> int:
    """Count the tokens of one frame, as a model's config says."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.scale_factor ** 2


def _frame_side(image_processor: Any) -> int | None:
    """The pixels along a frame; None for an image processor that makes no frames."""
    return getattr(image_processor, "max_image_size", {}).get("longest_edge")


def _cutting(image_processor: Any, photo: Image.Image, most: int | None) -> dict[str, Any]:
    """Options of the image processor that cut a photo into at most so many tiles; None: the model's own number."""
    if most is None:
        return {}
    side = _frame_side(image_processor)
    for edge in range(image_processor.size["longest_edge"] // side, 1, -1):  # tiles along the photo's longer side
        size = {"longest_edge": edge * side}
        _, rows, columns = image_processor.get_number_of_image_patches(photo.height, photo.width, {"size": size})
        if rows * columns <= most:
            return {"size": size}
    return {"do_image_splitting": False}


def _span(rows: int, columns: int, tokens: int) -> str:
    """A photo's placeholders: its tiles row by row, a line break behind each row, then the overview."""
    frame = _PLACEHOLDER * tokens
    lines = ["".join(f"{_AROUND}<row_{row}_col_{column}>{frame}" for column in range(1, columns + 1)) + "\n"
             for row in range(1, rows + 1)]
    return "".join([*lines, "\n" if rows else "", f"{_AROUND}{_OVERVIEW}{frame}{_AROUND}"])
