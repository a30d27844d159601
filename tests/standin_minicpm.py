"""Write a model folder whose code comes with it, and look at a prompt through that code."""

import json
import shutil
from pathlib import Path

import torch

CODE = Path(__file__).parent / "standin"
CHAT = ("{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}")


def write_standin(folder, tokenizer, version=2.6):
    """Write code, configuration, tokenizer and random weights of every part, audio and TTS included."""
    from transformers import Qwen2TokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    for path in CODE.glob("*.py"):
        shutil.copy(path, folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    fast = Qwen2TokenizerFast(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
                              eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>",
                              extra_special_tokens=list(tokenizer.get_added_vocab()))
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="MiniCPMOTokenizerFast",
         auto_map={"AutoTokenizer": ["tokenization_minicpmo_fast.MiniCPMOTokenizerFast", None]})
    edit(folder / "preprocessor_config.json", image_processor_type="MiniCPMVImageProcessor", version=version,
         processor_class="MiniCPMOProcessor", auto_map={
             "AutoProcessor": "processing_minicpmo.MiniCPMOProcessor",
             "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor"})
    edit(folder / "config.json", model_type="minicpmo", architectures=["MiniCPMO"], vocab_size=len(fast),
         hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
         max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=fast.eos_token_id,
         torch_dtype="bfloat16", auto_map={"AutoConfig": "configuration_minicpm.MiniCPMOConfig",
                                           "AutoModel": "modeling_minicpmo.MiniCPMO"})
    write_weights(folder)
    return folder


def edit(path, **values):
    """Set values of a JSON file, made when it is not there."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**before, **values}), encoding="utf-8")


def write_weights(folder):
    """Draw the weights: random ones as given make nearly uniform answers, these don't."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = build(folder)
    for weight in model.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.15)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def build(folder):
    """Build the folder's model without loading weights, every part on: its buffers are as its code makes them."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from models.remote_code import mended_imports

    with mended_imports():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        return get_class_from_dynamic_module(config.auto_map["AutoModel"], folder)(config)


def own_logits(model, prompt, ids):
    """The logits of the model's own forward for one row of ids (1, n)."""
    photos = {"pixel_values": [[]], "tgt_sizes": [[]], "image_bound": [[]]}
    if prompt.photos:
        sizes = prompt.photos["target_sizes"]
        widths = (sizes[:, 0] * sizes[:, 1] * model.config.patch_size).tolist()
        photos = {"pixel_values": [prompt.photos["pixel_values"].split(widths, dim=-1)], "tgt_sizes": [sizes],
                  "image_bound": [prompt.photos["image_bound"]]}
    return model({"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], **photos}).logits
