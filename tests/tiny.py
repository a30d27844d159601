"""Tiny models of every kind from real transformers configs, built offline, and what is asked of them."""

import torch
from PIL import Image
from torch.nn.functional import pad

import demo
import standin_minicpm
from rollout import draw_uniforms


def tiny_model(tokenizer, layer_types, version="4_6"):
    """A MiniCPM-V-4.6 of a few thousand parameters; linear_attention layers make it a hybrid as the real one is."""
    import transformers

    config_class = getattr(transformers, f"MiniCPMV{version}Config")
    markers = {} if version == "4_6" else {  # 4.7 reads its positions off these
        "image_start_id": tokenizer.image_start_token_id, "image_end_id": tokenizer.image_end_token_id,
        "slice_start_id": tokenizer.slice_start_token_id, "slice_end_id": tokenizer.slice_end_token_id,
        "newline_id": tokenizer("\n")["input_ids"][0]}
    torch.manual_seed(0)
    text = {"model_type": "qwen3_5_text", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": len(layer_types), "layer_types": layer_types, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "max_position_embeddings": 2048,
            "tie_word_embeddings": True, "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
                                "mrope_section": [2, 1, 1]}}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 64, "patch_size": 16}
    config = config_class(
        text_config=text, vision_config=vision, insert_layer_id=0, image_size=64, downsample_mode="4x",
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id, tie_word_embeddings=True,
        **markers)
    return remembering(sharpen(getattr(transformers, f"MiniCPMV{version}ForConditionalGeneration")(config)))


def sharpen(model):
    """Random weights as transformers gives them make nearly uniform answers; these don't."""
    for weight in model.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.15)
    return model


def remembering(model):
    """Delta nets that keep what they read for about fifteen tokens.

    As made they forget it at once: what comes out is one q k times v, and where q k is near zero the norm behind blows
    its rounding up to 2e-4.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("linear_attn.A_log"):
                weight.fill_(-3)
            if name.endswith("linear_attn.conv1d.weight"):
                weight.mul_(4)
    return model


QWEN_CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}<|im_start|>"
             "{{ message.role }}\n{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|>"
             "<|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PATCH = {"patch_size": 8, "temporal_patch_size": 2}


def qwen_tokenizer():
    """The demo's vocabulary with Qwen's photo markers and chat."""
    tokenizer = demo.make_tokenizer(seed=0)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|vision_start|>", "<|vision_end|>"]})
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def qwen_model(kind, tokenizer, **text_options):
    """A tiny Qwen2.5-VL with windowed vision attention, or a tiny Qwen3-VL with two deepstack layers."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{marker}|>") for name, marker in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"))}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            **text_options}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
              "spatial_merge_size": 2, "depth": 3, **PATCH}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    else:
        text |= {"head_dim": 8}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return sharpen(AutoModelForImageTextToText.from_config(AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, tie_word_embeddings=kind == "qwen2_5_vl", **ids)))


def qwen_image_processor():
    """A processor of 8 x 8 patches, four a token: photos of 1 to 48 tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 128 * 96}, **PATCH)


SMOLVLM_CHAT = ("<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
                "{% if message.content[0].type == 'image' %}:{% else %}: {% endif %}{% for part in message.content %}"
                "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
                "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]


def smolvlm_tokenizer():
    """The demo's vocabulary with SmolVLM's markers and chat."""
    from transformers import AddedToken, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=demo.make_tokenizer(seed=0).backend_tokenizer, eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>", extra_special_tokens=["<fake_token_around_image>", "<image>"])
    # Special, but not among all_special_tokens.
    tokenizer.add_tokens([AddedToken(marker, special=True) for marker in ("<global-img>", *TILES)])
    tokenizer.chat_template = SMOLVLM_CHAT
    return tokenizer


def smolvlm_model(kind, tokenizer):
    """A tiny SmolVLM as its first makers save it (idefics3), or a tiny SmolVLM2: frames of 16 x 16 pixels, 4 tokens."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}
    return sharpen(AutoModelForImageTextToText.from_config(AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, scale_factor=2, tie_word_embeddings=kind == "smolvlm",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"))))


def smolvlm_image_processor(kind, edge=2, **options):
    """A processor of up to edge x edge tiles of 16 x 16 pixels and an overview."""
    from transformers import Idefics3ImageProcessorPil, SmolVLMImageProcessorPil

    processor = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[kind]
    return processor(size={"longest_edge": edge * 16}, max_image_size={"longest_edge": 16}, image_seq_len=4, **options)


def parts_of(kind, tokenizer, image_processor):
    """Model, tokenizer and image processor of a native kind; those given belong to MiniCPM-V-4.6."""
    layers = {"dense": ["full_attention"] * 2,
              "hybrid": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}
    if kind == "v47":
        return tiny_model(tokenizer, layers["hybrid"], "4_7"), tokenizer, image_processor
    if kind in layers:
        return tiny_model(tokenizer, layers[kind]), tokenizer, image_processor
    if kind in ("idefics3", "smolvlm"):
        tokenizer = smolvlm_tokenizer()
        return smolvlm_model(kind, tokenizer), tokenizer, smolvlm_image_processor(kind)
    tokenizer = qwen_tokenizer()
    return qwen_model(kind, tokenizer), tokenizer, qwen_image_processor()


def own_logits(policy, prompt, answer):
    """The logits before each of the answer's tokens by the model's own forward, which numbers the positions itself."""
    ids = torch.cat([prompt.input_ids, answer])[None]
    if policy.family.runs_remote_code:
        logits = standin_minicpm.own_logits(policy.model, prompt, ids)
    else:
        kinds = pad(policy.family.photo_positions(policy.model, prompt).int(), (0, len(answer)))[None]  # 1: photo token
        logits = policy.model(input_ids=ids, mm_token_type_ids=kinds, **prompt.photos).logits
    return logits[0, len(prompt.input_ids) - 1:-1]


def noise_photo(seed, size=(64, 64)):
    """A photo of noise: no two alike."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def three_prompts(policy):
    """Prompts of unequal length: two photos (one sliced), one photo, none."""
    return [policy.encode_prompt("mug, grid 10 cm", [noise_photo(1), noise_photo(2, (128, 96))]),
            policy.encode_prompt("box, grid 5 cm, a longer text than the others have", [noise_photo(3)]),
            policy.encode_prompt("vase", [])]


def sample(policy, prompts, group_size=4, columns=12, temperature=0.7, seed="sample"):
    """Sample a group a prompt."""
    with torch.no_grad():
        features = policy.photo_features(prompts)
    uniforms = torch.cat([draw_uniforms(f"{seed}/{index}", group_size, columns) for index in range(len(prompts))])
    return policy.sample(prompts, features, uniforms, temperature)


def adapted(policy, rank=4):
    """The policy with an adapter that changes its answers: as peft makes it, it would not."""
    policy.add_adapter(rank, None, "base")
    torch.manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return policy
