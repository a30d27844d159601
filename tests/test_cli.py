"""Each command line as a user meets it: in a process of its own where that matters, else in this one."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from runs import as_flags, run_here, train_options

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("script", ["train_vlm_parallel.py", "run.py", "test_model.py", "export.py", "demo.py",
                                    "check_data.py", "download_images.py"])
def test_help_answers_before_torch_is_imported(script):
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / script), "--help"], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0 and "usage" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "config" in imported and not imported & {"torch", "transformers"}, "help should not wait for torch"


SCRIPT = """
if __name__ == "__main__":
    from config import DemoOptions
    from ground.commands import start
    start(DemoOptions, "")
import gc
then = gc.isenabled()
def main(options):
    print(then, gc.isenabled())
"""


def test_a_command_is_imported_without_looking_for_garbage_and_frozen_once(tmp_path, monkeypatch):
    (tmp_path / "some_script.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append("frozen"))
    for _ in range(2):  # the second time there is more in memory than modules
        assert run_here(tmp_path / "some_script.py").stdout == "False True\n"
        assert frozen == ["frozen"]


def test_without_any_option_the_demo_is_named(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train_vlm_parallel.py")], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 2 and "make demo" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    options = train_options(shop, output, eval_fraction=0.5)
    done = run_here("train_vlm_parallel.py", *as_flags(options))
    assert done.returncode == 0, done.stderr
    assert "step 3/3 | reward" in done.stderr
    assert "step 3/3 | reward" in (output / "run" / "train.log").read_text()
    return output / "run" / "step_000003"


def test_run_compares_before_and_after(trained):
    done = run_here("run.py", "--checkpoint_path", trained, "--num_samples", 2, "--ablate", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "mean reward" in done.stdout and "photos blanked" in done.stdout and "improved" in done.stdout
    folder = trained.parent / "compare"
    report = json.loads((folder / "compare.json").read_text())
    assert list(report["summary"]) == ["before", "after", "no photos", "photos blanked", "other products' photos"]
    assert report["settings"]["temperature"] == 1.0
    products = report["products"]
    rewards = [answer["reward"] for product in products for answer in product["models"]["after"]["answers"]]
    assert report["summary"]["after"]["mean_reward"] == pytest.approx(sum(rewards) / len(rewards))
    sheet = pd.read_excel(folder / "compare.xlsx", sheet_name="products")
    assert sheet["row"].tolist() == [product["row"] for product in products]
    assert "photos blanked" in (folder / "compare.html").read_text()


def test_run_on_all_rows_and_from_a_state_dict(trained, shop, tmp_path):
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(trained / "model.safetensors"), trained.parent / "model_step3.pt")
    done = run_here("run.py", "--checkpoint_path", trained.parent / "model_step3.pt", "--rows", "all", "--greedy",
                    "--output_dir", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "compare.json").read_text())["products"]) == 8


def test_model_answers_one_product(trained, shop):
    photos = sorted((shop / "photos").iterdir())
    done = run_here("test_model.py", "--model_path", trained, "--text", "box 1", "--image", photos[0], "--image",
                    photos[1], "--label", "12 8 15", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "answer:" in done.stdout and "reward:" in done.stdout


def test_model_answers_a_sheet(trained, shop, tmp_path):
    done = run_here("test_model.py", "--model_path", trained, "--data_path", shop / "data.xlsx", "--output_path",
                    tmp_path / "out.xlsx", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "9 products answered" in done.stdout  # the unlabelled one too
    answers = pd.read_excel(tmp_path / "out.xlsx", sheet_name="answers")
    assert answers["row"].tolist() == list(range(2, 12)) and answers["label"].notna().sum() == 9
    assert "photo missing" in answers["problem"].tolist()[-1] and pd.isna(answers["answer"].tolist()[-1])


@pytest.mark.parametrize(("script", "argv", "said"), [
    ("test_model.py", ["--model_path", "nowhere", "--text", "x"], "--model_path nowhere"),
    ("test_model.py", ["--model_path", "{trained}", "--text", "x", "--image", "gone.png"], "--image gone.png"),
    ("test_model.py", ["--model_path", "{trained}", "--text", "x", "--label", "huge"], "--label"),
    ("run.py", ["--checkpoint_path", "{trained}/nothing"], "nothing"),
    ("run.py", ["--checkpoint_path", "{trained}", "--data_path", "gone.xlsx"], "gone.xlsx"),
])
def test_mistakes_end_with_one_message(trained, script, argv, said):
    done = run_here(script, *[word.replace("{trained}", str(trained)) for word in argv])
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
