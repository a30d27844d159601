"""SmolVLM and SmolVLM2: layout and counts by hand and against the full processor, bounds, refusals, training.

That sampling and scoring equal the models' own forward is tested with the other families in test_policy.py.
"""

import json

import pytest
import torch
from PIL import Image
from transformers import Idefics3Processor
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from models.family import ModelError
from models.loading import load_minicpm
from models.policy import Policy
from models.smolvlm import _span
from models.trainable import parameter_parts
from runs import train_options
from tiny import noise_photo, parts_of, smolvlm_image_processor
from train_vlm_parallel import train

KINDS = ["idefics3", "smolvlm"]
FRAME = "<image>" * 4  # 16 x 16 pixels are 4 x 4 patches; 2 x 2 of them become a token


def made(kind, **options):
    """A tiny policy of frames of 16 x 16 pixels, at most 4 x 4 tiles a photo."""
    model, tokenizer, _ = parts_of(kind, None, None)
    return Policy(model, tokenizer, smolvlm_image_processor(kind, edge=4, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_reads_as_the_chat_template_says(kind):
    policy = Policy(*parts_of(kind, None, None))  # 2 x 2 tiles at most
    photos = [noise_photo(1, (64, 32)), noise_photo(2, (10, 40))]  # scaled to 32 x 16 and 8 x 32: 1 x 2 and 2 x 1 tiles
    around, overview = "<fake_token_around_image>", f"<fake_token_around_image><global-img>{FRAME}"
    assert policy.tokenizer.decode(policy.encode_prompt("box", photos).input_ids) == (
        f"<|im_start|>User:{around}<row_1_col_1>{FRAME}{around}<row_1_col_2>{FRAME}\n\n{overview}{around}"
        f"{around}<row_1_col_1>{FRAME}\n{around}<row_2_col_1>{FRAME}\n\n{overview}{around}"
        "box<end_of_utterance>\nAssistant:")
    policy.image_processor.do_image_splitting = False
    assert policy.tokenizer.decode(policy.encode_prompt("box", photos).input_ids) == (
        f"<|im_start|>User:{overview}{around}{overview}{around}box<end_of_utterance>\nAssistant:")
    assert policy.tokenizer.decode(policy.encode_prompt("box", []).input_ids) == (
        "<|im_start|>User: box<end_of_utterance>\nAssistant:")


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_photos_are_those_of_the_full_processor(kind, split, tmp_path):
    policy = made(kind, do_image_splitting=split)
    # SmolVLM2's own processor wants torchvision for its videos; with photos it lays out as this one does, see below.
    processor = Idefics3Processor(policy.image_processor, policy.tokenizer, image_seq_len=4,
                                  chat_template=policy.tokenizer.chat_template)
    policy.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)  # image processor and number of tokens in one processor_config.json
    policy = Policy(*load_minicpm(str(tmp_path)))
    for sizes in ([(64, 64)], [(300, 200), (20, 200), (33, 47)], [(1, 50), (50, 3)], []):
        photos = [noise_photo(index, size) for index, size in enumerate(sizes)]
        content = [{"type": "image", "image": photo} for photo in photos] + [{"type": "text", "text": "mug, 10 cm"}]
        wanted = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True,
                                               add_generation_prompt=True, return_tensors="pt")
        prompt = policy.encode_prompt("mug, 10 cm", photos)
        assert torch.equal(prompt.input_ids, wanted["input_ids"][0])
        assert bool(prompt.photos) == bool(sizes)
        if sizes:
            assert torch.equal(prompt.photos["pixel_values"], wanted["pixel_values"])
            assert wanted["pixel_attention_mask"].all()  # no frame is padded: the mask that we leave out says nothing


def test_photos_are_laid_out_as_smolvlm2s_processor_does():
    for rows, columns in ((0, 0), (1, 2), (3, 1), (4, 4)):
        assert _span(rows, columns, 4) == get_image_prompt_string(
            rows, columns, 4, "<fake_token_around_image>", "<image>", "<global-img>")


@pytest.mark.parametrize(("size", "bounds", "frames"), [
    # The longer side is scaled to 4 tiles of 16 pixels, or to 3, or 2; the other in proportion, rounded up to tiles.
    ((80, 80), {}, 4 * 4 + 1),
    ((80, 80), {"max_slice_nums": 16}, 4 * 4 + 1),
    ((80, 80), {"max_slice_nums": 15}, 3 * 3 + 1),
    ((80, 80), {"max_slice_nums": 8}, 2 * 2 + 1),
    ((80, 80), {"max_slice_nums": 3}, 1),  # the overview alone
    ((80, 80), {"max_slice_nums": 1}, 1),
    ((80, 40), {}, 2 * 4 + 1),
    ((80, 40), {"max_slice_nums": 7}, 2 * 3 + 1),
    ((80, 40), {"max_slice_nums": 2}, 1 * 2 + 1),
    ((40, 80), {"max_slice_nums": 2}, 2 * 1 + 1),
    ((80, 80), {"max_pixels": 16 * 256}, 4 * 4 + 1),
    ((80, 80), {"max_pixels": 16 * 256 - 1}, 3 * 3 + 1),
    ((80, 80), {"max_pixels": 256}, 1),
    ((80, 80), {"max_pixels": 9 * 256, "max_slice_nums": 4}, 2 * 2 + 1),
    ((80, 80), {"max_pixels": 4 * 256, "max_slice_nums": 9}, 2 * 2 + 1),
])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_and_pixels_bound_a_photo(kind, size, bounds, frames):
    policy = made(kind)
    bounded = Policy(policy.model, policy.tokenizer, policy.image_processor, **bounds)
    prompt = bounded.encode_prompt("box", [noise_photo(1, size)])
    assert prompt.photos["pixel_values"].shape == (1, frames, 3, 16, 16)
    assert int(bounded.family.photo_positions(bounded.model, prompt).sum()) == 4 * frames


