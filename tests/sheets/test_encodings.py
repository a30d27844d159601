"""Text files that do not say their encoding: read right, or refused with what they may be."""

import random

import product_texts
import pytest

from config import SheetOptions
from sheets.cells import DataError
from sheets.columns import read_sheet
from sheets.encodings import likely_encodings

# Each encoding with texts of its language, the header of such a sheet, its cross and its centimetre.
FAMILIES = {
    "gb18030": (product_texts.SIMPLIFIED_CHINESE, "标题,尺寸", "×", "厘米"),
    "cp950": (product_texts.TRADITIONAL_CHINESE, "標題,尺寸", "×", "公分"),
    "cp932": (product_texts.JAPANESE, "商品名,サイズ", "×", "cm"),
    "euc_jp": (product_texts.JAPANESE, "商品名,サイズ", "×", "cm"),
    "cp949": (product_texts.KOREAN, "상품명,크기", "×", "cm"),
    "cp1252": (product_texts.WESTERN, "text,label", "×", "cm"),
    "cp1251": (product_texts.CYRILLIC, "название,размер", "x", "см"),
    "cp1250": (product_texts.CENTRAL_EUROPEAN, "text,label", "×", "cm"),
}


def small_files(encoding, count=24):
    """Make small sheets of 2 to 5 rows: their text and their bytes."""
    texts, header, cross, unit = FAMILIES[encoding]
    for place in range(count):
        rows = [texts[(5 * place + row) % len(texts)] for row in range(2 + place % 4)]
        sign = cross if place % 3 == 0 else "x"
        lines = [header if place % 2 else "text,label",
                 *(f'"{text}",{12 + row}{sign}8{sign}{15 + place}{unit if place % 4 else "cm"}'
                   for row, text in enumerate(rows))]
        text = "\n".join(lines).replace("〜", "〜" if encoding == "euc_jp" else "～")  # as Windows writes it
        yield text, text.encode(encoding)


@pytest.mark.parametrize("encoding", FAMILIES)
def test_small_sheets_are_read_right(encoding):
    found = [(likely_encodings(data), text, data) for text, data in small_files(encoding)]
    wrong = [(guesses, text) for guesses, text, data in found if len(guesses) == 1 and data.decode(guesses[0]) != text]
    refused = [text for guesses, text, _ in found if len(guesses) != 1]
    assert not wrong and not refused and len(found) == 24


@pytest.mark.parametrize("encoding", FAMILIES)
def test_a_single_row_is_read_right_or_refused(encoding):
    texts = FAMILIES[encoding][0]
    lines = [f"{text},12 8 15" for text in texts if not text.isascii() and (encoding == "euc_jp" or "〜" not in text)]
    found = [(likely_encodings(line.encode(encoding)), line) for line in lines]
    assert not [line for guesses, line in found
                if len(guesses) == 1 and line.encode(encoding).decode(guesses[0]) != line]
    assert sum(len(guesses) == 1 for guesses, _ in found) > 0.7 * len(lines)


@pytest.mark.parametrize("line", ["mug,12×8×15cm", "mug,12 × 8 × 15 cm", "a mug’s lid,1 2 3", "a mug – blue,1 2 3",
                                  "mug of 30½ cm,1 2 3", "teapot for 100°,1 2 3", "mug at 9 €,1 2 3"])
def test_signs_alone_are_read_right(line):
    data = f"{line}\n{line}\n{line}".encode("cp1252")
    [guess] = likely_encodings(data)
    assert data.decode(guess) == data.decode("cp1252")


def test_of_encodings_that_read_the_same_the_commonest_is_taken():
    assert likely_encodings("Lámpara de pie de algodón, diseño sólido".replace("ñ", "n").encode("cp1252")) == ["cp1252"]


