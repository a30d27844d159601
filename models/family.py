"""What a model family has to say about itself, so that everything above it is written once.

A new family is one file with a subclass of Family and one line in models.FAMILIES.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ground.errors import UserError

# What a model folder holds besides weights: kept as the model's makers wrote it, so that their own loaders work.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
                    "chat_template.jinja", "chat_template.json")

# Work on a model that has no numbers yet: its weights are on meta, and each is read in the dtype and share left there.
AtBirth = Callable[[nn.Module], None]


class ModelError(UserError):
    """A model that can't be loaded or used; the text says which and what to do."""


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: its buffers lie there, also while its weights wait in the host's memory."""
    return next(model.buffers(), next(model.parameters())).device


@dataclass(frozen=True)
class Prompt:
    """One product's prompt, ready for the model: kept on the CPU, held once for all of the group's candidates."""

    input_ids: Tensor  # (P,) long
    photos: dict[str, Tensor] = field(default_factory=dict)  # the family's photo tensors; empty without photos
    num_photos: int = 0  # of the product's that are in it

    @property
    def num_bytes(self) -> int:
        """Host memory taken by the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.input_ids, *self.photos.values()))


class Family:
    """One model family. Methods take the model, so that policy and reference policy share one instance."""

    model_types: tuple[str, ...] = ()  # config.json's model_type values that belong to this family
    vision_names: tuple[str, ...] = ()  # the modules that --train_vision trains: the tower, its way into the text model
    cuts_slices = True  # False: photos go in whole, and --max_slice_nums is refused
    runs_remote_code = False  # load() runs Python files of the model's folder: asked for with --trust_remote_code

    def load(self, model_path: str, dtype: torch.dtype, quantization: Any = None,
             at_birth: AtBirth | None = None) -> tuple[nn.Module, Any, Any]:
        """Load (model, tokenizer, image processor) from a folder or hub name.

        quantization: transformers' quantization_config, None for weights of the given dtype. at_birth: see AtBirth.
        """
        raise NotImplementedError

    def make_lean(self, model: nn.Module) -> None:
        """Put what this family computes with fewer operations in the place of the model's own; twice is once."""

    def check_bounds(self, model: nn.Module, image_processor: Any, max_slice_nums: int | None, max_pixels: int | None
                     ) -> None:
        """Refuse bounds of a photo that mean nothing to this family; raises ModelError."""
        if max_slice_nums is not None and not self.cuts_slices:
            raise ModelError(f"max_slice_nums {max_slice_nums}: {model.config.model_type} does not cut photos into "
                             "slices; bound them with max_pixels instead")

    def encode_prompt(self, tokenizer: Any, image_processor: Any, text: str, photos: Sequence[Image.Image],
                      max_slice_nums: int | None = None, max_pixels: int | None = None) -> Prompt:
        """Turn a prompt text and its photos into ids and photo tensors, every photo in its own slices.

        max_pixels: bound of each photo before it is cut. None leaves the model's own bounds.
        """
        raise NotImplementedError

    def importing(self) -> AbstractContextManager[None]:
        """What has to be in place while code that comes with the model is imported, here or in another process."""
        return nullcontext()

    def photo_features(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Encode all photos in one vision pass: per prompt (photo tokens, hidden), or None without photos.

        Columns beyond the hidden size are the family's own, for decoder_arguments.
        """
        raise NotImplementedError

    def photo_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Mark the prompt positions that photo features fill: (P,) bool."""
        raise NotImplementedError

    def positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Give the prompt's position ids: (P,), or (axes, P) for a rotary embedding of several axes.

        A prompt ends in text, whose last position is the highest on every axis: answers count on from there.
        """
        return torch.arange(len(prompt.input_ids))

    def decoder_arguments(self, model: nn.Module, features: Sequence[Tensor | None], photo_mask: Tensor
                          ) -> dict[str, Any]:
        """Give further keyword arguments of the language model for a batch that begins with prompts.

        features: one entry a row. photo_mask: (rows, columns) bool, the columns that photo features fill.
        """
        return {}

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder without its head: takes inputs_embeds, gives last_hidden_state."""
        raise NotImplementedError

    def head(self, model: nn.Module) -> nn.Module:
        """The linear layer from hidden states to logits."""
        raise NotImplementedError

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that --train_vision trains."""
        return [model.get_submodule(name) for name in self.vision_names]

    def lora_targets(self, model: nn.Module) -> list[str]:
        """Name, in full, every linear layer of the language model: those that get an adapter."""
        inside = {id(module) for module in self.language_model(model).modules()}
        return [name for name, module in model.named_modules()
                if id(module) in inside and isinstance(module, nn.Linear)]

    def never_sampled(self, model: nn.Module, tokenizer: Any) -> list[int]:
        """Ids that stand for photos: sampled in an answer they would crash or blind the next forward pass."""
        raise NotImplementedError

    def save(self, model: nn.Module, tokenizer: Any, image_processor: Any, model_path: str, folder: Path,
             weights: dict[str, Tensor] | None = None) -> None:
        """Write a folder that loads by itself: weights, config, tokenizer, processor files of model_path.

        weights: those to write, None for the model's own.
        """
        model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
        self.save_processor(tokenizer, image_processor, model_path, folder)

    def audio_weights(self, model_path: str) -> dict[str, Tensor]:
        """Read what the makers' folder holds of audio and TTS; raises ModelError when it holds nothing of them."""
        raise ModelError(f"--keep_audio: {model_path} has no audio and no TTS part; leave the option out")

    def save_audio(self, weights: dict[str, Tensor], model_path: str, folder: Path) -> None:
        """Write audio_weights into a saved folder, and switch audio and TTS on in it as the makers have them."""
        raise NotImplementedError

    def save_processor(self, tokenizer: Any, image_processor: Any, model_path: str, folder: Path) -> None:
        """Write what a model folder holds besides weights and config: tokenizer, processor files of model_path."""
        tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        for name in _PROCESSOR_FILES:
            source = Path(model_path) / name
            if source.is_file():
                shutil.copyfile(source, folder / name)


@dataclass(frozen=True)
class PromptParts:
    """What makes a prompt of a text and photos: of a policy all but the model, so that another process can hold it."""

    family: Family
    tokenizer: Any
    image_processor: Any
    max_slice_nums: int | None = None
    max_pixels: int | None = None

    def encode_prompt(self, text: str, photos: Sequence[Image.Image]) -> Prompt:
        """Prepare a prompt text and its photos (CPU tensors)."""
        return self.family.encode_prompt(self.tokenizer, self.image_processor, text, photos, self.max_slice_nums,
                                         self.max_pixels)


def joined_on(device: torch.device, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Join tensors of the CPU on a device; from pinned memory they are copied there while this process goes on."""
    return torch.cat([tensor.to(device, non_blocking=True) for tensor in tensors], dim)


def load_tokenizer(model_path: str) -> Any:
    """Load a tokenizer with its chat template, the processor's before its own; raises ModelError without one."""
    from transformers import AutoTokenizer, ProcessorMixin

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    template = ProcessorMixin.get_processor_dict(model_path)[0].get("chat_template")
    if isinstance(template, str):  # the full processor takes its own template before the tokenizer's
        tokenizer.chat_template = template
    if not tokenizer.chat_template:
        raise ModelError(f"{model_path}: no chat template, neither a chat_template file nor one in "
                         "tokenizer_config.json")
    return tokenizer


def chat_parts(tokenizer: Any, text: str, num_photos: int, photo_marker: str) -> list[str]:
    """Write one user turn, photos before the text, and cut it at the photo markers: num_photos + 1 strings.

    Markers in the text become blanks: a product text must not open a turn or claim a photo.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for marker in (*tokenizer.all_special_tokens, *added):
        text = text.replace(marker, " ")
    content = [{"type": "image"} for _ in range(num_photos)] + [{"type": "text", "text": text}]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True, enable_thinking=False)
    parts = chat.split(photo_marker)
    if len(parts) != num_photos + 1:
        raise ModelError(f"the tokenizer's chat template placed {len(parts) - 1} photo markers for "
                         f"{num_photos} photos")
    return parts


def prompt_ids(tokenizer: Any, parts: Sequence[str], spans: Sequence[str]) -> Tensor:
    """Put a photo's placeholders between the parts of a chat and tokenize: (P,) long."""
    expanded = parts[0] + "".join(span + part for span, part in zip(spans, parts[1:], strict=True))
    return torch.tensor(tokenizer(expanded, add_special_tokens=False)["input_ids"])


def shrink(photo: Image.Image, max_pixels: int | None) -> Image.Image:
    """Scale a photo down to at most max_pixels, its proportions kept; a smaller one stays as it is."""
    wide, high = photo.size
    if max_pixels is None or wide * high <= max_pixels:
        return photo
    size = (math.isqrt(max_pixels * wide // high), math.isqrt(max_pixels * high // wide))
    return photo.resize((max(1, size[0]), max(1, size[1])), Image.Resampling.BICUBIC)
