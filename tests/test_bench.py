"""The benchmarks: operations counted by hand and against torch's counter, the tables, a step of each that is run."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import count
import pieces
import step
from cases import GRID, QUICK, Case, cases_named, make_sample, write_model
from ground.errors import OptionError
from meter import Meter
from ours import make_run, step_options

ROOT = Path(__file__).resolve().parent.parent

TEXT = count.Text(layers=2, hidden=4, heads=2, kv_heads=1, head_width=3, intermediate=5, vocabulary=7)
TOKEN, PAIR, LOGITS = 2 * (4 * 6 + 2 * 4 * 3 + 6 * 4 + 3 * 4 * 5), 2 * 2 * 6, 28  # 264, 24, 28
WORK = count.Work(prompt=3, group=2, answer=2, vision=1000)


def test_layers_counted_by_hand():
    assert (TEXT.token, TEXT.pair, TEXT.logits) == (TOKEN, PAIR, LOGITS) == (264, 24, 28)


def test_trl_counted_by_hand():
    # A row has five tokens: 15 causal pairs; a prompt of three 6. Decoding reads one token, which sees four.
    row = 5 * TOKEN + 15 * PAIR + 2 * LOGITS
    assert count.trl_way(TEXT, WORK) == {
        "generate": 2 * (1000 + 3 * TOKEN + 6 * PAIR + TOKEN + 4 * PAIR + 2 * LOGITS),
        "reference": 2 * (1000 + row), "train": 6 * (1000 + row)}
    frozen = count.trl_way(TEXT, replace(WORK, train_vision=False))
    assert frozen["train"] == 2 * 1000 + 6 * row


def test_ours_counted_by_hand():
    # The shared row: 3 + 4 tokens; 6 pairs in the prompt, 4 x 3 to it, 3 within each answer.
    row = 7 * TOKEN + 24 * PAIR + 4 * LOGITS
    assert count.our_way(TEXT, WORK) == {
        "generate": 1000 + 3 * TOKEN + 6 * PAIR + 2 * (TOKEN + 4 * PAIR + 2 * LOGITS),
        "reference": 1000 + row, "train": 3 * (1000 + row)}
    frozen = count.our_way(TEXT, replace(WORK, train_vision=False))
    assert (frozen["reference"], frozen["train"]) == (row, 3 * row)
    assert frozen["generate"] == count.our_way(TEXT, WORK)["generate"]


def test_photos_counted_by_hand():
    merger = count.Vision(layers=2, full_layers=1, hidden=3, intermediate=4, mlp_products=3, patch_values=5, window=4,
                          out_hidden=2, queries=0)
    # 6 x 4 patches, 6 merged tokens; one layer sees all, one windows of 4 x 4 and 2 x 4.
    linear = 24 * (5 * 3 + 2 * (4 * 9 + 3 * 3 * 4))
    assert merger.photo(6, 4) == linear + (24 ** 2 + 16 ** 2 + 8 ** 2) * 2 * 3 + 6 * (12 * 12 + 12 * 2)
    resampler = replace(merger, full_layers=2, window=0, queries=7)
    keys, queries = 24 * (3 * 2 + 2 * 4), 7 * (3 * 4 + 2 * 24 * 2)
    assert resampler.photo(6, 4) == linear + 2 * 24 ** 2 * 2 * 3 + keys + queries


def test_the_limit_of_a_long_prompt_is_the_group():
    text, _ = count.small_model()
    work = count.Work(prompt=10 ** 6, group=12, answer=32, vision=0)
    assert 11.9 < count.limit(text, work) < 12


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small model's folder."""
    folder = tmp_path_factory.mktemp("small")
    write_model(folder)
    return folder


@pytest.mark.parametrize("exact_path", [False, True])
def test_count_agrees_with_torchs_counter(small, exact_path, monkeypatch):
    sample = make_sample(QUICK, small)
    run = make_run(step_options(small / "model", QUICK))
    completions = torch.zeros(4, 32, dtype=torch.long)

    def attention(query, key, value, *args, out_shape=None, **kwargs):
        return sdpa_flop(query, key, value)  # the counter knows the GPU kernels' names only

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: attention}) as counter:
        run.policy.log_probs([run.encoder.encode(sample)], completions, completions == 0, 1.0, exact_path=exact_path)
    text, vision = count.small_model()
    work = count.work_of(QUICK, vision)
    expected = count.our_way(text, work)["reference"]
    if exact_path:
        expected = count.trl_way(text, work)["reference"] - 3 * work.vision  # our slow path has photos once as well
    # The counter takes a masked or causal pair for a computed one.
    assert 0.97 * expected < counter.get_total_flops() / 2 < 1.1 * expected


def test_prompts_have_exactly_the_length_of_the_case(small):
    for case in (*GRID[:2], QUICK):
        sample = make_sample(case, small)
        run = make_run(step_options(small / "model", case))
        assert len(run.encoder.encode(sample).input_ids) == case.prompt_tokens


def test_cases_have_names():
    assert cases_named("300x12,1000x12frozen") == [Case(300, 12), Case(1000, 12, train_vision=False)]
    with pytest.raises(OptionError, match="'7x7' is no case.*known: 300x12, "):
        cases_named("7x7")


RESULT = {"case": {"photos": 5, "prompt_tokens": 300, "group_size": 12, "train_vision": False, "name": "300x12frozen"},
          "ours": {"repeats": [{"prepare": 0.5, "generate": 1, "reference": 0.5, "train": 2},
                               {"prepare": 0.5, "generate": 3, "reference": 0.5, "train": 1},
                               {"prepare": 0.5, "generate": 2, "reference": 9.5, "train": 3}],
                   "peaks": {"generate": 50.0, "train": 100.0}}}
