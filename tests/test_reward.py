"""The reward by hand-worked numbers, the lenient answer reader, and hostile input."""

import json
import math
import random
import subprocess
import sys
import time
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import reward as reward_module
from reward import SUCCESS_REWARD, calculate_reward, score_answer
from sizes.answers import Reading, read_answer
from sizes.labels import LabelError, parse_label

MUG = "12 8 15"  # sorted 15, 12, 8
THREE = "{" + '"length": {}, "width": {}, "height": {}, "unit": "cm"' + "}"


def answer_of(length, width, height):
    return json.dumps({"length": length, "width": width, "height": height, "unit": "cm"})


# Fractions worked by hand: sorted answer against 15, 12, 8.
MUG_CANDIDATES = [
    ((12, 8, 15), 1.0),
    ((11, 7, 14), 1 - (1 / 15 + 1 / 12 + 1 / 8) / 3),  # 33/360 lost
    ((13, 9, 16), 1 - (1 / 15 + 1 / 12 + 1 / 8) / 3),
    ((15, 10, 18), 1 - (3 / 15 + 3 / 12 + 2 / 8) / 3),  # 0.7/3
    ((10, 6, 12), 1 - (3 / 15 + 2 / 12 + 2 / 8) / 3),  # 37/180
    ((8, 8, 15), 1 - (0 + 4 / 12 + 0) / 3),  # 1/9
    ((12, 8, 12), 1 - (3 / 15 + 0 + 0) / 3),  # 1/15
    ((0, 0, 0), 0.0),
    ((20, 15, 25), 1 - (10 / 15 + 8 / 12 + 7 / 8) / 3),  # 53/72
    ((11, 8, 15), 1 - (0 + 1 / 12 + 0) / 3),  # 1/36
    ((12, 7, 15), 1 - (0 + 0 + 1 / 8) / 3),  # 1/24
]
MUG_REWARDS = [1, 0.908333, 0.908333, 0.766667, 0.794444, 0.888889, 0.933333, 0, 0.263889, 0.972222, 0.958333]


@pytest.mark.parametrize(("sizes", "reward", "rounded"),
                         [(*case, rounded) for case, rounded in zip(MUG_CANDIDATES, MUG_REWARDS, strict=True)])
def test_mug_candidates_score_by_formula_in_any_order(sizes, reward, rounded):
    assert reward == pytest.approx(rounded, abs=5e-7)
    for answered in permutations(sizes):
        for label in permutations((12, 8, 15)):
            assert calculate_reward(answer_of(*answered), " ".join(map(str, label))) == pytest.approx(reward, abs=1e-12)


def test_success_needs_a_mean_error_of_at_most_a_tenth():
    assert SUCCESS_REWARD == 0.9
    assert calculate_reward(answer_of(11, 7, 14), MUG) >= SUCCESS_REWARD > calculate_reward(answer_of(8, 8, 15), MUG)


@pytest.mark.parametrize(("label", "answer", "reward", "errors"), [
    ("20", "18", 0.9, (0.1,)),
    ("20", "18 5 5", 0.9, (0.1,)),  # extra numbers are ignored, the largest is compared
    ("20", "5 5 18", 0.9, (0.1,)),
    ("20 10", "22 10", 0.95, (0.1, 0)),
    ("10 20", "10 22 1", 0.95, (0.1, 0)),
    ("20 10", "20", 0.5, (0, 1)),
    ("20 10 5", "20 10", 2 / 3, (0, 0, 1)),
    ("20 10 5", "20", 1 / 3, (0, 1, 1)),
    ("20 10 5", "5", (1 - 15 / 20) / 3, (0.75, 1, 1)),
    ("20 10 5", "20 10 5 99", 1, (0, 0, 0)),  # the fourth number is not among the first three
    ("20 10 5", "99 20 10 5", 0, (79 / 20, 1, 1)),
    ("20 10 5", "nothing", 0, (1, 1, 1)),
    ([20, 10.0, 5], "20 10 5", 1, (0, 0, 0)),
    ((5,), "5", 1, (0,)),
])
def test_label_counts_partial_answers_and_extra_numbers(label, answer, reward, errors):
    parts = score_answer(answer, label)
    assert parts.reward == pytest.approx(reward)
    assert parts.errors == pytest.approx(errors)
    assert parts.valid == (answer != "nothing")


