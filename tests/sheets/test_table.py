"""Sheets as people keep them: encodings, separators, worksheets, merged cells, formulas, mapped columns."""

import datetime
import importlib.util
import io
import json
import zipfile

import openpyxl
import pandas as pd
import pytest

from config import SheetOptions
from sheet_kinds import WRITERS, write_xls
from sheets.cells import DataError
from sheets.columns import ProductRow, read_sheet
from sheets.samples import load_samples
from sheets.table import read_table, write_table, write_tables


def read(path, *columns, required=("text", "label"), **options):
    return list(read_sheet(path, SheetOptions(column=list(columns), **options), required))


def csv_of(tmp_path, text, encoding="utf-8"):
    (tmp_path / "data.csv").write_bytes(text.encode(encoding))
    return tmp_path / "data.csv"


def book_of(path, fill):
    book = openpyxl.Workbook()
    fill(book)
    book.save(path)
    return path


TEXTS = {
    "gb18030": "标题,尺寸\n" + "不锈钢保温杯 大容量,12*8*15厘米\n" * 20,
    "cp950": "標題,尺寸\n" + "不鏽鋼保溫杯大容量,12*8*15公分\n" * 20,
    "cp932": "商品名,サイズ\n" + "ステンレスマグカップ,12x8x15cm\n" * 20,
    "cp949": "상품명,크기\n" + "스테인리스 머그컵,12x8x15cm\n" * 20,
    "cp1252": "Bezeichnung,Größe\n" + "Küchentisch für die große Küche – schön,12 8 15\n" * 20,
    "euc_jp": "商品名,サイズ\n" + "ステンレスマグカップ,12x8x15cm\n" * 20,
    "cp1251": "название,размер\n" + "Кружка из нержавеющей стали,12x8x15\n" * 20,
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_a_guessed_encoding_is_right_and_said(encoding, tmp_path, logged):
    header, first = TEXTS[encoding].split("\n")[:2]
    text, label = header.split(",")
    rows = read(csv_of(tmp_path, TEXTS[encoding], encoding), f"text={text}", f"label={label}")
    assert len(rows) == 20 and f"{rows[0].text},{rows[0].label}" == first
    assert any(f"read as {encoding}, which is a guess" in line and header in line for line in logged)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_known_by_itself(encoding, tmp_path, logged):
    path = csv_of(tmp_path, "text,label\n杯子,1 2 3\n", encoding)
    assert [(row.text, row.label) for row in read(path)] == [("杯子", "1 2 3")] and logged == []


def test_a_short_sheet_is_guessed_and_a_named_encoding_is_obeyed(tmp_path):
    path = csv_of(tmp_path, "text,label\n不锈钢杯子,1 2 3\n", "gbk")
    assert read(path)[0].text == "不锈钢杯子"
    assert read(csv_of(tmp_path, "text,label\n杯子,1 2 3\n", "big5"), encoding="big5")[0].text == "杯子"
    for wrong in ("ascii", "no such"):
        with pytest.raises(DataError, match=f"can't be read as {wrong}"):
            read(path, encoding=wrong)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators(separator, tmp_path, logged):
    path = csv_of(tmp_path, f'text{separator}label\n"a mug, blue"{separator}12,5 x 8,0 cm\n')
    assert [(row.text, row.label) for row in read(path)] == [("a mug, blue", "12,5 x 8,0 cm")]
    assert any("is cut at" in line for line in logged)


def test_columns_are_mapped_and_texts_joined(tmp_path):
    path = csv_of(tmp_path, "编号,标题,描述,尺寸,主图,细节图,text\n"
                  "007,杯子,不锈钢,1 2 3,a.jpg,b.jpg,!\n008,盘子,,4 5 6,,c.jpg,!\n")
    rows = read(path, "sku_id=编号", "text=标题", "text=描述", "label=尺寸", "photo=主图", "photo=细节图")
    assert rows == [ProductRow(2, "杯子\n不锈钢", "1 2 3", "007", "", (("主图", "a.jpg"), ("细节图", "b.jpg"))),
                    ProductRow(3, "盘子", "4 5 6", "008", "", (("细节图", "c.jpg"),))]


def test_any_number_of_photo_columns_in_their_order(tmp_path):
    header = "spu_img_10,text,spu_img_2,sku_img,label,spu_img_1,spu_img_x,category"
    path = csv_of(tmp_path, f"{header}\nj.jpg,mug,c.jpg,a.jpg,1,b.jpg,no.jpg,mugs\n")
    [row] = read(path)
    assert [address for _, address in row.photos] == ["a.jpg", "b.jpg", "c.jpg", "j.jpg"] and row.category == "mugs"


@pytest.mark.parametrize(("columns", "said"), [
    (["text=titel"], "no column 'titel'"), (["text=titel"], "Is 'title' meant?"), (["photo=main"], "no column 'main'"),
    (["label=size", "label=size"], "no column 'size'"),
])
def test_a_mapped_column_that_is_not_there(columns, said, tmp_path):
    with pytest.raises(DataError) as error:
        read(csv_of(tmp_path, "text,title,label\nmug,x,1\n"), *columns)
    assert said in str(error.value)


def test_jsonl_numbers_lists_and_objects(tmp_path):
    lines = [{"text": "a mug", "label": {"length": 12, "width": 8, "unit": "cm"}, "sku_id": "007"}, None,
             {"sku_img": ["a.jpg", "b.jpg"], "label": [12, 8.5], "text": "a plate", "extra": True}]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) if line else "" for line in lines))
    rows = read(tmp_path / "data.jsonl")
    assert [(row.number, row.sku_id, row.label) for row in rows] == [
        (1, "007", '{"length": 12, "width": 8, "unit": "cm"}'), (3, "", "[12, 8.5]")]
    assert rows[1].photos == (("sku_img", "a.jpg"), ("sku_img", "b.jpg"))
    [row] = read(csv_of(tmp_path, "text,label,sku_img\nmug,1," + "[" * 100_000))
    assert len(row.photos) == 1


