"""The wording: what is asked, in both languages, with any number of photos."""

import pytest

from prompts import build_prompt, read_template, write_answer
from reward import score_answer
from sizes.labels import Label, parse_label


@pytest.mark.parametrize("language", ["zh", "en"])
def test_both_languages_ask_for_the_json_object(language):
    for images in ([], ["photo"] * 3):
        prompt = build_prompt("a mug {of} 12%", images, language)
        assert "a mug {of} 12%" in prompt
        assert all(key in prompt for key in ("length", "width", "height", "unit", "JSON", '"cm"'))
        assert ("3" in prompt.splitlines()[0]) == bool(images)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_wording_has_no_number_that_an_answer_could_copy(language):
    assert not any(sign.isdigit() for sign in build_prompt("", [], language))


def test_chinese_is_the_default():
    assert build_prompt("杯子", []) == build_prompt("杯子", [], "zh") != build_prompt("杯子", [], "en")


def test_a_wording_of_ones_own(tmp_path):
    (tmp_path / "prompt.txt").write_text("Size of {text}? {json}\n", encoding="utf-8")
    template = read_template(str(tmp_path / "prompt.txt"))
    assert build_prompt("a {text} mug", ["photo"], template=template) == "Size of a {text} mug? {json}"
    assert read_template(None) is None


@pytest.mark.parametrize(("label", "answer"), [
    ("12 8.50 15", '{"length": 12, "width": 8.5, "height": 15, "unit": "cm"}'),
    ("138(L) x 100(H) x 90(W) MM", '{"length": 13.8, "width": 9, "height": 10, "unit": "cm"}'),
    ("高25cm", '{"height": 25, "unit": "cm"}'),
    ("厚2cm", '{"thickness": 2, "unit": "cm"}'),
    ("厚2cm 宽30cm", '{"width": 30, "thickness": 2, "unit": "cm"}'),
    ("长30cm 宽20cm 厚2cm", '{"length": 30, "width": 20, "height": 2, "unit": "cm"}'),
    ("直径30cm", '{"length": 30, "width": 30, "unit": "cm"}'),
    ("φ30 x 5 cm", '{"length": 30, "width": 30, "height": 5, "unit": "cm"}'),
    ("W30 x D40 cm", '{"length": 40, "width": 30, "unit": "cm"}'),
    ("深30cm 高20cm", '{"length": 30, "height": 20, "unit": "cm"}'),
    ("25 x 30", '{"length": 25, "width": 30, "unit": "cm"}'),
    ("27 cm", '{"length": 27, "unit": "cm"}'),
    ("10.5 in x 3/8 in x 19 5/8 in", '{"length": 26.67, "width": 0.9525, "height": 49.85, "unit": "cm"}'),
    ("123.45 x 0.125 x 0.1", '{"length": 123.45, "width": 0.125, "height": 0.1, "unit": "cm"}'),
    ("2500 x 99.999 x 1.5", '{"length": 2500, "width": 100, "height": 1.5, "unit": "cm"}'),
])
def test_a_label_is_written_as_the_answer_that_is_asked_for(label, answer):
    label = parse_label(label)
    assert write_answer(label) == answer
    assert score_answer(answer, label).reward == pytest.approx(1, abs=5e-4)


def test_an_answer_without_named_axes_is_a_labels_sizes_in_order():
    assert write_answer(Label((3.0, 5.0))) == write_answer((3.0, 5.0)) == '{"length": 3, "width": 5, "unit": "cm"}'