FULL = answer_of(40, 30, 25)


@pytest.mark.parametrize(("label", "answer", "reward"), [
    # one axis: that side alone counts
    ("厚2cm", answer_of(30, 20, 2), 1), ("高度：25cm", FULL, 1), ("L 40cm", FULL, 1), ("宽40cm", FULL, 1 - 10 / 40),
    ("高25cm", '{"length": 40, "width": 30}', 0),  # the side that is asked for is missing
    ("高25cm", "长40 宽30 高20", 1 - 5 / 25), ("高25cm", "高20，长40", 1 - 5 / 25),
    ("高25cm", "40 x 30 x 20 cm", 1 - 5 / 25),  # in the order in which it is asked
    # two axes
    ("宽60cm*高45cm", answer_of(80, 60, 45), 1), ("宽60cm*高45cm", answer_of(80, 45, 60), 1 - (15 / 60 + 15 / 45) / 2),
    # a diameter stands for the two sides across it, a thickness for the smallest, a depth for a free side on the floor
    ("直径30cm", answer_of(30, 30, 12), 1), ("直径30cm", answer_of(12, 27, 33), 1 - (3 / 30 + 3 / 30) / 2),
    ("直径30cm", '{"length": 30}', 0.5), ("W 60cm x D 40cm", answer_of(40, 60, 45), 1),
    ("W 60cm x D 40cm", '{"width": 60, "depth": 40, "height": 45}', 1), ("厚2cm", '{"length": 30, "width": 2}', 0),
    # no axes, or three sizes: sorted, largest first
    ("40 30", answer_of(25, 30, 40), 1), ("25", FULL, 1 - 15 / 25), ("长25宽40高30", FULL, 1), ("φ30*40mm", "3 3 4", 1),
])
def test_labels_of_one_or_two_sizes_are_compared_by_the_axes_they_name(label, answer, reward):
    parts = score_answer(answer, label)
    assert parts.reward == pytest.approx(reward) == score_answer(answer, parse_label(label)).reward
    assert len(parts.errors) == len(parts.compared) == len(parse_label(label))
    assert calculate_reward(answer, tuple(parse_label("25"))) == pytest.approx(calculate_reward(answer, "25"))


def test_parts_are_in_cm_and_descending():
    parts = score_answer('{"length": 120, "width": null, "height": 150, "unit": "mm"}', MUG)
    assert parts.sizes == (15.0, 12.0) and parts.errors == (0.0, 0.0, 1.0)
    assert parts.reward == pytest.approx(2 / 3) and parts.valid and parts.reason == ""


def test_an_unreadable_label_scores_zero_with_its_fault_and_never_raises():
    not_numbers = [None, float("nan"), "", ["12"], {"a": 1}, b"12", object(), [True]]
    for label in [*not_numbers, "10/12", [], [1, 2, 3, 4], [10**400]]:
        parts = score_answer("12 8 15", label)
        assert (parts.reward, parts.errors, parts.valid) == (0.0, (), False)
        with pytest.raises(LabelError) as error:
            parse_label(label)
        assert parts.reason == str(error.value)


def test_an_answer_that_is_no_text_is_not_valid():
    parts = score_answer(None, MUG)
    assert (parts.reward, parts.sizes, parts.valid) == (0.0, (), False) and "not text" in parts.reason


def test_zero_is_a_number_and_an_enormous_number_scores_zero():
    assert read_answer("0 0 0") == Reading((0.0, 0.0, 0.0))
    assert score_answer("0 0 0", MUG).valid
    for enormous in ("1" * 400, "1" * 5000, "1e999", "9e99"):
        parts = score_answer(THREE.replace("{}", enormous, 1).replace("{}", "8", 1).replace("{}", "15", 1), MUG)
        assert parts.reward == 0.0 and all(math.isfinite(size) for size in parts.sizes + parts.errors)
        assert calculate_reward(f"{enormous} 8 15", MUG) == 0.0


