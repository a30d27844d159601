"""What is odd in rows that can be read, against cases worked by hand; the check of a sheet as a command."""

import csv
import subprocess
import sys
import tracemalloc
from itertools import chain
from itertools import product as pairs
from pathlib import Path

import pytest
from openpyxl import load_workbook
from PIL import Image, ImageOps

import check_data
from config import CheckDataOptions
from runs import run_here
from sheets import columns, findings, table
from sheets.cells import DataError
from sheets.checks import leaks, look_at_photos, look_over, outliers
from sheets.photos import examine_photos, look_of
from sheets.samples import Sample, doubtful_labels, label_gap, load_samples
from sheets.summary import obey_bad_rows
from sheets.table import read_table, write_table
from sizes.labels import parse_label

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / "../shared/data"


def rows_of(*cells, **common):
    """Samples from (text, label) or (text, label, product) in rows 2, 3, ..."""
    samples = []
    for row, (text, label, *product) in enumerate(cells, start=2):
        samples.append(Sample(row, product[0] if product else f"P{row}", text, parse_label(label) if label else (),
                              common.get("photos", ()), "s.xlsx", "text_only", label, common.get("category", "")))
    return samples


def said(problems, kind):
    return {problem.row: problem.detail for problem in problems if problem.kind == kind}


# Labels against each other

def test_label_gap_is_the_share_of_the_larger_side():
    assert label_gap((10, 20, 30), (30, 19, 10)) == pytest.approx(1 / 20)
    assert label_gap((10, 20), (10, 20, 30)) == float("inf") and label_gap((1,), (1,)) == 0


def test_contradicting_labels_are_left_out_and_agreeing_ones_named(tmp_path):
    cells = [("mug", "10 10 10", "A"), ("mug", "10 10 9.4 cm", "A"), ("jug", "20 10 10", "B"),
             ("jug", "[10, 10, 20.9, cm]", "B"), ("pot", "100 x 100 mm", "C"), ("pot", "10 x 10 cm", "C"),
             ("cup", "5 5 5", "D")]
    samples = rows_of(*cells)
    doubts = doubtful_labels(samples)  # 6 % apart contradicts; 4.3 % does not
    assert set(doubts) == {2, 3} and "'10 10 9.4 cm' in row 3" in doubts[2] and "in row 2" in doubts[3]
    different = said(look_over(samples), "label written differently")
    assert set(different) == {4, 5, 6, 7}
    write_table(tmp_path / "data.xlsx", [["text", "label", "sku_id"], *map(list, cells)])
    usable, problems = load_samples(tmp_path / "data.xlsx", tmp_path)
    assert [sample.row for sample in usable] == [4, 5, 6, 7, 8]
    assert [(problem.row, problem.kind, problem.used) for problem in problems] == [
        (2, "labels contradict", False), (3, "labels contradict", False)]
    everything, problems = load_samples(tmp_path / "data.xlsx", tmp_path, require_label=False)
    assert [sample.label for sample in everything[:3]] == [(), (), (20, 10, 10)] and problems[0].used


@pytest.mark.parametrize(("label", "kept"), [("10001 5 5", False), ("9999 5 5", True), ("0.009 5 5", False),
                                             ("0.1mm x 5cm", True)])
def test_impossible_labels_are_left_out(label, kept, tmp_path):
    write_table(tmp_path / "data.xlsx", [["text", "label"], ["mug", label]])
    usable, problems = load_samples(tmp_path / "data.xlsx", tmp_path)
    assert bool(usable) == kept and [problem.kind for problem in problems] == ["label impossible"] * (not kept)


def test_bad_rows_stop_the_run_when_told_to(tmp_path):
    write_table(tmp_path / "data.xlsx", [["text", "label"], ["mug", "1 2 3"], ["jug", "10/12 cm"]])
    _, problems = load_samples(tmp_path / "data.xlsx", tmp_path)
    obey_bad_rows(problems, "data.xlsx", "skip")
    with pytest.raises(DataError, match=r"data.xlsx: 1 row can't be trained on.*row 3 .*label ambiguous: '10/12 cm'"):
        obey_bad_rows(problems, "data.xlsx", "stop")


# Outliers and unit slips

