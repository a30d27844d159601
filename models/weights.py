"""Weight files: what is in them before any of it is read, and in one line why one can't be read."""

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.family import AtBirth, ModelError

_POINTER = b"version https://git-lfs.github.com"
_COMPANIONS = {"image processor": ("preprocessor_config.json", "processor_config.json"),
               "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json")}
# What torch.load raises for a file that is none of its own, or damaged, beside OSError.
_NO_STATE_DICT = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError,
                  AttributeError, AssertionError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile)


def stored_tensors(source: Path) -> Iterator[tuple[str, Any]]:
    """Each tensor of a checkpoint folder (safetensors) or a plain model_stepN.pt, its name first; nothing is read yet.

    What comes second is read by read_tensor. Names lose the "module." that
    DataParallel puts before them. Raises ModelError naming the file that can't be read.
    """
    if source.is_file():
        state = _read_state_dict(source)
        wrapped = all(name.startswith("module.") for name in state)
        yield from ((name.removeprefix("module.") if wrapped else name, tensor) for name, tensor in state.items())
        return
    if not source.is_dir():
        raise ModelError(f"{source}: no such checkpoint folder or .pt file")
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{source}: no .safetensors file in this folder")
    for file in files:
        with open_safetensors(file) as stored:
            yield from ((name, stored.get_slice(name)) for name in stored.keys())


def shape_of(stored: Any) -> tuple[int, ...]:
    """The shape of what stored_tensors gives."""
    return tuple(stored.shape if isinstance(stored, Tensor) else stored.get_shape())


def read_tensor(stored: Any, rows: Any = ...) -> Tensor:
    """Read what stored_tensors gives, or some rows of it."""
    return stored[rows]


def fill(tensor: Tensor, stored: Any) -> None:
    """Read a stored tensor into one of its shape; of one that is split over processes, this process's rows alone."""
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(read_tensor(stored, own_rows(tensor)))
    else:
        tensor.copy_(read_tensor(stored))


def own_rows(tensor: DTensor) -> slice:
    """The rows that this process holds of a tensor that FSDP2 has split."""
    each = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(each * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return slice(start, start + len(tensor.to_local()))


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """Open one .safetensors file; raises ModelError naming it when it is none, or not whole."""
    try:
        opened = safe_open(file, framework="pt")
    except FileNotFoundError as problem:
        raise ModelError(f"{file}: no such file") from problem
    except SafetensorError as problem:
        said = _pointer(file) or f"it is damaged, or no safetensors file: {problem}"
        raise ModelError(f"{file}: {said}") from problem
    with opened as stored:
        yield stored


def check_files(folder: Path) -> None:
    """Refuse a model folder that lacks tokenizer or image processor, or with a file that is not whole: ModelError."""
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for part, names in _COMPANIONS.items():
        if not there & set(names):
            raise ModelError(f"{folder}: no {part} in this folder, none of {', '.join(names)}: copy the makers' folder "
                             "whole")
    for file in (folder / name for name in sorted(there)):
        if said := _pointer(file):
            raise ModelError(f"{file}: {said}")
        if file.suffix == ".json":
            try:
                json.loads(file.read_bytes())
            except ValueError as problem:
                raise ModelError(f"{file}: it is damaged, or no JSON: {problem}") from problem
        elif file.suffix == ".safetensors":
            with open_safetensors(file):
                pass


def add_weights(folder: Path, tensors: dict[str, Tensor], name: str) -> None:
    """Put more tensors into a model folder, in a file of this name; the index that transformers then wants is made."""
    save_file(tensors, folder / name, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        (folder / "model.safetensors").rename(folder / "model-trained.safetensors")
    places, size = {}, 0
    for file in sorted(folder.glob("*.safetensors")):
        with open_safetensors(file) as stored:
            places |= dict.fromkeys(stored.keys(), file.name)
            size += file.stat().st_size
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2), encoding="utf-8")


def load_checked(model_class: type[nn.Module], path: str | Path, at_birth: AtBirth | None, **options: Any) -> nn.Module:
    """Load a model by its class's from_pretrained, refusing weights that don't fit its config to the last tensor.

    transformers draws what is missing at random and says so in a table only. Raises ModelError naming the tensors.
    at_birth: see AtBirth.
    """
    with _at_birth(model_class, at_birth):
        model, report = model_class.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True,
                                                    **options)
    odd = {"missing": report["missing_keys"], "too many": report["unexpected_keys"],
           "of another shape": {name for name, *_ in report["mismatched_keys"]}}
    if any(odd.values()):
        raise ModelError(f"{path}: the weights are not those of the model in config.json: {say_odd(odd)}. Fetch the "
                         "folder anew, whole")
    return model


def native_class(model_path: str) -> type[nn.Module]:
    """The class that transformers has for a folder or hub name."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(AutoConfig.from_pretrained(model_path))]


@contextmanager
def _at_birth(model_class: type[nn.Module], work: AtBirth | None) -> Iterator[None]:
    """Do work on each model of the class that is made inside the block, tied weights already one."""
    init = model_class.__init__

    def init_and_work(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        for target, source in self.all_tied_weights_keys.items():
            owner, _, name = target.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_parameter(source))
        with torch.device("cpu"):  # what is made from now on is not to be on meta
            work(self)

    if work is not None:
        model_class.__init__ = init_and_work
    try:
        yield
    finally:
        model_class.__init__ = init


def say_odd(odd: Mapping[str, Collection[str]]) -> str:
    """Name the first tensors of each kind that don't fit, and count the others."""
    return "; ".join(f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")
                     for kind, names in ((kind, sorted(names)) for kind, names in odd.items()) if names)


def _pointer(file: Path) -> str | None:
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            return "a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    return None


def _read_state_dict(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except _NO_STATE_DICT as problem:
        raise ModelError(f"{file}: {_pointer(file) or _why_no_state_dict(file, problem)}") from problem
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and isinstance(value, Tensor)
                                                           for name, value in state.items()):
        held = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise ModelError(f"{file}: no state dict, which is tensors by name; in it: {held or 'nothing'}")
    return state


def _why_no_state_dict(file: Path, problem: Exception) -> str:
    """Say it in our own words: torch's recommend to run whatever stands in the file."""
    if file.stat().st_size == 0:
        return "it is empty, 0 bytes"
    if asked := re.search(r"GLOBAL ([\w.]+)", str(problem)):
        return (f"it asks for {asked[1]}, and reading it would run that: not read. Weights are saved by "
                "torch.save(model.state_dict(), ...)")
    return "it is damaged, or no state dict that torch saved"
