"""What was saved, in a fresh process: it answers the same there.

Saved models and merged adapters by plain transformers' own generate; the checkpoint of a model whose code comes with it
by our own loading, since that code needs our mends here.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run
import test_model
import train_vlm_parallel as training
from config import AnswerOptions, CompareOptions
from models.family import ModelError
from models.loading import load_minicpm, load_weights
from models.policy import Policy
from rounding import float64
from runs import train_options
from tiny import adapted, noise_photo, parts_of

KINDS = ["hybrid", "v47", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"]
ROOT = Path(__file__).resolve().parents[2]
ANSWER = """
import gc, json, sys
gc.disable()  # looking for garbage among what is imported takes a third of the time
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
root, checkpoint, photo, *folders = sys.argv[1:]
answers, models = {}, {}
for folder in folders:
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    models[folder] = model
as_it_was = torch.float32, torch.Tensor.float
torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # so that no rounding decides a token
for folder, model in models.items():
    given = torch.load(f"{folder}/given.pt")
    out = model.generate(**given["inputs"], **given["options"], do_sample=False)
    answers[folder] = out[0, given["inputs"]["input_ids"].shape[1]:].tolist()
torch.float32, torch.Tensor.float = as_it_was
sys.path.insert(0, root)  # nothing of ours is imported before
from models.policy import Policy, load_minicpm
policy = Policy(*load_minicpm(checkpoint, trust_remote_code=True))
prompts = [policy.encode_prompt("box, grid 5 cm", [Image.open(photo)])]
uniforms = torch.zeros(1, 12, dtype=torch.float64)
generation = policy.sample(prompts, policy.photo_features(prompts), uniforms, None)
answers[checkpoint] = generation.completions[0][generation.action_mask[0]].tolist()
print(json.dumps(answers))
"""


def greedy(policy, prompt):
    with torch.no_grad():
        features = policy.photo_features([prompt])
    generation = policy.sample([prompt], features, torch.zeros(1, 12, dtype=torch.float64), None)
    return generation.completions[0][generation.action_mask[0]].tolist()


def write_plain(tokenizer, image_processor, folder_of_all):
    """Save models and merged adapters; returns their answers here by folder."""
    expected = {}
    for kind in KINDS:
        policy = Policy(*parts_of(kind, tokenizer, image_processor))
        shown = [noise_photo(1, (200, 90)), noise_photo(2)]
        prompt = policy.encode_prompt("box, grid 5 cm", shown)
        photos = dict(prompt.photos)
        if kind in ("qwen2_5_vl", "qwen3_vl"):  # of which a prompt holds one frame
            photos = dict(policy.image_processor(shown, return_tensors="pt"))
        photos = {name: value.double() if value.is_floating_point() else value for name, value in photos.items()}
        inputs = {"input_ids": prompt.input_ids[None], **photos}
        if kind in ("v47", "qwen2_5_vl", "qwen3_vl"):  # these look at the photos to number their positions
            inputs["mm_token_type_ids"] = policy.family.photo_positions(policy.model, prompt).long()[None]
        given = {"inputs": inputs,
                 "options": {"max_new_tokens": 12, "suppress_tokens": policy._banned.tolist(),
                             "eos_token_id": policy.stop_ids.tolist(), "pad_token_id": 0}}
        answers = []
        for name in ("whole", "merged"):
            with float64(policy):
                if name == "merged":
                    adapted(policy)
                answers.append(greedy(policy, prompt))
                if name == "merged":
                    policy.merge_adapter()
                folder = folder_of_all / kind / name
                policy.save(str(folder_of_all), folder)
            torch.save(given, folder / "given.pt")
            expected[str(folder)] = answers[-1]
        assert answers[0] != answers[1], kind
    return expected


@pytest.fixture(scope="module")
def checkpoint(shop, standin, tmp_path_factory):
    """What a run saved that trained a model whose code comes with it."""
    output = tmp_path_factory.mktemp("remote")
    return training.train(train_options(shop, output, model_path=str(standin), trust_remote_code=True,
                                        train_vision=True, max_steps=2, eval_every=0))


def test_saved_models_merged_adapters_and_checkpoints_answer_the_same(tokenizer, image_processor, standin, checkpoint,
                                                                      tmp_path):
    expected = write_plain(tokenizer, image_processor, tmp_path)
    after = Policy(*load_minicpm(str(standin), trust_remote_code=True))
    before = [parameter.clone() for parameter in after.model.parameters()]
    load_weights(after.model, str(checkpoint))
    assert any(not torch.equal(one, two) for one, two in zip(before, after.model.parameters(), strict=True))
    noise_photo(7, (200, 90)).save(tmp_path / "photo.png")
    done = subprocess.run([sys.executable, "-c", ANSWER, str(ROOT), str(checkpoint), str(tmp_path / "photo.png"),
                           *expected], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected[str(checkpoint)] = greedy(after, after.encode_prompt("box, grid 5 cm", [noise_photo(7, (200, 90))]))
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_a_checkpoint_with_code_of_its_own_is_compared_and_answers_when_trusted(checkpoint, tmp_path, capsys):
    noise_photo(7, (200, 90)).save(tmp_path / "photo.png")
    run.main(CompareOptions(checkpoint_path=str(checkpoint), rows="all", num_samples=1, trust_remote_code=True))
    test_model.answer_product(AnswerOptions(model_path=str(checkpoint), text="box", trust_remote_code=True,
                                            image=[str(tmp_path / "photo.png")]))
    assert "answer: " in capsys.readouterr().out
    with pytest.raises(ModelError, match="--trust_remote_code"):
        test_model.answer_product(AnswerOptions(model_path=str(checkpoint), text="box"))
