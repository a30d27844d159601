"""The demo's products, what its warm-up imitates, and the seconds that make demo prints."""

import random
import sys
from statistics import fmean

import pytest

import cpu_seconds
import demo
from config import DemoOptions
from reward import score_answer


def test_a_photo_shows_as_many_cells_as_the_side_has():
    photo = demo.draw_photo("mug", 3, 5, random.Random(0))
    top, right = demo.PIXELS - 5 * demo.CELL, 3 * demo.CELL
    dark = [[sum(photo.getpixel((x, y))) < 500 for x in range(demo.PIXELS)] for y in range(demo.PIXELS)]
    assert [row for row, pixels in enumerate(dark) if any(pixels)] == list(range(top, demo.PIXELS))
    assert all(pixels.index(False) == right for pixels in dark[top:])


def test_perfect_imitation_earns_what_is_said():
    rng = random.Random(0)
    parts = [score_answer(demo.answer_text(demo.miscounted(product, rng)), product.label)
             for product in (demo.draw_product(rng) for _ in range(3000))]
    assert fmean(part.reward for part in parts) == pytest.approx(0.7747, abs=0.01)  # over all sizes
    assert fmean(max(part.errors) <= 0.1 for part in parts) == pytest.approx(0.027, abs=0.01)  # 0.3 ** 3


@pytest.mark.parametrize(("losses", "rounds"), [([0.05], 0), ([0.3, 0.09, 0.07], 2), ([0.3] * 6, 5)])
def test_the_warm_up_goes_on_until_the_model_sees(losses, rounds, monkeypatch, said):
    """As many steps more as it takes, or five times, which is said; then the habit, whatever came of it."""
    done, coming = [], iter([*losses, 0.4])
    monkeypatch.setattr(demo, "LESSONS", 2)
    monkeypatch.setattr(demo, "encode", lambda *_: None)
    monkeypatch.setattr(demo, "sampled_reward", lambda *_: 0.7)
    monkeypatch.setattr(demo, "imitate", lambda policy, prompts, sizes, steps, lr, rng: done.append((steps, lr)) or
                        next(coming))
    assert demo.warm_up(None, DemoOptions(warm_up_steps=300)) == 0.7
    assert done == [(300, 5e-3), *[(100, 3e-3)] * rounds, (80, 2e-3)]
    assert ("hardly sees yet: its loss on right sizes is 0.30" in "".join(said)) == (losses[-1] > 0.08)


def test_seconds_of_a_command_are_printed_and_its_status_kept(monkeypatch, capfd):
    monkeypatch.setattr(cpu_seconds, "PRODUCTS", 1)
    burn = "import time, sys\nwhile time.process_time() < 1: pass\nsys.exit(3)"
    assert cpu_seconds.main([sys.executable, "-c", burn]) == 3
    assert capfd.readouterr().out.startswith("1 CPU seconds on ")
