"""Run the code that comes with a MiniCPM model on transformers 5, for which it was not written.

Every mend is made in memory, at load, and only where something is missing; no file of the model's folder is touched.
Written against the code of MiniCPM-o-2_6, o-4_5, V-2_6 and V-4_5 on transformers 5.23.0.
"""

import functools
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from models.family import AtBirth, ModelError
from models.weights import load_checked

_UNUSED_PACKAGES = ("torchaudio", "torchvision", "soundfile", "librosa")  # for audio, TTS and video only
OFF = (r"^apm\.", r"^audio_projection_layer\.", r"^tts\.")  # weights of the parts that stay off
_TABLES = {"pos_embed": ("_set_2d_pos_cache", "max_size"),
           "temporal_pos_embed": ("_set_temporal_pos_cache", "max_temporal_size")}
_NOTHING = object()


def local_folder(model_path: str) -> Path:
    """Find the model's folder; a hub name is downloaded whole first, so that code and weights are of one revision."""
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_path, ignore_patterns=["assets/*", "*.gguf", "*.onnx"]))


def load_remote(folder: Path, dtype: torch.dtype, quantization: Any = None, at_birth: AtBirth | None = None
                ) -> tuple[nn.Module, Any]:
    """Run the folder's code and load (model, processor), audio and TTS off.

    Raises ModelError when the code needs a package that is not installed or is not built as MiniCPM-o and -V are.
    """
    from transformers import AutoConfig, AutoProcessor, PretrainedConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    code = PretrainedConfig.get_config_dict(folder)[0].get("auto_map", {})
    if not {"AutoConfig", "AutoModel"} <= set(code):
        raise ModelError(f"{folder}: config.json names no code of the model's own (auto_map); copy the makers' folder "
                         "whole, its Python files included")
    with mended_imports():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            config.init_vision, config.init_audio, config.init_tts = True, False, False
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            model_class = get_class_from_dynamic_module(code["AutoModel"], folder)
            call_post_init(model_class)
            model_class._keys_to_ignore_on_load_unexpected = list(OFF)
            model = load_checked(model_class, folder, at_birth, config=config, dtype=dtype,
                                 quantization_config=quantization)
        except ImportError as problem:
            raise ModelError(f"{folder}: the code of this model can't be imported: {problem}") from problem
    missing = [name for name in ("llm", "vpm", "resampler", "get_vllm_embedding") if not hasattr(model, name)]
    if missing:
        raise ModelError(f"{folder}: {type(model).__name__} has no {', '.join(missing)}; this program knows "
                         "MiniCPM-o-2_6, o-4_5, V-2_6, V-4 and V-4_5")
    drop_generation_patch(model)
    rebuild_position_tables(model)
    return model, processor


@contextmanager
def mended_imports() -> Iterator[None]:
    """Put in place what the code imports and transformers or this machine lacks; take it away again afterwards."""
    from transformers import dynamic_module_utils
    from transformers.models.whisper import modeling_whisper
    from transformers.utils import import_utils

    for name in _UNUSED_PACKAGES:  # asked before the stubs are there, for the answers are kept for good
        getattr(import_utils, f"is_{name}_available")()
    transformers = sys.modules["transformers"]  # importing an Auto class may have put another module object there
    with ExitStack() as mends:
        # Packages for audio and video: an empty module satisfies the import at the top of a file.
        for name in _UNUSED_PACKAGES:
            if name not in sys.modules and importlib.machinery.PathFinder.find_spec(name) is None:
                mends.enter_context(_replaced(sys.modules, name, _stub(name)))
        # The check ahead of the import demands every package that any function of the file might want some day.
        mends.enter_context(_replaced(vars(dynamic_module_utils), "check_imports",
                                      dynamic_module_utils.get_relative_imports))
        # LogitsWarper went in transformers 4.49: TTS classes inherit from it.
        if not hasattr(transformers, "LogitsWarper"):
            mends.enter_context(_replaced(vars(transformers), "LogitsWarper", transformers.LogitsProcessor))
        # WHISPER_ATTENTION_CLASSES went in transformers 5: the audio encoder would look its attention up there.
        if not hasattr(modeling_whisper, "WHISPER_ATTENTION_CLASSES"):
            mends.enter_context(_replaced(vars(modeling_whisper), "WHISPER_ATTENTION_CLASSES", {}))
        # Newer torch writes list for List: an older resampler.py takes List from `torch.nn.functional import *`.
        if not hasattr(nn.functional, "List"):
            mends.enter_context(_replaced(vars(nn.functional), "List", list))
        yield


@contextmanager
def _replaced(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = names.get(name, _NOTHING)
    names[name] = value
    try:
        yield
    finally:
        if before is _NOTHING:
            names.pop(name, None)
        else:
            names[name] = before


def _stub(name: str) -> ModuleType:
    module = ModuleType(name, "Stands in for a package that is not installed and not needed for photos.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    return module


def call_post_init(model_class: type[nn.Module]) -> None:
    """Mend a class that never calls post_init(), on whose all_tied_weights_keys transformers 5 relies."""
    init = model_class.__init__
    if hasattr(init, "__wrapped__"):  # mended by an earlier load in this process
        return

    @functools.wraps(init)
    def init_and_post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not hasattr(self, "all_tied_weights_keys"):
            self.post_init()

    model_class.__init__ = init_and_post_init


def drop_generation_patch(model: nn.Module) -> None:
    """Take back the instance's own prepare_inputs_for_generation: it reads DynamicCache.seen_tokens, which is gone."""
    vars(model.llm).pop("prepare_inputs_for_generation", None)


def rebuild_position_tables(model: nn.Module) -> None:
    """Rebuild the resampler's position tables and check them.

    They are not among the weights, and transformers 5 leaves unset memory in such buffers without a word. Raises
    ModelError when a table is not one of sines and cosines, or when another such buffer is found.
    """
    resampler = model.resampler
    for name, (rebuild, size) in _TABLES.items():
        if hasattr(resampler, name):
            getattr(resampler, rebuild)(getattr(resampler, size), device=resampler.query.device)
            table = getattr(resampler, name)  # (.., d): d / 2 pairs of a sine and a cosine
            off = (table.float().square().sum(-1) - table.shape[-1] / 2).abs().max()
            if not off < 1e-2:
                raise ModelError(f"{type(model).__name__}: resampler.{name} can't be rebuilt: {rebuild} gave a table "
                                 "that is not made of sines and cosines")
    unknown = [f"{path}.{name}" for path, module in model.named_modules() if not path.startswith("llm")
               for name in module._non_persistent_buffers_set if module is not resampler or name not in _TABLES]
    if unknown:
        raise ModelError(f"{type(model).__name__}: {', '.join(unknown)} is not among the weights, and how to rebuild "
                         "it is not known")
