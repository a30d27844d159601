"""The decoder of a rollout: the model's own weights untouched to the bit, adapters merged, transformers' code else."""

import copy

import pytest
import torch

from models import lean, lora, packing
from models.policy import Policy
from rounding import float64
from tiny import adapted, qwen_image_processor, qwen_model, qwen_tokenizer, sample, three_prompts


def layers_of(policy):
    return policy._language_model.layers


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_rollout_leaves_weights_and_layers_as_they_were(policy, held):
    adapted(Policy(policy.model.to(held), policy.tokenizer, policy.image_processor, held))
    rounded = Policy(policy.model, policy.tokenizer, policy.image_processor, held)
    before = copy.deepcopy(policy.model.state_dict())
    sample(rounded, three_prompts(rounded))
    after = policy.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any("forward" in vars(layer) for layer in layers_of(policy))


def test_layers_are_as_they_were_after_an_error_too(dense_policy):
    with pytest.raises(ZeroDivisionError), lean.lean(dense_policy._language_model, torch.float32, torch.float32):
        assert all("forward" in vars(layer) for layer in layers_of(dense_policy))
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in layers_of(dense_policy))


def test_every_family_is_known(policy):
    assert lean._is_known(policy._language_model) and lean._is_known(adapted(policy)._language_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_write_the_same_answers(policy, dtype, monkeypatch):
    """Large ones are packed on a CPU; here all but none are."""
    policy = Policy(policy.model, policy.tokenizer, policy.image_processor, dtype)
    prompts = three_prompts(policy)
    plain = sample(policy, prompts)
    packs = []
    monkeypatch.setattr(packing, "_FROM", 1)
    monkeypatch.setattr(lean, "product", lambda *parts: packs.append(1) or packing.product(*parts))
    packed = sample(policy, prompts)
    assert bool(packs) == (dtype == torch.float32)  # those of bfloat16 are torch's own
    alike = (plain.completions == packed.completions) | ~plain.action_mask
    assert alike.all() and torch.equal(plain.action_mask, packed.action_mask)
    assert (plain.old_log_probs - packed.old_log_probs).abs().max() < 1e-5


def test_copies_of_weights_are_counted_by_hand(monkeypatch):
    tokenizer = qwen_tokenizer()
    policy = Policy(qwen_model("qwen2_5_vl", tokenizer), tokenizer, qwen_image_processor())
    # 3 layers; queries, keys and values of 32 + 16 + 16 x 32, gate and up of 2 x 48 x 32: what lies side by side. In
    # another dtype, or under an adapter, output (32 x 32) and down (32 x 48) as well.
    side_by_side, single = 3 * (64 * 32 + 2 * 48 * 32), 3 * (32 * 32 + 32 * 48)
    for dtype, numbers, size in ((torch.float32, side_by_side, 4), (torch.bfloat16, side_by_side + single, 2)):
        with lean.lean(policy._language_model, dtype, torch.float32) as decoder:
            assert decoder.copied == numbers * size
    with lean.lean(adapted(policy)._language_model, torch.float32, torch.float32) as decoder:
        assert decoder.copied == (side_by_side + single) * 4
    monkeypatch.setattr(packing, "_FROM", 1)  # gate and up once more, in another layout
    with lean.lean(policy.without_adapter()._language_model, torch.float32, torch.float32) as decoder:
        assert decoder.copied == (side_by_side + single + 3 * 2 * 48 * 32) * 4


def test_a_merged_weight_by_hand():
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    get_peft_model(model, LoraConfig(r=1, lora_alpha=3, target_modules=["0"]))
    layer = model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.lora_A["default"].weight.copy_(torch.tensor([[5.0, 6.0]]))
        layer.lora_B["default"].weight.copy_(torch.tensor([[0.5], [-1.0]]))
    # 3 / 1 times the outer product of (0.5, -1) and (5, 6) on top.
    assert lora.merged_weight(layer)[0].tolist() == [[8.5, 11.0], [-12.0, -14.0]]
    layer.enable_adapters(False)
    assert lora.merged_weight(layer)[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def strange(policy):
    """The last layer's MLP is of a kind that nobody knows."""
    class Odd(torch.nn.Linear):
        pass

    layers_of(policy)[-1].mlp.down_proj.base_layer.__class__ = Odd


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("reason", ["kind", "memory", "not wanted"])
def test_without_it_transformers_own_code_writes_the_same(policy, monkeypatch, reason, logged):
    prompts = three_prompts(adapted(policy))
    with float64(policy):
        one = sample(policy, prompts, columns=20)
        if reason == "kind":
            strange(policy)
        else:
            monkeypatch.setattr(lean, "LeanDecoder", no_memory)
        assert policy.copies.taken > 0
        policy.copies.wanted = reason != "not wanted"
        other = sample(policy, prompts, columns=20)
    assert not policy.copies.taken
    assert ("no memory for copies" in "".join(logged)) == (reason == "memory")
    mask = other.action_mask
    assert torch.equal(one.action_mask, mask) and torch.equal(one.completions[mask], other.completions[mask])
    assert (one.old_log_probs - other.old_log_probs).abs().max() < 1e-10


def test_one_product_beside_which_copies_have_no_room_is_written_without_them(policy, monkeypatch, logged):
    prompts = three_prompts(policy)
    with float64(policy):
        one = sample(policy, prompts[:1], columns=20)
        monkeypatch.setattr(lean.LeanDecoder, "__call__", no_memory)
        with pytest.raises(torch.OutOfMemoryError):  # for the caller to halve
            sample(policy, prompts, columns=20)
        other, _ = (sample(policy, prompts[:1], columns=20) for _ in range(2))
    assert "".join(logged).count("without copies of the language model's weights from now on") == 1
    mask = other.action_mask
    assert torch.equal(one.action_mask, mask) and torch.equal(one.completions[mask], other.completions[mask])


@pytest.mark.parametrize(("held", "known"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_in_bfloat16_what_is_sampled_is_what_is_scored_within_rounding(policy, held, known):
    rounded = Policy(policy.model.to(held), policy.tokenizer, policy.image_processor, torch.bfloat16)
    prompts = three_prompts(adapted(rounded))
    if not known:
        strange(rounded)
    generation = sample(rounded, prompts)
    with torch.no_grad():
        scored = [rounded.log_probs(prompts, generation.completions, generation.action_mask, 0.7, exact_path=exact)[0]
                  for exact in (False, True)]
    gaps = [(each - generation.old_log_probs)[generation.action_mask].abs().mean() for each in scored]
    noise = (scored[0] - scored[1])[generation.action_mask].abs().mean()
    assert max(gaps) < max(4 * noise, 0.05)


def test_of_a_prompt_the_last_layer_computes_the_column_that_predicts_alone(policy, monkeypatch):
    widths, behind = [], lean._Layer._behind
    monkeypatch.setattr(lean._Layer, "_behind",
                        lambda layer, hidden, mixed: widths.append(mixed.shape[1]) or behind(layer, hidden, mixed))
    prompts = three_prompts(policy)
    layers, longest = len(layers_of(policy)), max(len(prompt.input_ids) for prompt in prompts)
    with float64(policy):
        lean_generation = sample(policy, prompts, columns=2)
        assert widths[:layers] == [longest] * (layers - 1) + [1]
        monkeypatch.setattr(lean, "_make", lambda *_: None)
        stock_generation = sample(policy, prompts, columns=2)
    assert (lean_generation.old_log_probs - stock_generation.old_log_probs).abs().max() < 1e-10