def test_random_bytes_and_other_encodings_are_refused():
    dice = random.Random(1)
    found = [likely_encodings(dice.randbytes(60)) for _ in range(200)]
    assert sum(len(guesses) == 1 for guesses in found) < 4
    for text, encoding in (("Кружка из нержавеющей стали", "cp866"), ("แก้วสแตนเลสเก็บความร้อน", "cp874"),
                           ("스테인리스 머그컵 보온 보냉", "johab")):
        assert len(likely_encodings(text.encode(encoding))) != 1, encoding


def read(path, **options):
    return list(read_sheet(path, SheetOptions(**options), ("text", "label")))


def sheet_of(tmp_path, data):
    (tmp_path / "data.csv").write_bytes(data)
    return tmp_path / "data.csv"


def test_a_guess_is_shown_by_a_line_that_tells(tmp_path, logged):
    path = sheet_of(tmp_path, "text,label\nmug,1 2 3\n不锈钢保温杯 大容量,12 8 15\n".encode("gb18030"))
    assert [row.text for row in read(path)] == ["mug", "不锈钢保温杯 大容量"]
    assert any("read as gb18030, which is a guess: a line of it reads '不锈钢保温杯 大容量,12 8 15'" in line
               for line in logged)


def test_two_readings_are_both_shown(tmp_path):
    path = sheet_of(tmp_path, "text,label\nmug,1 2 3\n花瓶,12 8 15\n".encode("gb18030"))
    with pytest.raises(DataError, match="may be in .*: '빻틸,12 8 15' or in gb18030: '花瓶,12 8 15'. Say which with "
                                        "--encoding"):
        read(path)
    assert [row.text for row in read(path, encoding="gb18030")] == ["mug", "花瓶"]


def test_damaged_utf_8_is_no_other_encoding(tmp_path):
    whole = "text,label\n不锈钢保温杯 大容量,12 8 15\nKüchenbrett aus Bambus,1 2 3\n".encode()
    for place in range(len(whole)):
        if whole[place] > 0x7F:
            with pytest.raises(DataError, match="is UTF-8 with 1 damaged lines, the first of them"):
                read(sheet_of(tmp_path, whole[:place] + whole[place + 1:]))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", ["mug", "不锈钢保温杯 一一一 大容量"])
def test_utf_16_without_a_mark(encoding, text, tmp_path, logged):
    path = sheet_of(tmp_path, f"text,label\r\n{text},1 2 3\r\n".encode(encoding))
    assert [row.text for row in read(path)] == [text]
    assert any(f"read as {encoding}, which is a guess" in line for line in logged)


def test_zero_bytes_are_no_text(tmp_path):
    for data in (b"text,label\0\0\nmug,1 2 3\n", b"PK\3\4\0\0\0\0mug,\0\1\0\xd8\xd8\xd8"):
        with pytest.raises(DataError, match="holds zero bytes"):
            read(sheet_of(tmp_path, data))


@pytest.mark.parametrize("first_line", ["sep=;", '"sep=;"', "SEP=;", "sep=;;;", "\ufeffsep=;"])
def test_excels_separator_line_is_obeyed_and_is_no_row(first_line, tmp_path, logged):
    path = sheet_of(tmp_path, f'{first_line}\r\ntext;label\r\n"a mug, blue";12,5 x 8,0 cm\r\n'.encode())
    assert [(row.number, row.text, row.label) for row in read(path)] == [(2, "a mug, blue", "12,5 x 8,0 cm")]
    assert logged == []  # nothing was guessed
    with pytest.raises(DataError, match="row 3, line 4 has 3 fields, the first row 2"):
        read(sheet_of(tmp_path, f"{first_line}\ntext;label\nmug;1\nmug;1;2\n".encode()))


def test_a_separator_that_no_guess_would_find(tmp_path):
    assert [row.label for row in read(sheet_of(tmp_path, b"sep=|\ntext|label\na, b, c|1 2 3\n"))] == ["1 2 3"]
    assert [row.label for row in read(sheet_of(tmp_path, b"sep=\t\ntext\tlabel\na, b, c\t1 2 3\n"))] == ["1 2 3"]
