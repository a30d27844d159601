"""Pictures inside workbooks, as spreadsheet programs write them: each reaches its row, or is named."""

import io
import re
import zipfile
from collections import Counter

import openpyxl
import pytest
import xlsxwriter
from openpyxl.drawing.image import Image as Drawing
from PIL import Image

from config import SheetOptions
from sheets.cells import DataError
from sheets.fetch import missing_addresses
from sheets.pictures import may_hold_pictures
from sheets.samples import load_photos, load_samples

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (99, 99, 0)]
HEADER = ("text", "label", "图片")
WPS = "http://www.wps.cn/officeDocument/2017/etCustomData"
DRAWING = "http://schemas.openxmlformats.org/drawingml/2006"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
RICH = "http://schemas.microsoft.com/office/spreadsheetml"


def picture(colour, kind="PNG"):
    content = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(content, kind)
    return content


def written(path, fill, rows=3):
    """A workbook of products, as Excel writes it by way of XlsxWriter."""
    with xlsxwriter.Workbook(path) as book:
        sheet = book.add_worksheet("商品")
        for number, cells in enumerate([HEADER, *[(f"mug {index}", "1 2 3") for index in range(rows)]]):
            sheet.write_row(number, 0, cells)
        fill(sheet)
    return path


def changed(path, parts, replacements=()):
    """Put parts into a workbook, and change others by regular expressions."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for part, pattern, new in replacements:
        text = contents[part].decode()
        assert re.search(pattern, text)
        contents[part] = re.sub(pattern, new, text).encode()
    contents |= parts
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def relations(*targets):
    entries = "".join(f'<Relationship Id="rId{number}" Type="{OFFICE}/image" Target="{target}"'
                      + (' TargetMode="External"/>' if "://" in target else "/>")
                      for number, target in enumerate(targets, 1))
    return f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{entries}</Relationships>'


def read(path, **options):
    return load_samples(path, path.parent / "cache", "text_only", reading=SheetOptions(**options))


def colours(samples):
    """The colour of each photo by row."""
    return {sample.row: [photo.getpixel((9, 9)) for photo in load_photos(sample)] for sample in samples}


def all_rows(samples, expected):
    assert colours(samples) == {row: [COLOURS[place] for place in places] for row, places in expected.items()}


def test_floating_pictures_over_cells(tmp_path):
    def fill(sheet):
        sheet.set_row(2, 60)
        for number, colour in enumerate(COLOURS[:3], 1):
            sheet.insert_image(number, 2, "a.png", {"image_data": picture(colour)})
        sheet.insert_image(2, 4, "b.png", {"image_data": picture(COLOURS[3])})  # a second one, beside the table

    path = written(tmp_path / "data.xlsx", fill)
    assert missing_addresses(str(path), str(tmp_path / "cache"), SheetOptions()) == []  # nothing to fetch
    samples, problems = read(path)
    all_rows(samples, {2: [0], 3: [1, 3], 4: [2]})
    assert problems == []


def test_floating_pictures_by_openpyxl_are_bound_by_their_corner_however_far_they_reach(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(HEADER)
    for index, colour in enumerate(COLOURS):
        book.active.append((f"mug {index}", "1 2 3"))
        book.active.add_image(Drawing(picture(colour)), f"C{index + 2}")  # 48 pixels in rows of 20: they overlap
    book.save(tmp_path / "data.xlsx")
    samples, problems = read(tmp_path / "data.xlsx")
    all_rows(samples, {2: [0], 3: [1], 4: [2], 5: [3]})
    assert problems == []


def test_a_picture_that_begins_at_the_foot_of_a_row_belongs_to_the_next(tmp_path):
    def fill(sheet):
        sheet.set_row(2, 60)  # points: 80 pixels
        sheet.insert_image(1, 2, "a.png", {"image_data": picture(COLOURS[0]), "y_offset": 17})  # of 20
        sheet.insert_image(2, 2, "b.png", {"image_data": picture(COLOURS[1]), "y_offset": 58})  # of 80
        sheet.insert_image(3, 2, "c.png", {"image_data": picture(COLOURS[2]), "y_offset": 1})

    samples, _ = read(written(tmp_path / "data.xlsx", fill))
    all_rows(samples, {2: [], 3: [0, 1], 4: [2]})


def test_pictures_placed_in_cells(tmp_path):
    def fill(sheet):
        for number, colour in enumerate(COLOURS[:2], 1):
            sheet.embed_image(number, 2, "a.png", {"image_data": picture(colour)})
        sheet.embed_image(3, 5, "b.jpg", {"image_data": picture(COLOURS[2])})

    samples, problems = read(written(tmp_path / "data.xlsx", fill))
    all_rows(samples, {2: [0], 3: [1], 4: [2]})
    assert problems == []


def wps(path, missing=False):
    """A sheet with cell pictures as WPS writes them: a formula in the cell, all pictures in one part."""
    names = [f"ID_{number:032X}" for number in range(3)]

    def fill(sheet):
        for number, name in enumerate(names, 1):
            sheet.write_formula(number, 2, f'=_xlfn.DISPIMG("{name}",1)', value=f'=DISPIMG("{name}",1)')

    written(path, fill)
    pictures = "".join(f'<etc:cellImage><xdr:pic><xdr:nvPicPr><xdr:cNvPr id="{number}" name="{name}"/></xdr:nvPicPr>'
                       f'<xdr:blipFill><a:blip r:embed="rId{number}"/></xdr:blipFill></xdr:pic></etc:cellImage>'
                       for number, name in enumerate(names[:2 if missing else 3], 1))
    return changed(path, {
        "xl/cellimages.xml": f'<etc:cellImages xmlns:etc="{WPS}" xmlns:xdr="{DRAWING}/spreadsheetDrawing" '
                             f'xmlns:a="{DRAWING}/main" xmlns:r="{OFFICE}">{pictures}</etc:cellImages>',
        "xl/_rels/cellimages.xml.rels": relations(*(f"media/image{number}.png" for number in (1, 2, 3))),
        **{f"xl/media/image{number}.png": picture(colour).getvalue() for number, colour in enumerate(COLOURS[:3], 1)}})


def test_cell_pictures_of_wps(tmp_path):
    samples, problems = read(wps(tmp_path / "data.xlsx"))
    all_rows(samples, {2: [0], 3: [1], 4: [2]})
    assert problems == []


def test_image_formulas(tmp_path):
    def fill(sheet):
        sheet.write_formula(1, 2, '=_xlfn.IMAGE("https://x.cn/a.jpg","front")', value="#VALUE!")
        sheet.write_formula(2, 2, '=IFERROR(__xludf.DUMMYFUNCTION("IMAGE(""https://x.cn/b.jpg"")"),"")', value="")
        sheet.write_formula(3, 2, "=_xlfn.IMAGE(D4)", value="#VALUE!")

    path = written(tmp_path / "data.xlsx", fill)
    Image.open(picture(COLOURS[0])).save(tmp_path / "a.png")
    samples, problems = read(path)
    assert [(problem.row, problem.problem.partition(" (expected")[0]) for problem in problems] == [
        (2, "photo missing: 图片 https://x.cn/a.jpg"), (3, "photo missing: 图片 https://x.cn/b.jpg"),
        (4, "photo missing: 图片: the workbook does not say where it is")]
    assert len(samples) == 3


def test_image_formulas_that_excel_has_worked_out(tmp_path):
    """Excel keeps the address of a picture from the web, and mostly a copy, as a rich value of its own structure."""
    def fill(sheet):
        for number in (1, 2, 3):
            sheet.embed_image(number, 2, "a.png", {"image_data": picture(COLOURS[number])})

    path = changed(written(tmp_path / "data.xlsx", fill), {
        "xl/richData/rdRichValueWebImage.xml":
            f'<webImagesSrd xmlns="{RICH}/2020/richdatawebimage" xmlns:r="{OFFICE}"><webImageSrd><address r:id="rId1"/>'
            '<blip r:id="rId2"/></webImageSrd><webImageSrd><address r:id="rId1"/></webImageSrd></webImagesSrd>',
        "xl/richData/_rels/rdRichValueWebImage.xml.rels": relations("https://x.cn/a.jpg", "../media/web.png"),
        "xl/media/web.png": picture(COLOURS[0]).getvalue(),
    }, [("xl/richData/rdrichvaluestructure.xml", "</rvStructures>",
         '<s t="_webimage"><k n="WebImageIdentifier" t="i"/><k n="CalcOrigin" t="i"/></s></rvStructures>'),
        ("xl/richData/rdrichvalue.xml", '<rv s="0"><v>0</v>', '<rv s="1"><v>0</v>'),
        ("xl/richData/rdrichvalue.xml", '<rv s="0"><v>1</v>', '<rv s="1"><v>1</v>'),
        ("xl/worksheets/sheet1.xml", '(<c r="C[23]"[^>]*>)', r"\1<f>_xlfn.IMAGE(D2)</f>")])
    samples, problems = read(path)
    all_rows(samples, {2: [0], 3: [], 4: [3]})
    assert [problem.problem.partition(" (")[0] for problem in problems] == ["photo missing: 图片 https://x.cn/a.jpg"]


def test_hyperlinked_cells(tmp_path):
    def fill(sheet):
        sheet.write_url(1, 2, "https://x.cn/a.jpg", string="查看")
        sheet.write_formula(2, 2, '=HYPERLINK("https://x.cn/b.jpg","查看")', value="查看")
        sheet.write_url(3, 2, "external:pics/c d.png", string="查看")
        sheet.write_url(1, 0, "https://x.cn/product/1", string="mug 0")  # a text that leads to its page names no photo

    path = written(tmp_path / "data.xlsx", fill)
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/c d.png").write_bytes(picture(COLOURS[0]).getvalue())
    samples, problems = read(path)
    all_rows(samples, {2: [], 3: [], 4: [0]})
    assert [(problem.row, problem.problem.partition(" (")[0]) for problem in problems] == [
        (2, "photo missing: 图片 https://x.cn/a.jpg"), (3, "photo missing: 图片 https://x.cn/b.jpg")]
    assert samples[0].text == "mug 0"


def test_a_picture_in_a_merged_cell_holds_for_all_its_rows(tmp_path):
    def fill(sheet):
        sheet.merge_range(1, 2, 2, 2, "")
        sheet.insert_image(1, 2, "a.png", {"image_data": picture(COLOURS[0])})
        sheet.embed_image(3, 2, "b.png", {"image_data": picture(COLOURS[1])})

    samples, _ = read(written(tmp_path / "data.xlsx", fill))
    all_rows(samples, {2: [0], 3: [0], 4: [1]})


def test_what_can_not_be_taken_is_named_by_its_row(tmp_path):
    samples, problems = read(wps(tmp_path / "data.xlsx", missing=True))
    all_rows(samples, {2: [0], 3: [1], 4: []})
    assert [(problem.row, problem.problem) for problem in problems] == [
        (4, "photo missing: 图片: the workbook does not say where it is")]

    def fill(sheet):
        for number, colour in enumerate(COLOURS[:3], 1):
            sheet.insert_image(number, 2, "a.png", {"image_data": picture(colour)})

    path = changed(written(tmp_path / "drawn.xlsx", fill), {"xl/media/image3.png": None, "xl/media/image2.png": None,
                                                            "xl/media/image2.emf": b"lines"},
                   [("xl/drawings/_rels/drawing1.xml.rels", "image2.png", "image2.emf")])
    samples, problems = read(path)
    all_rows(samples, {2: [0], 3: [], 4: []})
    assert [(problem.row, problem.problem) for problem in problems] == [
        (3, "photo missing: 图片: xl/media/image2.emf is a drawing of lines (.emf), no photo; paste it as a picture"),
        (4, "photo missing: 图片: xl/media/image3.png is not in the workbook")]
    assert load_samples(path, tmp_path / "cache")[0][0].row == 2  # the others have lost their only photo
    assert len(load_samples(path, tmp_path / "cache", "placeholder")[0][2].photos) == 1


def test_a_picture_beside_no_product_is_said(tmp_path, said):
    def fill(sheet):
        sheet.insert_image(0, 5, "logo.png", {"image_data": picture(COLOURS[0])})
        sheet.insert_image(6, 2, "a.png", {"image_data": picture(COLOURS[1])})

    samples, problems = read(written(tmp_path / "data.xlsx", fill))
    assert [(problem.row, problem.kind) for problem in problems] == [(7, "text missing"), (7, "label missing")]
    assert any("1 pictures lie beside or above the rows of products" in line for line in said)


def test_pictures_are_kept_by_content_and_a_second_reading_writes_none(tmp_path):
    def fill(sheet):
        for number in (1, 2, 3):
            sheet.insert_image(number, 2, "a.jpg", {"image_data": picture(COLOURS[0], "JPEG")})

    path = written(tmp_path / "data.xlsx", fill)
    samples, _ = read(path)
    [file] = (tmp_path / "cache").iterdir()
    assert Counter(sample.photos for sample in samples) == {(str(file),): 3} and file.suffix == ".jpeg"
    before = file.stat().st_mtime_ns
    assert read(path)[0] == samples and file.stat().st_mtime_ns == before


def test_another_worksheet_has_its_own_pictures(tmp_path):
    with xlsxwriter.Workbook(tmp_path / "data.xlsx") as book:
        for name, colour in (("May", COLOURS[0]), ("June", COLOURS[1])):
            sheet = book.add_worksheet(name)
            sheet.write_row(0, 0, HEADER)
            sheet.write_row(1, 0, ("mug", "1 2 3"))
            sheet.insert_image(1, 2, "a.png", {"image_data": picture(colour)})
    all_rows(read(tmp_path / "data.xlsx")[0], {2: [0]})
    all_rows(read(tmp_path / "data.xlsx", sheet_name="June")[0], {2: [1]})


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    path = written(tmp_path / "data.xlsx",
                   lambda sheet: sheet.insert_image(1, 2, "a.png", {"image_data": picture(COLOURS[0])}))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="can't be written there.*--image_cache_dir"):
        read(path)


@pytest.mark.parametrize("part", ["xl/drawings/drawing1.xml", "xl/richData/rdrichvalue.xml", "xl/metadata.xml",
                                  "xl/drawings/_rels/drawing1.xml.rels", "xl/richData/rdrichvaluestructure.xml"])
def test_damaged_parts_are_one_message(part, tmp_path):
    def fill(sheet):
        sheet.insert_image(1, 2, "a.png", {"image_data": picture(COLOURS[0])})
        sheet.embed_image(2, 2, "a.png", {"image_data": picture(COLOURS[1])})

    path = changed(written(tmp_path / "data.xlsx", fill), {part: b"<broken"})
    with pytest.raises(DataError, match="is damaged.*save it again"):
        read(path)


@pytest.mark.parametrize(("name", "content"), [("data.xls", b"\xff\xd8\xff\xe0"), ("data.ods", b"Pictures/1.png"),
                                               ("data.xlsb", b"xl/media/image1.png")])
def test_pictures_of_other_kinds_are_warned_of(name, content, tmp_path, said):
    (tmp_path / name).write_bytes(b"x" * 5000 + content)
    assert not may_hold_pictures(tmp_path / name)
    assert any("it holds pictures, which are read from .xlsx only" in line for line in said)
