"""Stand-in model: the structure, the inputs and the habits of MiniCPM-o's own code, with a few thousand parameters.

Its habits are what the loader has to cope with: names that transformers 5 lacks, packages for audio, no post_init(),
a generation method replaced on the instance.
"""

import types

import soundfile  # noqa: F401
import torch
import torchvision  # noqa: F401
from torch import nn
from transformers import AutoProcessor, LogitsWarper, Qwen2ForCausalLM, Qwen2PreTrainedModel
from transformers.models.whisper.modeling_whisper import WHISPER_ATTENTION_CLASSES

from .configuration_minicpm import MiniCPMOConfig
from .resampler import Resampler


class LoudWarper(LogitsWarper):
    """As in the TTS part, never used for photos."""

    attention_classes = WHISPER_ATTENTION_CLASSES


class Tower(nn.Module):
    """One convolution, one attention layer among a slice's patches."""

    def __init__(self, config):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.vision_size, config.patch_size, config.patch_size)
        self.attn = nn.MultiheadAttention(config.vision_size, 2, batch_first=True)

    def forward(self, pixel_values, patch_attention_mask):
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (slices, patches, d)
        return patches + self.attn(patches, patches, patches, key_padding_mask=~patch_attention_mask)[0]


class MiniCPMO(Qwen2PreTrainedModel):
    """llm, vpm and resampler, apm and tts when they are on."""

    config_class = MiniCPMOConfig

    def __init__(self, config):
        super().__init__(config)
        if config._name_or_path:  # loads once more what the loader has loaded, and needs the same mends for it
            self.processor = AutoProcessor.from_pretrained(config._name_or_path, trust_remote_code=True)
        self.llm = Qwen2ForCausalLM(config)
        self.llm.prepare_inputs_for_generation = types.MethodType(prepare_inputs_for_generation, self.llm)
        if config.init_vision:
            self.vpm = Tower(config)
            self.resampler = Resampler(config.query_num, config.hidden_size, config.vision_size)
        if config.init_audio:
            self.apm = nn.Linear(4, 4)
        if config.init_tts:
            self.tts = nn.Linear(4, 4)

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self):
        return self.llm.lm_head

    def encode_slices(self, pixel_values, tgt_sizes):
        patch = self.config.patch_size
        rows = [pixels.permute(2, 0, 1) for slices in pixel_values for pixels in slices]  # (patches * patch, 3, patch)
        if not rows:
            return [[] for _ in pixel_values]
        sizes = torch.cat([size for size in tgt_sizes if len(size)])
        pixels = nn.utils.rnn.pad_sequence(rows, batch_first=True).permute(0, 2, 3, 1)  # (slices, 3, patch, longest)
        mask = torch.arange(pixels.shape[-1] // patch, device=pixels.device) < sizes.prod(-1)[:, None]
        features = self.resampler(self.vpm(pixels.to(self.dtype), mask), sizes)
        return features.split([len(slices) for slices in pixel_values])

    def get_vllm_embedding(self, data):
        features = self.encode_slices(data["pixel_values"], data["tgt_sizes"])
        embeds = self.llm.model.embed_tokens(data["input_ids"]).clone()
        for row, (found, bounds) in enumerate(zip(features, data["image_bound"], strict=True)):
            places = [place for first, end in bounds for place in range(first, end)]
            if places:
                embeds[row, places] = found.flatten(0, 1).to(embeds.dtype)
        return embeds, features

    def chat_embedding(self, data):
        """As newer revisions do for chat(): look at the audio encoder before asking whether there is any audio."""
        self.apm.weight.device  # noqa: B018
        return self.get_vllm_embedding(data)[0]

    def speak(self, words):
        import a_package_that_only_speech_needs

        return a_package_that_only_speech_needs.say(words)

    def forward(self, data, **kwargs):
        embeds, _ = self.get_vllm_embedding(data)
        return self.llm(inputs_embeds=embeds, position_ids=data["position_ids"].long(), **kwargs)


def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
    """Reads what transformers 5 no longer has."""
    return {"input_ids": input_ids[:, past_key_values.seen_tokens:]}
