"""Qwen2.5-VL and Qwen3-VL: positions and counts by hand, photo budgets, what is refused, two steps of training.

That sampling and scoring equal the models' own forward is tested with the other families in test_policy.py.
"""

import copy

import pytest
import torch
from PIL import Image

from models.family import ModelError
from models.loading import load_minicpm
from models.policy import Policy
from models.trainable import parameter_parts
from runs import train_options
from sheets.samples import PhotoError
from tiny import noise_photo, parts_of
from train_vlm_parallel import train

WIDE, SQUARE = (64, 32), (32, 32)  # pixels; in tokens of 16 x 16 pixels: 4 x 2 and 2 x 2


def photo_tokens(policy, size):
    prompt = policy.encode_prompt("box", [noise_photo(1, size)])
    return int(policy.family.photo_positions(policy.model, prompt).sum())


def test_positions_of_two_photos_of_different_sizes(qwen_policy):
    prompt = qwen_policy.encode_prompt("box", [noise_photo(1, WIDE), noise_photo(2, SQUARE)])
    positions = qwen_policy.family.positions(qwen_policy.model, prompt)
    assert positions.shape == (3, len(prompt.input_ids))
    photo = qwen_policy.family.photo_positions(qwen_policy.model, prompt)
    first = int(photo.nonzero()[0])
    assert photo[first:].tolist() == [True] * 8 + [False] * 2 + [True] * 4 + [False] * (len(photo) - first - 14)
    assert positions[:, :first].tolist() == [list(range(first))] * 3
    # Two rows of four: time stands still, rows and columns count from the same number.
    assert (positions[:, first:first + 8] - first).tolist() == [[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3] * 2]
    # Text goes on behind the longer side of the photo: its end, the next one's start.
    assert (positions[:, first + 8:first + 10] - first).tolist() == [[4, 5]] * 3
    assert (positions[:, first + 10:first + 14] - first).tolist() == [[6] * 4, [6, 6, 7, 7], [6, 7, 6, 7]]
    rest = len(photo) - first - 14
    assert (positions[:, first + 14:] - first).tolist() == [list(range(8, 8 + rest))] * 3


def test_prompt_without_photos_counts_on_all_axes(qwen_policy):
    prompt = qwen_policy.encode_prompt("box", [])
    assert prompt.photos == {}
    assert qwen_policy.family.positions(qwen_policy.model, prompt).tolist() == [list(range(len(prompt.input_ids)))] * 3


def test_prompt_reads_as_the_chat_template_says(qwen_policy):
    prompt = qwen_policy.encode_prompt("box", [noise_photo(1, SQUARE), noise_photo(2, SQUARE)])
    photo = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert qwen_policy.tokenizer.decode(prompt.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + photo * 2
        + "box<|im_end|>\n<|im_start|>assistant\n")


