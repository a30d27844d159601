"""Headers as shops have them: names in other writing, in two rows under one name, named a second time in Chinese."""

import openpyxl
import pytest

import check_data
from config import CheckDataOptions, SheetOptions
from sheets.cells import DataError
from sheets.columns import header_rows, read_sheet
from sheets.samples import load_samples


def csv_of(tmp_path, text):
    (tmp_path / "data.csv").write_text(text, encoding="utf-8")
    return tmp_path / "data.csv"


def book_of(tmp_path, rows, *merged):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for cells in merged:
        book.active.merge_cells(cells)
    book.save(tmp_path / "data.xlsx")
    return tmp_path / "data.xlsx"


def read(path, *columns, required=("text", "label")):
    return list(read_sheet(path, SheetOptions(column=list(columns)), required))


@pytest.mark.parametrize("header", [
    "Text,Label,SKU_IMG", "TEXT,LABEL,Sku_Img", "\ufeff\ufefftext,label,sku_img", "ｔｅｘｔ,ｌａｂｅｌ,ｓｋｕ_ｉｍｇ",
    "\u3000Text ,\u200blabel,\xa0sku_img", '"text\n",label,sku_img'])
def test_names_are_known_in_any_writing(header, tmp_path):
    [row] = read(csv_of(tmp_path, f"{header}\nText,12 8 15,a.jpg\n"))
    assert (row.text, row.label, row.photos) == ("Text", "12 8 15", (("sku_img", "a.jpg"),))


def test_named_columns_are_known_in_any_writing_and_the_right_one_comes_first(tmp_path):
    [row] = read(csv_of(tmp_path, "TITLE,Ｓize,text,Text\nmug,1 2 3,cup,jug\n"), "text=title", "label=size")
    assert (row.text, row.label) == ("mug", "1 2 3")
    [row] = read(csv_of(tmp_path, "Text,text,label\nmug,cup,1 2 3\n"))
    assert row.text == "cup"
    with pytest.raises(DataError, match="the column 'text' comes 2 times"):
        read(csv_of(tmp_path, "Text,TEXT,label\nmug,cup,1 2 3\n"))


@pytest.mark.parametrize("second", [
    "标题,尺寸,主图", "商品标题,产品尺寸(cm),主图", "标题*,规格,图片1", "名称,尺寸,sku_img", "Title,Size,Main image",
    "text,label,sku_img", "品名,规格,", "商品名,サイズ,写真", "상품명,크기,사진"])
def test_a_second_row_of_names_is_no_product_and_said(second, tmp_path, logged):
    path = csv_of(tmp_path, f"text,label,sku_img\n{second}\n杯子,12 8 15,a.jpg\n")
    assert [(row.number, row.text) for row in read(path)] == [(3, "杯子")]
    assert [line for line in logged if "row 2 " in line and "names the columns once more and is no product" in line]
    samples, problems = load_samples(path, tmp_path, "text_only")
    assert [sample.row for sample in samples] == [3] and {problem.row for problem in problems} == {3}


def test_names_come_again_below_columns_of_sides_and_with_a_row_of_musts(tmp_path, logged):
    path = csv_of(tmp_path, "text,length,width,height\n标题,长,宽,高\n必填,选填,选填,选填\n杯子,12,8,15\n")
    assert [(row.number, row.label) for row in read(path)] == [(4, "length: 12, width: 8, height: 15")]
    assert sum("once more" in line for line in logged) == 2


@pytest.mark.parametrize("product", [
    "标题,12 8 15,主图", "尺寸,12 8 15,", "杯子,尺寸,主图", "标题,,", "text,,a.jpg", "标题,尺寸,主图.jpg",
    "标题,尺寸见图,主图", "标题,尺寸：12*8*15,主图", "Size matters mug,size,photo", "标题,尺寸,https://x.cn/主图"])
def test_a_product_is_never_taken_for_names(product, tmp_path):
    assert [row.number for row in read(csv_of(tmp_path, f"text,label,sku_img\n{product}\n杯子,1 2 3,\n"))] == [2, 3]