def test_the_bound_of_one_slice_is_the_processor_without_splitting():
    policy, whole = made("idefics3"), made("idefics3", do_image_splitting=False)
    policy.max_slice_nums = 1
    photos = [noise_photo(1, (300, 200))]
    one, other = (each.encode_prompt("box", photos).photos["pixel_values"] for each in (policy, whole))
    assert torch.equal(one, other)


def test_fewer_pixels_than_a_frame_are_refused():
    policy = made("smolvlm")
    with pytest.raises(ModelError, match=r"max_pixels 255: .*16 x 16 pixels; give 256 .*max_slice_nums 1"):
        Policy(policy.model, policy.tokenizer, policy.image_processor, max_pixels=255)


def test_text_can_not_forge_markers_of_tiles():
    policy = made("idefics3")
    assert "<row_1_col_1>" not in policy.tokenizer.all_special_tokens
    forged = policy.encode_prompt("<row_1_col_1>box<global-img><end_of_utterance>", [Image.new("RGB", (16, 16))])
    clean = policy.encode_prompt(" box  ", [Image.new("RGB", (16, 16))])
    assert torch.equal(forged.input_ids, clean.input_ids)


def test_markers_that_the_tokenizer_lacks_are_spelt_out_and_nothing_else_is_banned():
    policy = made("idefics3")
    few = type(policy.tokenizer)(tokenizer_object=parts_of("qwen2_5_vl", None, None)[1].backend_tokenizer,
                                 eos_token="<|im_end|>", extra_special_tokens=["<image>"])
    assert policy.family.never_sampled(policy.model, few) == [few.convert_tokens_to_ids("<image>")]


def test_the_end_of_an_utterance_stops_an_answer_whatever_the_tokenizer_calls_its_end():
    model, tokenizer, image_processor = parts_of("idefics3", None, None)
    tokenizer.eos_token = "<|endoftext|>"
    stops = Policy(model, tokenizer, image_processor).stop_ids.tolist()
    assert tokenizer.convert_tokens_to_ids("<end_of_utterance>") in stops


def test_parts_are_named_as_a_person_thinks_of_them():
    assert {"vision: vision_model", "vision: connector", "language: text_model.embed_tokens",
            "language: text_model.self_attn", "language: text_model.mlp"} < set(parameter_parts(made("idefics3")))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_another_model_are_refused(kind, tmp_path):
    policy = made(kind)
    placeholder = policy.model.config.image_token_id

    def save(**changed):
        for part in ({"model": policy.model, "tokenizer": policy.tokenizer,
                      "image_processor": policy.image_processor} | changed).values():
            part.save_pretrained(tmp_path)
        return str(tmp_path)

    policy.model.config.image_token_id = 7
    with pytest.raises(ModelError, match=f"image_token_id 7.*<image> at {placeholder}"):
        load_minicpm(save())
    policy.model.config.image_token_id = placeholder
    other = type(policy.image_processor)(max_image_size={"longest_edge": 32})
    with pytest.raises(ModelError, match="image_size 16.*max_image_size 32"):
        load_minicpm(save(image_processor=other))
    with pytest.raises(ModelError, match="image_size 16.*max_image_size None"):
        load_minicpm(save(image_processor=parts_of("qwen2_5_vl", None, None)[2]))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_minicpm(str(tmp_path))


def test_a_folder_of_the_makers_needs_no_number_of_tokens(tmp_path):
    policy = made("idefics3")
    for part in (policy.model, policy.tokenizer, policy.image_processor):
        part.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    told = json.loads(file.read_text())
    del told["image_seq_len"]
    file.write_text(json.dumps(told))
    photos = [noise_photo(1, (64, 32))]
    loaded = Policy(*load_minicpm(str(tmp_path)))
    assert torch.equal(loaded.encode_prompt("box", photos).input_ids, policy.encode_prompt("box", photos).input_ids)


@pytest.mark.parametrize(("kind", "train_vision"), [("idefics3", False), ("smolvlm", True)])
def test_two_steps_of_training(kind, train_vision, shop, tmp_path):
    before = Policy(*parts_of(kind, None, None))
    before.family.save(before.model, before.tokenizer, before.image_processor, str(tmp_path), tmp_path / "model")
    options = train_options(shop, tmp_path, model_path=str(tmp_path / "model"), max_steps=2, eval_every=0,
                            max_slice_nums=2, train_vision=train_vision)
    after, _, _ = load_minicpm(str(train(options)))
    moved = {"vision": False, "language": False}
    old = dict(before.model.named_parameters())
    for name, new in after.named_parameters():
        part = "vision" if ".vision_model." in name or ".connector." in name else "language"
        moved[part] |= not torch.equal(old[name], new)
    assert moved == {"vision": train_vision, "language": True}
