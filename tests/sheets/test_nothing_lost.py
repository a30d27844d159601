"""Odd sheets as people send them: of every row and every photo it is known what became of it."""

import csv
import io
from datetime import date

import openpyxl
import pandas as pd
import pytest

from config import SheetOptions
from sheet_kinds import WRITERS
from sheets.samples import load_samples
from tiny import noise_photo

HEADER = ["text", "label", "sku_img", "spu_img_1"]
ROWS = [["不锈钢保温杯 大容量", "12×8×15cm", "p1.png", "p2.png"],
        ["陶瓷马克杯 带盖", "10×9×11cm", "p3.png", "gone.png"],
        ["玻璃水杯", "", "p4.png", "p1.png"], ["", "7×7×9cm", "p2.png", ""],
        ["儿童餐具套装", "30×20×5cm", "gone.png", "lost.png"]]
PLANTED = [2, 2, 2, 1, 2]  # photos of each row


@pytest.fixture
def folder(tmp_path):
    for number in range(1, 5):
        noise_photo(number, (40, 30)).save(tmp_path / f"p{number}.png")
    return tmp_path


def account(path, planted, **reading):
    """Hold that each row is used or named, and that a used row's photos are all used or named.

    planted: how many photos each row has, by its number. Returns the numbers of the rows that are used.
    """
    samples, problems = load_samples(path, path.parent / "cache", "text_only", reading=SheetOptions(**reading))
    used = {sample.row: sample for sample in samples}
    left_out = {problem.row for problem in problems if not problem.used}
    assert used.keys() | left_out == planted.keys() and not used.keys() & left_out
    for row, sample in used.items():
        missing = [problem for problem in problems if problem.row == row and problem.kind == "photo missing"]
        assert len(sample.photos) + len(missing) == planted[row], (row, sample.photos, missing)
    return sorted(used)


def counted_from(first):
    return dict(enumerate(PLANTED, start=first))


def text_of(rows, separator=","):
    file = io.StringIO()
    csv.writer(file, delimiter=separator, lineterminator="\n").writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("kind", [*WRITERS, ".csv", ".parquet"])
def test_of_every_kind(kind, folder):
    path = folder / f"data{kind}"
    if kind == ".csv":
        path.write_text(text_of([HEADER, *ROWS]), encoding="utf-8")
    elif kind == ".parquet":
        pytest.importorskip("pyarrow")
        pd.DataFrame(ROWS, columns=HEADER).to_parquet(path)
    else:
        WRITERS[kind](path, [HEADER, *ROWS])
    first = 1 if kind in (".json", ".jsonl") else 2
    assert account(path, counted_from(first)) == [first, first + 1, first + 4]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_in_every_encoding_and_with_every_separator(encoding, separator, folder):
    (folder / "data.csv").write_bytes(text_of([HEADER, *ROWS], separator).encode(encoding))
    assert account(folder / "data.csv", counted_from(2)) == [2, 3, 6]


@pytest.mark.parametrize("encoding", ["euc_jp", "cp932"])
def test_in_japanese(encoding, folder):
    rows = [["ステンレスマグカップ", "12×8×15cm", "p1.png", "gone.png"],
            ["木製の収納ボックス", "約30×20×10cm", "p2.png", ""]]
    (folder / "data.csv").write_bytes(text_of([HEADER, *rows]).encode(encoding))
    assert account(folder / "data.csv", {2: 2, 3: 1}) == [2, 3]


@pytest.mark.parametrize(("header", "rows_above", "rows_below"), [
    (["Text", "LABEL", "Sku_Img", "SPU_IMG_1"], [], []), (["\ufefftext", *HEADER[1:]], [], []),
    (["ｔｅｘｔ ", *HEADER[1:]], [], []), (HEADER, [["商品表", "", "", ""], ["", "", "", ""]], []),
    (HEADER, [], [["标题", "尺寸", "主图", "副图"]]), (["text", "label", "主图", "image_url"], [], []),
    (["text", "label", "photos", "a"], [], []),
])
def test_with_headers_of_every_kind(header, rows_above, rows_below, folder):
    path = folder / "data.csv"
    path.write_text(text_of([*rows_above, header, *rows_below, *ROWS]), encoding="utf-8")
    first = 2 + len(rows_above) + len(rows_below)
    assert account(path, counted_from(first)) == [first, first + 1, first + 4]


def test_columns_named_by_the_user(folder):
    (folder / "data.csv").write_text(text_of([["标题", "尺寸", "图一", "图二"], *ROWS]), encoding="utf-8")
    columns = ["text=标题", "label=尺寸", "photo=图一", "photo=图二"]
    assert account(folder / "data.csv", counted_from(2), column=columns) == [2, 3, 6]


@pytest.mark.parametrize("joined", [",", ", ", ";", "；", "|", " ", "\n", "\r\n", "、"])
@pytest.mark.parametrize("form", ["{}", "./{}", ".\\{}", "file://{folder}/{}", "//cdn.invalid/{}",
                                  "https://x.invalid/{}?a=1,2"])
def test_several_addresses_in_a_cell(joined, form, folder):
    rows = [[text, label, joined.join(form.format(name, folder=folder) for name in names if name)]
            for text, label, *names in ROWS]
    (folder / "data.csv").write_text(text_of([HEADER[:3], *rows]), encoding="utf-8")
    assert account(folder / "data.csv", counted_from(2)) == [2, 3, 6]


def test_a_first_line_that_is_excels(folder):
    (folder / "data.csv").write_text("sep=;\n" + text_of([HEADER, *ROWS], ";"), encoding="utf-8")
    assert account(folder / "data.csv", counted_from(2)) == [2, 3, 6]


def test_sizes_in_columns_of_their_own_below_one_name_and_a_date(folder):
    book = openpyxl.Workbook()
    for row in (["text", "label", None, None, "sku_img"], [None, "长", "宽", "高(mm)", None],
                ["杯", 120, 80, 150, "p1.png"], ["盘", 200, 200, None, "gone.png"],
                ["碗", date(2015, 12, 8), None, None, "p2.png"]):
        book.active.append(row)
    book.active.merge_cells("B1:D1")
    book.save(folder / "data.xlsx")
    assert account(folder / "data.xlsx", {3: 1, 4: 1, 5: 1}) == [3, 4]
    samples, problems = load_samples(folder / "data.xlsx", folder, "text_only")
    assert sorted(samples[0].label) == pytest.approx([8, 12, 15]) and len(samples[1].label) == 2
    assert [problem.row for problem in problems if "Excel" in problem.problem] == [5]
