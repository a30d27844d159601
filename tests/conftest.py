"""Tiny models from real transformers configs, built offline; shared by the tests."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="remote_code_")  # the code of stand-in models is copied there

import pytest
import torch
from loguru import logger
from PIL import Image
from torch.nn.functional import pad

torch.set_num_threads(1)

import demo  # noqa: E402
import standin_minicpm  # noqa: E402
from models.loading import load_minicpm  # noqa: E402
from models.policy import Policy  # noqa: E402


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


def qwen_model(kind, tokenizer):
    """A tiny Qwen2.5-VL with windowed vision attention, or a tiny Qwen3-VL with two deepstack layers."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{marker}|>") for name, marker in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"))}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
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


@pytest.fixture(scope="session")
def tokenizer():
    """The demo's tokenizer."""
    return demo.make_tokenizer(seed=0)


@pytest.fixture(scope="session")
def image_processor():
    """A processor that slices: photos above 64 x 64 pixels get an overview and up to four slices."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    return MiniCPMV4_6ImageProcessorPil(max_slice_nums=4, scale_resolution=64, patch_size=16, downsample_mode="4x",
                                        use_image_id=True)


def parts_of(kind, tokenizer, image_processor):
    """Model, tokenizer and image processor of a native kind; those given belong to MiniCPM-V-4.6."""
    layers = {"dense": ["full_attention"] * 2,
              "hybrid": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}
    if kind == "v47":
        return tiny_model(tokenizer, layers["hybrid"], "4_7"), tokenizer, image_processor
    if kind in layers:
        return tiny_model(tokenizer, layers[kind]), tokenizer, image_processor
    tokenizer = qwen_tokenizer()
    return qwen_model(kind, tokenizer), tokenizer, qwen_image_processor()


@pytest.fixture(scope="session")
def standin(tmp_path_factory, tokenizer):
    """A model folder with code of its own; read only."""
    return standin_minicpm.write_standin(tmp_path_factory.mktemp("standin") / "model", tokenizer)


@pytest.fixture
def remote_policy(standin):
    """A tiny policy whose code comes with the model."""
    return Policy(*load_minicpm(str(standin), trust_remote_code=True))


@pytest.fixture(params=["dense", "hybrid", "v47", "remote", "qwen2_5_vl", "qwen3_vl"])
def policy(request, tokenizer, image_processor):
    """A tiny policy of each kind: MiniCPM-V-4.6 with both kinds of text model, 4.7, remote code, the Qwen families."""
    if request.param == "remote":
        return request.getfixturevalue("remote_policy")
    return Policy(*parts_of(request.param, tokenizer, image_processor))


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def qwen_policy(request, tokenizer, image_processor):
    """A tiny policy of each Qwen family."""
    return Policy(*parts_of(request.param, tokenizer, image_processor))


@pytest.fixture
def said():
    """Every log line of the test."""
    lines = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{level} {message}")
    yield lines
    logger.remove(sink)


@pytest.fixture
def dense_policy(tokenizer, image_processor):
    """A tiny policy with attention layers only."""
    return Policy(tiny_model(tokenizer, ["full_attention"] * 2), tokenizer, image_processor)


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


def write_shop(folder, tokenizer, image_processor):
    """A model folder, a sheet with photos (eight good rows, one unlabelled, one without its photo) and prompt.txt."""
    from evidence.report import write_sheet
    from sheets.samples import cached_photo_path

    model = tiny_model(tokenizer, ["linear_attention", "full_attention"])
    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    rows = []
    for index in range(10):
        address = f"https://shop.invalid/{index}.png"
        if index != 9:
            noise_photo(index, (96, 64)).save(cached_photo_path(address, folder / "photos"))
        rows.append({"sku_id": f"00{index}", "text": f"box {index}", "sku_img": "" if index == 3 else address,
                     "label": "" if index == 8 else f"{index + 1} 8 15"})
    write_sheet(folder / "data.xlsx", {"products": rows})
    (folder / "prompt.txt").write_text("{text}", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def shop(tmp_path_factory, tokenizer, image_processor):
    """See write_shop; read only."""
    return write_shop(tmp_path_factory.mktemp("shop"), tokenizer, image_processor)


def train_options(shop, output, **changes):
    """Options of a run of a few seconds on the shop."""
    from config import TrainOptions

    settings = dict(model_path=str(shop / "model"), data_path=str(shop / "data.xlsx"),
                    image_cache_dir=str(shop / "photos"), prompt_file=str(shop / "prompt.txt"),
                    output_dir=str(output / "run"), log_dir=str(output / "logs"), device="cpu", batch_size=3,
                    group_size=4, max_length=8, temperature=1.0, lr=1e-3, max_steps=3, eval_fraction=0.3, eval_every=2,
                    save_every=2, num_threads=1)
    return TrainOptions(**{**settings, **changes})


def as_flags(options):
    """The command line that gives these options."""
    from dataclasses import asdict

    flags = []
    for name, value in asdict(options).items():
        if isinstance(value, list):
            flags += [word for item in value for word in (f"--{name}", item)]
        elif value is not None:
            flags += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value).lower()
                                     if isinstance(value, bool) else str(value)])]
    return flags
