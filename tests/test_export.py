"""What an export holds beside the weights: an example that can be asked again, and audio where it is wanted."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import export
import train_vlm_parallel as training
from config import ExportOptions
from models.family import ModelError
from models.loading import load_minicpm
from models.policy import Policy
from models.remote_code import call_post_init, mended_imports
from models.weights import load_checked
from runs import train_options
from standin_minicpm import build, edit
from tiny import noise_photo
from training.trained import TrainedModel


def export_of(checkpoint, folder, **changes):
    options = ExportOptions(checkpoint_path=str(checkpoint), output_path=str(folder), device="cpu", num_products=2,
                            trust_remote_code=True, **changes)
    export.main(options)
    return folder


@pytest.fixture(scope="module")
def makers(standin, tmp_path_factory):
    """The makers' folder, with a file that speech wants; read only."""
    folder = shutil.copytree(standin, tmp_path_factory.mktemp("makers") / "model")
    (folder / "assets").mkdir()
    (folder / "assets" / "voice.pt").write_bytes(b"a voice")
    edit(folder / "config.json", init_audio=True)
    return folder


@pytest.fixture(scope="module")
def trained(shop, makers, tmp_path_factory):
    """A checkpoint of one step on it."""
    return training.train(train_options(shop, tmp_path_factory.mktemp("trained"), model_path=str(makers), max_steps=1,
                                        trust_remote_code=True, eval_every=0))


def all_on(folder):
    """The model by its makers' own code, with all parts that its config.json asks for."""
    config = build(folder).config
    with mended_imports():
        model_class = get_class_from_dynamic_module(config.auto_map["AutoModel"], folder)
        call_post_init(model_class)
        model_class._keys_to_ignore_on_load_unexpected = []
        return load_checked(model_class, folder, None, config=config)


def test_audio_and_tts_come_back_beside_the_trained_weights(trained, makers, tmp_path):
    plain = export_of(trained, tmp_path / "plain")
    whole = export_of(trained, tmp_path / "whole", keep_audio=True)
    before = load_file(makers / "model.safetensors")
    audio = {name for name in before if name.startswith(("apm.", "tts."))}
    held = {name: tensor for file in whole.glob("*.safetensors") for name, tensor in load_file(file).items()}
    trained_ones = load_file(plain / "model.safetensors")
    assert audio and held.keys() == audio | trained_ones.keys() and not audio & trained_ones.keys()
    assert all(torch.equal(held[name], before[name] if name in audio else trained_ones[name]) for name in held)
    assert (whole / "assets" / "voice.pt").read_bytes() == b"a voice" and not (plain / "assets").exists()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (makers, whole, plain)]
    assert [config.get("init_audio") for config in configs] == [True, True, False]
    assert ["init_tts" in config for config in configs] == [False, False, True]  # the class's own default, on, but ours

    data = {"pixel_values": [[]], "tgt_sizes": [[]], "image_bound": [[]], "input_ids": torch.tensor([[40, 41]])}
    speaking, mute = all_on(whole), all_on(plain)
    assert torch.equal(speaking.apm.weight, before["apm.weight"]) and hasattr(speaking, "tts")
    assert torch.equal(speaking.chat_embedding(data), mute.get_vllm_embedding(data)[0])
    with pytest.raises(AttributeError, match="apm"):  # as the chat() of some revisions
        mute.chat_embedding(data)


def test_audio_that_is_not_there_is_not_kept(trained, shop, makers, tmp_path):
    silent = shutil.copytree(makers, tmp_path / "silent")
    state = load_file(makers / "model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if not name.startswith(("apm.", "tts."))},
              silent / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="--keep_audio: no weights of audio or TTS in .*silent"):
        export_of(trained, tmp_path / "served", keep_audio=True, model_path=str(silent))
    native = training.train(train_options(shop, tmp_path, max_steps=1, eval_every=0))
    with pytest.raises(ModelError, match="--keep_audio: .* has no audio"):
        export_of(native, tmp_path / "served", keep_audio=True)
    assert not (tmp_path / "served").exists()


def test_the_example_holds_its_photos(shop, tmp_path):
    checkpoint = training.train(train_options(shop, tmp_path, max_steps=1, eval_every=0))
    served = export_of(checkpoint, tmp_path / "served")
    notes = json.loads((served / "serving.json").read_text())
    example = notes["example"]
    assert example["photos"] == ["example/photo_1.png"]
    policy = Policy(*load_minicpm(str(served)))
    photos = [Image.open(served / name) for name in example["photos"]]
    prompt = policy.encode_prompt(notes["user_message"]["1 photos"].format(text=example["text"]), photos)
    assert prompt.input_ids.tolist() == example["prompt_ids"]
    with torch.no_grad():
        features = policy.photo_features([prompt])
    greedy = policy.sample([prompt], features, torch.zeros(1, 8, dtype=torch.float64), None)
    assert policy.answers(greedy.completions, greedy.action_mask) == [example["greedy_answer"]]


def test_photos_that_the_prompt_has_no_room_for_are_not_in_the_example(dense_policy, shop, tmp_path):
    options = train_options(shop, tmp_path, prompt_file=None)
    sample, *_ = export.choose_samples(ExportOptions(), options)
    for number in (1, 2):
        noise_photo(number).save(tmp_path / f"{number}.png")
    sample = replace(sample, photos=(str(tmp_path / "1.png"), str(tmp_path / "2.png")))
    both = TrainedModel(dense_policy, options, None).encoder().encode(sample)
    for room, kept in ((len(both.input_ids), 2), (len(both.input_ids) - 1, 1)):
        model = TrainedModel(dense_policy, replace(options, max_prompt_length=room), None)
        group = export.rollout_groups(model.encoder(), [sample], 1, None, 4, "export", 1)[0][0]
        (tmp_path / str(room)).mkdir()
        names = export.write_photos(model, group, tmp_path / str(room))
        assert names == [f"example/photo_{number}.png" for number in range(1, kept + 1)]
        assert [Image.open(tmp_path / str(room) / name).tobytes() for name in names] == \
            [noise_photo(number).tobytes() for number in range(1, kept + 1)]
