"""scaling.md: its tables are what its formulas give. Print them with python tests/test_scaling.py."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The models, as counted in the README: language and vision parameters; of the first also the shape of its layers.
O26 = dict(language=7.6e9, vision=0.45e9, adapter=0.081e9, four_bit=6.5e9, layers=28, width=3584, wide=18944)
V46 = dict(language=1.0e9, vision=0.0, adapter=0.022e9, four_bit=0.7e9, layers=24, width=1024, wide=3584)
PROMPT, GROUP, ANSWER, LONGEST = 1500, 12, 30, 64  # tokens of five photos and the text; answers; tokens of one
PRODUCTS = 16  # a step on each GPU
COMPUTE, MEMORY, CLOSE, FAR = 1.25e14, 1.4e12, 2e11, 1.6e11  # operations/s, bytes/s of a GPU; bytes/s between GPUs
SLOW = 1e10  # bytes/s of a machine with one card of 100 Gbit/s


def weights(model, way, gpus):
    """Bytes on each GPU that stay: weights, gradients, Adam's moments, the reference; and what a rollout gathers."""
    both = model["language"] + model["vision"]
    if way == "full":
        kept = 16 * model["language"] + 4 * model["vision"] + 2 * both
        return kept if gpus == 1 else kept / gpus + 2 * both
    adapter = 16 * model["adapter"]
    base = 2 * both if way == "LoRA" else 0.53 * model["four_bit"] + 2 * (both - model["four_bit"])
    return base + adapter


def activations(model):
    """Bytes of one product's pass under gradient checkpointing: what enters each layer, and one layer's inside."""
    tokens = PROMPT + GROUP * LONGEST
    inside = 3 * model["wide"] + 10 * model["width"]
    return tokens * (2 * model["layers"] * model["width"] + 4 * inside)


def needed(model, way, gpus):
    return (weights(model, way, gpus) + activations(model)) / 1e9


def fits(gigabytes, size):
    return "yes" if gigabytes <= 0.9 * size else "no"


def memory_rows():
    """model, way, GPUs, GB on each, and whether that fits 24, 40, 80."""
    for name, model in (("MiniCPM-o-2_6", O26), ("MiniCPM-V-4.6", V46)):
        for way in ("LoRA", "QLoRA", "full"):
            for gpus in (1, 4, 8):
                size = needed(model, way, gpus)
                sharding = "fsdp" if way == "full" and gpus > 1 else "none"
                cells = [name, way, f"{gpus}", sharding, f"{size:.0f}", *(fits(size, card) for card in (24, 40, 80))]
                yield "| " + " | ".join(cells) + " |"


def compute_seconds(model, way):
    """Seconds of one GPU's own work in a step: prefill, decode, vision, reference, update."""
    size, answers = model["language"], GROUP * ANSWER
    row = PROMPT + answers
    update = 8 if way == "full" else 6  # forward twice (checkpointing), backward by activations and by weights
    operations = PRODUCTS * size * (2 * PROMPT + 2 * answers + 2 * row + update * row)
    operations += PRODUCTS * 2 * model["vision"] * 5 * 1024
    decode = PRODUCTS / 4 * (ANSWER + 10) * 2 * size  # four products together, until the longest answer ends
    return operations / COMPUTE + decode / MEMORY


def sent_bytes(model, way, products_a_pass):
    """Bytes that each GPU sends a step, short of the factor (n - 1) / n."""
    if way == "LoRA":
        return 2 * 4 * model["adapter"]  # gradients in float32, averaged: there and back
    passes = PRODUCTS / products_a_pass
    gathered_once = 2 * 2 * (model["language"] + model["vision"])  # policy for the rollout, and the reference
    return gathered_once + passes * (2 + 2 + 4) * model["language"]  # forward, backward, gradients in float32


def step_seconds(model, way, gpus, products_a_pass, far=FAR):
    """Seconds of a step with nothing overlapped: work, then words."""
    speed = CLOSE if gpus <= 8 else far
    sent = sent_bytes(model, way, products_a_pass) * (gpus - 1) / gpus
    return compute_seconds(model, way) + sent / speed


def scaling_rows():
    """way, products a pass, then for each number of GPUs the seconds of a step and the share of work in it."""
    for way, products_a_pass in (("LoRA", 1), ("full", 1), ("full", 4), ("full", 16)):
        work = compute_seconds(O26, way)
        cells = [way, f"{products_a_pass}"]
        for gpus, far in ((1, FAR), (8, FAR), (64, FAR), (64, SLOW)):
            seconds = step_seconds(O26, way, gpus, products_a_pass, far)
            cells.append(f"{seconds:.1f} s, {work / seconds:.0%}")
        if way == "full":
            cells[2] = "does not fit"
        yield "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("rows", [memory_rows, scaling_rows])
def test_the_tables_are_what_the_formulas_give(rows):
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows() if row not in page] == []


def test_numbers_worked_by_hand():
    # 16 x 7.6 + 4 x 0.45 + 2 x 8.05 = 121.6 + 1.8 + 16.1 = 139.5; a quarter is 34.875, and 16.1 gathered: 50.975
    assert weights(O26, "full", 1) == pytest.approx(139.5e9) and weights(O26, "full", 4) == pytest.approx(50.975e9)
    # 2 x 8.05 + 16 x 0.081 = 17.396; in four bits 0.53 x 6.5 + 2 x 1.55 + 1.296 = 7.841
    assert weights(O26, "LoRA", 8) == pytest.approx(17.396e9) and weights(O26, "QLoRA", 1) == pytest.approx(7.841e9)
    # 1500 + 12 x 64 = 2268 tokens x (2 x 28 x 3584 + 4 x (3 x 18944 + 10 x 3584)) = 2268 x 571,392
    assert activations(O26) == pytest.approx(1.29592e9, rel=1e-4)
    # one pass: 4 x 8.05 + 8 x 7.6 = 93.0
    assert sent_bytes(O26, "full", 16) == pytest.approx(93.0e9)
    # 16 x 7.6e9 x (3000 + 720 + 3720 + 14880) + 16 x 2 x 0.45e9 x 5120 = 2.7879e15; / 1.25e14 = 22.30
    # decode: 4 x 40 x 15.2e9 = 2.432e12; / 1.4e12 = 1.737
    assert compute_seconds(O26, "full") == pytest.approx(24.04, abs=0.01)


if __name__ == "__main__":
    print("\n".join([*memory_rows(), "", *scaling_rows()]))
