"""Options: read from flags and YAML, refused early with the nearest right name."""

import pytest

from config import AnswerOptions, CheckDataOptions, CompareOptions, DownloadOptions, TrainOptions
from ground.options import parse_options, read_options, sheet_options, write_options


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    (tmp_path / "data.xlsx").write_bytes(b"")
    (tmp_path / "mine.py").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(*argv, kind=TrainOptions):
    return parse_options(kind, "test", argv)


def refusal(capsys, *argv, kind=TrainOptions):
    with pytest.raises(SystemExit) as stop:
        parse(*argv, kind=kind)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_documented_ones(sheet):
    options = parse()
    assert (options.model_path, options.data_path, options.image_cache_dir) == \
        ("openbmb/MiniCPM-o-2_6", "data.xlsx", "image_cache_new")
    assert (options.output_dir, options.log_dir) == ("outputs/vlm_grpo", "runs/vlm_grpo_parallel")
    assert (options.batch_size, options.group_size, options.lr, options.kl_weight) == (16, 12, 5e-6, 0.01)
    assert (options.clip_eps, options.max_length, options.temperature, options.max_grad_norm) == (0.2, 64, 0.7, 1.0)
    assert options.train_vision is False


def test_the_command_line_wins_over_the_file(sheet):
    (sheet / "run.yaml").write_text("lr: 3e-5\nbatch_size: 4\nadam_betas: [0.8, 0.9]\ntrain_vision: true\n")
    options = parse("--config", "run.yaml", "--batch_size", "5")
    assert (options.lr, options.batch_size, options.adam_betas, options.train_vision) == (3e-5, 5, (0.8, 0.9), True)


def test_flags_and_pairs(sheet):
    assert parse("--train_vision").train_vision is True
    assert parse("--train_vision", "false").train_vision is False
    assert parse("--adam_betas", "0.5", "0.6").adam_betas == (0.5, 0.6)


@pytest.mark.parametrize(("argv", "said"), [
    (["--batchsize", "3"], "Did you mean --batch_size?"),
    (["--learning_rate", "3"], "unrecognized arguments: --learning_rate"),
    (["--batch_siz", "3"], "Did you mean --batch_size?"),
    (["--lr", "fast"], "--lr:\n  Expected a float. Got value: fast"),
    (["--batch_size", "2.5"], "batch_size"),
    (["--lr", "nan"], "--lr:"),
    (["--lr", "0"], "--lr 0.0: must be above 0"),
    (["--lr_scheduler", "step"], "constant"),
    (["--scale_advantages", "true"], "batch"),
    (["--scale_rewards_each"], "needs several rewards"),
    (["--scale_rewards_each", "--reward", "size"], "needs several rewards"),
    (["--scale_rewards_each", "--reward", "size", "--reward", "size:0.5", "--scale_advantages", "none"], "given twice"),
    (["--scale_rewards_each", "--reward", "mine.py:f", "--scale_advantages", "none"], "contradict each other"),
    (["--sft_lr", "1e-4"], "needs --sft_steps"),
    (["--ref_sync_every", "2", "--lora_rank", "4"], "python export.py"),
    (["--ref_sync_every", "2", "--kl_weight", "0"], "needs a reference policy"),
    (["--ref_sync_every", "2", "--ref_sync_mix", "0.1", "--dtype", "bfloat16"], "take 0.5 or more"),
    (["--ref_sync_mix", "0.6"], "--ref_sync_mix 0.6 needs --ref_sync_every"),
    (["--ref_sync_every", "2", "--ref_sync_mix", "0"], "--ref_sync_mix 0.0: must be in (0, 1]"),
    (["--clip_ratio_c", "1"], "--clip_ratio_c 1.0: must be in (1, inf)"),
    (["--temperature", "0"], "--temperature 0.0: must be above 0"),
    (["--clip_eps", "1.5"], "--clip_eps"),
    (["--adam_betas", "0.9", "1"], "--adam_betas"),
    (["--eval_fraction", "1"], "--eval_fraction"),
    (["--eval_fraction", "0"], "--eval_path"),
    (["--group_size", "1"], "advantage 0"),
    (["--minibatch_size", "17"], "--batch_size 16"),
    (["--min_lr_ratio", "0.1"], "--lr_scheduler linear or cosine"),
    (["--warmup_steps", "10", "--max_steps", "5"], "--max_steps 5"),
    (["--data_path", "other.xlsx"], "other.xlsx: no such file"),
    (["--prompt_file", "none.txt"], "none.txt: no such file"),
    (["--eval_path", "none.xlsx"], "none.xlsx: no such file"),
    (["--resume", "auto", "--overwrite_output_dir"], "contradict"),
    (["--column", "text"], "--column text: write FIELD=NAME"),
    (["--column", "texts=标题"], "--column texts=标题"),
    (["--on_bad_row", "drop"], "skip"),
    (["--missing_photos", "guess"], "placeholder"),
    (["--eval_sheet_name", "June"], "--eval_sheet_name June needs --eval_path"),
])
def test_wrong_options_are_refused(sheet, capsys, argv, said):
    assert said in refusal(capsys, *argv)