def test_outliers_are_named_within_their_like_worst_first():
    sofas = [("SOFA", f"{180 + index} x 90 x 80 cm") for index in range(25)]
    rings = [("RING", f"{20 + index / 10} x 20 x 3 mm") for index in range(25)]
    samples = rows_of(*sofas, *rings, ("SOFA", "2000 x 900 x 800 cm"), ("RING", "200 x 200 x 90 cm"),
                      ("SOFA", "190 x 90 x 9 cm"))
    found = outliers(samples)
    assert [problem.row for problem in found] == [53, 52]
    assert "90 cm is 300 times as long as the usual 0.3 cm of RING" in found[0].problem
    assert "900 cm is 10 times as long" in found[1].problem or "2000 cm is 10 times as long" in found[1].problem
    assert outliers(samples[:10]) == []  # too few to say


def test_rows_without_a_category_are_compared_with_the_sheet():
    samples = rows_of(*((f"box {index}", f"{10 + index} 10 10") for index in range(30)), ("box x", "27400 10 10"))
    [found] = outliers(samples)
    assert found.row == 32 and "of this sheet" in found.problem
    by_category = rows_of(*((f"box {index}", f"{10 + index} 10 10") for index in range(30)), category="boxes")
    assert outliers(by_category) == []


@pytest.mark.parametrize(("text", "label", "kind"), [
    ("mug 12 x 8 x 15 cm", "15 12 8", "answer in the text"),
    ("mug 12 x 8 x 15 inch", "12 8 15", "unit slip"),
    ("mug 12 x 8 x 15 cm", "12 8 15 inch", "unit slip"),
    ("mug 120 x 80 x 150 mm", "120 80 150", "unit slip"),
    ("mug 12 x 8 x 15 mm", "[12, 8, 15, inch]", "unit slip"),  # 25.4 times
    ("mug 12 x 8 x 15 cm", "13 8 15", None),
    ("a mug of 350 ml", "12 8 15", None),
    ("pole 10 cm", "100 100", None),  # equal sides could match by chance
    ("138(L) x 90(W) x 100(H) MM", "13.8 9 10", "answer in the text"),  # the unit stands behind an axis
])
def test_labels_against_the_text(text, label, kind):
    kinds = {problem.kind for problem in look_over(rows_of((text, label)))}
    assert kinds == ({kind} if kind else set())


def test_fillers_repeats_and_few_rows():
    samples = rows_of(("bulb", "[9.0, 9.0, 9.0, inch]"), ("mug", "1 2 3", "A"), ("mug", "1 2 3", "A"), ("cup", ""))
    found = look_over(samples)
    fillers = said(found, "label like a placeholder")
    assert set(fillers) == {2, 3, 4} and "3 labelled rows are too few to say what is usual" in fillers[2]
    assert said(found, "row repeated") == {4: "the same as row 3"}


# Photos

def photo(path, seed, size=(90, 80), **how):
    import random

    blocks = Image.frombytes("RGB", (9, 8), random.Random(seed).randbytes(9 * 8 * 3))
    blocks.resize((90, 80), Image.Resampling.NEAREST).resize(size).save(path, **how)
    return str(path)


def test_photos_twice_shared_alike_and_broken(tmp_path):
    a, b, alone = (photo(tmp_path / f"{name}.png", name) for name in "ab!")
    again, small = photo(tmp_path / "again.png", "a"), photo(tmp_path / "small.png", "a", (45, 40))
    (tmp_path / "broken.png").write_bytes(b"<html>")
    plain = [str(tmp_path / f"plain{index}.png") for index in range(2)]
    for path, size in zip(plain, (8, 9), strict=True):
        Image.new("RGB", (size, 8), "red").save(path)
    photos = [(a, again), (a, small), (b, str(tmp_path / "broken.png")), (again,), (small, alone), (plain[0],),
              (plain[1],)]
    samples = [Sample(row, f"P{row}", "mug", (1.0,), mine, "s.xlsx") for row, mine in enumerate(photos, start=2)]
    seen = dict(examine_photos({path: 0 for mine in photos for path in mine}))
    found = look_at_photos(samples, seen) + look_over(samples)
    assert set(said(found, "photo twice")) == {2} and set(said(found, "photo broken")) == {4}
    assert "it is a web page" in said(found, "photo broken")[4]
    assert set(said(found, "photo shared")) == {3, 5, 6}
    assert set(said(found, "photos look alike")) == {3, 6}
    assert look_of(Image.new("RGB", (50, 50), "red")) is None


