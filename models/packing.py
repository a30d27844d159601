"""Products of few rows on a CPU: of one new token an answer.

They are as fast as the weight is read. Laid out in blocks by oneDNN, a large one is read up to twice as fast as row by
row, for the price of about a dozen such products.
"""

import torch
from torch import Tensor

_FROM = 2 ** 18  # numbers of a weight: smaller ones gain nothing


def pack(weight: Tensor) -> Tensor | None:
    """Copy a weight (out, in) into blocks, for product() alone; None where that can't be done or gains nothing."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _FROM
    if not (fits and torch.backends.mkldnn.is_available()):
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def product(inputs: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply (.., in) by a packed weight: (.., out), without gradient."""
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