def fill_merged(book):
    sheet = book.active
    for row in [("Products of May",), ("sku_id", "text", "label"), ("1", "mug", "1 2 3"), (None, None, "2 2 2"), (),
                (None, "plate", "4 5 6"), (None, "cup", "7 8 9"), ("2", "jug", None)]:
        sheet.append(row) if row else sheet.append([None])
    sheet.merge_cells("A1:C1")
    sheet.merge_cells("A3:A6")
    sheet.merge_cells("B3:B4")
    sheet.merge_cells("B8:C8")


def test_merged_cells_hold_for_all_their_rows_and_titles_are_passed_over(tmp_path):
    rows = read(book_of(tmp_path / "data.xlsx", fill_merged))
    assert [(row.number, row.sku_id, row.text, row.label) for row in rows] == [
        (3, "1", "mug", "1 2 3"), (4, "1", "mug", "2 2 2"), (6, "1", "plate", "4 5 6"), (7, "", "cup", "7 8 9"),
        (8, "2", "jug", "")]


def test_a_table_away_from_the_corner_keeps_its_row_numbers(tmp_path):
    def fill(book):
        for place, value in {"C4": "text", "D4": "label", "C5": "mug", "D5": 12, "C8": 7.50, "D8": "0012"}.items():
            book.active[place] = value
        book.active.merge_cells("C5:C6")
        book.active.merge_cells("A1:A9")  # to the left and right of the table
        book.active.merge_cells("H1:J9")
        book.active["D6"] = "1 2"

    assert [(row.number, row.text, row.label) for row in read(book_of(tmp_path / "data.xlsx", fill))] == [
        (5, "mug", "12"), (6, "mug", "1 2"), (8, "7.5", "0012")]


def fill_sheets(book):
    book.active.title = "Notes"
    book.active.sheet_state = "hidden"
    for title in ("May", "June"):
        sheet = book.create_sheet(title)
        sheet.append(["text", "label"])
        sheet.append([title, "1 2 3"])


def test_worksheets_by_name(tmp_path, logged):
    path = book_of(tmp_path / "data.xlsx", fill_sheets)
    assert [row.text for row in read(path)] == ["May"]
    assert any("worksheet 'May' is read; the others: June" in line for line in logged)
    assert [row.text for row in read(path, sheet_name="June")] == ["June"]
    [sample] = load_samples(path, tmp_path, reading=SheetOptions(sheet_name="June"))[0]
    assert (sample.sheet, sample.row) == ("data.xlsx [June]", 2)
    with pytest.raises(DataError, match="no worksheet 'July'. Its worksheets are: Notes, May, June"):
        read(path, sheet_name="July")
    with pytest.raises(DataError, match="--sheet_name May is for .xlsx"):
        read(csv_of(tmp_path, "text,label\n"), sheet_name="May")