def test_wrong_names_in_the_file_are_refused(sheet, capsys):
    (sheet / "run.yaml").write_text("groupsize: 4\n")
    message = refusal(capsys, "--config", "run.yaml")
    assert "groupsize" in message and "Did you mean --group_size?" in message


def test_the_missing_default_sheet_points_at_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "make demo" in refusal(capsys)


def test_a_prompt_file_without_the_marker_is_refused(sheet, capsys):
    (sheet / "prompt.txt").write_text("How large is it?")
    assert "{text}" in refusal(capsys, "--prompt_file", "prompt.txt")


def test_options_survive_writing(sheet):
    options = parse("--adam_betas", "0.5", "0.6", "--minibatch_size", "4", "--prompt_language", "en")
    write_options(options, sheet / "options.yaml")
    assert read_options(sheet / "options.yaml") == options
    assert parse("--config", "options.yaml") == options


def test_columns_are_shared_repeated_and_kept(sheet):
    (sheet / "run.yaml").write_text("column: [text=标题]\nsheet_name: May\n", encoding="utf-8")
    argv = ("--config", "run.yaml", "--column", "photo=主图")
    for kind in (TrainOptions, CheckDataOptions, DownloadOptions):
        options = parse(*argv, kind=kind)
        assert (options.column, options.sheet_name) == (["text=标题", "photo=主图"], "May")
    assert parse().column == []
    write_options(parse(*argv), sheet / "options.yaml")
    trained = read_options(sheet / "options.yaml")
    assert trained == parse(*argv) and parse("--config", "options.yaml") == trained
    own = CompareOptions(encoding="big5")
    same = sheet_options(own, trained, own_sheet=False)
    assert (same.column, same.sheet_name, same.encoding) == (trained.column, "May", "big5")
    other = sheet_options(own, trained, own_sheet=True)
    assert (other.column, other.sheet_name) == (trained.column, None)
    trained.eval_sheet_name = "June"
    assert sheet_options(CompareOptions(), trained, own_sheet=False, held_out=True).sheet_name == "June"


def test_compare_and_answer_options(sheet, capsys):
    assert "--checkpoint_path is missing" in refusal(capsys, kind=CompareOptions)
    assert "--model_path is missing" in refusal(capsys, "--text", "x", kind=AnswerOptions)
    assert "either --text" in refusal(capsys, "--model_path", "m", kind=AnswerOptions)
    assert "--image and --label" in refusal(capsys, "--model_path", "m", "--data_path", "data.xlsx", "--image", "a",
                                            kind=AnswerOptions)
    assert parse("--model_path", "m", "--text", "x", "--image", "a", "--image", "b", kind=AnswerOptions).image == \
        ["a", "b"]


def test_every_option_says_what_it_is(sheet, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for group in ("Model", "Data", "Rollout", "Reward and loss", "Optimizer", "Run"):
        assert f"\n{group}:" in text
    assert "--kl_weight" in text and "default: 0.01" in text
