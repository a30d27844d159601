"""Photo cells as people fill them, and which columns are taken for photo columns."""

import json

import pytest

from config import SheetOptions
from sheets.addresses import addresses_of, is_address
from sheets.columns import read_sheet
from sheets.fetch import missing_addresses

URL = "https://cdn.shop.cn/a/1.jpg"


@pytest.mark.parametrize(("cell", "addresses"), [
    ("", []), (URL, [URL]), ("photos/a 1.jpg", ["photos/a 1.jpg"]), ("a,b.jpg", ["a,b.jpg"]),
    (f"{URL},{URL}?x=1,2", [URL, f"{URL}?x=1,2"]), (f"{URL}\n{URL}2", [URL, f"{URL}2"]),
    (f"{URL}\r\n\n b.png", [URL, "b.png"]),
    (f"{URL}; {URL}2 ;", [URL, f"{URL}2"]), (f"{URL}|{URL}2", [URL, f"{URL}2"]), (f"{URL} {URL}2", [URL, f"{URL}2"]),
    (f"{URL}，{URL}2；{URL}3、{URL}4", [URL, f"{URL}2", f"{URL}3", f"{URL}4"]),
    ("a.jpg,b 2.PNG;c.webp|d.jpeg e.gif", ["a.jpg", "b 2.PNG", "c.webp", "d.jpeg", "e.gif"]),
    ("front view.jpg (old)", ["front view.jpg (old)"]),
    ("https://x.cn/i?p=resize,w_800;q_90", ["https://x.cn/i?p=resize,w_800;q_90"]),
    ("//cdn.shop.cn/a.jpg,//cdn.shop.cn/b.jpg", ["https://cdn.shop.cn/a.jpg", "https://cdn.shop.cn/b.jpg"]),
    ("pics\\a.jpg", ["pics/a.jpg"]), ("pics\\a.jpg;pics\\b.jpg", ["pics/a.jpg", "pics/b.jpg"]),
    ("file:///home/me/a%20b.jpg", ["/home/me/a b.jpg"]), ("file://[", ["file://["]),
    (json.dumps(["a.jpg", "", None, "//x.cn/b.jpg"]), ["a.jpg", "https://x.cn/b.jpg"]),
    (json.dumps([{"url": "a.jpg"}, {"path": "b.jpg", "bytes": None}, {"x": 1}]), ["a.jpg", "b.jpg", "{'x': 1}"]),
    ("[not json.jpg", ["[not json.jpg"]),
])
def test_addresses_of_a_cell(cell, addresses):
    assert addresses_of(cell) == addresses


@pytest.mark.parametrize(("text", "loose", "certain"), [
    (URL, True, True), ("https://shop.cn/item/12", True, False), ("//x.cn/a.jpg_400x400.jpg!w", True, True),
    ("a.jpg", True, True),
    ("12 x 8 x 15 cm", False, False), ("jpg", False, False), (".jpg", False, False), ("红色", False, False),
    ("see https://x.cn/a.jpg", False, False),
])
def test_what_looks_like_an_address(text, loose, certain):
    assert is_address(text) == loose and (is_address(text, certain=True) == certain or not loose)


def write_csv(folder, header, *rows):
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in (header, *rows))
    (folder / "data.csv").write_text(text, encoding="utf-8")
    return folder / "data.csv"


def photos_of(path, *columns):
    rows = read_sheet(path, SheetOptions(column=list(columns)), ("text", "label"), str(path.parent / "cache"))
    return [[address for _, address in row.photos] for row in rows]


@pytest.mark.parametrize("name", ["image_url", "图片", "主图", "photos", "images", "Main Picture", "IMG", "spu_img1"])
def test_a_column_named_as_photos_are_is_read_and_said(name, tmp_path, said):
    path = write_csv(tmp_path, ["text", "label", name], ["mug", "1 2 3", "https://x.cn/1"], ["cup", "1 2 3", ""])
    assert photos_of(path) == [["https://x.cn/1"], []]
    assert [line for line in said if f"photos are read from the columns '{name}'" in line]
    assert missing_addresses(str(path), str(tmp_path), SheetOptions()) == ["https://x.cn/1"]


def test_a_column_of_any_name_is_read_when_its_cells_end_as_photos_do(tmp_path, said):
    path = write_csv(tmp_path, ["text", "label", "link", "a", "b"],
                     ["mug", "1 2 3", "https://x.cn/1", f"{URL};{URL}?2", "a.png"], ["cup", "1 2 3", "", "", "none"])
    assert photos_of(path) == [[URL, f"{URL}?2"], []]
    assert any("from the columns 'a'," in line for line in said)


def test_a_column_named_so_that_holds_none_is_warned_of(tmp_path, said):
    path = write_csv(tmp_path, ["text", "label", "picture"], ["mug", "1 2 3", "yes"])
    assert photos_of(path) == [[]]
    assert any("the column 'picture' is not read; where it holds photos: --column photo=picture" in line
               for line in said)
    assert any("no photo column is read" in line for line in said)
    assert photos_of(path, "photo=picture") == [["yes"]]


def test_known_columns_go_first_and_others_are_said(tmp_path, said):
    path = write_csv(tmp_path, ["text", "label", "sku_img", "image_url", "photos"], ["mug", "1 2 3", "a.jpg", URL, ""])
    assert photos_of(path) == [["a.jpg"]]
    assert [line for line in said if "is not read" in line] == [line for line in said if "'image_url' is not" in line]
    assert photos_of(path, "photo=image_url", "photo=photos") == [["a.jpg", URL]]


def test_lists_of_jsonl(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "mug", "label": "1 2 3", "images": ["a.jpg", {"url": URL}]}))
    assert photos_of(path) == [["a.jpg", URL]]