def test_a_label_that_excel_made_a_date_of_says_so(tmp_path):
    def fill(book):
        book.active.append(["text", "label"])
        for place, (date, form) in enumerate([(datetime.date(2024, 5, 12), 'm"月"d"日"'),
                                              (datetime.datetime(2015, 12, 8), "d-mmm-yy"), ("12 8 15", "@")], 2):
            book.active.append(["mug", date])
            book.active.cell(place, 2).number_format = form

    samples, problems = load_samples(book_of(tmp_path / "data.xlsx", fill), tmp_path)
    assert [sample.row for sample in samples] == [4]
    assert [problem.row for problem in problems if problem.kind == "label ambiguous"] == [2, 3]
    assert "Excel makes of 5-12, 12-5" in problems[0].detail and "8-12-15 or 15-12-8" in problems[1].detail


def test_formulas_give_their_stored_values(tmp_path, logged):
    def fill(book):
        book.active.append(["text", "label"])
        book.active.append(['="a "&"mug"', "1 2 3"])

    path = book_of(tmp_path / "data.xlsx", fill)
    assert [(row.text, row.label) for row in read(path)] == [("", "1 2 3")]  # never opened in a spreadsheet program
    assert any("formulas whose values are not stored" in line for line in logged)
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            body = old.read(name)
            if name.startswith("xl/worksheets/"):
                assert body.count(b"<v />") == 1
                body = body.replace(b'<c r="A2"', b'<c r="A2" t="str"').replace(b"<v />", b"<v>a mug</v>")
            new.writestr(name, body)
    path.write_bytes(buffer.getvalue())
    logged.clear()
    assert [row.text for row in read(path)] == ["a mug"] and logged == []


def test_a_damaged_workbook_raises_nothing_but_data_error(tmp_path):
    import random

    whole = book_of(tmp_path / "data.xlsx", fill_merged).read_bytes()
    dice, refused = random.Random(1), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(6):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        (tmp_path / "data.xlsx").write_bytes(damaged[: dice.choice([len(whole), dice.randrange(len(whole))])])
        try:
            read(tmp_path / "data.xlsx")
        except DataError:
            refused += 1
    assert refused > 50


def test_what_is_written_is_text_and_never_a_formula(tmp_path):
    hostile = ["=1+1", "+1", "-1", "@SUM(A1)", "\x00bell", "x" * 40_000, "<script>", "", "12"]
    write_table(tmp_path / "out.xlsx", [["problem"], *([text] for text in hostile)])
    cells = [row[0] for row in openpyxl.load_workbook(tmp_path / "out.xlsx").active.iter_rows(min_row=2)]
    assert [cell.data_type for cell in cells if cell.value] == ["s"] * 8
    assert [cell.value or "" for cell in cells] == [*hostile[:4], "\N{REPLACEMENT CHARACTER}bell", "x" * 32_767,
                                                    *hostile[6:]]
    assert not (tmp_path / "out.xlsx.partial").exists()


def test_five_thousand_rows_are_read_one_by_one(tmp_path):
    rows = [["text", "label", *(f"spu_img_{index}" for index in range(1, 6))],
            *([f"mug {index}", "1 2 3", *[f"https://shop.invalid/{index}.jpg"] * 5] for index in range(5_000))]
    write_table(tmp_path / "data.xlsx", rows)
    found = read_sheet(tmp_path / "data.xlsx", SheetOptions(), ("text", "label"))
    assert next(found).number == 2 and sum(1 for _ in found) == 4_999
    assert len(list(read_table(tmp_path / "data.xlsx", SheetOptions()))) == 5_001


CELLS = [["text", "label", "sku_id"], ["mug", "12 8 15", "007"], ["=1+1", "0.1", ""],
         ["NA", "12", "123456789012345678"]]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_sheet_of_any_kind_reads_the_same(tmp_path, kind):
    WRITERS[kind](tmp_path / f"data{kind}", CELLS)
    rows = [cells for _, cells in read_table(tmp_path / f"data{kind}", SheetOptions())]
    assert rows == CELLS
    products = read(tmp_path / f"data{kind}")
    assert [product.number for product in products] == ([1, 2, 3] if kind in (".json", ".jsonl") else [2, 3, 4])


