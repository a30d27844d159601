"""Saved models and merged adapters in a fresh process with plain transformers: its own generate answers the same.

Models whose code comes with them are loaded afresh in test_remote_code.py: that code needs our mends here.
"""

import json
import subprocess
import sys

import torch

from models.policy import Policy
from rounding import float64
from tiny import adapted, noise_photo, parts_of

KINDS = ["hybrid", "v47", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"]
ANSWER = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText
answers, models = {}, {}
for folder in sys.argv[1:]:
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    models[folder] = model
torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # so that no rounding decides a token
for folder, model in models.items():
    given = torch.load(f"{folder}/given.pt")
    out = model.generate(**given["inputs"], **given["options"], do_sample=False)
    answers[folder] = out[0, given["inputs"]["input_ids"].shape[1]:].tolist()
print(json.dumps(answers))
"""


def greedy(policy, prompt):
    features = policy.photo_features([prompt])
    generation = policy.sample([prompt], features, torch.zeros(1, 12, dtype=torch.float64), None)
    return generation.completions[0][generation.action_mask[0]].tolist()


def test_saved_models_and_merged_adapters_answer_the_same(tokenizer, image_processor, tmp_path):
    expected = {}
    for kind in KINDS:
        policy = Policy(*parts_of(kind, tokenizer, image_processor))
        prompt = policy.encode_prompt("box, grid 5 cm", [noise_photo(1, (200, 90)), noise_photo(2)])
        photos = {name: value.double() if value.is_floating_point() else value for name, value in prompt.photos.items()}
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
                folder = tmp_path / kind / name
                policy.save(str(tmp_path), folder)
            torch.save(given, folder / "given.pt")
            expected[str(folder)] = answers[-1]
        assert answers[0] != answers[1], kind
    done = subprocess.run([sys.executable, "-c", ANSWER, *expected], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