@pytest.mark.parametrize(("answer", "sizes"), [
    # JSON anywhere, keys in any case and language, in order of appearance
    ('{"length": 12, "width": 8, "height": 15, "unit": "cm"}', (12, 8, 15)),
    ('{"HEIGHT": 15, "Width": 8}', (15, 8)),
    ('```json\n{"length": 12, "width": 8, "height": 15}\n```', (12, 8, 15)),
    ('I see 3 mugs. {"length": 12, "width": 8, "depth": 15} as said on page 7.', (12, 8, 15)),
    ('{"长": 12, "宽": 8, "高": 15}', (12, 8, 15)),
    ('{"长度": 120, "宽度": 80, "高度": 150, "单位": "毫米"}', (12, 8, 15)),
    ('{"name": 3} {"length": 12}', (12,)),
    ('{"a": 1} {"b": 2}', ()),  # what is not called a size is none
    ('{"length": 12} {"length": 13}', (13,)),  # the last one counts
    ('{"length": 12} {"name": 13}', (12,)),
    ('{"weight": 3, "colour": "red", "length": 12, "width": 8, "height": 15, "depth": 4}', (12, 8, 15)),
    ('｛"length"：１２，"width"：８｝', (12, 8)),
    ('{"length": "１２．５"}', (12.5,)),
    # nested
    ('{"size": {"length": 120, "width": 80, "height": 150}, "unit": "mm"}', (12, 8, 15)),
    ('{"length": {"value": 120, "unit": "mm"}, "width": {"value": 8}, "unit": "cm"}', (12, 8)),
    ('{"length": {"unit": "mm", "value": 120}, "width": 3, "unit": "inch"}', (12, 7.62)),
    ('{"size": [120, 80, 150], "unit": "mm"}', (12, 8, 15)),
    ('{"size": [4, 4, 5, "inch"]}', (10.16, 10.16, 12.7)),
    ('{"size": "120 x 80 x 150 mm"}', (12, 8, 15)),
    ('{"a": {"b": {"c": {"d": {"length": 12}}}}}', (12,)),
    ('{"length": {}}', (None,)),
    # values
    ('{"length": "12", "width": "80 mm", "height": "about 12.5cm"}', (12, 8, 12.5)),
    ('{"length": "12,5", "width": "1,200", "height": "1,200.5"}', (12.5, 1200, 1200.5)),
    ('{"length": "12 cm", "width": 8, "unit": "mm"}', (12, 0.8)),
    ('{"length": "12\\"", "width": "1 ft", "height": "5″"}', (30.48, 30.48, 12.7)),
    ('{"length": true, "width": false, "height": 15}', (None, None, 15)),
    ('{"length": null, "width": NaN, "height": 15}', (None, None, 15)),
    ('{"length": Infinity, "width": -Infinity, "height": 15}', (None, None, 15)),
    ('{"length": -1, "width": "-8", "height": "- 8"}', (None, None, 8)),
    ('{"length": "big", "width": "12 kg", "height": "10-12"}', (None, None, None)),
    ('{"length": "1e1", "width": 1e1, "height": ".5"}', (10, 10, 0.5)),
    # units
    ('{"length": 3, "unit": "MM."}', (0.3,)),
    ('{"length": 1.2, "unit": " m "}', (120,)),
    ('{"length": 4, "unit": "in"}', (10.16,)),
    ('{"length": 4, "unit": "英寸"}', (10.16,)),
    ('{"length": 4, "unit": "\\""}', (10.16,)),
    ('{"length": 2, "unit": "feet"}', (60.96,)),
    ('{"length": "19⅝\\""}', (49.8475,)),  # the number reader of the labels
    ("3½ x 2 x 1 inch", (8.89, 5.08, 2.54)),
    ('{"length": 12, "unit": ""}', (12,)),
    ('{"length": 12, "unit": null}', (12,)),
    # truncated, single quotes, no quotes: numbers as text, the stated unit obeyed
    ('{"length": 12, "width": 8, "hei', (12, 8)),
    ('{"length": 120, "width": 80, "height": 150, "unit": "mm"', (12, 8, 15)),
    ('{"length": "12", "width": "8", "height": "15"', (12, 8, 15)),
    ('{"length": 12, "unit": "m', (12,)),  # a unit cut short may be any
    ('{"size": {"length": 120, "width": 80}, "unit": "mm"', (12, 8)),
    ("{'length': 4, 'width': 4, 'height': 5, 'unit': 'inch'}", (10.16, 10.16, 12.7)),
    ("{length: 4, width: 4, height: 5, unit: inch}", (10.16, 10.16, 12.7)),
    # plain text
    ("12 x 8 x 15 inches", (30.48, 20.32, 38.1)),
    ('12" x 8" x 15"', (30.48, 20.32, 38.1)),
    ('It measures "12 x 8 x 15".', (12, 8, 15)),
    ("385mmX385mmX135mm", (38.5, 38.5, 13.5)),
    ("12,8,15", (12, 8, 15)),
    ("12-8-15", (12, 8, 15)),
    ("12cm-8cm-15cm", (12, 8, 15)),
    (" -8 3", (None, 3)),
    ("-8", (None,)),
    ("长12宽8高15厘米", (12, 8, 15)),
    ("１２ ８ １５", (12, 8, 15)),
    ("0.5m x 30cm x 120mm", (50, 30, 12)),
    ("[66.0, 53.0, 73.0, inch]", (167.64, 134.62, 185.42)),
    ("120 by 80 by 150 (mm)", (12, 8, 15)),
    ("length: 120\nwidth: 80\nheight: 150\nunit: mm", (12, 8, 15)),
    ("", ()),
    ("{}", ()),
    ("no idea", ()),
])
def test_answers_are_read_leniently(answer, sizes):
    reading = read_answer(answer)
    assert [size is None for size in reading.sizes] == [size is None for size in sizes]
    assert [size for size in reading.sizes if size is not None] == pytest.approx([s for s in sizes if s is not None])
    assert reading.valid == any(size is not None for size in sizes) == (reading.reason == "")


