"""The comparison on a tiny trained model: several models side by side, own options, own rewards, ablations."""

import json
import shutil
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import run as comparing
import train_vlm_parallel as training
from config import CompareOptions
from evidence.evaluation import ablations, evaluate
from evidence.report import write_sheet
from ground.errors import UserError
from ground.options import check_options
from models.policy import Policy
from rollout import PromptEncoder
from rounding import float64
from runs import train_options


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    """The last of two checkpoints, half of the shop's products held out."""
    options = train_options(shop, tmp_path_factory.mktemp("trained"), eval_fraction=0.5, eval_every=0, max_steps=2,
                            save_every=1)
    return training.train(options)


def compare(checkpoint, folder, **changes):
    options = CompareOptions(output_dir=str(folder), device="cpu",
                             **{"checkpoint_path": str(checkpoint), "num_samples": 2, **changes})
    check_options(options)
    comparing.main(options)
    return json.loads((folder / "compare.json").read_text())


def test_several_models_side_by_side(trained, shop, tmp_path):
    report = compare(trained, tmp_path, also=[str(trained.parent / "step_000001"), str(shop / "model")])
    assert list(report["summary"]) == ["before", "after", "step_000001", "model"]
    assert report["greedy"]["model"] == report["greedy"]["before"] and not report["models"][2]["notes"]
    assert report["summary"]["model"] == report["summary"]["before"]
    before, after, model = ([[answer["answer"] for answer in product["models"][name]["answers"]]
                             for product in report["products"]] for name in ("before", "after", "model"))
    assert model == before != after
    assert "no options.yaml" in report["models"][3]["notes"][0]
    assert "step_000001" in (tmp_path / "compare.html").read_text()


def test_weights_that_do_not_fit_are_refused_before_any_model_answers(trained, shop, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "answer", lambda *_: pytest.fail("a model has answered"))
    before = load_file(shop / "model" / "model.safetensors")
    torch.save({name: tensor for name, tensor in before.items() if "norm" not in name}, tmp_path / "model_step9.pt")
    damaged = shutil.copytree(trained, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"")
    for changes, said in (({"checkpoint_path": str(tmp_path / "model_step9.pt"), "model_path": str(shop / "model"),
                            "data_path": str(shop / "data.xlsx"), "image_cache_dir": str(shop / "photos")},
                           "model_step9.pt: these weights are of another model: missing: .*norm"),
                          ({"also": [str(damaged)]}, "damaged/model.safetensors"),
                          ({"also": [str(tmp_path / "model_step9.pt")]}, "model_step9.pt: these weights")):
        with pytest.raises(UserError, match=said):
            compare(trained, tmp_path, **changes)