def test_leaks_by_product_and_photo(tmp_path):
    a, again, b = photo(tmp_path / "a.png", 1), photo(tmp_path / "again.png", 1), photo(tmp_path / "b.png", 2)
    training = [Sample(2, "A", "mug", (1.0,), (a,), "train.xlsx"), Sample(3, "B", "jug", (1.0,), (b,), "train.xlsx")]
    held_out = [Sample(2, "A", "mug", (1.0,), (a,), "test.xlsx"), Sample(3, "C", "cup", (1.0,), (again,), "test.xlsx"),
                Sample(4, "D", "pot", (1.0,), (b,), "test.xlsx")]
    assert [(problem.row, problem.kind) for problem in leaks(training, held_out)] == [
        (2, "held-out product trained on"), (4, "held-out photo trained on")]
    seen = dict(examine_photos([a, again, b]))
    assert [problem.row for problem in leaks(training, held_out, seen)] == [2, 3, 4]


# The command

HOSTILE = "<script>document.body.innerHTML='taken over'</script>"


def sheet(tmp_path, *extra):
    for name in ("a.png", "b.png"):
        photo(tmp_path / name, name)
    rows = [["标题", "label", "sku_id", "sku_img"], ["=1+1", "12 8 15", "001", "a.png"],
            [f"{HOSTILE} mug", "10/12 cm", "<b>2</b>", "b.png"], ["jug", "5 x 6 x 7 inch", "003", "https://x.invalid/c.jpg"],
            *extra]
    write_table(tmp_path / "data.xlsx", rows)


FLAGS = ["--data_path", "data.xlsx", "--column", "text=标题"]


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Run the command in this process, on the sheet in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: run_here("check_data.py", *FLAGS, *argv)