def test_a_row_of_names_further_down_is_a_row_like_others(tmp_path):
    path = csv_of(tmp_path, "text,label,sku_img\n杯子,1 2 3,\n标题,尺寸,主图\n")
    assert [row.number for row in read(path)] == [2, 3]


TWO_ROWS = [["sku_id", "text", "label", None, None, "category"], [None, None, "长", "宽", "高", None],
            ["007", "杯子", 12, 8, 15, "mugs"], ["008", "盘子", 20, 20, 3, "plates"]]
READ = [(3, "007", "杯子", "length: 12, width: 8, height: 15", "mugs"),
        (4, "008", "盘子", "length: 20, width: 20, height: 3", "plates")]


def seen(rows):
    return [(row.number, row.sku_id, row.text, row.label, row.category) for row in rows]


@pytest.mark.parametrize("merged", [(), ("C1:E1",), ("C1:E1", "A1:A2", "B1:B2", "F1:F2")])
def test_a_label_over_three_sides_reads_all_three(merged, tmp_path):
    assert seen(read(book_of(tmp_path, TWO_ROWS, *merged))) == READ
    with_title = [["Products of May"], *TWO_ROWS]
    lower = [cells.translate(str.maketrans("12", "23")) for cells in merged]
    assert seen(read(book_of(tmp_path, with_title, *lower))) == [(number + 1, *others) for number, *others in READ]


def test_a_label_over_three_sides_in_a_csv(tmp_path, logged):
    lines = [",".join("" if cell is None else str(cell) for cell in row) for row in TWO_ROWS]
    assert seen(read(csv_of(tmp_path, "\n".join(lines)))) == READ
    assert any("labels are read from the columns '长' (length), '宽' (width), '高' (height)" in line for line in logged)


def test_names_and_units_over_the_sides(tmp_path):
    path = csv_of(tmp_path, "标题,尺寸(mm),,\n,长,宽,高(cm)\n杯子,120,80,15\n")
    [row] = read(path, "text=标题", "label=尺寸(mm)")
    assert row.label == "length: 120 mm, width: 80 mm, height: 15 cm"
    [row] = read(csv_of(tmp_path, "text,label,,,\n商品标题,长,宽,高,单位\n杯子,120,80,150,mm\n"))
    assert row.label == "length: 120 mm, width: 80 mm, height: 150 mm"


def test_a_label_of_its_own_comes_before_the_sides_of_a_box(tmp_path):
    [row] = read(csv_of(tmp_path, "text,label,包装,,\n,,长,宽,高\n杯子,12 8 15,20,20,20\n"))
    assert row.label == "12 8 15"


def test_products_that_look_like_sides_are_none(tmp_path):
    assert [row.text for row in read(csv_of(tmp_path, "text,label,,\nmug,L,W,H\ncup,1 2 3,,\n"))] == ["mug", "cup"]


def test_sizes_in_columns_without_a_name_are_not_lost_in_silence(tmp_path):
    rows = [["text", "label", None, None], ["杯子", 12, 8, 15]]
    for path in (book_of(tmp_path, rows, "B1:D1"), csv_of(tmp_path, "text,label,,\n杯子,12,8,15\n")):
        with pytest.raises(DataError, match="the columns behind 'label' have no name and hold numbers"):
            read(path)
    for line in ("杯子,12 8 15,9.99,", "杯子,12 8 15,,new", "杯子,12,,", "杯子,12,new,"):
        assert len(read(csv_of(tmp_path, f"text,label,,\n{line}\n"))) == 1


def test_a_checked_sheet_keeps_its_header_and_can_be_checked_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = book_of(tmp_path, TWO_ROWS, "C1:E1")
    assert header_rows(path, SheetOptions(), ("text",)) == range(1, 3)
    for written in ("once.xlsx", "twice.xlsx"):
        check_data.check(CheckDataOptions(data_path=str(path), output_path=written, html_path="page.html"))
        path = tmp_path / written
        assert [row[1:] for row in seen(read(path))] == [row[1:] for row in READ]  # below a header in one row
