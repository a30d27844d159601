"""scaling.md: the count against bytes that are measured at small size, and its tables against the count.

Print the tables with PYTHONPATH=. python tests/test_scaling.py.
"""

import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from config import TrainOptions
from ground.options import parse_options
from models.footprint import Work, footprint, kept_in_a_layer, shape_of

ROOT = Path(__file__).resolve().parent.parent
PROMPT, GROUP = 256, 2
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 16,
         "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 4}


@pytest.fixture(scope="module")
def enlarged(tokenizer, image_processor):
    """Makes a model of a kind, small but not tiny: beside its layers the rest hardly counts."""
    from tiny import parts_of

    def make(kind):
        model, tokens, processor = parts_of(kind, tokenizer, image_processor)
        text = model.config.text_config
        for name, value in SIZES.items():
            setattr(text, name, value)
        text.layer_types = ["full_attention"] * 4 if kind != "hybrid" else ["linear_attention"] * 3 + ["full_attention"]
        text.rope_parameters["mrope_section"] = [2, 3, 3]
        if hasattr(model.config.vision_config, "out_hidden_size"):
            model.config.vision_config.out_hidden_size = SIZES["hidden_size"]
        return type(model)(model.config), tokens, processor

    return make


@contextmanager
def no_room_for_copies():
    """Lets the making of a rollout's copies of weights run out of memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.lean.LeanDecoder", Mock(side_effect=torch.OutOfMemoryError))
        yield


def measure(parts, options):
    """Bytes that a step takes, each with what is counted for it."""
    import update
    from live_bytes import LiveBytes, held_by
    from models.family import Prompt
    from models.loading import DTYPES
    from models.policy import Policy
    from models.trainable import set_trainable

    (model, tokenizer, image_processor), dtype = parts, DTYPES[options.dtype]
    policy = Policy(model.to(dtype) if options.lora_rank else model, tokenizer, image_processor, dtype,
                    gradient_checkpointing=options.gradient_checkpointing)
    if options.lora_rank:
        policy.add_adapter(options.lora_rank, None, "base")
    parameters = set_trainable(policy, False)
    vision = [parameter for module in policy.family.vision_modules(model) for parameter in module.parameters()]
    shape = shape_of(policy.family.language_model(model), policy.family.head(model),
                     sum(parameter.numel() for parameter in vision))
    counted = footprint(shape, options, Work(PROMPT), on_gpu=False)
    learner = update.make_learner(policy, parameters, options)
    item = update.pretend(policy, Prompt(torch.full((PROMPT,), 5)), GROUP, options.max_length, (None,))
    item.advantages = torch.tensor([1.0, -1.0])
    found = {"weights": (held_by(model.parameters()), counted.held["weights"])}

    def measured(phase, work, already=0, counted=counted):
        with LiveBytes() as live:
            work()
        wanted = max(sum(parts.values()) for name, parts in counted.phases.items() if name.startswith(phase))
        found[phase] = already + live.peak, wanted

    update.backward(learner, [item], options, on_policy=True)
    gradients = held_by(parameter.grad for parameter in parameters)
    measured("update", lambda: update.backward(learner, [item], options, on_policy=True), gradients)
    learner.optimizer.step()
    moments = [value for state in learner.optimizer.state.values() for name, value in state.items() if name != "step"]
    found["Adam's moments"] = held_by(moments), counted.held["Adam's moments"]
    with LiveBytes() as live:
        log_probs = policy.log_probs(item.prompts, item.completions, item.action_mask, 1.0, item.features)
    forward = counted.phases["update, forward"]
    copies = 0 if options.gradient_checkpointing else forward.get("autocast's copies", 0)
    probabilities = 4 * item.action_mask.numel() * (shape.vocabulary + shape.width)  # few answers: they stay
    found["kept"] = live.now, forward["kept for the backward pass"] + copies + probabilities
    del log_probs
    if options.lora_rank:  # else the reference is another model, whose matrices need no copies
        measured("reference", lambda: update.log_probs_under(policy.without_adapter(), [item], learner.passes, 1.0))
    policy.stop_ids = policy.stop_ids[:0]  # answers as long as they may be
    counted = footprint(shape, replace(options, max_length=4), Work(PROMPT), on_gpu=False)
    uniforms = torch.rand(GROUP, 4, dtype=torch.float64)
    measured("rollout", lambda: policy.sample(item.prompts, [None], uniforms, 1.0), counted=counted)
    with_copies = found["rollout"]
    counted = footprint(shape, replace(options, max_length=4), Work(PROMPT), on_gpu=False, copies=False)
    with no_room_for_copies():
        measured("rollout", lambda: policy.sample(item.prompts, [None], uniforms, 1.0), counted=counted)
    found["rollout without copies"], found["rollout"] = found["rollout"], with_copies
    return found


# A word of what trains, in which dtype and how; each kind of layer in each of them at least once.
CASES = [("qwen2_5_vl", dtype, rank, checkpointed) for dtype in ("float32", "bfloat16") for rank in (None, 4)
         for checkpointed in (False, True)]
CASES += [("hybrid", "float32", None, False), ("hybrid", "bfloat16", None, True), ("hybrid", "bfloat16", 4, False),
          ("qwen3_vl", "bfloat16", None, False)]


@pytest.mark.parametrize(("kind", "dtype", "rank", "checkpointed"), CASES)
def test_the_count_is_what_is_measured(enlarged, kind, dtype, rank, checkpointed):
    """Within 2 % for what is held, 5 % for what the backward pass wants, 10 % for the fullest moment of a phase."""
    options = TrainOptions(dtype=dtype, lora_rank=rank, gradient_checkpointing=checkpointed, group_size=GROUP,
                           batch_size=1, max_length=65 if kind == "hybrid" else 17)  # delta nets fill answers up to 64
    found = measure(enlarged(kind), options)
    bounds = {"weights": 0.02, "Adam's moments": 0.02, "kept": 0.05}
    odd = {name: f"{counted / measured:.3f} of {measured}" for name, (measured, counted) in found.items()
           if abs(counted / measured - 1) > bounds.get(name, 0.1)}
    assert not odd


@pytest.mark.parametrize("length", [10, 24, 64])  # the room on a CPU is for 16 tokens at a time
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rollouts_keys_are_what_is_measured(enlarged, dtype, length):
    """Short prompts and many answers: beside the keys, their masks and the copies of weights little is left."""
    from live_bytes import LiveBytes
    from models.family import Prompt
    from models.loading import DTYPES
    from models.policy import Policy

    model, tokenizer, image_processor = enlarged("qwen2_5_vl")
    policy = Policy(model, tokenizer, image_processor, DTYPES[dtype])
    policy.stop_ids = policy.stop_ids[:0]
    options = TrainOptions(dtype=dtype, group_size=8, max_length=length, batch_size=1)
    uniforms = torch.rand(16, length, dtype=torch.float64)
    with LiveBytes() as live:
        policy.sample([Prompt(torch.full((16,), 5))] * 2, [None, None], uniforms, 1.0)
    shape = shape_of(policy.family.language_model(model), policy.family.head(model))
    rollout = footprint(shape, options, Work(16, sampled=2), on_gpu=False).phases["rollout"]
    assert sum(rollout.values()) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "hybrid"])
@pytest.mark.parametrize(("dtype", "rank"), [("float32", None), ("float32", 4), ("bfloat16", None), ("bfloat16", 4)])
def test_the_copies_for_a_rollout_are_what_the_decoder_says(enlarged, kind, dtype, rank):
    from models.lean import LeanDecoder
    from models.loading import DTYPES
    from models.policy import Policy

    (model, tokenizer, image_processor), dtype = enlarged(kind), DTYPES[dtype]
    policy = Policy(model.to(dtype) if rank else model, tokenizer, image_processor, dtype)
    if rank:
        policy.add_adapter(rank, None, "base")
    language_model = policy.family.language_model(model)
    options = TrainOptions(dtype=str(dtype).removeprefix("torch."), lora_rank=rank)
    shape = shape_of(language_model, policy.family.head(model))
    counted = footprint(shape, options, Work(PROMPT), on_gpu=False).phases["rollout"]["copies for the rollout"]
    assert counted == pytest.approx(LeanDecoder(language_model, dtype, torch.float32).copied, rel=0.01)


def test_keys_repeated_for_each_query_are_counted_on_a_gpu(enlarged, monkeypatch):
    """As the shared prefix does there; what it takes is measured with the same done on the CPU."""
    from models import shared_prefix
    good = shared_prefix.sdpa

    def repeating(query, key, value, mask, scaling):
        if mask is not None:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        return good(query, key, value, mask, scaling)

    options = TrainOptions(dtype="float32", group_size=GROUP, max_length=17, batch_size=1)
    without = measure(enlarged("qwen2_5_vl"), options)["kept"]
    monkeypatch.setattr(shared_prefix, "sdpa", repeating)
    more = measure(enlarged("qwen2_5_vl"), options)["kept"][0] - without[0]
    model, _, _ = enlarged("qwen2_5_vl")
    shape = shape_of(model.model.language_model, model.lm_head)
    counted = [footprint(shape, options, Work(PROMPT), on_gpu=on_gpu).phases["update, forward"] for on_gpu in (0, 1)]
    assert sum(counted[1].values()) - sum(counted[0].values()) == pytest.approx(more, rel=0.05)


# The models of the tables, their language models on meta: sizes of MiniCPM-o-2_6, and of MiniCPM-V-4.6's text model.
LONG, PHOTO_TOKENS, ANSWER = 1500, 1400, 30  # tokens of a prompt of five photos, of these; and of an answer
PRODUCTS = 16  # a step on each GPU
COMPUTE, MEMORY, CLOSE, FAR = 1.25e14, 1.4e12, 2e11, 1.6e11  # operations/s, bytes/s of a GPU; bytes/s between GPUs
SLOW = 1e10  # bytes/s of a machine with one card of 100 Gbit/s
# What trains, as options; sharding where there are more GPUs than one.
WAYS = {"LoRA": {"lora_rank": 32, "gradient_checkpointing": True}, "LoRA, no checkpointing": {"lora_rank": 32},
        "QLoRA": {"lora_rank": 32, "gradient_checkpointing": True, "quantize": "4bit"},
        "full": {"gradient_checkpointing": True},
        "full, Adam in 8 bits": {"gradient_checkpointing": True, "optimizer": "adamw_8bit"},
        "full, offloaded": {"gradient_checkpointing": True, "offload": True}}


@cache
def o26():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(vocab_size=151700, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                         num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    return shape_of(model.model, model.lm_head, vision=0.45e9)


@cache
def v46():
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(vocab_size=248320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24,
                               num_attention_heads=8, num_key_value_heads=2, head_dim=256, linear_num_key_heads=16,
                               linear_num_value_heads=16, tie_word_embeddings=True)
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(config)
    return replace(shape_of(model.model, model.lm_head), language=1.0e9)  # the vision counted as if it trained too


MODELS = {"MiniCPM-o-2_6": o26, "MiniCPM-V-4.6": v46}


def counted(shape, options, gpus, copies=True):
    """A step of the tables' lengths, as many products a pass as the options say, one where they leave it open."""
    work = Work(LONG, PHOTO_TOKENS, min(options.micro_batch_size or 1, options.batch_size),
                min(options.rollout_batch_size or 1, options.batch_size))
    return footprint(shape, options, work, gpus, copies=copies)


