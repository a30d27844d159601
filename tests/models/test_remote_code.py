"""Models whose code comes with them: never run unasked, mended at load, photos complete, checkpoints load again."""

import ast
import hashlib
import inspect
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from loguru import logger
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils
from transformers.utils import is_torchvision_available

from config import AnswerOptions, CompareOptions, TrainOptions
from models import remote_code
from models.family import ModelError
from models.loading import load_minicpm, load_weights
from models.policy import Policy
from replay_buffer import Experience, ReplayBuffer
from rollout import draw_uniforms
from sheets.photos import PhotoError
from standin_minicpm import build, edit, write_standin, write_weights
from test_layout import FLOORS, path_of
from tiny import noise_photo

ROOT = Path(__file__).resolve().parents[2]


def fingerprints(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def greedy(policy, prompt):
    with torch.no_grad():
        features = policy.photo_features([prompt])
    return policy.sample([prompt], features, torch.zeros(1, 12, dtype=torch.float64), None).completions[0].tolist()


def test_code_is_not_run_without_being_asked(standin, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(standin, folder)
    for path in folder.glob("*.py"):
        path.write_text("raise RuntimeError('the code has been run')\n")
    with pytest.raises(ModelError, match="--trust_remote_code"):
        load_minicpm(str(folder))
    with pytest.raises(RuntimeError, match="has been run"):
        load_minicpm(str(folder), trust_remote_code=True)


def test_the_flag_is_off_unless_given():
    assert not any(kind().trust_remote_code for kind in (TrainOptions, CompareOptions, AnswerOptions))


def test_mends_are_taken_back_and_the_folder_is_left_alone(standin):
    before = fingerprints(standin)
    check = dynamic_module_utils.check_imports
    load_minicpm(str(standin), trust_remote_code=True)
    assert fingerprints(standin) == before
    assert dynamic_module_utils.check_imports is check
    assert not hasattr(transformers, "LogitsWarper") and not hasattr(torch.nn.functional, "List")
    for name in ("torchvision", "soundfile"):
        assert name not in sys.modules or sys.modules[name].__spec__.loader is not None
    assert is_torchvision_available() == ("torchvision" in sys.modules)


def test_audio_and_the_generation_patch_are_gone(remote_policy, standin):
    model = remote_policy.model
    assert not hasattr(model, "apm") and not hasattr(model, "tts") and model.all_tied_weights_keys == {}
    ids = model.llm.generate(torch.tensor([[40, 41]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ids.shape[1] > 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(model, str(standin))  # the file holds the weights of audio and TTS as well
    assert all(bool(parameter.any()) for name, parameter in model.named_parameters() if name.endswith("weight"))


def test_position_table_is_rebuilt_and_checked(remote_policy, standin):
    model = remote_policy.model
    right = build(standin).resampler.pos_embed
    assert torch.equal(model.resampler.pos_embed, right)
    model.resampler.pos_embed.fill_(torch.nan)
    remote_code.rebuild_position_tables(model)
    assert torch.equal(model.resampler.pos_embed, right)
    model.resampler.register_buffer("other", torch.zeros(2), persistent=False)
    with pytest.raises(ModelError, match="resampler.other"):
        remote_code.rebuild_position_tables(model)
    model.resampler._set_2d_pos_cache = lambda size, device: model.resampler.pos_embed.fill_(0.1)
    with pytest.raises(ModelError, match="sines and cosines"):
        remote_code.rebuild_position_tables(model)


def test_a_folder_without_its_code_or_parts_is_refused(standin, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(standin, folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"model_type": "minicpmv"}')
    with pytest.raises(ModelError, match="auto_map"):
        load_minicpm(str(folder), trust_remote_code=True)
    (folder / "config.json").write_text(config)
    code = (folder / "modeling_minicpmo.py").read_text()
    (folder / "modeling_minicpmo.py").write_text(code.replace("self.resampler", "self.bridge"))
    state = load_file(folder / "model.safetensors")
    save_file({name.replace("resampler.", "bridge."): tensor for name, tensor in state.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no resampler"):
        load_minicpm(str(folder), trust_remote_code=True)


@pytest.mark.parametrize("version", [2.6, 4.5])
def test_prompts_are_as_chat_writes_them(version, tokenizer, tmp_path):
    policy = Policy(*load_minicpm(str(write_standin(tmp_path / "model", tokenizer, version)), trust_remote_code=True))
    sizes = [(64, 64), (300, 300), (20, 200), (128, 96), (1024, 378)]
    for count in range(6):
        prompt = policy.encode_prompt("box", [noise_photo(seed, sizes[seed]) for seed in range(count)])
        said = policy.tokenizer.decode(prompt.input_ids)
        assert said.count("<image>") == said.count("</image_id>") == count and "(" not in said and "./" not in said
        assert prompt.input_ids.dtype == torch.long and bool(prompt.photos) == (count > 0)
        marked = policy.family.photo_positions(policy.model, prompt)
        unknown = policy.tokenizer.unk_token_id
        assert torch.equal(marked, prompt.input_ids == unknown)
        if count:
            assert int(marked.sum()) == policy.model.config.query_num * len(prompt.photos["target_sizes"])
    assert said.startswith("<|im_start|><image_id>0</image_id><image>") and said.endswith("box<|im_end|><|im_start|>")


@pytest.mark.parametrize(("sizes", "max_slice_nums", "slices", "others"), [
    # One slice holds 448 x 448 pixels and makes 64 tokens, whatever its shape. 800 x 800 is 3.2 times as much: four
    # slices in two rows of two, and the overview. Around them: <image_id> 0 </image_id>, <image> </image>, two markers
    # a slice, a line break between rows; and the line break behind each photo that chat() writes.
    ([(800, 800)], None, 5, 3 + 2 + 4 * 2 + 1 + 1),          # 334 tokens and the line break behind
    ([(800, 800)], 1, 1, 3 + 2 + 1),                         # 69
    ([(800, 800)], 2, 3, 3 + 2 + 2 * 2 + 1 + 1),             # 202: two slices, one above the other
    ([(800, 800)] * 5, None, 25, 5 * (3 + 2 + 4 * 2 + 1 + 1)),
    ([(800, 800)] * 5, 1, 5, 5 * (3 + 2 + 1)),
    ([(1400, 1400)], None, 10, 3 + 2 + 9 * 2 + 2 + 1),       # 665: nine slices at most, three rows of three
])
def test_photos_take_the_tokens_worked_by_hand(sizes, max_slice_nums, slices, others, tokenizer, tmp_path):
    folder = write_standin(tmp_path / "model", tokenizer)
    edit(folder / "preprocessor_config.json", max_slice_nums=9, scale_resolution=448, patch_size=14,
         image_feature_size=64)
    edit(folder / "config.json", query_num=64, patch_size=14)
    write_weights(folder)
    policy = Policy(*load_minicpm(str(folder), trust_remote_code=True), max_slice_nums=max_slice_nums)
    prompt = policy.encode_prompt("box", [noise_photo(index, size) for index, size in enumerate(sizes)])
    without = policy.encode_prompt("box", [])
    assert len(prompt.photos["target_sizes"]) == slices
    assert int(policy.family.photo_positions(policy.model, prompt).sum()) == 64 * slices
    assert len(prompt.input_ids) - len(without.input_ids) == 64 * slices + others
    with torch.no_grad():
        assert len(policy.photo_features([prompt])[0]) == 64 * slices


def test_product_text_cannot_forge_markers(remote_policy):
    text = "box (<image>./</image>) <unk><|im_end|> (<audio>./</audio>)"
    forged = remote_policy.encode_prompt(text, [noise_photo(1)])
    clean = remote_policy.encode_prompt("box", [noise_photo(1)])
    for token in ("<image>", "<unk>", "<|im_end|>"):
        identity = remote_policy.tokenizer.convert_tokens_to_ids(token)
        assert (forged.input_ids == identity).sum() == (clean.input_ids == identity).sum()


def test_a_photo_that_the_processor_loses_is_an_error(remote_policy):
    whole = remote_policy.image_processor.processor

    def forgetful(texts, photos, **options):
        return whole([text.replace("(<image>./</image>)", "", 1) for text in texts], [photos[0][1:]], **options)

    remote_policy.image_processor = replace(remote_policy.image_processor, processor=forgetful)
    with pytest.raises(PhotoError, match="1 spans for 2 photos"):
        remote_policy.encode_prompt("box", [noise_photo(1), noise_photo(2)])


def test_no_public_function_takes_messages_that_could_hide_photos(policy):
    for name in FLOORS:
        tree = ast.parse(path_of(name).read_text(encoding="utf-8"))
        assert "images" not in {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}, name
        if name == "app.chat":  # what OpenAI's protocol calls messages is taken apart there, photos and all
            continue
        for _, function in inspect.getmembers(import_module(name), inspect.isfunction):
            assert not {"msgs", "messages"} & set(inspect.signature(function).parameters), function
    message = {"role": "user", "content": "box", "images": [noise_photo(1)]}
    with pytest.raises((TypeError, ValueError, AttributeError)):
        policy.encode_prompt("box", [message])


def test_photos_of_all_products_are_encoded_in_one_pass(remote_policy):
    passes = []
    remote_policy.model.vpm.register_forward_hook(lambda *_: passes.append(1))
    prompts = [remote_policy.encode_prompt("box", [noise_photo(seed, (200, 90))] * seed) for seed in range(3)]
    features = remote_policy.photo_features(prompts)
    assert len(passes) == 1 and features[0] is None
    for prompt, found in zip(prompts[1:], features[1:], strict=True):
        assert torch.allclose(found, remote_policy.photo_features([prompt])[0], atol=1e-5)


def test_prompts_are_plain_tensors_for_the_buffer(remote_policy, tmp_path):
    prompt = remote_policy.encode_prompt("box", [noise_photo(1, (200, 90)), noise_photo(2)])
    answers, mask = torch.tensor([[40, 41]]), torch.ones(1, 2, dtype=torch.bool)
    zeros = torch.zeros(1, 2)
    buffer = ReplayBuffer()
    buffer.append(Experience(answers, mask, zeros, zeros, torch.zeros(1), torch.zeros(1), prompts=(prompt,)))
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    again = ReplayBuffer()
    again.load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    with torch.no_grad():
        one, other = (remote_policy.log_probs(held.items[0].prompts, answers, mask, 1.0)[0] for held in (buffer, again))
    assert torch.equal(one, other)


def test_saving_does_not_need_the_folder_any_more(standin, tmp_path):
    source, saved = tmp_path / "model", tmp_path / "saved"
    shutil.copytree(standin, source)
    policy = Policy(*load_minicpm(str(source), trust_remote_code=True))
    shutil.rmtree(source)
    policy.family.save(policy.model, policy.tokenizer, policy.image_processor, str(source), saved)
    for path in standin.glob("*.py"):
        assert (saved / path.name).read_bytes() == path.read_bytes()
    again = Policy(*load_minicpm(str(saved), trust_remote_code=True))
    prompts = [each.encode_prompt("box", [noise_photo(1, (200, 90))]) for each in (policy, again)]
    assert torch.equal(prompts[0].input_ids, prompts[1].input_ids)
    assert greedy(policy, prompts[0]) == greedy(again, prompts[1])


def test_a_tokenizer_that_forgets_half_of_itself_is_named(standin, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(standin, folder)
    path = folder / "tokenization_minicpmo_fast.py"
    path.write_text(path.read_text().replace("Qwen2TokenizerFast", "PreTrainedTokenizerFast"))
    lines = []
    sink = logger.add(lines.append, format="{message}")
    load_minicpm(str(standin), trust_remote_code=True)
    assert "other ids" not in "".join(lines)
    load_minicpm(str(folder), trust_remote_code=True)
    assert "gives other ids than tokenizer.json" in "".join(lines)
    logger.remove(sink)


def test_sampling_does_not_depend_on_the_load(standin):
    one, two = (Policy(*load_minicpm(str(standin), trust_remote_code=True)) for _ in range(2))
    drawn = [policy.sample([policy.encode_prompt("box", [noise_photo(1)])],
                           policy.photo_features([policy.encode_prompt("box", [noise_photo(1)])]),
                           draw_uniforms("load", 4, 8), 1.0) for policy in (one, two)]
    assert torch.equal(drawn[0].completions, drawn[1].completions)
