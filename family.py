"""What a model family has to say about itself, so that everything above it is written once.

A new family is one file with a subclass of Family and one line in policy.FAMILIES.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

# What a model folder holds besides weights: kept as the model's makers wrote it, so that their own loaders work.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
                    "chat_template.jinja", "chat_template.json")


class ModelError(ValueError):
    """A model that can't be loaded or used; the text says which and what to do."""


@dataclass(frozen=True)
class Prompt:
    """One product's prompt, ready for the model: kept on the CPU, held once for all of the group's candidates."""

    input_ids: Tensor  # (P,) long
    photos: dict[str, Tensor] = field(default_factory=dict)  # the family's photo tensors; empty without photos

    @property
    def num_bytes(self) -> int:
        """Host memory taken by the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.input_ids, *self.photos.values()))


class Family:
    """One model family. Methods take the model, so that policy and reference policy share one instance."""

    model_types: tuple[str, ...] = ()  # config.json's model_type values that belong to this family
    runs_remote_code = False  # load() runs Python files of the model's folder: asked for with --trust_remote_code

    def load(self, model_path: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
        """Load (model, tokenizer, image processor) from a folder or hub name."""
        raise NotImplementedError

    def encode_prompt(self, tokenizer: Any, image_processor: Any, text: str, photos: Sequence[Image.Image],
                      max_slice_nums: int | None = None) -> Prompt:
        """Turn a prompt text and its photos into ids and photo tensors, every photo in its own slices."""
        raise NotImplementedError

    def photo_features(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Encode all photos in one vision pass: per prompt (photo tokens, hidden), or None without photos."""
        raise NotImplementedError

    def photo_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Mark the prompt positions that photo features fill: (P,) bool."""
        raise NotImplementedError

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder without its head: takes inputs_embeds, gives last_hidden_state."""
        raise NotImplementedError

    def head(self, model: nn.Module) -> nn.Module:
        """The linear layer from hidden states to logits."""
        raise NotImplementedError

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that --train_vision trains: the tower and its projection into the language model."""
        raise NotImplementedError

    def never_sampled(self, model: nn.Module, tokenizer: Any) -> list[int]:
        """Ids that stand for photos: sampled in an answer they would crash or blind the next forward pass."""
        raise NotImplementedError

    def save(self, model: nn.Module, tokenizer: Any, image_processor: Any, model_path: str, folder: Path) -> None:
        """Write a folder that loads by itself: weights, config, tokenizer, processor files of model_path."""
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        for name in _PROCESSOR_FILES:
            source = Path(model_path) / name
            if source.is_file():
                shutil.copyfile(source, folder / name)