TRL = {"trl": {"micro_batch": 4, "repeats": [{"prepare": 1, "generate": 9, "reference": 5, "train": 20}],
               "tried": [{"micro_batch": 4, "checkpointing": True, "seconds": {"generate": 10, "train": 31}}],
               "peaks": {"train": 450.0}}, "trl_checkpointed": {"peaks": {"train": 200.0}}}


def test_table_gives_medians_and_ratios():
    assert step.table([RESULT | TRL]).splitlines()[2] == (
        "| 5, 300, 12, vision frozen | 1.00 / 9.00 / 5.00 / 20.00 / 35.00 (micro-batch 4; checkpointed 41.00) | "
        "0.50 / 2.00 / 0.50 / 2.00 / 5.00 | 7.0 | 450 (200) | 100 | 4.5 |")
    assert "| 5, 300, 12, vision frozen |  | 0.50 / 2.00 / 0.50 / 2.00 / 5.00 |  |  | 100 |  |" in step.table([RESULT])


def test_growth_compares_the_same_prompts():
    def result(group_size, seconds, peak):
        case = RESULT["case"] | {"group_size": group_size, "train_vision": True}
        return {"case": case, "ours": {"repeats": [{"train": seconds}], "peaks": {"train": peak}}}

    assert step.growth([result(12, 3.0, 110.0), RESULT, result(4, 2.0, 100.0)]) == [
        "300 prompt tokens, G 4 -> 12: ours 1.50 times the time, 1.10 times the memory"]


def test_count_prints_the_measured_ratio(tmp_path):
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"cases": [RESULT | TRL, RESULT]}))
    assert count.measured_ratios(str(path)) == {"300x12frozen": 7.0}
    row = count.table([("small", TEXT, WORK, 7.0)]).splitlines()[2]
    assert row.endswith(f"| {count.limit(TEXT, WORK):.1f} | 7.0 |")


def test_meter_charges_the_innermost_phase():
    meter = Meter()
    with meter.phase("generate"):
        sum(range(10 ** 6))
        with meter.phase("prepare"):
            pass
    meter.charge()
    assert set(meter.seconds) == {"train", "generate", "prepare"}
    assert meter.seconds["generate"] > 10 * meter.seconds["prepare"]


def test_meter_finds_the_peak_of_each_phase():
    meter = Meter(memory=True)
    with meter.phase("large"):
        torch.ones(64, 2 ** 18)  # 64 MiB, gone again
    with meter.phase("small"):
        torch.ones(1, 2 ** 18)
    assert meter.peaks["large"] > meter.peaks["small"] + 50


def test_a_step_taken_apart():
    seconds = {"model": 0.8, "policy": 0.1, "prepare": 0.05, "generate": 0.02, "reference": 0.01, "train": 0.02}
    lines = pieces.apart_table(seconds).splitlines()
    assert lines[2].endswith("| 800.0 | 80.0% |") and lines[4] == "| photo files, pixels, prompt | 50.0 | 5.0% |"
    assert lines[-1] == "| all but model and policy | 100.0 | 10.0% |"


def test_a_step_is_taken_apart_and_put_together_again(small):
    case = replace(QUICK, group_size=2)
    settings = step_options(small / "model", case)
    stock = torch.Tensor.backward
    seconds = pieces.take_apart(make_run(settings), settings, case, make_sample(case, small), repeats=1)
    assert torch.Tensor.backward is stock
    assert set(seconds) == {"model", "policy", "prepare", "generate", "reference", "train"}
    assert seconds["model"] > max(value for name, value in seconds.items() if name != "model")


def test_operators_of_a_phase_dearest_first():
    rows = [("aten::mm", 60, 7), ("aten::add", 30, 2), ("aten::cat", 10, 1)]
    assert pieces.operator_table({"prepare": rows, "train": rows}, 2).splitlines()[2:] == [
        "| train | aten::mm | 7 | 60% |", "| train | aten::add | 2 | 30% |"]


@pytest.mark.parametrize("flags, said", [
    ({"cases": "7x7"}, "'7x7' is no case"), ({"micro_batches": "2,x"}, "--micro_batches 2,x: give numbers above 0")])
def test_wrong_options_are_named(flags, said):
    with pytest.raises(OptionError, match=said):
        step.main(step.StepOptions(**flags))


@pytest.mark.parametrize("name", ["step", "count", "pieces", "demo_step", "real_weights", "gpu", "learning"])
def test_help_answers(name):
    done = subprocess.run([sys.executable, f"bench/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout


def run_quick(tmp_path, *flags):
    path = tmp_path / "step.json"
    done = subprocess.run([sys.executable, "bench/step.py", "--quick", "--json", str(path), *flags], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())["cases"][0], done.stdout


def test_our_side_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "keep_memory", lambda: None)  # it would hold for the tests behind this one
    step.main(step.StepOptions(quick=True, no_trl=True, json=str(tmp_path / "step.json")))
    result, said = json.loads((tmp_path / "step.json").read_text())["cases"][0], capsys.readouterr().out
    assert set(result["ours"]["repeats"][0]) == set(step.PHASES)
    assert all(seconds > 0 for seconds in result["ours"]["repeats"][0].values())
    assert result["ours"]["peaks"]["train"] > 10
    assert "| 5, 100, 4 |" in said


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: bench/requirements.txt")
def test_both_sides_do_the_same(tmp_path):
    result, _ = run_quick(tmp_path, "--micro_batches", "2")
    assert result["checks"]["prompt_tokens"] == 100 and result["checks"]["generated"] == 4 * 32
    assert result["checks"]["log_probs_within"] < 1e-4
    assert set(result["trl"]["repeats"][0]) == set(step.PHASES)
