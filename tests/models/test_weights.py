"""Folders and files of weights that are not what they should be: each is refused in one line that names what is odd."""

import json
import os
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.family import ModelError
from models.loading import load_minicpm, load_weights
from models.weights import shape_of, stored_tensors
from tiny import parts_of

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module", params=["hybrid", "qwen2_5_vl", "remote"])
def whole(request, tmp_path_factory, tokenizer, image_processor):
    """A model folder of each kind of family; read only."""
    if request.param == "remote":
        return request.getfixturevalue("standin")
    folder = tmp_path_factory.mktemp(request.param)
    for part in parts_of(request.param, tokenizer, image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(whole, tmp_path / "model")


def load(folder):
    return load_minicpm(str(folder), trust_remote_code=True)


def rewrite(folder, change):
    """Save the weights anew as change gives them back."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def type_of(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


PARTS = {"minicpmv4_6": ("layers.1.mlp", "embed_tokens", "merger.", "vision_tower."),
         "qwen2_5_vl": ("layers.1.mlp", "embed_tokens", "visual."),
         "minicpmo": ("layers.1.mlp", "embed_tokens", "llm.lm_head", "vpm.", "resampler.")}


def test_missing_weights_are_named(folder):
    good = load_file(folder / "model.safetensors")
    for part in PARTS[type_of(folder)]:
        left = {name: tensor for name, tensor in good.items() if part not in name}
        assert len(left) < len(good)
        save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"not those of the model in config.json: missing: [^;]*{part}"):
            load(folder)


def test_a_head_that_is_the_embedding_is_not_missing(folder):
    rewrite(folder, lambda state: {name: tensor for name, tensor in state.items() if "lm_head" not in name})
    if type_of(folder) != "minicpmo":
        load(folder)


def test_weights_too_many_or_of_another_shape_are_named(folder):
    rewrite(folder, lambda state: state | {"llm.more.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"too many: .*more\.weight"):
        load(folder)
    rewrite(folder, lambda state: {name: torch.zeros(3, 3) if "layers.0.mlp.down_proj" in name else tensor
                                   for name, tensor in state.items() if "more" not in name})
    with pytest.raises(ModelError, match=r"of another shape: .*layers\.0\.mlp\.down_proj\.weight\. Fetch"):
        load(folder)


def remove(folder, *beginnings):
    for path in folder.iterdir():
        if path.name.startswith(beginnings) and path.suffix != ".py":
            path.unlink()


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda folder: (folder / "model.safetensors").write_text(POINTER), "model.safetensors: a Git LFS pointer"),
    (lambda folder: (folder / "tokenizer.json").write_text(POINTER), "tokenizer.json: a Git LFS pointer"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: it is damaged"),
    (lambda folder: os.truncate(folder / "model.safetensors", 9000), "model.safetensors: it is damaged"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors: it is damaged"),
    (lambda folder: rewrite(folder, lambda _: {"their.weight": torch.zeros(1)}), "too many: their.weight"),
    (lambda folder: (folder / "model.safetensors").unlink(), "--model_path .* no file named model.safetensors"),
    (lambda folder: remove(folder, "preprocessor_config"), "no image processor in this folder"),
    (lambda folder: remove(folder, "tokenizer", "vocab", "merges"), "no tokenizer in this folder"),
], ids=["pointer", "pointer to a tokenizer", "half a tokenizer", "truncated", "empty", "foreign", "none",
        "no image processor", "no tokenizer"])
def test_folders_that_are_not_whole_are_refused_by_file(folder, spoil, said):
    spoil(folder)
    with pytest.raises(ModelError, match=said):
        load(folder)


def test_each_weight_is_read_in_the_dtype_that_it_is_left_in_at_birth(whole):
    def hold(model):
        assert all(parameter.is_meta for parameter in model.parameters())
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.data = parameter.data.bfloat16()

    plain, _, _ = load(whole)
    held, _, _ = load_minicpm(str(whole), trust_remote_code=True, at_birth=hold)
    again, _, _ = load(whole)
    for (name, wanted), found, last in zip(plain.state_dict().items(), held.state_dict().values(),
                                           again.state_dict().values(), strict=True):
        assert found.dtype == (torch.bfloat16 if wanted.dim() >= 2 else torch.float32), name
        assert torch.equal(found, wanted.to(found.dtype)) and torch.equal(last, wanted), name
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in
               zip(plain.buffers(), held.buffers(), strict=True))
    for target, source in plain.all_tied_weights_keys.items():
        assert held.get_parameter(target) is held.get_parameter(source)


def test_weights_saved_from_data_parallel_are_read(dense_policy, tmp_path):
    wanted = {name: tensor + 1 for name, tensor in dense_policy.model.state_dict().items()}
    for zipped in (True, False):
        torch.save({f"module.{name}": tensor for name, tensor in wanted.items()}, tmp_path / "model_step1.pt",
                   _use_new_zipfile_serialization=zipped)
        with torch.no_grad():
            for parameter in dense_policy.model.parameters():
                parameter.zero_()
        load_weights(dense_policy.model, str(tmp_path / "model_step1.pt"))
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in dense_policy.model.state_dict().items())


class Poison:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(("make", "said"), [
    (lambda path: path.write_bytes(b""), "it is empty, 0 bytes"),
    (lambda path: path.write_text(POINTER), "a Git LFS pointer"),
    (lambda path: path.write_text("hello"), "damaged, or no state dict"),
    (lambda path: (torch.save({"a": torch.zeros(9)}, path), os.truncate(path, 300)), "damaged, or no state dict"),
    (lambda path: torch.save({"a": Poison(path.parent / "bitten")}, path), "it asks for posix.mkdir"),
    (lambda path: path.write_bytes(pickle.dumps(Poison(path.parent / "bitten"))), "damaged, or no state dict"),
    (lambda path: torch.save(torch.nn.Linear(1, 1), path), "it asks for torch.nn.modules.linear.Linear"),
    (lambda path: torch.save({"model": {"a": torch.zeros(1)}, "step": 3}, path), "in it: model, step"),
    (lambda path: torch.save([torch.zeros(1)], path), "in it: list"),
    (lambda path: torch.save({}, path), "in it: nothing"),
    (lambda path: torch.save({0: torch.zeros(1)}, path), "in it: 0"),
], ids=["empty", "pointer", "text", "truncated", "poisoned", "poisoned pickle", "whole module", "nested", "list",
        "nothing", "numbered"])
def test_state_dicts_that_are_none_are_refused_and_run_nothing(dense_policy, tmp_path, make, said):
    make(tmp_path / "model_step1.pt")
    with pytest.raises(ModelError, match=f"model_step1.pt: .*{said}") as caught:
        load_weights(dense_policy.model, str(tmp_path / "model_step1.pt"))
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "bitten").exists()


def test_damaged_state_dicts_raise_nothing_else(tmp_path):
    dice, refused = random.Random(5), 0
    for zipped in (True, False):
        path = tmp_path / "whole.pt"
        torch.save({"module.a": torch.zeros(3, 2), "module.b": torch.tensor(1.0)}, path,
                   _use_new_zipfile_serialization=zipped)
        good = path.read_bytes()
        for _ in range(300):
            spoilt = bytearray(good)
            for _ in range(dice.randrange(1, 6)):
                spoilt[dice.randrange(len(spoilt))] = dice.randrange(256)
            path.write_bytes(spoilt[:dice.randrange(len(spoilt))] if dice.random() < 0.3 else spoilt)
            try:
                assert all(len(shape_of(stored)) < 9 for _, stored in stored_tensors(path))
            except ModelError:
                refused += 1
    assert refused > 200


def test_a_folder_is_refused_before_the_model_is_touched(dense_policy, tmp_path):
    dense_policy.model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {name: tensor + 1 for name, tensor in state.items()
                                     if "layers.1.mlp.up_proj" not in name})
    before = {name: tensor.clone() for name, tensor in dense_policy.model.state_dict().items()}
    with pytest.raises(ModelError, match=r"of another model: missing: .*layers\.1\.mlp\.up_proj"):
        load_weights(dense_policy.model, str(tmp_path))
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(ModelError, match="Git LFS pointer"):
        load_weights(dense_policy.model, str(tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense_policy.model.state_dict().items())