def test_the_command_writes_page_and_sheet_in_which_everything_is_text(tmp_path):
    sheet(tmp_path)
    done = subprocess.run([sys.executable, str(ROOT / "check_data.py"), *FLAGS, "--eval_fraction", "0"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "label ambiguous (1 of the rows)\n    row 3 (<b>2</b>): '10/12 cm'" in done.stdout
    assert "training would start: 1 rows to train on, 0 held out" in done.stdout
    page = (tmp_path / "data.check.html").read_text(encoding="utf-8")
    assert "<script" not in page and "document.body.innerHTML" in page and "<b>2" not in page
    assert page.count("data:image/jpeg;base64,") == 2 and "default-src 'none'" in page
    assert "http-equiv" in page and page.count("http") == page.count("http-equiv") + page.count("https://x.invalid")
    table = load_workbook(tmp_path / "data.check.xlsx").active
    rows = list(table.values)
    assert rows[0] == ("标题", "label", "sku_id", "sku_img", "row", "read", "problem")
    assert rows[1][4:] == ("2", "12 x 8 x 15 cm", None) and rows[1][2] == "001"
    assert table["A2"].value == "=1+1" and table["A2"].data_type == "s"
    assert "label ambiguous: '10/12 cm'" in rows[2][6] and rows[2][6].endswith("(left out)")
    assert rows[3][6].startswith("photo missing: sku_img https://x.invalid/c.jpg")


@pytest.mark.parametrize(("argv", "status", "text"), [
    (["--on_bad_row", "stop"], 1, "training would not start: data.xlsx: 2 rows can't be trained on"),
    (["--missing_photos", "placeholder", "--eval_fraction", "0"], 0, "training would start: 2 rows"),
    (["--max_prompt_length", "20"], 0, "text too long (3 of the rows)"),
    (["--sheet_name", "May"], 2, "no worksheet 'May'"),
    (["--column", "label=size"], 2, "no column 'size'"),
])
def test_the_exit_status_says_whether_training_would_start(argv, status, text, tmp_path, check):
    sheet(tmp_path)
    done = check(*argv)
    assert done.returncode == status and text in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_sheet_without_a_usable_row_and_a_leaking_one(tmp_path, check):
    sheet(tmp_path)
    write_table(tmp_path / "test.xlsx", [["标题", "label", "sku_id", "sku_img"], ["mug", "12 8 15", "9", "a.png"]])
    done = check("--eval_path", "test.xlsx")
    assert done.returncode == 0 and "held-out photo trained on (1 of the rows)" in done.stdout
    assert (tmp_path / "data.check.held_out.html").is_file()
    write_table(tmp_path / "data.xlsx", [["标题", "label"], ["mug", "4-seat"]])
    done = check()
    assert done.returncode == 1 and "no row can be used, of 1: label without a size (1 row)" in done.stdout


# What it costs

def check_here(tmp_path, monkeypatch, **options):
    """Run the command in this process, in the folder of its sheet."""
    monkeypatch.chdir(tmp_path)
    return check_data.check(CheckDataOptions(**{"data_path": "data.csv", "image_cache_dir": "cache"} | options))


def test_each_photo_is_decoded_once_and_the_sheet_read_once(tmp_path, monkeypatch, capsys):
    for name in "abc":
        photo(tmp_path / f"{name}.jpg", name)
    (tmp_path / "again.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    rows = [["text", "label", "sku_img", "spu_img_1", "spu_img_2"],  # rows of several kinds of problem each
            ["mug", "1 2 3", "a.jpg", "b.jpg", "again.jpg"], ["mug", "1 2 3", "a.jpg", "b.jpg", "again.jpg"],
            ["<b>jug</b> 9 x 8 x 7 cm", "9 8 7", "c.jpg", "broken.jpg", "gone.jpg"],
            ["pot", "4-seat", "again.jpg", "", ""]]
    write_table(tmp_path / "data.csv", rows)
    decoded, read = [], []
    upright, table = ImageOps.exif_transpose, columns.read_table
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda opened: decoded.append(opened.filename) or upright(opened))
    monkeypatch.setattr(columns, "read_table", lambda *sheet: read.append(sheet) or table(*sheet))
    assert check_here(tmp_path, monkeypatch)
    assert sorted(Path(path).name for path in decoded) == ["a.jpg", "b.jpg", "c.jpg"]  # again.jpg equals a.jpg
    assert len(read) == 1
    page = (tmp_path / "data.check.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") > 2 * len(decoded) and "broken.jpg: broken" in page

    decoded.clear()
    check_here(tmp_path, monkeypatch, max_photos=1)
    assert len(decoded) == 1 and "b.jpg: not opened" in (tmp_path / "data.check.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("rule", ["use_rest", "drop_row", "text_only", "placeholder"])
@pytest.mark.parametrize("partial", ["axis", "skip"])
def test_the_rows_called_used_are_those_that_training_uses(rule, partial, tmp_path, monkeypatch, capsys):
    photo(tmp_path / "a.jpg", "a")
    cells = [("mug", "1 2 3"), ("", "1 2 3"), ("jug", "4-seat"), ("pot", ""), ("pan", "12 8"), ("box", "1 2 3 km"),
             ("<p>", "1 2 3"), ("tin", "1 2 30000")]
    photos = [(), ("a.jpg",), ("a.jpg", "gone.jpg"), ("gone.jpg",), ("gone.jpg", "lost.jpg")]
    rows = [[text, label, f"P{place}", *of_row, *[""] * (2 - len(of_row))]
            for place, ((text, label), of_row) in enumerate(pairs(cells, photos))]
    # One product whose rows contradict each other, one of them without its photo.
    rows += [["cup", "1 2 3", "Q", "", ""], ["cup", "1 2 4", "Q", "gone.jpg", ""], ["cup", "1 2 3", "Q", "a.jpg", ""]]
    write_table(tmp_path / "data.csv", [["text", "label", "sku_id", "sku_img", "spu_img_1"], *rows])
    check_here(tmp_path, monkeypatch, missing_photos=rule, partial_labels=partial)
    samples, problems = load_samples("data.csv", "cache", rule, partial_labels=partial)
    with open("data.check.csv", encoding="utf-8-sig", newline="") as file:
        back = list(csv.DictReader(file))
    left_out = {int(row["row"]) for row in back if "(left out)" in row["problem"]}
    assert {int(row["row"]) for row in back} - left_out == {sample.row for sample in samples}
    assert left_out == {problem.row for problem in problems if not problem.used}
    assert [[row[name] for name in ("text", "label", "sku_id", "sku_img", "spu_img_1")] for row in back] == rows
    said = {(int(row["row"]), line.removesuffix(" (left out)")) for row in back for line in row["problem"].splitlines()}
    assert {(problem.row, problem.problem) for problem in problems} <= said
    photos = sum(len(sample.photos) for sample in samples)
    assert f"{len(samples)} rows would be used, {len(left_out)} left out" in (printed := capsys.readouterr().out)
    assert f"; {photos} photos" in printed


def test_what_rows_share_is_named_by_its_beginning_every_time(tmp_path, monkeypatch, capsys):
    text = "A sofa for the living room, of which there are many variants in many colours"
    rows = [[text, f"{180 + row} x 90 x 80 cm"] for row in range(25)]
    write_table(tmp_path / "data.csv", [["text", "label"], *rows, [text, "19000 x 90 x 80 mm"], [text, "2 x 1 x 1 cm"]])
    check_here(tmp_path, monkeypatch)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("    row 28"))
    assert line.endswith("times shorter than the usual 192 cm of " + text[:40])


def test_memory_grows_little_with_rows_their_texts_and_their_problems(tmp_path, monkeypatch, capsys):
    def peak(count):
        rows = ([f"mug {row} " + "x" * 1000, "4-seat", *(f"https://x.invalid/{row}/{place}" for place in range(3))]
                for row in range(count))
        write_table(tmp_path / "data.csv", chain([["text", "label", "sku_img", "spu_img_1", "spu_img_2"]], rows))
        tracemalloc.start()
        check_here(tmp_path, monkeypatch)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    monkeypatch.setattr(findings, "_AT_A_TIME", 50)
    peak(200)  # imports what is needed
    assert peak(1200) - peak(200) < 1000 * 800  # bytes a row; text and problems alone are 1,800


@pytest.mark.parametrize(("name", "written"), [("data.csv", "data.check.csv"), ("data.tsv", "data.check.csv"),
                                               ("data.xlsx", "data.check.xlsx")])
def test_a_workbook_comes_back_as_a_workbook_and_any_other_sheet_as_csv(name, written, tmp_path, monkeypatch, capsys):
    write_table(tmp_path / name, [["text", "label"], ["杯子, 白", "1 2 3"], ["=1+1", "4 5 6"]])
    assert check_here(tmp_path, monkeypatch, data_path=name, eval_fraction=0)
    assert [cells for _, cells in read_table(tmp_path / written, CheckDataOptions())] == [
        ["text", "label", "row", "read", "problem"],
        ["杯子, 白", "1 2 3", "2", "1 x 2 x 3 cm", "label like a placeholder: '1 2 3'"],
        ["=1+1", "4 5 6", "3", "4 x 5 x 6 cm", ""]]
    assert written in capsys.readouterr().out


def test_more_rows_than_a_worksheet_holds_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_MOST_EXCEL_ROWS", 3)
    rows = [["text", "label"], *[["mug", "1 2 3"]] * 3]
    write_table(tmp_path / "data.csv", rows)
    with pytest.raises(DataError, match=r"out.xlsx: a worksheet holds 3 rows.*--output_path NAME.csv"):
        check_here(tmp_path, monkeypatch, output_path="out.xlsx")
    with pytest.raises(DataError, match="a worksheet holds 3 rows"):
        write_table(tmp_path / "out.xlsx", rows)
    with pytest.raises(DataError, match="a worksheet holds 3 rows"):
        table.write_tables(tmp_path / "out.xlsx", {"answers": [{"text": "mug"}] * 3})
    table.write_tables(tmp_path / "out.xlsx", {"answers": [{"text": "mug"}] * 2})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["data.csv", "out.xlsx"]


# Rows that nobody here made

@pytest.mark.skipif(not (SHARED / "dextract").is_dir(), reason="shared/data/dextract is not beside this repository")
def test_the_contradictions_and_outliers_of_d_extract():
    from sheets.samples import read_rows

    rows, _ = read_rows(SHARED / "dextract/products_urls_only.xlsx", "nowhere", "text_only", False)
    doubts = doubtful_labels(rows)
    apart = {sample.product_id for sample in rows if "contradict" in doubts.get(sample.row, "")}
    alike = {problem.product_id for problem in look_over(rows) if problem.kind == "label written differently"}
    assert (len(rows), len(apart), len(apart | alike)) == (5439, 50, 56)
    assert "27400" in outliers(rows)[0].problem