def test_pixels_bound_a_photo(qwen_policy):
    model, tokenizer, image_processor = qwen_policy.model, qwen_policy.tokenizer, qwen_policy.image_processor

    def tokens(size, max_pixels):
        return photo_tokens(Policy(model, tokenizer, image_processor, max_pixels=max_pixels), size)

    assert tokens((64, 64), None) == tokens((64, 64), 64 * 64) == 16
    assert tokens((64, 64), 64 * 64 - 1) == 9  # the next smaller grid, 3 x 3
    assert tokens((64, 64), 32 * 32) == 4
    assert tokens((256, 192), None) == tokens((256, 192), 10 ** 9) == 8 * 6  # the model's own 128 x 96 pixels
    image_processor.size = {"shortest_edge": 64 * 64, "longest_edge": 128 * 96}
    assert tokens(SQUARE, None) == 16
    assert tokens(SQUARE, 16 * 16) == 1  # below the model's own smallest number of pixels


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_patches_embedded_by_one_product_are_those_of_the_convolution(kind, tokenizer, image_processor, tmp_path):
    parts = parts_of(kind, tokenizer, image_processor)
    for part in parts:
        part.save_pretrained(tmp_path)
    stock, (model, tokenizer, image_processor) = parts[0], load_minicpm(str(tmp_path))
    policy = Policy(model, tokenizer, image_processor)
    pixels = torch.randn(12, 3 * 2 * 8 * 8)
    wanted, found = (each.model.visual.patch_embed(pixels) for each in (stock, model))
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-5
    twin = copy.deepcopy(model)  # as the reference policy is made
    with torch.no_grad():
        twin.model.visual.patch_embed.proj.weight.zero_()
    assert torch.equal(model.model.visual.patch_embed(pixels), found)
    # Of the frames of a photo, which are alike, a prompt holds one: half the values.
    photo = noise_photo(1)
    whole = image_processor([photo], return_tensors="pt")["pixel_values"]
    frame = policy.encode_prompt("box", [photo]).photos["pixel_values"]
    assert torch.equal(frame.view(-1, 3, 64), whole.view(-1, 3, 2, 64)[:, :, 1])
    gradients = []
    for each, given in ((stock, whole), (model, frame)):
        embedded = each.model.visual.patch_embed(given)
        (embedded * torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients.append(each.model.visual.patch_embed.proj.weight.grad)
    assert (model.model.visual.patch_embed(frame) - stock.model.visual.patch_embed(whole)).abs().max() < 1e-5
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[0].abs().max()


def test_slices_are_refused_and_the_way_out_is_named(qwen_policy):
    with pytest.raises(ModelError, match="max_slice_nums 4.*max_pixels"):
        Policy(qwen_policy.model, qwen_policy.tokenizer, qwen_policy.image_processor, max_slice_nums=4)


def test_a_photo_too_thin_is_named(qwen_policy):
    assert photo_tokens(qwen_policy, (400, 2)) > 0
    with pytest.raises(PhotoError, match="photo 2 is 2 x 402 pixels"):
        qwen_policy.encode_prompt("box", [noise_photo(1), Image.new("RGB", (2, 402))])


def test_parts_are_named_as_a_person_thinks_of_them(qwen_policy):
    parts = set(parameter_parts(qwen_policy))
    assert {"vision: patch_embed", "vision: blocks", "vision: merger", "language: language_model.embed_tokens",
            "language: language_model.self_attn", "language: language_model.mlp"} < parts
    deepstack = "vision: deepstack_merger_list" in parts
    assert deepstack == (qwen_policy.model.config.model_type == "qwen3_vl")


def test_parts_of_another_model_are_refused(qwen_policy, tokenizer, tmp_path):
    def save(**changed):
        for part in ({"model": qwen_policy.model, "tokenizer": qwen_policy.tokenizer,
                      "image_processor": qwen_policy.image_processor} | changed).values():
            part.save_pretrained(tmp_path)
        return str(tmp_path)

    with pytest.raises(ModelError, match="vision_start_token_id"):
        load_minicpm(save(tokenizer=tokenizer))
    other = type(qwen_policy.image_processor)(patch_size=14)
    with pytest.raises(ModelError, match=r"\(8, 2, 2\).*\(14, 2, 2\)"):
        load_minicpm(save(image_processor=other))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_minicpm(str(tmp_path))


def test_the_processors_chat_template_comes_before_the_tokenizers(qwen_policy, tmp_path):
    for part in (qwen_policy.model, qwen_policy.tokenizer, qwen_policy.image_processor):
        part.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages[0].role }}: <|image_pad|>"}')
    loaded = Policy(*load_minicpm(str(tmp_path)))
    prompt = loaded.encode_prompt("box", [noise_photo(1, SQUARE)])
    assert loaded.tokenizer.decode(prompt.input_ids) == "user: " + "<|image_pad|>" * 4


@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_two_steps_of_training(kind, train_vision, shop, tokenizer, image_processor, tmp_path):
    before = Policy(*parts_of(kind, tokenizer, image_processor))
    before.family.save(before.model, before.tokenizer, before.image_processor, str(tmp_path), tmp_path / "model")
    options = train_options(shop, tmp_path, model_path=str(tmp_path / "model"), max_steps=2, eval_every=0,
                            max_pixels=32 * 32, train_vision=train_vision)
    after, _, _ = load_minicpm(str(train(options)))
    moved = {part.split(":")[0]: False for part in parameter_parts(before)}
    old = dict(before.model.named_parameters())
    for name, new in after.named_parameters():
        part = "vision" if ".visual." in name else "language"
        moved[part] |= not torch.equal(old[name], new)
    assert moved == {"vision": train_vision, "language": True}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_ids_and_photos_are_those_of_the_full_processor(kind, tokenizer, image_processor, tmp_path):
    pytest.importorskip("torchvision", reason="the full processors need torchvision")
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    full, video = {"qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
                   "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor)}[kind]
    model, tokenizer, image_processor = parts_of(kind, tokenizer, image_processor)
    processor = full(image_processor, tokenizer, video(), chat_template=tokenizer.chat_template)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    policy = Policy(*load_minicpm(str(tmp_path)))  # one processor_config.json for image and video processor
    for sizes in ([(64, 64)], [(300, 200), (20, 200), (33, 47)], []):
        photos = [noise_photo(index, size) for index, size in enumerate(sizes)]
        content = [{"type": "image", "image": photo} for photo in photos] + [{"type": "text", "text": "mug, 10 cm"}]
        wanted = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True,
                                               add_generation_prompt=True, return_tensors="pt")
        prompt = policy.encode_prompt("mug, 10 cm", photos)
        assert torch.equal(prompt.input_ids, wanted["input_ids"][0])
        assert torch.equal(policy.family.photo_positions(policy.model, prompt), wanted["mm_token_type_ids"][0] == 1)
        for name in prompt.photos:
            assert torch.equal(prompt.photos[name], wanted[name])
        assert bool(prompt.photos) == bool(sizes)
