"""MiniCPM-o-2_6, o-4_5, V-2_6, V-4, V-4_5: code of their own, a SigLIP tower, a resampler, a stock language model.

The processor makes ids and slices, the model's get_vllm_embedding() encodes the photos: both are the makers' code.
Their chat() is not used: it drops photos under an "images" key, samples with top_p and a repetition penalty, and
gives text instead of ids.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from PIL import Image
from torch import Tensor, nn

from models.family import AtBirth, Family, ModelError, Prompt, device_of, shrink
from models.remote_code import OFF, load_remote, local_folder
from models.weights import add_weights, read_tensor, stored_tensors
from sheets.photos import PhotoError

_MARKERS = ("im_start", "im_end", "slice_start", "slice_end", "im_id_start", "im_id_end", "unk_token")
_WRITTEN_MARKERS = ("<image>./</image>", "<audio>./</audio>", "<video>./</video>")  # text that processors replace
_COMPANIONS = {".py", ".json", ".jinja", ".model", "merges.txt", "vocab.txt"}  # kinds of files beside the weights
_OURS = {"checksums.json", "best.json", "serving.json"}  # written by this program, true of the folder they lie in alone


@dataclass(frozen=True)
class RemoteProcessor:
    """The model's own processor, and what else is needed of the folder it came from."""

    processor: Any
    photo_marker: str  # how chat() writes one photo into the prompt
    files: dict[str, bytes]  # the makers' code, tokenizer and processor files, for checkpoints


