"""MiniCPM-V-4.6 and 4.7: tokens of a photo worked by hand, ids and pixels against the full processor.

That sampling and scoring equal the models' own forward is tested with the other families in test_policy.py.
"""

import pytest
import torch
from PIL import Image

from models.loading import load_minicpm
from models.policy import Policy
from tiny import noise_photo, parts_of

KINDS = ["hybrid", "v47"]


@pytest.mark.parametrize(("sizes", "max_slice_nums", "slices", "photo_tokens", "others"), [
    # One slice holds 448 x 448 pixels: 32 x 32 patches of 14, of which 16 become a token: 64 tokens.
    # 800 x 800 is 3.2 times as much: four slices in two rows of two, and the overview.
    # Around them: <image_id> 0 </image_id>, <image> </image>, two markers a slice, a line break between rows.
    ([(800, 800)], None, 5, 320, 3 + 2 + 4 * 2 + 1),
    ([(800, 800)], 1, 1, 64, 3 + 2),
    # Two slices of 800 x 400, one above the other, go in as 616 x 336: 44 x 24 patches, 66 tokens.
    ([(800, 800)], 2, 3, 64 + 2 * 66, 3 + 2 + 2 * 2 + 1),
    ([(800, 800)] * 5, None, 25, 1600, 5 * 14),
    ([(800, 800)] * 5, 1, 5, 320, 5 * 5),
    ([(1400, 1400)], None, 10, 640, 3 + 2 + 9 * 2 + 2),  # three rows of three
])
def test_photos_take_the_tokens_worked_by_hand(tokenizer, sizes, max_slice_nums, slices, photo_tokens, others):
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    policy = Policy(*parts_of("hybrid", tokenizer, MiniCPMV4_6ImageProcessorPil()), max_slice_nums=max_slice_nums)
    prompt = policy.encode_prompt("box", [Image.new("RGB", size) for size in sizes])
    without = policy.encode_prompt("box", [])
    assert len(prompt.photos["target_sizes"]) == slices
    assert int(policy.family.photo_positions(policy.model, prompt).sum()) == photo_tokens
    assert len(prompt.input_ids) - len(without.input_ids) == photo_tokens + others


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_photos_are_those_of_the_full_processor(kind, backend, tokenizer, image_processor, tmp_path):
    pytest.importorskip("torchvision", reason="the full processor needs torchvision")
    from transformers import AutoImageProcessor, MiniCPMV4_6Processor, MiniCPMV4_6VideoProcessor, MiniCPMV4_7Processor

    for part in parts_of(kind, tokenizer, image_processor):
        part.save_pretrained(tmp_path)
    policy = Policy(*load_minicpm(str(tmp_path)))
    full = MiniCPMV4_7Processor if kind == "v47" else MiniCPMV4_6Processor
    processor = full(AutoImageProcessor.from_pretrained(tmp_path, backend=backend), MiniCPMV4_6VideoProcessor(),
                     tokenizer, chat_template=tokenizer.chat_template)
    sizes = [(300, 200), (20, 200), (33, 47), (64, 64), (200, 90)]
    for count in range(6):
        photos = [noise_photo(index, size) for index, size in enumerate(sizes[:count])]
        content = [{"type": "image", "image": photo} for photo in photos] + [{"type": "text", "text": "mug, 10 cm"}]
        wanted = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True,
                                               add_generation_prompt=True, return_tensors="pt")
        prompt = policy.encode_prompt("mug, 10 cm", photos)
        assert torch.equal(prompt.input_ids, wanted["input_ids"][0])
        assert bool(prompt.photos) == bool(count)
        if count:
            assert torch.equal(prompt.photos["target_sizes"].long(), wanted["target_sizes"].long())
            gap = (prompt.photos["pixel_values"] - wanted["pixel_values"]).abs()
            # The torchvision backend resizes by other arithmetic: a fifth of a grey level (2 / 255) on average at most.
            assert gap.max() == 0 if backend == "pil" else gap.mean() < 0.2 * 2 / 255