def fits(size, card):
    """Whether so many bytes leave a tenth of a card of so many GB free."""
    return size <= 0.9 * card * 1e9


def memory_rows():
    """model, way, GPUs, GB on each at the fullest moment, which that is, the same without copies of weights for the
    rollout where that is another, and whether that fits 24, 40, 80: without copies, if need be."""
    cases = [(way, 1, "fsdp" if "offload" in WAYS[way] else "none") for way in WAYS]
    cases += [("full", 4, "fsdp"), ("full", 8, "fsdp")]
    for name, model in MODELS.items():
        for way, gpus, sharding in cases:
            options = TrainOptions(dtype="bfloat16", sharding=sharding, **WAYS[way])
            count, without = (counted(model(), options, gpus, copies) for copies in (True, False))
            cells = [name, way, f"{gpus}", sharding, f"{count.peak / 1e9:.0f}", count.fullest,
                     f"{without.peak / 1e9:.0f}, {without.fullest}" if without.peak < count.peak else "",
                     *("yes" if fits(count.peak, card) else "without copies" if fits(without.peak, card) else "no"
                       for card in (24, 40, 80))]
            yield "| " + " | ".join(cells) + " |"


CONFIGS = sorted((ROOT / "configs").glob("minicpm*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_file_fits_the_gpus_that_it_names(path, tmp_path):
    """With as many products a pass as it asks for; where it leaves that open the pre-flight takes what fits."""
    (tmp_path / "data.xlsx").touch()
    options = parse_options(TrainOptions, "", ["--config", str(path), "--data_path", str(tmp_path / "data.xlsx")])
    gpus, card = re.search(r"_(?:(\d+)x)?(\d+)gb", path.stem).groups()
    assert len(options.gpu_ids) == (int(gpus) if gpus else 0) and options.dtype == "bfloat16"
    name = next(name for name in MODELS if path.stem.startswith(name.lower()))
    assert fits(counted(MODELS[name](), options, int(gpus or 1)).peak, int(card))  # with copies for the rollout
    assert f"`configs/{path.name}`" in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_what_is_offloaded_is_with_the_host():
    options = TrainOptions(dtype="bfloat16", sharding="fsdp", **WAYS["full, offloaded"])
    count, split = (counted(o26(), each, gpus) for each, gpus in ((options, 1), (replace(options, offload=False), 4)))
    assert not count.held and round(sum(count.host.values()) / 1e9) == 140  # 16 L + 4 V + 2 (L + V), as one without
    assert {name: size / 4 for name, size in count.host.items() if name != "gradients"} == split.held
    assert "gradients" not in count.phases["update, backward"]
    assert count.phases["rollout"] == split.phases["rollout"]
    # Adam in 8 bits: 8 - 2 - 8 / 256 bytes less for each number that trains
    small = counted(o26(), TrainOptions(dtype="bfloat16", **WAYS["full, Adam in 8 bits"]), 1)
    whole = counted(o26(), TrainOptions(dtype="bfloat16", **WAYS["full"]), 1)
    assert whole.peak - small.peak == pytest.approx(5.96875 * o26().language)


def part_rows():
    """What the fullest moment of some cases is made of, in GB."""
    for way, gpus, sharding in (("LoRA", 1, "none"), ("LoRA, no checkpointing", 1, "none"), ("full", 1, "none"),
                                ("full, Adam in 8 bits", 1, "none"), ("full, offloaded", 1, "fsdp"),
                                ("full", 8, "fsdp")):
        count = counted(o26(), TrainOptions(dtype="bfloat16", sharding=sharding, **WAYS[way]), gpus)
        parts = count.held | count.phases[count.fullest]
        said = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
        yield f"| {way} | {gpus} | {count.fullest} | {said} |"


def compute_seconds(shape, way):
    """Seconds of one GPU's own work in a step: prefill, decode, vision, reference, update."""
    size, answers = shape.language, 12 * ANSWER
    row = LONG + answers
    update = 8 if way == "full" else 6  # forward twice (checkpointing), backward by activations and by weights
    operations = PRODUCTS * size * (2 * LONG + 2 * answers + 2 * row + update * row)
    operations += PRODUCTS * 2 * shape.vision * 5 * 1024
    decode = PRODUCTS / 4 * (ANSWER + 10) * 2 * size  # four products together, until the longest answer ends
    return operations / COMPUTE + decode / MEMORY


def sent_bytes(shape, way, products_a_pass):
    """Bytes that each GPU sends a step, short of the factor (n - 1) / n."""
    if way == "LoRA":
        return 2 * 4 * 32 * shape.features  # gradients in float32, averaged: there and back
    passes = PRODUCTS / products_a_pass
    gathered_once = 2 * 2 * (shape.language + shape.vision)  # policy for the rollout, and the reference
    return gathered_once + passes * (2 + 2 + 4) * shape.language  # forward, backward, gradients in float32


def step_seconds(shape, way, gpus, products_a_pass, far=FAR):
    """Seconds of a step with nothing overlapped: work, then words."""
    speed = CLOSE if gpus <= 8 else far
    sent = sent_bytes(shape, way, products_a_pass) * (gpus - 1) / gpus
    return compute_seconds(shape, way) + sent / speed


def scaling_rows():
    """way, products a pass, then for each number of GPUs the seconds of a step and the share of work in it."""
    for way, products_a_pass in (("LoRA", 1), ("full", 1), ("full", 4), ("full", 16)):
        work = compute_seconds(o26(), way)
        cells = [way, f"{products_a_pass}"]
        for gpus, far in ((1, FAR), (8, FAR), (64, FAR), (64, SLOW)):
            seconds = step_seconds(o26(), way, gpus, products_a_pass, far)
            cells.append(f"{seconds:.1f} s, {work / seconds:.0%}")
        if way == "full":
            cells[2] = "does not fit"
        yield "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("rows", [memory_rows, part_rows, scaling_rows])
def test_the_tables_are_what_the_formulas_give(rows):
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows() if row not in page] == []


def test_numbers_worked_by_hand():
    shape, options = o26(), TrainOptions(dtype="bfloat16", gradient_checkpointing=True)
    # 28 x (2 x 3584^2 + 2 x 3584 x 512 + 3 x 3584 x 18944) in layers, 2 x 151700 x 3584 outside, 229,376 in vectors
    assert 28 * shape.layer == 28 * 233_046_016 and shape.head == 543_692_800
    assert shape.language == pytest.approx(28 * 233_046_016 + 2 * 543_692_800 + 229_376, rel=1e-4)
    # inputs and outputs: 28 x (2 x (3584 + 3584) + 2 x (3584 + 512) + 3 x (3584 + 18944)); 32 for each of them
    assert 32 * shape.features == 32 * 28 * 90_112
    count = counted(shape, options, 1)
    # 4 x (7.613 + 0.45), 8 x 7.613, 2 x (7.613 + 0.45); copies of 28 x 0.233 in two bytes; gradients 4 x 7.613
    assert {name: round(size / 1e8) for name, size in count.held.items()} == {
        "weights": 323, "Adam's moments": 609, "reference": 161}
    forward = count.phases["update, forward"]
    assert round(forward["autocast's copies"] / 1e8) == 131 and round(forward["gradients"] / 1e8) == 305
    # A token: 26 x 3584 + 6 x 3584 + 6 x 512 + 8 x 18944 + 4 x 28 + 8; with LoRA 8 x 3584 less, and 14 x 32 more
    assert kept_in_a_layer(shape, options, 1, 0, on_gpu=False) == {"attention": 269_432}
    adapted = replace(options, lora_rank=32)
    assert kept_in_a_layer(shape, adapted, 1, 0, on_gpu=False) == {"attention": 241_208}
    assert kept_in_a_layer(shape, adapted, 1, 0) == {"attention": 241_208 + 4 * 3584}  # keys and values repeated
    # Reading four prompts: buffers of 1500 + 12 x 63 columns for each, 512 keys and 512 values of 2 bytes in 28 layers,
    # and of each token the inside of one MLP; copies of 28 layers.
    four = footprint(shape, adapted, Work(LONG, sampled=4)).phases["rollout"]
    assert four["copies for the rollout"] == 2 * 28 * 233_046_016 and "autocast's copies" not in four
    assert four["keys, prompts' work, logits"] == 4 * (2256 * 28 * 1024 * 2
                                                       + 1500 * (12 * 3584 + 8 * 18944 + 8 * 128))
    # Without copies: autocast's of the adapters, and more inside of an MLP with adapters
    plain = footprint(shape, adapted, Work(LONG, sampled=4), copies=False).phases["rollout"]
    assert plain["autocast's copies"] == 2 * 32 * 28 * 90_112 and "copies for the rollout" not in plain
    assert plain["keys, prompts' work, logits"] == 4 * (2256 * 28 * 1024 * 2
                                                        + 1500 * (18 * 3584 + 8 * 18944 + 8 * 128))
    # Reading one prompt takes less than to make the last copies: 2 x 3584 x 18944 numbers in four bytes and in two
    one = footprint(shape, adapted, Work(LONG)).phases["rollout"]["keys, prompts' work, logits"]
    assert one == 6 * 2 * 3584 * 18944
    # In float32, and split, what lies side by side is copied: 3584 x (3584 + 2 x 512 + 2 x 18944) in 28 layers; in 4
    # bits nothing is.
    kinds = [footprint(shape, TrainOptions(**more), Work(LONG), world).phases["rollout"].get("copies for the rollout")
             for more, world in (({"dtype": "float32"}, 1), ({"dtype": "bfloat16", "sharding": "fsdp"}, 4),
                                 ({"dtype": "bfloat16", "lora_rank": 8, "quantize": "4bit"}, 1))]
    assert kinds == [size and size * 28 * 3584 * (3584 + 2 * 512 + 2 * 18944) for size in (4, 2, None)]
    # Writing a hundred answers of up to 201 tokens: keys and values of 1500 + 100 x 200 columns, filled up to eights,
    # in 28 layers; the masks of 100 x 7 queries; 1500 hidden states and embeddings; logits of 100 rows.
    many = footprint(shape, replace(options, group_size=100, max_length=201), Work(LONG)).phases["rollout"]
    assert many["keys, prompts' work, logits"] == (21_504 * (28 * 1024 * 2 + 700 * 2) + 1500 * 8 * 3584
                                                   + 100 * 151_700 * 20)
    assert many["the head's copy"] == 2 * 151_700 * 3584
    # With a small vocabulary the last growth takes more, from 1500 + 100 x 192 columns: a layer's of before, the masks
    # of before, and 100 rows that new ones are made of.
    small = footprint(replace(shape, vocabulary=100), replace(options, group_size=100, max_length=201), Work(LONG))
    assert small.phases["rollout"]["keys, prompts' work, logits"] == (
        21_504 * (28 * 1024 * 2 + 700 * 2) + 1500 * 8 * 3584 + 20_704 * (2048 + 1400) + 21_504 * 200)
    # Reduced once, gradients are whole; in one pass they are reduced anyway
    split = TrainOptions(dtype="bfloat16", sharding="fsdp", batch_size=4, reduce_once=True)
    kept = [footprint(shape, split, Work(LONG, products=products), 8).phases["update, backward"]["gradients"]
            for products in (2, 4)]
    assert kept == [4 * shape.language, 4 * shape.language / 8]
    # one pass: 4 x 8.063 + 8 x 7.613 = 93.2
    assert sent_bytes(shape, "full", 16) == pytest.approx(93.15e9, rel=1e-3)
    # 16 x 7.613e9 x (3000 + 720 + 3720 + 14880) + 16 x 2 x 0.45e9 x 5120 = 2.7925e15; / 1.25e14 = 22.34
    # decode: 4 x 40 x 15.226e9 = 2.436e12; / 1.4e12 = 1.740
    assert compute_seconds(shape, "full") == pytest.approx(24.08, abs=0.01)


if __name__ == "__main__":
    print("\n".join([*memory_rows(), "", *part_rows(), "", *scaling_rows()]))
