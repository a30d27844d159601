"""Rewards of one's own: a number, parts, weights, several; what goes wrong names the file and the row."""

import pytest

from ground.errors import OptionError
from ground.options import check_rewards, split_reward
from own_reward import RewardError, Scorer
from sheets.samples import Sample

SAMPLE = Sample(row=7, product_id="p7", text="mug", label=(10.0, 5.0), photos=(), sheet="s.xlsx")
HALF = '{"length": 10, "width": 2.5}'  # the built-in reward: 1 - 0.5 / 2

FUNCTIONS = """
def number(answer, label, sample):
    return len(answer) / 100 + max(label) + sample.row
def parts(answer, label, sample):
    return {"a": 1, "b": 0.5}
def broken(answer, label, sample):
    return 1 / (len(answer) - len(answer))
def wordy(answer, label, sample):
    return "good"
def infinite(answer, label, sample):
    return {"x": float("inf")}
constant = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def test_without_any_it_is_the_built_in_one():
    parts = Scorer()(HALF, SAMPLE)
    assert parts.reward == 0.75 and parts.named == ()


def test_a_number_and_weighted_parts_are_added_up(file):
    assert Scorer([f"{file}:number"])("x" * 50, SAMPLE).reward == pytest.approx(0.5 + 10 + 7)
    parts = Scorer(["size:0.4", f"{file}:parts:2", f"{file}:number:0.1"])(HALF, SAMPLE)
    number = 0.1 * (len(HALF) / 100 + 17)
    assert dict(parts.named) == pytest.approx({"size": 0.3, "a": 2, "b": 1, "number": number})
    assert parts.reward == pytest.approx(3.3 + number)
    assert parts.sizes == (10, 2.5) and parts.errors == (0, 0.5)  # the reading stays


def test_a_product_without_a_label_is_only_read(file):
    unlabelled = Sample(7, "p7", "mug", (), (), "s.xlsx")
    assert Scorer([f"{file}:broken"])(HALF, unlabelled).sizes == (10, 2.5)


def test_it_is_tried_before_anything_costs_time(file):
    said = Scorer([f"{file}:parts:0.5"]).check(SAMPLE)
    assert "s.xlsx row 7" in said and "earns 0.750 (a 0.500, b 0.250)" in said
    assert "the true size earns 1.000, an empty answer 0.000" in Scorer().check(SAMPLE)


@pytest.mark.parametrize(("name", "said"), [
    ("broken", "ZeroDivisionError"), ("wordy", "'good'"), ("infinite", "inf"), ("gone", "no function 'gone'"),
    ("constant", "no function 'constant'"),
])
def test_what_is_wrong_with_a_function(file, name, said):
    with pytest.raises(RewardError, match=said) as caught:
        Scorer([f"{file}:{name}"]).check(SAMPLE)
    assert f"mine.py:{name}" in str(caught.value)
    if name in ("broken", "wordy", "infinite"):
        assert "s.xlsx row 7" in str(caught.value)


def test_a_file_that_can_not_be_run(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    with pytest.raises(RewardError, match="ModuleNotFoundError"):
        Scorer([f"{tmp_path / 'bad.py'}:f"])


def test_how_a_reward_is_written(file):
    assert split_reward("a/b.py:f") == ("a/b.py", "f", 1.0) and split_reward("a.py:f:0.25") == ("a.py", "f", 0.25)
    assert split_reward("C:\\r.py:f:2") == ("C:\\r.py", "f", 2.0) and split_reward("size:0.5") == ("", "size", 0.5)
    for wrong in ("a.py", "f", "a.py:", "a.py:f:", "a.py:f:much", "a.py:f:nan", "size:x"):
        with pytest.raises(OptionError, match="--reward"):
            split_reward(wrong)
    check_rewards([f"{file}:number", "size"])
    with pytest.raises(OptionError, match="no such file"):
        check_rewards(["gone.py:f"])
    with pytest.raises(OptionError, match="twice"):
        check_rewards(["size", "size:0.5"])