class MiniCPMRemote(Family):
    """The MiniCPM models whose code comes with the weights; audio and TTS stay off."""

    model_types = ("minicpmo", "minicpmv")
    vision_names = ("vpm", "resampler")
    runs_remote_code = True

    def load(self, model_path: str, dtype: torch.dtype, quantization: Any = None, at_birth: AtBirth | None = None
             ) -> tuple[nn.Module, Any, Any]:
        """Load (model, tokenizer, processor), running the code in the folder; raises OSError when files are missing."""
        folder = local_folder(model_path)
        model, processor = load_remote(folder, dtype, quantization, at_birth)
        tokenizer = processor.tokenizer
        missing = [name for name in _MARKERS if getattr(tokenizer, name, None) is None]
        if missing:
            raise ModelError(f"{model_path}: the tokenizer lacks {', '.join(missing)}; take the model's own tokenizer")
        warn_of_other_ids(tokenizer, folder)
        if getattr(model.llm.config, "scale_emb", 1) != 1:
            raise ModelError(f"{model_path}: its embeddings are scaled by {model.llm.config.scale_emb}, which this "
                             "program does not do")
        omni = model.config.model_type == "minicpmo"
        photo_marker = "<image>./</image>" if omni and float(processor.version) >= 4.5 else "(<image>./</image>)"
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())
                 if (path.suffix in _COMPANIONS or path.name in _COMPANIONS)
                 and path.name not in _OURS and not path.name.endswith(".index.json")}
        if omni:
            logger.info(f"{model_path}: audio and TTS are off, checkpoints hold language model and vision only")
        return model, tokenizer, RemoteProcessor(processor, photo_marker, files)

    def encode_prompt(self, tokenizer: Any, image_processor: RemoteProcessor, text: str,
                      photos: Sequence[Image.Image], max_slice_nums: int | None = None,
                      max_pixels: int | None = None) -> Prompt:
        """Put the photos before the text of one user turn, as chat() does, and let the processor cut and expand them.

        max_pixels scales a photo down before it is cut, so fewer slices come of it.
        Raises PhotoError when the processor does not take every photo.
        Prompt.photos: pixel_values (3, patch, all patches * patch), the slices side by side; target_sizes (slices, 2),
        patches high and wide; image_bound (slices, 2), first and last + 1 position of each slice's placeholders.
        """
        for marker in (*_WRITTEN_MARKERS, *tokenizer.get_added_vocab()):  # a text must not open a turn or claim a photo
            text = text.replace(marker, " ")
        content = "\n".join([image_processor.photo_marker] * len(photos) + [text])
        chat = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=False)
        encoded = image_processor.processor([chat], [[shrink(photo, max_pixels) for photo in photos]],
                                            max_slice_nums=max_slice_nums, use_image_id=None,
                                            return_tensors="pt")
        input_ids = encoded["input_ids"][0].long()  # (P,)
        if not photos:
            return Prompt(input_ids)
        slices, bound = encoded["pixel_values"][0], encoded["image_bound"][0].long()
        sizes = torch.as_tensor(encoded["tgt_sizes"][0]).long()
        photo_spans = int((input_ids == tokenizer.convert_tokens_to_ids(tokenizer.im_start)).sum())
        if photo_spans != len(photos) or not len(slices) == len(sizes) == len(bound):
            raise PhotoError(f"the model's processor made {photo_spans} spans for {len(photos)} photos, {len(bound)} "
                             f"for {len(slices)} slices")
        return Prompt(input_ids, {"pixel_values": torch.cat(list(slices), dim=-1), "target_sizes": sizes,
                                  "image_bound": bound})

    def photo_features(self, model: nn.Module, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Encode the slices of all prompts together by the model's own vision path and its resampler."""
        with_photos = [prompt for prompt in prompts if prompt.photos]
        if not with_photos:
            return [None] * len(prompts)
        device = device_of(model)
        data = {"pixel_values": [_slices(prompt, device) for prompt in with_photos],
                "tgt_sizes": [prompt.photos["target_sizes"].to(device, torch.int32) for prompt in with_photos],
                # Text is embedded by the policy: one id a prompt and no place for photos leaves the features alone.
                "input_ids": torch.zeros(len(with_photos), 1, dtype=torch.long, device=device),
                "image_bound": [[] for _ in with_photos]}
        _, features = model.get_vllm_embedding(data)  # per prompt (slices, queries, d)
        encoded = iter(features)
        return [next(encoded).flatten(0, 1) if prompt.photos else None for prompt in prompts]

    def photo_positions(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """Mark the placeholders between the slice markers: (P,) bool."""
        marked = torch.zeros(len(prompt.input_ids), dtype=torch.bool)
        for start, end in prompt.photos["image_bound"].tolist() if prompt.photos else []:
            marked[start:end] = True
        return marked

    def language_model(self, model: nn.Module) -> nn.Module:
        """The stock text model (Qwen2, Qwen3 or Llama) without its head."""
        return model.llm.model

    def head(self, model: nn.Module) -> nn.Module:
        """The language model head."""
        return model.llm.lm_head

    def never_sampled(self, model: nn.Module, tokenizer: Any) -> list[int]:
        """Photo and slice markers, and the unknown token that stands for photo features."""
        return sorted({tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)) for name in _MARKERS})

    def save(self, model: nn.Module, tokenizer: Any, image_processor: RemoteProcessor, model_path: str,
             folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the weights beside the makers' own files: code, tokenizer, processor; config.json with audio off."""
        model.save_pretrained(folder, state_dict=weights)
        self.save_processor(tokenizer, image_processor, model_path, folder)
        config = json.loads(image_processor.files["config.json"])
        config.pop("dtype", None)
        config |= {"init_vision": True, "init_audio": False, "init_tts": False,
                   "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")

    def audio_weights(self, model_path: str) -> dict[str, Tensor]:
        """Read what the makers' folder holds of audio and TTS; raises ModelError when it holds nothing of them."""
        found = {name: read_tensor(stored) for name, stored in stored_tensors(local_folder(model_path))
                 if any(re.match(pattern, name) for pattern in OFF)}
        if not found:
            raise ModelError(f"--keep_audio: no weights of audio or TTS in {model_path}; give the makers' own folder "
                             "with --model_path")
        return found

    def save_audio(self, weights: dict[str, Tensor], model_path: str, folder: Path) -> None:
        """Write audio_weights into a saved folder, and switch audio and TTS on in it as the makers have them."""
        add_weights(folder, weights, "model-audio-and-tts.safetensors")
        config, makers = (json.loads((path / "config.json").read_text(encoding="utf-8"))
                          for path in (folder, local_folder(model_path)))
        for switch in ("init_audio", "init_tts"):
            config.pop(switch)
        config |= {switch: makers[switch] for switch in ("init_audio", "init_tts") if switch in makers}
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        if (local_folder(model_path) / "assets").is_dir():  # what some of them speak with
            shutil.copytree(local_folder(model_path) / "assets", folder / "assets")

    def save_processor(self, tokenizer: Any, image_processor: RemoteProcessor, model_path: str, folder: Path) -> None:
        """Write the makers' own files as they are, but for config.json: code, tokenizer, processor."""
        for name, content in image_processor.files.items():
            if name != "config.json":
                (folder / name).write_bytes(content)


def warn_of_other_ids(tokenizer: Any, folder: Path) -> None:
    """Warn when the tokenizer gives other ids than the folder's tokenizer.json: some classes read only half of it."""
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        return
    text = "box 12 x 8.5 cm, 尺寸 12*8*15\n"
    written = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    if tokenizer.encode(text) != written:
        logger.warning(f"{folder}: {type(tokenizer).__name__} gives other ids than tokenizer.json on this version of "
                       "transformers; the model will read other tokens than it was trained with")


def _slices(prompt: Prompt, device: torch.device) -> list[Tensor]:
    """Cut a prompt's pixels into its slices again: each (3, patch, patches * patch)."""
    pixels = prompt.photos["pixel_values"]
    widths = prompt.photos["target_sizes"].prod(-1) * pixels.shape[1]
    return list(pixels.to(device).split(widths.tolist(), dim=-1))
