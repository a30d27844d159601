"""Adapters: on the right layers, without effect when off, saved, resumed and merged without a difference."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import export
import run
import test_model
import train_vlm_parallel as training
from config import AnswerOptions, CompareOptions, ExportOptions
from ground.errors import OptionError
from ground.options import check_options, read_options, write_options
from models import lora
from models.family import ModelError
from models.loading import load_minicpm
from models.policy import Policy
from models.trainable import parameter_table, set_trainable, warn_without_gradient
from own_reward import Scorer
from rounding import float64
from runs import tags, train_options
from sheets.photos import open_photo
from sheets.samples import cached_photo_path
from tiny import adapted, parts_of, sample, three_prompts
from training.trained import TrainedModel, options_of

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
DELTA_NET = {f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def scored(policy, prompts, generation, **options):
    return policy.log_probs(prompts, generation.completions, generation.action_mask, 0.7, **options)[0]


def test_every_linear_layer_of_the_language_model_gets_one_and_nothing_else(policy):
    wanted = set()
    for layer in policy._language_model.layers:
        wanted |= MLP | (ATTENTION if hasattr(layer, "self_attn") else DELTA_NET)
    targets = policy.family.lora_targets(policy.model)
    assert {".".join(name.split(".")[-2:]) for name in targets} == wanted
    assert len(targets) == sum(7 if hasattr(layer, "self_attn") else 8 for layer in policy._language_model.layers)
    path = {name for name, module in policy.model.named_modules() if module is policy._language_model}.pop()
    assert all(name.startswith(f"{path}.layers.") for name in targets)
    kind, head = type(policy.model), policy._head
    policy.add_adapter(4, None, "base")
    inside = {name.split(".lora_A")[0] for name, _ in policy.model.named_parameters() if ".lora_A" in name}
    assert inside == set(targets)
    assert type(policy.model) is kind and policy.family.head(policy.model) is head


def test_vision_is_known_by_name(policy):
    assert policy.family.vision_names and all(
        policy.model.get_submodule(name) in policy.family.vision_modules(policy.model)
        for name in policy.family.vision_names)


def test_only_adapters_get_gradients(policy):
    policy.add_adapter(4, None, "base")
    parameters = set_trainable(policy, train_vision=False)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    prompts = three_prompts(policy)
    scored(policy, prompts, sample(policy, prompts)).sum().backward()
    assert warn_without_gradient(policy) == []
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert (parameter.grad is not None) == (".lora_" in name)
        if ".lora_B" in name:
            assert parameter.grad.any(), name
    trains = [line for line in parameter_table(policy).split("\n")[1:-1] if line.split()[-1] != "0"]
    assert trains and all(line.startswith("adapter: ") for line in trains)
    assert {line.split()[1] for line in trains} <= {"self_attn", "linear_attn", "mlp"}


def test_a_fresh_adapter_changes_nothing_and_a_switched_off_one_neither(policy):
    prompts = three_prompts(policy)
    with float64(policy), torch.no_grad():
        generation = sample(policy, prompts)
        base = scored(policy, prompts, generation)
        policy.add_adapter(4, None, "base")
        assert (scored(policy, prompts, generation) - base).abs().max() < 1e-10
        for name, parameter in policy.model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        reference = policy.without_adapter()
        assert reference.model is policy.model
        assert (scored(policy, prompts, generation) - base).abs().max() > 1e-2
        assert (scored(reference, prompts, generation) - base).abs().max() < 1e-10
        again = sample(reference, prompts)
        assert torch.equal(again.completions, generation.completions)
        assert (scored(policy, prompts, generation) - base).abs().max() > 1e-2  # switched on again


@pytest.mark.parametrize("columns", [3, 12])
def test_shared_rows_equal_plain_rows_with_the_adapter_on_and_off(policy, columns):
    prompts = three_prompts(adapted(policy))
    generation = sample(policy, prompts, columns=columns)
    for each in (policy, policy.without_adapter()):
        shared, plain = (scored(each, prompts, generation, exact_path=exact) for exact in (False, True))
        assert (shared - plain).abs().max() < 1e-4
    rescored = scored(policy, prompts, generation)
    assert (rescored - generation.old_log_probs).abs().max() < 1e-4  # sampled with the adapter on


def test_gradients_of_shared_rows_equal_those_of_plain_rows(policy):
    prompts = three_prompts(adapted(policy))
    parameters = set_trainable(policy, train_vision=False)
    generation = sample(policy, prompts)
    gradients = [torch.autograd.grad(scored(policy, prompts, generation, exact_path=exact).sum(), parameters)
                 for exact in (False, True)]
    scale = max(float(gradient.abs().max()) for gradient in gradients[1])
    assert all((one - other).abs().max() <= 1e-4 * scale for one, other in zip(*gradients, strict=True))


def remade(policy, request):
    """The same policy once more, without an adapter."""
    if policy.family.runs_remote_code:
        return Policy(*load_minicpm(str(request.getfixturevalue("standin")), trust_remote_code=True))
    kind = policy.model.config.model_type
    if kind == "minicpmv4_6":
        kind = "hybrid" if "linear_attention" in policy.model.config.text_config.layer_types else "dense"
    if kind == "minicpmv4_7":
        kind = "v47"
    return Policy(*parts_of(kind, policy.tokenizer, policy.image_processor))


def test_plain_peft_loads_a_saved_adapter(policy, request, tmp_path):
    prompts = three_prompts(adapted(policy))
    generation = sample(policy, prompts)
    policy.save("base", tmp_path)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "model.safetensors").exists()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "base")
    assert (tmp_path / "tokenizer_config.json").exists() and (tmp_path / "preprocessor_config.json").exists()
    by_peft, by_us, broken = (remade(policy, request) for _ in range(3))
    PeftModel.from_pretrained(by_peft.model, tmp_path)
    by_us.load_weights(str(tmp_path))
    with torch.no_grad():
        expected = scored(policy, prompts, generation)
        # Other tensors at other places of memory: kernels may round otherwise. The adapter moves 1e-2 and more.
        assert (scored(by_peft, prompts, generation) - expected).abs().max() < 1e-5
        assert (scored(by_us, prompts, generation) - expected).abs().max() < 1e-5
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") and tensor.dtype == torch.float32
               for name, tensor in state.items())
    from safetensors.torch import save_file

    save_file(dict(list(state.items())[1:]), tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=next(iter(state)).replace(".", r"\.")):
        broken.load_weights(str(tmp_path))


def test_a_bfloat16_base_keeps_float32_adapters(policy, request):
    parts = remade(policy, request)
    half = Policy(parts.model.bfloat16(), parts.tokenizer, parts.image_processor, torch.bfloat16)
    half.add_adapter(4, None, "base")
    parameters = set_trainable(half, train_vision=False)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert half._language_model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    prompts = three_prompts(half)
    generation = sample(half, prompts)
    log_probs = scored(half, prompts, generation)
    assert (log_probs - generation.old_log_probs).abs().max() < 0.5
    log_probs.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in parameters)


def lora_options(shop, output, **changes):
    return train_options(shop, output, **{"lora_rank": 4, "eval_every": 0, "lr": 1e-2, **changes})


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    """The last checkpoint of four steps with adapters, and the options."""
    options = lora_options(shop, tmp_path_factory.mktemp("adapted"), max_steps=4, save_every=2, eval_fraction=0.5)
    return training.train(options), options


def adapter_weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_trains_the_adapter_and_the_reference_stays_the_base(trained, shop):
    checkpoint, options = trained
    assert {path.name for path in checkpoint.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "options.yaml", "trainer_state.pt", "prompt.txt",
        "tokenizer.json", "preprocessor_config.json"}
    assert any(tensor.any() for name, tensor in adapter_weights(checkpoint).items() if "lora_B" in name)
    curves = tags(options.log_dir)
    assert curves["kl_divergence"][0][1] == pytest.approx(0, abs=1e-6) and curves["kl_divergence"][3][1] > 1e-5
    policy, reference, shares_vision = training.load_models(options, checkpoint)
    untouched = Policy(*load_minicpm(str(shop / "model")))
    prompts = three_prompts(untouched)
    generation = sample(untouched, prompts)
    with torch.no_grad():
        base = scored(untouched, prompts, generation)
        assert shares_vision and (scored(reference, prompts, generation) - base).abs().max() < 1e-5
        assert (scored(policy, prompts, generation) - base).abs().max() > 1e-4
    assert training.load_models(replace(options, kl_weight=0.0), None)[1] is None


def test_resuming_is_bit_for_bit(trained, shop, tmp_path):
    whole, options = trained
    parted = replace(options, output_dir=str(tmp_path / "run"), log_dir=str(tmp_path / "logs"))
    training.train(replace(parted, max_steps=2))
    resumed = training.train(replace(parted, resume="auto"))
    one, other = adapter_weights(whole), adapter_weights(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    states = [torch.load(path / "trainer_state.pt", weights_only=True)["optimizer"]["state"]
              for path in (whole, resumed)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == len(one)
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())


def test_weights_that_do_not_go_with_the_options_are_refused(trained, shop, tmp_path):
    checkpoint, _ = trained
    with pytest.raises(ModelError, match="--lora_rank, or merge it"):
        training.load_models(train_options(shop, tmp_path, checkpoint_path=str(checkpoint)), None)
    with pytest.raises(OptionError, match="give whole weights as --model_path"):
        training.load_models(lora_options(shop, tmp_path, checkpoint_path=str(shop / "model")), None)
    with pytest.raises(OptionError, match="has 4 and 8"):
        training.load_models(lora_options(shop, tmp_path, checkpoint_path=str(checkpoint), lora_rank=8), None)
    policy, _, _ = training.load_models(lora_options(shop, tmp_path, checkpoint_path=str(checkpoint)), None)
    assert lora.rank_of(policy.adapter) == (4, 8)


def test_an_adapter_of_another_model_is_refused(trained, standin, tmp_path):
    with pytest.raises(ModelError, match="another model"):
        Policy(*load_minicpm(str(standin), trust_remote_code=True)).load_weights(str(trained[0]))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ModelError, match="IA3"):
        lora.base_of(tmp_path)


def test_comparing_and_answering_with_an_adapter(trained, capsys):
    checkpoint, options = trained
    run.main(CompareOptions(checkpoint_path=str(checkpoint), rows="all", greedy=True, ablate=True, device="cpu"))
    report = json.loads((checkpoint.parent / "compare" / "compare.json").read_text())
    assert [model["path"] for model in report["models"][:2]] == [options.model_path, str(checkpoint)]
    answers = [[product["models"][name]["answers"][0]["answer"] for product in report["products"]]
               for name in ("before", "after")]
    assert answers[0] != answers[1]
    capsys.readouterr()

    def answer(**paths):
        test_model.answer_product(AnswerOptions(text="box 1", device="cpu", **paths))
        return capsys.readouterr().out

    with_adapter = answer(model_path=str(checkpoint))
    assert with_adapter == answer(checkpoint_path=str(checkpoint))
    assert with_adapter == answer(model_path=options.model_path, checkpoint_path=str(checkpoint))
    assert with_adapter != answer(model_path=options.model_path)
    with pytest.raises(ModelError, match="no folder with a config.json"):
        answer(model_path=str(checkpoint), checkpoint_path=str(checkpoint))


@pytest.mark.parametrize(("changes", "said"), [
    ({"lora_alpha": 8}, "--lora_alpha 8 needs --lora_rank"),
    ({"quantize": "4bit"}, "--quantize 4bit needs --lora_rank"),
    ({"lora_rank": 4, "train_vision": True}, "adapters are on the language model only"),
    ({"lora_rank": 4, "quantize": "4bit", "sharding": "fsdp"}, "take --sharding none, or --quantize none"),
    ({"lora_rank": 0}, "--lora_rank 0: must be above 0"),
])
def test_options_that_contradict_are_refused(shop, tmp_path, changes, said):
    with pytest.raises(OptionError) as refusal:
        check_options(train_options(shop, tmp_path, **changes))
    assert said in str(refusal.value)


def test_four_bits_say_what_is_missing(shop, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_minicpm(str(shop / "model"), quantize="4bit")


def test_four_bit_layers_are_kept_from_packing():
    packs = torch.nn.Linear(1, 1)
    packs.support_avx512bf16_for_cpu = True
    lora.keep_gradients(torch.nn.Sequential(packs))
    assert packs.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("kind", ["hybrid", "qwen2_5_vl", "idefics3", "remote"])
def test_gradients_through_four_bits_are_those_through_the_same_weights_in_full(
        kind, request, tokenizer, image_processor, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
    folder = tmp_path / "model"
    if kind == "remote":
        folder = request.getfixturevalue("standin")
    else:
        for part in parts_of(kind, tokenizer, image_processor):
            part.save_pretrained(folder)
    quantized, full = (Policy(*load_minicpm(str(folder), trust_remote_code=True, quantize=quantize))
                       for quantize in ("4bit", "none"))
    layers = {name: module for name, module in quantized.model.named_modules()
              if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert set(layers) == set(quantized.family.lora_targets(quantized.model))
    with torch.no_grad():
        for name, layer in layers.items():
            full.model.get_submodule(name).weight.copy_(
                bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    torch.manual_seed(0)
    adapted(quantized)
    torch.manual_seed(0)
    adapted(full)
    prompts = three_prompts(full)
    generation = sample(quantized, prompts)  # without gradient first, as in training
    scores, gradients = [], []
    for policy in (quantized, full):
        scores.append(scored(policy, prompts, generation))
        gradients.append(torch.autograd.grad(scores[-1].sum(), set_trainable(policy, train_vision=False)))
    assert (scores[0] - scores[1]).abs().max() < 1e-4
    scale = max(float(gradient.abs().max()) for gradient in gradients[1])
    assert all((one - other).abs().max() <= 1e-4 * scale for one, other in zip(*gradients, strict=True))


def test_four_bits_train_compare_and_merge(shop, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
    checkpoint = training.train(lora_options(shop, tmp_path, quantize="4bit", max_steps=2))
    assert any(tensor.any() for name, tensor in adapter_weights(checkpoint).items() if "lora_B" in name)
    run.main(CompareOptions(checkpoint_path=str(checkpoint), rows="all", num_samples=1, device="cpu"))
    test_model.answer_product(AnswerOptions(model_path=str(checkpoint), text="box 1", device="cpu"))
    with float64():
        export.main(merge_options(checkpoint, tmp_path / "merged"))
    assert "4 products answered alike" in capsys.readouterr().out


def merge_options(checkpoint, output, **changes):
    return ExportOptions(**{"checkpoint_path": str(checkpoint), "output_path": str(output), "device": "cpu",
                            **changes})


def greedy_ids(policy, prompts):
    generation = sample(policy, prompts, group_size=1, temperature=None)
    return [row[mask].tolist() for row, mask in zip(generation.completions, generation.action_mask, strict=True)]


def test_the_merged_folder_answers_as_base_and_adapter_do(trained, tmp_path, capsys):
    checkpoint, options = trained
    merged = tmp_path / "merged"
    with float64():
        export.main(merge_options(checkpoint, merged))
    assert "4 products answered alike" in capsys.readouterr().out
    assert not (merged / "adapter_config.json").exists() and (merged / "prompt.txt").is_file()

    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, tokenizer, image_processor = load_minicpm(str(merged))
    with float64():
        policy, reference, _ = training.load_models(options, checkpoint)
        prompts = three_prompts(policy)
        by_adapter = greedy_ids(policy, prompts)
        assert greedy_ids(Policy(model.double(), tokenizer, image_processor), prompts) == by_adapter
        assert greedy_ids(reference, prompts) != by_adapter
    test_model.answer_product(AnswerOptions(model_path=str(merged), text="box 1", device="cpu"))
    training.train(lora_options(Path(options.model_path).parent, tmp_path, model_path=str(merged), max_steps=1))


@pytest.mark.parametrize("kind", ["hybrid", "qwen2_5_vl", "qwen3_vl", "idefics3", "remote"])
def test_every_family_exports(kind, request, tmp_path, tokenizer, image_processor, capsys):
    folder = tmp_path / "model"
    if kind == "remote":
        folder = request.getfixturevalue("standin")
    else:
        for part in parts_of(kind, tokenizer, image_processor):
            part.save_pretrained(folder)
    policy = Policy(*load_minicpm(str(folder), trust_remote_code=True))
    policy.save(str(folder), tmp_path / "whole")
    adapted(policy).adapter.peft_config["default"].base_model_name_or_path = str(folder)
    policy.save(str(folder), tmp_path / "adapter")
    with float64():
        export.main(merge_options(tmp_path / "adapter", tmp_path / "merged", trust_remote_code=True))
    assert "4 products answered alike" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()} | {
        "options.yaml", "serving.json", "generation_config.json"}


def test_a_merge_that_answers_otherwise_is_refused_and_leaves_nothing(trained, tmp_path, monkeypatch):
    checkpoint, _ = trained
    good = lora.merge_adapter

    def forgetful(adapter):
        good(adapter)
        with torch.no_grad():
            adapter.base_model.model.model.language_model.layers[-1].mlp.down_proj.weight.neg_()

    monkeypatch.setattr(lora, "merge_adapter", forgetful)
    with pytest.raises(ModelError, match=r"row 2: checkpoint .*, written "):
        export.main(merge_options(checkpoint, tmp_path / "out" / "merged"))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_without_the_training_sheet_says_what_it_compares(trained, tmp_path, said):
    checkpoint = tmp_path / "moved"
    shutil.copytree(trained[0], checkpoint)
    options = read_options(checkpoint / "options.yaml")
    write_options(replace(options, data_path="gone.xlsx", quantize="4bit"), checkpoint / "options.yaml")
    with float64():
        export.main(merge_options(checkpoint, tmp_path / "merged", num_products=2))
    assert "made-up texts" in "".join(said) and "trained on a base in 4bit" in "".join(said)
    assert read_options(tmp_path / "merged" / "options.yaml").quantize == "none"


def test_exports_that_can_not_be_are_refused(shop, tmp_path):
    for changes, message in (({"checkpoint_path": ""}, "--checkpoint_path is missing"),
                             ({"output_path": ""}, "--output_path is missing"),
                             ({"output_path": str(shop)}, "is there already")):
        with pytest.raises(OptionError, match=message):
            check_options(merge_options("x", tmp_path / "merged", **changes))


def test_whole_weights_are_exported_with_prompt_and_sampling(shop, tmp_path, capsys):
    checkpoint = training.train(train_options(shop, tmp_path, max_steps=1, eval_every=0, temperature=0.8))
    export.main(merge_options(checkpoint, tmp_path / "served"))
    assert "4 products answered alike" in capsys.readouterr().out
    assert not (tmp_path / "served" / "trainer_state.pt").exists()
    one, other = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "served"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    from transformers import GenerationConfig

    sampling = GenerationConfig.from_pretrained(tmp_path / "served")
    assert (sampling.do_sample, sampling.temperature, sampling.top_p, sampling.top_k) == (True, 0.8, 1.0, 0)
    assert sampling.max_new_tokens == 8 and sampling.repetition_penalty == 1.0
    serving = json.loads((tmp_path / "served" / "serving.json").read_text())
    example = serving["example"]
    assert example["photos"] == ["example/photo_1.png"]
    assert open_photo(tmp_path / "served/example/photo_1.png").tobytes() == open_photo(
        cached_photo_path("https://shop.invalid/0.png", shop / "photos")).tobytes()
    assert serving["user_message"]["2 photos"] == "{text}" and serving["photos"]["at_most"] == 5
    policy = Policy(*load_minicpm(str(tmp_path / "served")))
    ids = torch.tensor(example["prompt_ids"])
    assert sampling.eos_token_id == policy.stop_ids.tolist()
    assert policy.tokenizer.decode(ids) == example["prompt"] and "box 0" in example["prompt"]
    served = TrainedModel(policy, options_of(str(checkpoint)), Scorer())
    samples = export.choose_samples(merge_options(checkpoint, "x"), training.TrainOptions(
        data_path=str(shop / "data.xlsx"), image_cache_dir=str(shop / "photos")))
    assert example["greedy_answer"] == export.answer(served, samples)[0].answers[0]
