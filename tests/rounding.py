"""Comparing what two different computations sample: in float64, where rounding decides nothing.

Two ways of computing one thing, the fast path and the slow one, agree to about 1e-6 in float32, and no two processors
round alike. Where a drawn number lies within that distance of the boundary between two tokens, they draw different
ones. In float64 they agree to about 1e-14, so such a number is one in ten million million.
"""

from contextlib import contextmanager
from functools import wraps

import peft  # noqa: F401  # whatever looks torch.float32 up when it is imported, must find it as it is
import pytest
import safetensors.torch
import torch
from transformers import PreTrainedModel
from transformers.models.idefics3 import modeling_idefics3  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.minicpmv4_7 import modeling_minicpmv4_7  # noqa: F401
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401
from transformers.models.qwen3_5 import modeling_qwen3_5  # noqa: F401
from transformers.models.qwen3_vl import modeling_qwen3_vl  # noqa: F401
from transformers.models.smolvlm import modeling_smolvlm  # noqa: F401

import train_vlm_parallel  # noqa: F401
from models import loading, weights

FLOAT32 = torch.float32


def aside(function):
    """Let a function find torch.float32 as it is: those that read and write files know the sizes of numbers by it."""
    @wraps(function)
    def wrapped(*args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "float32", FLOAT32)
            return function(*args, **options)
    return wrapped


@contextmanager
def float64(*policies):
    """Compute in float64 what else is computed in float32; the policies' weights are turned into float64, for good.

    Models that are loaded or made inside are float64 as well, and whole runs can be trained.
    """
    with pytest.MonkeyPatch.context() as patch:
        # By torch.float32 and float() transformers' delta rule, norms and rotations, and our own code, ask for it.
        patch.setitem(loading.DTYPES, "float32", torch.float64)
        patch.setattr(loading.load_minicpm, "__defaults__", (torch.float64, *loading.load_minicpm.__defaults__[1:]))
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(aside(PreTrainedModel.from_pretrained.__func__)))
        patch.setattr(PreTrainedModel, "save_pretrained", aside(PreTrainedModel.save_pretrained))
        patch.setattr(weights, "read_tensor", aside(weights.read_tensor))
        for name in ("load_file", "save_file"):
            patch.setattr(safetensors.torch, name, aside(getattr(safetensors.torch, name)))
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            for policy in policies:
                policy.model.double()
            yield
        finally:
            torch.set_default_dtype(torch.float)
