"""Stand-in resampler: learned queries look at the patches; the position table is not among the weights."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import *  # noqa: F403


def patch_counts(tgt_sizes) -> List[int]:  # noqa: F405, UP006
    """The List comes, as in older code, with the star import."""
    return tgt_sizes.prod(-1).tolist()


def sines_and_cosines(positions, size):
    """(..) positions to (.., size)."""
    angles = positions[..., None] / 100 ** (np.arange(size // 2) * 2 / size)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


class Resampler(nn.Module):
    """query_num tokens a slice, whatever its size."""

    def __init__(self, query_num, size, vision_size, max_size=(70, 70)):
        super().__init__()
        self.size = size
        self.max_size = max_size
        self.query = nn.Parameter(torch.randn(query_num, size))
        self.kv_proj = nn.Linear(vision_size, size, bias=False)
        self.attn = nn.MultiheadAttention(size, 2, batch_first=True)
        self._set_2d_pos_cache(max_size)

    def _set_2d_pos_cache(self, max_size, device="cpu"):
        high, wide = np.mgrid[:max_size[0], :max_size[1]]
        table = np.concatenate([sines_and_cosines(side, self.size // 2) for side in (high, wide)], axis=-1)
        self.register_buffer("pos_embed", torch.from_numpy(table).float().to(device), persistent=False)

    def forward(self, patches, tgt_sizes):
        counts = torch.tensor(patch_counts(tgt_sizes), device=patches.device)
        positions = nn.utils.rnn.pad_sequence(
            [self.pos_embed[:high, :wide].flatten(0, 1) for high, wide in tgt_sizes.tolist()], batch_first=True)
        padding = torch.arange(patches.shape[1], device=patches.device) >= counts[:, None]
        values = self.kv_proj(patches)
        queries = self.query.expand(len(patches), -1, -1)
        return self.attn(queries, values + positions.to(values.dtype), values, key_padding_mask=padding)[0]