def test_another_checkpoint_answers_with_its_own_options(trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    text = (other / "options.yaml").read_text()
    (other / "options.yaml").write_text(text.replace("max_pixels: null", "max_pixels: 1024"))
    (other / "prompt.txt").write_text("how large? {text}")
    report = compare(trained, tmp_path, greedy=True, also=[str(other)])
    notes = " ".join(report["models"][2]["notes"])
    assert "own --max_pixels 1024; the model after has None" in notes and "own prompt" in notes
    assert "own --max_pixels 1024" in (tmp_path / "compare.html").read_text()
    answers = [[product["models"][name]["answers"][0]["answer"] for product in report["products"]]
               for name in ("after", "other")]
    assert answers[0] != answers[1]  # the same weights, asked otherwise


def test_another_model_that_is_not_there_is_refused_at_once(trained, tmp_path):
    with pytest.raises(comparing.OptionError, match="--also a/b/gone"):
        compare(trained, tmp_path, also=["a/b/gone"])
    with pytest.raises(UserError, match="given twice"):
        compare(trained, tmp_path, also=[str(trained), str(trained)])


class Killed(BaseException):
    """What a kill does to a process, as far as it can be planted."""


def test_a_killed_comparison_goes_on_where_it_stopped(trained, shop, tmp_path, monkeypatch):
    good, asked = Policy.sample, []

    def sample(self, prompts, *args):
        if len(asked) == killed_at:
            raise Killed
        asked.append(len(prompts))
        return good(self, prompts, *args)

    monkeypatch.setattr(Policy, "sample", sample)
    settings = dict(eval_batch_size=2, also=[str(shop / "model")], ablate=True)
    reports, calls = [], []
    for folder, kills in (("whole", []), ("killed", [3, 6, 1, 5])):
        asked.clear()
        with float64():  # what is resumed is answered in other batches
            for more in kills:
                killed_at = len(asked) + more
                with pytest.raises(Killed):
                    compare(trained, tmp_path / folder, **settings)
                assert (tmp_path / folder / "compare.journal").is_file()
            killed_at = None
            reports.append(compare(trained, tmp_path / folder, **settings) | {"settings": None})
        assert not (tmp_path / folder / "compare.journal").exists()
        calls.append(len(asked))
    assert reports[0] == reports[1]
    assert calls[1] - calls[0] <= 4  # of a chunk cut off, the sampled answers are sampled again


def test_a_comparison_of_other_answers_is_not_gone_on_from(trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(comparing, "build_report", Mock(side_effect=Killed))
        compare(trained, tmp_path, greedy=True)
    for changes in ({"seed": 1}, {"max_products": 2}, {"also": [str(trained.parent / "step_000001")]}):
        with pytest.raises(UserError, match="compare.journal: .*another sheet, model or options"):
            compare(trained, tmp_path, greedy=True, **changes)
    monkeypatch.setattr(Policy, "sample", Mock(side_effect=Killed))
    compare(trained, tmp_path, greedy=True, accept_error=0.1)


def test_every_model_has_its_bar(trained, shop, tmp_path, bars):
    report = compare(trained, tmp_path, rows="all", ablate=True, also=[str(shop / "model")])
    assert [bar.title for bar in bars] == [model["name"] for model in report["models"]]
    count = len(report["products"])
    assert [bar.total for bar in bars] == [count] * 2 + [count - 1] * 3 + [count]  # one has no photos
    assert all(bar.shown[-1] == bar.total for bar in bars)
    note = f"1 of {count} products left out: they have no photos, or no other product has other ones"
    assert [model["notes"] for model in report["models"][2:5]] == [[note]] * 3
    assert f"no photos: {note}." in (tmp_path / "compare.html").read_text()


def test_photos_that_nobody_can_swap_are_not_ablated(trained, shop, tmp_path):
    write_sheet(tmp_path / "own.xlsx", {"t": [{"text": f"box {row}", "label": "1 2 3"} for row in (2, 3)]})
    with pytest.raises(UserError, match="--ablate: none of these products"):
        compare(trained, tmp_path, ablate=True, data_path=str(tmp_path / "own.xlsx"))


def test_what_names_tell_apart():
    assert comparing.names_of(["a/step_1", "b/step_1", "c/step_2"]) == ["a/step_1", "b/step_1", "c/step_2"]
    assert comparing.names_of(["a/step_1", "a/step_2"]) == ["step_1", "step_2"] and comparing.names_of([]) == []
    assert comparing.names_of(["x/before"]) == ["x/before"]
    with pytest.raises(comparing.OptionError, match="twice"):
        comparing.names_of(["a/step_1", "a/step_1"])


def test_a_reward_of_ones_own_is_the_same_everywhere(shop, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def long(answer, label, sample):\n    return len(answer) + sample.row / 100\n")
    options = train_options(shop, tmp_path, reward=[f"{file}:long:2"], max_steps=1, eval_fraction=0.5, eval_every=0)
    checkpoint = training.train(options)
    report = compare(checkpoint, tmp_path, greedy=True)
    for product in report["products"]:
        answer = product["models"]["after"]["answers"][0]
        assert answer["reward"] == pytest.approx(2 * (len(answer["answer"]) + product["row"] / 100))
    file.write_text("def long(answer, label, sample):\n    return 1 / 0\n")
    with pytest.raises(UserError, match="own_reward_1.py.*--trust_remote_code"):
        compare(checkpoint, tmp_path, greedy=True)
    trusting = compare(checkpoint, tmp_path, greedy=True, trust_remote_code=True)
    assert trusting["summary"] == report["summary"]
    assert compare(checkpoint, tmp_path, greedy=True, reward=["size"])["summary"]["after"]["mean_reward"] <= 1


def test_a_reward_that_fails_in_the_middle_stops_before_weights_change(shop, tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("calls = 0\ndef late(answer, label, sample):\n    global calls\n    calls += 1\n"
                    "    return 1 / (calls < 15)\n")  # two at the start, twelve answers in the first step
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args: steps.append(1))
    options = train_options(shop, tmp_path, reward=[f"{file}:late"], eval_every=0)
    with pytest.raises(UserError, match="ZeroDivisionError.*data.xlsx row"):
        training.main(options)
    assert "step 1/3" in (tmp_path / "run" / "train.log").read_text() and len(steps) == 2  # one allocates
    broken = replace(options, reward=[f"{file}:missing"], output_dir=str(tmp_path / "other"))
    with pytest.raises(UserError, match="no function 'missing'"):
        training.main(broken)
    assert not list((tmp_path / "other").glob("step_*"))


def test_a_model_that_looks_at_no_photo_loses_nothing(dense_policy, shop, trained):
    samples = comparing.choose_samples(CompareOptions(checkpoint_path=str(trained)), comparing.options_of(str(trained)))

    def make_encoder(**more):
        return PromptEncoder(dense_policy, template="{text}", **more)

    def answers():
        sides = {"as they are": (make_encoder(), samples), **ablations(samples, make_encoder)}
        return {name: [record.answers for record in evaluate(encoder, others, 1, None, 8, 0, 8)[0]]
                for name, (encoder, others) in sides.items()}

    looking = answers()
    assert looking["photos blanked"] != looking["as they are"] != looking["other products' photos"]
    with torch.no_grad():
        for weight in dense_policy.model.model.merger.parameters():
            weight.zero_()
    blind = answers()
    assert blind["photos blanked"] == blind["as they are"] == blind["other products' photos"]
    assert not any(sample.photos for sample in ablations(samples, make_encoder)["no photos"][1])