def test_parquet_keeps_long_ids_or_says_what_to_install(tmp_path):
    path = tmp_path / "data.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        path.write_bytes(b"PAR1")
        with pytest.raises(DataError, match="pip install pyarrow"):
            list(read_table(path, SheetOptions()))
        return
    pd.DataFrame({"text": ["mug", None], "label": ["12 8 15", "1"],
                  "sku_id": pd.array([123456789012345678, None], dtype="Int64")}).to_parquet(path)
    assert [cells for _, cells in read_table(path, SheetOptions())] == [
        ["text", "label", "sku_id"], ["mug", "12 8 15", "123456789012345678"], ["", "1", ""]]


def test_tables_of_results_hold_text_as_text(tmp_path):
    rows = [{"name": "=1+1", "share": 0.5, "count": 3, "none": None, "long": "x" * 40_000, "odd": "a\x00b"},
            {"name": "+1", "share": None, "count": None, "none": None, "long": "", "odd": "@SUM(A1)"}]
    write_tables(tmp_path / "out.xlsx", {"first": rows, "empty": []})
    book = openpyxl.load_workbook(tmp_path / "out.xlsx")
    sheet = book["first"]
    assert book.sheetnames == ["first", "empty"] and sheet["A1"].font.bold and sheet.freeze_panes == "A2"
    assert (sheet["A2"].value, sheet["A2"].data_type, sheet["B2"].value, sheet["C2"].value) == ("=1+1", "s", 0.5, 3)
    assert len(sheet["E2"].value) == 32_767 and sheet["F2"].value == "a\N{REPLACEMENT CHARACTER}b"
    assert sheet["C3"].value is None and sheet["E3"].value is None and sheet["F3"].data_type == "s"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("header", "row", "columns", "label"), [
    ("text,长,宽,高", "杯子,12,8,15", [], "length: 12, width: 8, height: 15"),
    ("text,长(mm),宽（mm）,高(mm)", "杯子,120,80,150", [], "length: 120 mm, width: 80 mm, height: 150 mm"),
    ("text,Length in,Width in,Height in", "mug,12,8,15", [], "length: 12 in, width: 8 in, height: 15 in"),
    ("text,length,width,height,unit", "mug,120,80,150,mm", [], "length: 120 mm, width: 80 mm, height: 150 mm"),
    ("text,length,width,height,unit", "mug,12cm,80,,mm", [], "length: 12cm, width: 80 mm"),
    ("text,W,D,H", "mug,12,8,15", [], "width: 12, depth: 8, height: 15"),
    ("text,a,b,c,u", "mug,12,8,15,inch", ["length=a", "width=b", "height=c", "unit=u"],
     "length: 12 inch, width: 8 inch, height: 15 inch"),
    ("text,a (mm)", "mug,120", ["height=a (mm)"], "height: 120 mm"),
    ("text,label,length,width", "mug,1 2 3,12,8", [], "1 2 3"),  # a label of its own comes first
])
def test_a_label_in_columns_of_its_own(tmp_path, header, row, columns, label):
    [product] = read(csv_of(tmp_path, f"{header}\n{row}\n"), *columns)
    assert product.label == label


def test_sides_that_are_not_there_or_alone_are_named(tmp_path):
    with pytest.raises(DataError, match="no column 'b'.*--column width=NAME"):
        read(csv_of(tmp_path, "text,a\nmug,1\n"), "length=a", "width=b")
    with pytest.raises(DataError, match="no column 'label'"):
        read(csv_of(tmp_path, "text,height\nmug,1\n"))  # the height of what?


def test_a_cut_workbook_of_the_old_kind_is_refused(tmp_path):
    write_xls(tmp_path / "data.xls", CELLS)
    whole = (tmp_path / "data.xls").read_bytes()
    for length in range(512, len(whole), 500):  # the reader panics at some of these
        (tmp_path / "data.xls").write_bytes(whole[:length])
        with pytest.raises(DataError, match="no readable Excel workbook"):
            list(read_table(tmp_path / "data.xls", SheetOptions()))
