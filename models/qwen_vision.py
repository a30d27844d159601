"""The vision tower of Qwen-VL with few launches and no question to the device.

transformers calls attention once for each window of each photo, 320 times a layer for five photos of 800 x 800 pixels,
and asks the device for their sizes each time. Here what follows from the photos' sizes is worked out on the host, once
a pass; a photo's windows come in order of size, and neighbours of one size go into one call.
"""

from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from models.rotation import turned


def make_lean(visual: nn.Module) -> None:
    """Let a vision tower embed its patches by one product, and its attention take windows of one size together."""
    visual.patch_embed.forward = partial(_embed_patches, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = partial(attend, block.attn)


def arguments(visual: nn.Module, grids: Tensor, device: torch.device) -> dict[str, Any]:
    """What a vision tower works out from its photos' grids (photos, 3), on the host: for its forward on the device."""
    from transformers import vision_utils as utils

    merge = visual.spatial_merge_size
    found: dict[str, Any] = {"position_ids": utils.get_vision_position_ids(grids, merge).to(device, non_blocking=True)}
    if hasattr(visual, "window_size"):
        windows, found["cu_window_seqlens"] = by_size(*utils.get_vision_window_index(
            grids, merge, visual.window_size, visual.patch_size), grids, merge ** 2)
        found["window_index"] = windows.to(device, non_blocking=True)
    else:
        places = utils.get_vision_interpolation_indices_and_weights(
            grids, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners, merge)
        found |= {name: each.to(device, non_blocking=True) for name, each in
                  zip(("interp_indices", "interp_weights"), places, strict=True)}
    return found | {"cu_seqlens": utils.get_vision_cu_seqlens(grids)}  # read by attend() alone


def by_size(window_index: Tensor, bounds: Tensor, grids: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Sort each photo's windows by size.

    window_index: (tokens,) which token comes where. bounds: (windows + 1,) in patches, unit to a token. Any order of
    windows within a photo gives the same features.
    """
    windows = window_index.split((bounds.diff() // unit).tolist())
    photos = torch.searchsorted(grids.prod(-1).cumsum(0), bounds[:-1], right=True).tolist()  # which each belongs to
    ordered = [windows[place] for place in sorted(range(len(windows)), key=lambda at: (photos[at], len(windows[at])))]
    sizes = torch.tensor([0, *(unit * len(window) for window in ordered)], dtype=bounds.dtype)
    return torch.cat(ordered), sizes.cumsum(0, dtype=bounds.dtype)


def attend(module: nn.Module, hidden_states: Tensor, cu_seqlens: Tensor,
           position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:
    """Stand in for the forward of a vision layer's attention: hidden_states (patches, d), which see others of their
    window or photo alone, whose bounds are cu_seqlens (n + 1,)."""
    cos, sin = (each[:, None, None] for each in position_embeddings)  # (patches, 1, 1, width)
    heads = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1))  # (patches, 3, heads, width)
    asked, values = heads.split([2, 1], 1)  # as split() is, so that its gradient is joined, not summed up
    asked = turned(asked, cos, sin).to(heads.dtype)  # (patches, 2, heads, width)
    runs = [(len(list(run)), length) for length, run in groupby(cu_seqlens.diff().tolist())]  # of so many windows
    patches = [count * length for count, length in runs]
    out = []
    for run, both, value in zip(runs, asked.split(patches), values.split(patches), strict=True):
        query, key = both.unflatten(0, run).transpose(1, 3).unbind(2)  # (windows, heads, length, width)
        value = value.unflatten(0, run).transpose(1, 3).squeeze(2)
        out.append(scaled_dot_product_attention(query, key, value, scale=module.scaling).transpose(1, 2).flatten(0, 1))
    return module.proj(torch.cat(out).flatten(1))


def one_frame(pixels: Tensor, channels: int, frames: int) -> Tensor:
    """Keep the first of the frames that patches (patches, channels * frames * p * p) of photos hold: all are alike."""
    return pixels.unflatten(1, (channels, frames, -1))[:, :, 0].flatten(1)


def _embed_patches(module: nn.Module, pixels: Tensor) -> Tensor:
    """Embed flat patches (patches, values of a patch), of one frame or of all, by one matrix product.

    The convolution that is there does the same, a patch at each place it stops; as a convolution it is far slower.
    """
    weight = module.proj.weight  # (d, channels, frames, high, wide)
    weight = weight.flatten(1) if pixels.shape[1] == weight[0].numel() else weight.sum(2).flatten(1)
    return linear(pixels.to(weight.dtype), weight, module.proj.bias)