@pytest.mark.parametrize(("answer", "named"), [
    ('{"length": 12, "width": 8, "height": 15, "unit": "kg"}', "'kg'"),
    ('{"length": 12, "width": 8, "height": 15, "unit": "寸"}', "'寸'"),
    ('{"length": 12, "unit": ["cm", "mm"]}', "list"),
    ('{"length": {"value": 12, "unit": "px"}}', "'px'"),
    ("{'length': 12, 'unit': 'kg'}", "'kg'"),
])
def test_an_unknown_unit_makes_the_answer_invalid(answer, named):
    parts = score_answer(answer, MUG)
    assert (parts.reward, parts.sizes, parts.valid) == (0.0, (), False) and named in parts.reason


@pytest.mark.parametrize(("answer", "sizes"), [
    # what was thought is not the answer; the last object behind it is
    ('<think>Maybe {"length": 30, "width": 20, "height": 40}</think>{"length": 12, "width": 8, "height": 15}',
     (12, 8, 15)),
    ("<think>30 x 20 x 40?</think> 12 x 8 x 15 cm", (12, 8, 15)),
    ("<think>30 x 20 x 40, no", ()),
    ('{"length": 30, "width": 20, "height": 40} no: {"length": 12, "width": 8, "height": 15}', (12, 8, 15)),
    # units in keys, behind the object, in lists, with a remark
    ('{"length_mm": 120, "width_mm": 80, "height_mm": 150}', (12, 8, 15)),
    ('{"length (inch)": 12, "width (inch)": 8}', (30.48, 20.32)),
    ('{"长（毫米）": 120, "宽（毫米）": 80, "高（毫米）": 150}', (12, 8, 15)),
    ('{"length": 120, "length_unit": "mm", "width": 8, "width_unit": "cm"}', (12, 8)),
    ('{"length": 120, "width": 80, "height": 150} mm', (12, 8, 15)),
    ('{"length": 12, "unit": "cm"} mm', (12,)),
    ('{"size": [120, 80, 150], "unit": ["mm", "mm", "mm"]}', (12, 8, 15)),
    ('{"length": 12, "width": 8, "height": 15, "unit": "cm (厘米)"}', (12, 8, 15)),
    ('{"length": 1.2, "width": 0.8, "unit": "分米"}', (12, 8)),
    ("4.72'' x 3.15'' x 5.91''", (11.9888, 8.001, 15.0114)),
    # numbers of lists, photos and pieces
    ("1. 长：12厘米\n2. 宽：8厘米\n3. 高：15厘米", (12, 8, 15)),
    ("1) Length: 12 cm\n2) Width: 8 cm", (12, 8)),
    ("根据图片2，尺寸约为 12cm×8cm×15cm", (12, 8, 15)),
    ("Based on the 5 photos, the size is 12 x 8 x 15 cm.", (12, 8, 15)),
    ("3件套，长12宽8高15", (12, 8, 15)),
    # no sizes
    ("12 kg, 8 kg, 15 kg", ()),
    ('{"weight": 12, "price": 8, "stock": 15}', ()),
    ('{"length": {"min": 12, "max": 99}, "width": 8, "height": 15}', (None, 8, 15)),
    ("version 12.8.15", ()),
    # keys of other names, and a remark that repeats one
    ('{"product_length": 12, "product_width": 8, "product_height": 15}', (12, 8, 15)),
    ('{"L": 12, "breadth": 8, "H": 15}', (12, 8, 15)),
    ('{"reasoning": {"length": "about 30"}, "length": 12, "width": 8, "height": 15}', (12, 8, 15)),
])
def test_what_the_model_meant_and_no_more(answer, sizes):
    reading = read_answer(answer)
    assert [size is None for size in reading.sizes] == [size is None for size in sizes]
    assert [size for size in reading.sizes if size is not None] == pytest.approx([s for s in sizes if s is not None])


