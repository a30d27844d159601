"""The reward doctor: readings and errors against numbers worked by hand; the head-room of groups; the command."""

import subprocess
import sys
from pathlib import Path

import pytest

import check_reward
from config import CheckRewardOptions
from ground.errors import OptionError
from ground.options import check_options
from sizes.labels import LabelError

ROOT = Path(__file__).resolve().parent.parent


def test_an_answer_is_explained_side_by_side():
    said = check_reward.explain(CheckRewardOptions(answer="about 10 x 5 inch", label="12 8 15")).splitlines()
    assert said[1] == "label:   15 x 12 x 8 cm, largest first"
    assert said[2] == "read:    25.4 cm (given in inch), 12.7 cm (given in inch)"
    assert said[3:6] == ["side 1:  25.4 for 15: off by 69.3%", "side 2:  12.7 for 12: off by 5.8%",
                         "side 3:  missing for 8: off by 100.0%"]
    assert said[6] == "volume:  off by 100.0%"
    assert said[7] == "reward:  0.4161 = max(0, 1 - 0.5839), the mean error"  # (0.6933 + 0.0583 + 1) / 3


def test_a_unit_slip_and_an_unreadable_answer_are_named():
    said = check_reward.explain(CheckRewardOptions(answer='{"length": 150, "width": 120, "height": 80}',
                                                   label="15 12 8"))
    assert "every side is 10 times the true one" in said and "reward:  0.0000" in said
    said = check_reward.explain(CheckRewardOptions(answer="no idea", label="15 12"))
    assert "read:    nothing" in said and "holds no readable size" in said and "volume" not in said
    with pytest.raises(LabelError):
        check_reward.explain(CheckRewardOptions(answer="1", label="huge"))


def test_a_reward_of_ones_own_is_explained_in_parts(tmp_path):
    (tmp_path / "mine.py").write_text("def brief(answer, label, sample):\n    return len(sample.text)\n")
    said = check_reward.explain(CheckRewardOptions(answer="15 12 8", label="15 12 8", text="four",
                                        reward=["size:0.5", f"{tmp_path / 'mine.py'}:brief:0.25"]))
    assert "size +0.5000" in said and "brief +1.0000" in said and "reward:  1.5000, the sum of the parts" in said


def test_the_head_room_of_groups():
    groups = [[0.2, 0.6, 0.7, 0.9], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.501], [0.0, 0.0, 0.0, 1.0]]
    figures = dict(line.rsplit(maxsplit=1) for line in check_reward.head_room(groups, [0.5, 0.7], 0.75)[:-1])
    assert figures["readable answers"] == "75.0%" and figures["groups with a signal"] == "50.0%"
    assert figures["  all answers earn the same"] == "25.0%" and figures["  spread below 0.01"] == "25.0%"
    assert figures["mean reward"] == "0.463" and figures["greedy"] == "0.600"  # (0.6 + 0.5 + 0.50025 + 0.25) / 4
    assert figures["best of 4"] == "0.725" and figures["head-room, best - mean"] == "0.263"
    assert figures["answers with reward >= 0.9"] == "12.5%"


@pytest.mark.parametrize(("figures", "said"), [
    ((0.3, 1.0, 0.1, 0.5), "can't be read"), ((1.0, 0.1, 0.5, 0.52), "nothing to learn from"),
    ((1.0, 0.9, 0.9, 0.92), "little to gain"), ((1.0, 0.9, 0.62, 0.9), "RL can help"),
])
def test_the_verdict(figures, said):
    assert said in check_reward.verdict(*figures)


def test_a_sheet_is_examined(shop, bars):
    options = CheckRewardOptions(data_path=str(shop / "data.xlsx"), model_path=str(shop / "model"), group_size=4,
                            image_cache_dir=str(shop / "photos"), prompt_file=str(shop / "prompt.txt"), max_length=8,
                            temperature=1.0, device="cpu", num_threads=1)
    check_options(options)
    said = check_reward.examine(options)
    assert said.startswith("8 products x 4 answers at temperature 1.0") and "best of 4" in said and "verdict" in said
    assert [(bar.total, bar.shown) for bar in bars] == [(8, [0, 8])]


def test_what_does_not_go_together():
    for wrong in (CheckRewardOptions(), CheckRewardOptions(answer="1"), CheckRewardOptions(data_path="x.xlsx"),
                  CheckRewardOptions(answer="1", label="1", data_path="x.xlsx")):
        with pytest.raises(OptionError):
            check_options(wrong)


def test_the_command_needs_no_torch():
    code = ("import sys; sys.argv = ['check_reward.py', '15 12 8', '--label', '15 12 8']; import runpy\n"
            "sys.path.insert(0, '.')\n"
            "try:\n    runpy.run_path('check_reward.py', run_name='__main__')\nexcept SystemExit as end:\n"
            "    print(end.code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "reward:  1.0000" in done.stdout and done.stdout.endswith("0 False\n"), done.stderr
