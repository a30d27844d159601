"""The wording: what is asked, in both languages, with any number of photos."""

import pytest

from prompts import build_prompt, read_template


@pytest.mark.parametrize("language", ["zh", "en"])
def test_both_languages_ask_for_the_json_object(language):
    for images in ([], ["photo"] * 3):
        prompt = build_prompt("a mug {of} 12%", images, language)
        assert "a mug {of} 12%" in prompt
        assert all(key in prompt for key in ("length", "width", "height", "unit", "JSON", '"cm"'))
        assert ("3" in prompt.splitlines()[0]) == bool(images)


def test_chinese_is_the_default():
    assert build_prompt("杯子", []) == build_prompt("杯子", [], "zh") != build_prompt("杯子", [], "en")


def test_a_wording_of_ones_own(tmp_path):
    (tmp_path / "prompt.txt").write_text("Size of {text}? {json}\n", encoding="utf-8")
    template = read_template(str(tmp_path / "prompt.txt"))
    assert build_prompt("a {text} mug", ["photo"], template=template) == "Size of a {text} mug? {json}"
    assert read_template(None) is None