HOSTILE = [
    "{", '{"a":', "1", "1 ", '"', "\\", "{}", "-", "1e", "[", '{"', '{"a":1}', '{"a":[', "{ ", "1,", "1.", " ", "\n",
    "x", "unit", "unit:'", 'unit:"', "１", "１a", "\ufdfa１", "\ud800", "\x00", "İ", "长", "1cm x ", '{"length":1}',
    '{"length":[', '{"length":"',
]
# Made for this very reader: its most costly paths, one after the other, for as long as 10,000 characters last.
CRAFTED = [
    "." * 10_000, '{"a":[' + "1," * 4990 + "1]}", '{"a":[' + "1.5," * 2490 + "1]}", '{"a":[' + "１．５，" * 2498,
    '{"a":' * 900 + "1" + "}" * 900, '{"length":"' + "1,1 " * 2490 + '"}', '{"length":' + "1" * 9980 + "}",
    "{" + '"length":1,' * 900 + '"a":1}', ('{"a":[' + "1.5," * 150) * 16, ('{"a":[' + "1," * 110 + "1]}") * 43,
]


def best_time(text, enough=0.3e-3):
    """The best of fifty calls, in seconds of the processor, which other processes take less of than of the clock; stop
    once one took less than enough."""
    best = math.inf
    for _ in range(50):
        start = time.process_time()
        reward = calculate_reward(text, MUG)
        best = min(best, time.process_time() - start)
        assert 0.0 <= reward <= 1.0
        if best < enough:
            break
    return best


def test_ten_thousand_hostile_characters_take_under_a_millisecond():
    slow = {piece: best for piece in HOSTILE if (best := best_time((piece * 10_000)[:10_000], 1e-3)) >= 1e-3}
    assert not slow


