"""The comparison at equal CPU seconds: its clock, its table, and a run of our arms at tiny size."""

import json
from types import SimpleNamespace

import pytest

import learning
import learning_task
from ground.errors import OptionError
from learning import LearningOptions, Pacer, Watcher, table


def point(seconds, steps, mean_reward, within_10):
    return {"seconds": seconds, "steps": steps, "mean_reward": mean_reward, "within_10": within_10}


def test_the_table_by_hand():
    runs = {"ours": [{"points": [point(0, 0, 0.5, 0.0), point(10, 30, 0.9, 0.4)]},
                     {"points": [point(0, 0, 0.7, 0.1), point(10, 40, 0.8, 0.6)]}]}
    assert table(runs, 10).splitlines()[2:] == [
        "| before |  | 0.600 (0.500 to 0.700) | 5.0% (0.0% to 10.0%) |",
        "| GRPO, ours | 35 | 0.850 (0.800 to 0.900) | 50.0% (40.0% to 60.0%) |"]


@pytest.fixture
def seconds(monkeypatch):
    """CPU seconds that tests let pass; a look at held-out products takes 100."""
    passed = SimpleNamespace(now=0.0)
    monkeypatch.setattr(learning_task.time, "process_time", lambda: passed.now)

    def evaluate(*_, **__):
        passed.now += 100
        return [], []

    monkeypatch.setattr(learning, "evaluate", evaluate)
    monkeypatch.setattr(learning, "summarise", lambda records: {"mean_reward": 0.5, "within_10": 0.1})
    return passed


def test_looks_are_not_counted_and_the_seconds_end_the_run(seconds):
    watcher = Watcher([], LearningOptions(seconds=10, looks=2), seed=0)
    watcher.begin(encoder=None)
    stopped = []
    for step in range(1, 5):
        seconds.now += 3
        stopped.append(watcher.after(step))
    assert stopped == [False, False, False, True]
    assert [(look["seconds"], look["steps"]) for look in watcher.points] == [(0, 0), (6, 2), (12, 4)]
    watcher.end()
    assert len(watcher.points) == 3  # the last step has been looked at


def test_a_run_whose_steps_are_done_early_is_looked_at_once_more(seconds):
    watcher = Watcher([], LearningOptions(seconds=10, looks=2), seed=0)
    watcher.begin(encoder=None)
    seconds.now += 2
    watcher.after(1)
    watcher.end()
    assert [(look["seconds"], look["steps"]) for look in watcher.points] == [(0, 0), (2, 1)]


def test_the_pace_leaves_the_first_step_out(seconds):
    pacer = Pacer([], LearningOptions(), seed=0)
    pacer.begin(encoder=None)
    took = [50, *[2] * (learning.PACE_STEPS - 1)]
    for step, second in enumerate(took, 1):
        seconds.now += second
        assert pacer.after(step) == (step == learning.PACE_STEPS)
    assert pacer.pace == 2


def test_our_arms_run_and_what_is_done_is_kept(tmp_path, monkeypatch, capsys):
    def here(command, check):
        words = dict(part.removeprefix("--").split("=", 1) for part in command[2:])
        learning.main(LearningOptions(**{name: type(getattr(LearningOptions, name))(word)
                                         for name, word in words.items()}))

    monkeypatch.setattr(learning, "subprocess", SimpleNamespace(run=here))
    monkeypatch.setattr(learning, "PACE_STEPS", 2)
    monkeypatch.setattr(learning_task.demo, "warm_up", lambda policy, options: 0.0)
    options = LearningOptions(arms="ours,supervised,both", seeds="0", seconds=0.2, looks=1, warm_up_steps=1, products=8,
                              held_out=2, output_dir=str(tmp_path / "out"))
    learning.main(options)
    printed = capsys.readouterr().out
    assert [title for title in learning.ARMS.values() if f"| {title} |" in printed] == list(learning.ARMS.values())[1:]
    found = json.loads((tmp_path / "out" / "learning.json").read_text())["runs"]
    assert found.keys() == {"ours", "supervised", "both"} and (tmp_path / "out" / "learning.svg").read_text()
    assert found["both"][0]["steps"]["supervised"] and found["both"][0]["steps"]["sampled"]
    monkeypatch.setattr(learning, "run_arm", None)  # nothing is run again
    learning.main(options)
    with pytest.raises(OptionError, match="made with other options"):
        learning.main(LearningOptions(**{**vars(options), "seconds": 0.3}))
    with pytest.raises(OptionError, match="'sft' is none"):
        learning.main(LearningOptions(arms="sft"))
