"""The vision of Qwen-VL with few launches: transformers' own features and gradients, windows of one size together."""

import copy

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from models import qwen_vision
from models.loading import load_minicpm
from models.qwen_vision import by_size
from models.rotation import turn, turned
from tiny import noise_photo, parts_of

# Pixels: of one size and two others; some are no multiple of a window of 2 x 2 tokens of 16 x 16 pixels.
SIZES = ((80, 48), (80, 48), (64, 64), (48, 112))


def test_rotation_and_its_gradient_are_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    query, key, up = (torch.randn(7, 3, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    angles = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    wanted, _ = apply_rotary_pos_emb_vision(query, key, cos, sin)  # which computes in float32
    query.requires_grad_()
    found = turned(query, cos[:, None], sin[:, None])
    assert (found - wanted).abs().max() < 1e-6
    # Two numbers, by hand: a quarter turn takes (1, 2) to (-2, 1).
    assert turn(torch.tensor([1.0, 2.0]), torch.zeros(2), torch.ones(1), torch.ones(1)).tolist() == [-2, 1]
    unlike = torch.randn(7, 1, 8, generator=generator, dtype=torch.float64)  # halves need not be alike
    assert torch.autograd.gradcheck(turned, (query, cos[:, None], unlike))
    halves = turned(query.bfloat16(), cos[:, None].float(), sin[:, None].float())
    halves.backward(up.float())
    assert halves.dtype == torch.float32 and query.grad is not None


def test_windows_of_a_photo_are_sorted_by_size():
    """Two photos of 3 x 3 and 2 x 1 tokens of 4 patches, windows of 2 x 2 tokens."""
    grids = torch.tensor([[1, 6, 6], [1, 4, 2]])
    window_index = torch.tensor([0, 1, 3, 4, 2, 5, 6, 7, 8, 9, 10])  # 2 x 2, 2 x 1, 1 x 2, 1 x 1; then 2 x 1
    bounds = torch.tensor([0, 16, 24, 32, 36, 44], dtype=torch.int32)
    index, sorted_bounds = by_size(window_index, bounds, grids, 4)
    assert index.tolist() == [8, 2, 5, 6, 7, 0, 1, 3, 4, 9, 10]
    assert sorted_bounds.tolist() == [0, 4, 12, 20, 36, 44] and sorted_bounds.dtype == torch.int32


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_features_and_gradients_are_those_of_transformers(kind, tokenizer, image_processor, tmp_path, monkeypatch):
    parts = parts_of(kind, tokenizer, image_processor)
    for part in parts:
        part.save_pretrained(tmp_path)
    stock, (model, *_) = parts[0], load_minicpm(str(tmp_path))
    qwen_vision.make_lean(model.model.visual)
    photos = parts[2]([noise_photo(seed, size) for seed, size in enumerate(SIZES)], return_tensors="pt")
    pixels, grids = photos["pixel_values"], photos["image_grid_thw"]
    calls = []
    attention = qwen_vision.scaled_dot_product_attention
    monkeypatch.setattr(qwen_vision, "scaled_dot_product_attention",
                        lambda *parts, **more: calls.append(parts[0].shape) or attention(*parts, **more))

    def features_of(each, **more):
        out = each.model.get_image_features(pixels, grids, **more)
        return torch.cat([torch.cat(layer) for layer in
                          (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))], -1)

    def worked(each, **more):
        each.zero_grad()
        features = features_of(each, **more)
        (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        return features.detach(), {name: weight.grad for name, weight in each.model.visual.named_parameters()}

    wanted, wanted_gradients = worked(stock)
    assert not calls
    visual = model.model.visual
    for more in (qwen_vision.arguments(visual, grids, pixels.device), {}):  # and as transformers works them out
        found, gradients = worked(model, **more)
        assert (found - wanted).abs().max() < 1e-5
        for name, gradient in wanted_gradients.items():
            assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    layers = len(visual.blocks)
    windowed = layers - len(visual.fullatt_block_indexes) if kind == "qwen2_5_vl" else 0
    worked_out = qwen_vision.arguments(visual, grids, pixels.device)
    calls.clear()
    with torch.no_grad():
        found = features_of(model, **worked_out)
    # Whole photos of one size stand side by side; windows have four sizes at most.
    assert len(calls) <= 3 * (layers - windowed) + 4 * len(SIZES) * windowed
    assert sum(shape[0] * shape[2] for shape in calls) == layers * len(pixels)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.model.visual.parameters():
            weight.zero_()
        assert torch.equal(features_of(model, **worked_out), found)
