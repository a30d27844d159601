"""What a run leaves behind: described curves, candidate tables, run.json, the best checkpoint, early stopping."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import train_vlm_parallel as training
from evidence.evaluation import Record
from ground.errors import OptionError
from ground.options import check_options
from reward import score_answer
from rollout import Group, RolloutFailure
from runs import train_options
from sheets.samples import Sample
from tiny import noise_photo
from training import upkeep
from training.checkpoint import is_better, read_best
from training.curves import MEANINGS, candidate_table, photo_strip, telling, warn_of_failures
from training.trained import options_of


@pytest.fixture(scope="module")
def finished(shop, tmp_path_factory):
    """Options of a run that is done, and its events."""
    options = train_options(shop, tmp_path_factory.mktemp("curves"), show_every=2)
    training.train(options)
    events = EventAccumulator(options.log_dir, size_guidance={"tensors": 0, "images": 0, "histograms": 0})
    events.Reload()
    return options, events


def text_of(events, tag):
    return events.Tensors(tag)[0].tensor_proto.string_val[0].decode()


def test_every_curve_says_what_it_means(finished):
    _, events = finished
    scalars = events.Tags()["scalars"]
    assert {"returns", "errors/largest", "held_out/within_10", "seconds/rollout"} <= set(scalars)
    mute = [tag for tag in scalars if not events.SummaryMetadata(tag).summary_description]
    assert not mute


def test_the_first_page_has_every_curve_once_and_rewards_first(finished):
    _, events = finished
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    patterns = [pattern for category in layout.category for chart in category.chart for pattern in
                chart.multiline.tag]
    for tag in {*MEANINGS, *events.Tags()["scalars"]}:
        assert sum(bool(re.match(pattern, tag)) for pattern in patterns) == 1, tag
    assert list(layout.category[0].chart[0].multiline.tag) == ["returns$", "held_out/mean_reward$"]


def test_curves_say_what_is_computed():
    """As tests/test_loss.py works it out: what the first loss of a step is, and which tokens the clip holds back."""
    total, clipped = (" ".join(MEANINGS[name].split()) for name in ("total_loss", "clip_fraction"))
    assert "With loss_type grpo about 0" in total and "dapo and dr_grpo" in total and "mask_truncated" in total
    assert "above its range and the advantage is positive" in clipped


def test_candidates_are_shown_with_photos(finished):
    options, events = finished
    tables = [tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"] if "candidates" in tag]
    assert set(tables) == {"returns/widest spread/candidates", "returns/lowest reward/candidates",
                           *(f"held_out/product {number}/candidates" for number in
                             range(1, sum("held_out" in tag for tag in tables) + 1))}
    tag = "returns/widest spread/candidates/text_summary"
    assert [event.step for event in events.Tensors(tag)] == [1, 2]
    table = text_of(events, tag)
    assert table.count("\n| ") == 2 + options.group_size and "true size" in table and "| reward | advantage |" in table
    assert "held_out/product 1/photos" in events.Tags()["images"]
    assert [event.step for event in events.Histograms("rewards")] == [1, 2, 3]


def test_options_are_a_table_and_hyperparameters(finished):
    _, events = finished
    assert "| lr | 0.001 |" in text_of(events, "options/text_summary").replace("&#95;", "_")
    assert "_hparams_/session_start_info" in str(events.summary_metadata.keys())


def test_hostile_text_can_not_break_the_table():
    sample = Sample(3, "p|1", "a | b\n\n# <script>alert(1)</script> `x` *y*", (2.0, 1.0), (), "s.xlsx")
    answers = ["no | idea\n| x |", "2 1"]
    table = candidate_table(sample, answers, [score_answer(answer, sample.label) for answer in answers], [-1.0, 1.0])
    lines = table.splitlines()
    assert "<" not in table and "`" not in table and lines[0].startswith("**s.xlsx row 3** (p&#124;1)")
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    assert len(rows) == 3 and all(row.count("|") == 6 for row in rows)
    assert rows[1].startswith("| 1.000 | &#43;1.00 | 2 x 1 | 0&#37;, 0&#37; |")  # the best first


def test_photos_stand_side_by_side():
    strip = photo_strip([noise_photo(0, (80, 40)), noise_photo(1, (40, 80))])
    assert strip.shape == (128, 256 + 8 + 64, 3) and strip.dtype == np.uint8
    assert (strip[:, 256:264] == 255).all()


def test_the_most_telling_groups():
    def group(*answers):
        return Group(None, None, None, None, None, None, None, list(answers),
                     [score_answer(answer, (10.0,)) for answer in answers])

    assert telling([group("9", "9"), group("10", "5"), group("1", "1")]) == {"widest spread": 1, "lowest reward": 2}


def test_a_run_folder_explains_itself(finished, shop):
    options, _ = finished
    facts = json.loads((Path(options.output_dir) / "run.json").read_text())
    assert facts["options"]["lr"] == options.lr and facts["starts"][0]["packages"]["torch"].startswith("2")
    assert len(facts["sheets"][options.data_path]) == 64
    assert facts["products"]["products"] + facts["held_out"]["products"] == 8
    assert facts["starts"][0]["from_step"] == 0 and facts["summary"]["done"]
    assert facts["summary"]["last_checkpoint"].endswith("step_000003")
    best = read_best(options.output_dir)
    assert facts["summary"]["best"] == {"step": best["step"], "mean_reward": best["mean_reward"]}
    assert len(best["rewards"]) == facts["held_out"]["products"]
    assert best["mean_reward"] == pytest.approx(np.mean(list(best["rewards"].values())))
    resumed = replace(options, resume="auto", max_steps=4)
    training.train(resumed)
    facts = json.loads((Path(options.output_dir) / "run.json").read_text())
    assert [start["from_step"] for start in facts["starts"]] == [0, 3]


def give_rewards(monkeypatch, evaluations):
    """Let each evaluation answer so many held-out products, and give every answer of each a reward."""
    good, evaluations = upkeep.evaluate, iter(evaluations)

    def evaluate(*args, **more):
        records, failures = good(*args, **more)
        return [replace(record, parts=[replace(part, reward=reward) for part in record.parts])
                for record, reward in zip(records, next(evaluations), strict=False) if reward is not None], failures

    monkeypatch.setattr(upkeep, "evaluate", evaluate)


def test_what_could_not_be_sampled_is_named_with_a_way_out(said):
    sample = Sample(row=3, product_id="B1", text="mug", label=(), photos=(), sheet="mugs.csv")
    warn_of_failures("no rollout", [RolloutFailure(sample, "out of memory while sampling 4 products x 12 answers"),
                                    RolloutFailure(sample, "photo truncated")])
    lines = "".join(said)
    assert "mugs.csv row 3 (B1): out of memory while sampling 4 products x 12 answers; lower --rollout_batch" in lines
    assert "no rollout: mugs.csv row 3 (B1): photo truncated\n" in lines


def test_the_best_weights_are_kept_and_a_run_that_stands_still_ends(shop, tmp_path, monkeypatch, said):
    # before training, then after each step; twice
    give_rewards(monkeypatch, [[reward] * 9 for reward in (0.9, 0.1, 0.3, 0.2, 0.3, 0.9, 0.2)])
    options = train_options(shop, tmp_path, eval_every=1, save_every=1, keep_last=0, max_steps=9, stop_after=2)
    final = training.train(options)
    assert final.name == "step_000004" and "no better held-out reward for 2 evaluations" in "".join(said)
    best = read_best(options.output_dir)
    assert (best["step"], best["mean_reward"]) == (2, 0.3) and set(best["rewards"].values()) == {0.3}
    best, second = (load_file(Path(options.output_dir) / name / "model.safetensors")
                    for name in ("best", "step_000002"))
    assert all((best[name] == second[name]).all() for name in best)
    assert options_of(str(Path(options.output_dir) / "best")).lr == options.lr
    training.train(replace(options, overwrite_output_dir=True, stop_after=0, max_steps=1))
    assert read_best(options.output_dir)["step"] == 1  # nothing is left of the earlier run


def test_the_best_is_chosen_on_products_that_both_evaluations_answered(shop, tmp_path, monkeypatch):
    # Without the hard product, whose photo is lost, say, the mean is higher and the model no better.
    give_rewards(monkeypatch, [[], [0.8, 0.2], [0.7, None], [0.7, 0.4], [None, 0.5], [0.9, 0.4]])
    options = train_options(shop, tmp_path, eval_every=1, max_steps=5, save_every=9, eval_fraction=0.5)
    kept = []
    monkeypatch.setattr(upkeep, "keep_best", lambda *args, good=upkeep.keep_best: kept.append(args[2]) or
                        good(*args))
    training.train(options)
    assert kept == [1, 3, 4]


@pytest.mark.parametrize(("rewards", "earlier", "better"), [
    ({"a": 0.5, "b": 0.4}, {"a": 0.4, "b": 0.4}, True), ({"a": 0.5, "b": 0.3}, {"a": 0.4, "b": 0.4}, False),
    ({"a": 0.7}, {"a": 0.8, "b": 0.2}, False), ({"a": 0.5, "c": 0.0}, {"a": 0.4, "b": 0.9}, True),
    ({"c": 0.1}, {"a": 0.9}, True),  # other products are held out now
])
def test_means_are_compared_over_the_same_products(rewards, earlier, better):
    assert is_better(rewards, {"step": 1, "mean_reward": 0.5, "rewards": earlier}) is better
    assert is_better(rewards, None) and is_better(rewards, {"step": 1, "mean_reward": 0.5})


def test_without_save_best_nothing_is_kept_or_gathered(shop, tmp_path, monkeypatch):
    options = train_options(shop, tmp_path, save_best=False)
    gathered = []
    monkeypatch.setattr(upkeep, "whole_weights", lambda *args, **more: gathered.append(1))
    record = Record(Sample(2, "p", "mug", (9.0,), (), "s.xlsx"), ["9"], [score_answer("9", (9.0,))])
    for save_best, count in ((False, 0), (True, 1)):
        run = SimpleNamespace(policy=None, processes=training.Processes(1, 1), learner=SimpleNamespace(sharded=True))
        with monkeypatch.context() as patch:
            patch.setattr(upkeep, "keep_best", lambda *args: None)
            assert not upkeep.keep_if_best(run, replace(options, save_best=save_best), 5, [record])
        assert len(gathered) == count
    for changes in ({"save_best": False, "stop_after": 2}, {"stop_after": 2, "eval_every": 0}):
        with pytest.raises(OptionError, match="--stop_after"):
            check_options(replace(train_options(shop, tmp_path), **changes))