def test_the_most_costly_answers_stay_near_a_millisecond():
    """They measure 0.3 to 0.9 ms; the bound leaves room for a slow machine and still fails a quadratic scan."""
    slow = {text[:30]: best for text in CRAFTED if (best := best_time(text, 2.5e-3)) >= 2.5e-3}
    assert all(len(text) <= 10_000 for text in CRAFTED) and not slow


@pytest.mark.parametrize("piece", ['{"a":', "1", "1 ", "１", "unit:'", '{"a":[', "{}", '{"', "1,"])
def test_time_grows_linearly_with_the_answer(piece):
    short, long = ((piece * characters)[:characters] for characters in (10_000, 200_000))
    assert best_time(long) < 100 * best_time(short) + 1e-3  # a quadratic scan would take 400 times as long


ATOMS = [
    "{", "}", "[", "]", ":", ",", '"', "'", '"length"', '"width"', "'height'", '"unit"', "unit", '"cm"', '"mm"', "inch",
    "长", "厘米", "12", "-8", "15.5", "1e999", "NaN", "Infinity", "true", "null", "x", "×", "*", " ", "\n", "1,200",
    "１２", "\\", "\\u12", "\ud800", "\x00", "０", "−", "½", "9" * 400, "in", "ft", "```json", "(", ")", "±", "/",
]
VALUES = [
    "12", "8.5", "-3", '"12 cm"', '"1,2"', "null", "true", "NaN", "1e400", '"x"', "[1, 2]", "{}",
    '{"value": 3, "unit": "mm"}',
]
KEYS = ["length", "width", "height", "depth", "unit", "长", "宽", "高", "size", "LENGTH", ""]
LABELS = [MUG, "[4.0, 4.0, 5.0, inch]", "7", (1e-3,), [1e300, 1.0], "5 mm x 5 mm"]


def mutated(text, chance, pieces):
    """Cut, insert and repeat at random places."""
    for _ in range(chance.randrange(4)):
        place = chance.randrange(len(text) + 1)
        text = chance.choice([
            text[:place], text[:place] + chance.choice(pieces) + text[place:], text[:place] + text[place + 1:],
            text[place:] + text[:place],
        ])
    return text


def make_answer(chance, drawn):
    pieces = ATOMS + drawn
    kind = chance.randrange(4)
    if kind == 0:
        return mutated(chance.choice(drawn), chance, pieces)
    if kind == 1:
        return "".join(chance.choices(pieces, k=chance.randrange(1, 12)))
    if kind == 2:
        return chance.choice(pieces) * chance.randrange(1, 60) + chance.choice(pieces)
    pairs = [f'"{chance.choice(KEYS)}": {chance.choice(VALUES)}' for _ in range(chance.randrange(5))]
    return mutated("{" + ", ".join(pairs) + ', "unit": "mm"}' * chance.randrange(2), chance, pieces)


def test_a_hundred_thousand_generated_strings_always_score_in_zero_to_one():
    seen = {"strings": 0, "scored": 0}
    read_labels = [parse_label(label) for label in LABELS]  # reading them each time takes a third of the time

    @settings(max_examples=260, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @example(seed=0, drawn=["{", "１２"])
    @given(seed=st.integers(0, 2**32), drawn=st.lists(st.text(max_size=30), min_size=1, max_size=8))
    def check(seed, drawn):
        chance = random.Random(seed)
        for _ in range(400):
            answer = make_answer(chance, drawn)
            tenth = seen["strings"] % 10 == 0
            reward = calculate_reward(answer, chance.choice(LABELS if tenth else read_labels))
            assert type(reward) is float and 0.0 <= reward <= 1.0, answer
            seen["strings"] += 1
            seen["scored"] += reward > 0
            if tenth:  # the strict reader may refuse any string, and only in its own words
                assert type(score_answer("12 8 15", answer).reward) is float

    check()
    assert seen["strings"] >= 100_000
    assert seen["scored"] >= 5_000  # or the generator makes nothing but rubbish


def test_the_module_needs_only_the_standard_library():
    code = "import sys, reward; sys.exit(bool({'torch', 'numpy', 'pandas', 'transformers'} & set(sys.modules)))"
    root = Path(reward_module.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
