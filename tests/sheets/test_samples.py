"""The sheet: row numbers, missing columns, labels and photos; photo decoding; the split; the order of products."""

import hashlib
import os
import random
from collections import Counter
from pathlib import Path

import openpyxl
import pytest
from PIL import Image

from sheets.cells import DataError
from sheets.order import products_of_step, split_held_out
from sheets.samples import (
    PhotoError,
    RowProblem,
    Sample,
    cached_photo_path,
    find_cached_photo,
    load_photos,
    load_samples,
)
from sheets.summary import WITHOUT_PHOTOS, count_photos, describe_labels, require_usable, summarise_problems

PHOTO_COLUMNS = ("sku_img", "spu_img_1", "spu_img_2", "spu_img_3", "spu_img_4")
ABO = Path(__file__).resolve().parents[2] / "../shared/data/abo"
HEADER = ("sku_id", "text", "label", *PHOTO_COLUMNS)
ADDRESS = "https://shop.example/p/{}.jpg"


def write_sheet(path: Path, rows: list[tuple], header: tuple = HEADER) -> Path:
    """Write rows, each padded with empty cells, as .csv or .xlsx; the row () is blank."""
    if path.suffix == ".csv":
        padded = [[*row, *[""] * (len(header) - len(row))] if row else [] for row in [header, *rows]]
        lines = [",".join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in padded]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
        return path
    book = openpyxl.Workbook()
    for number, row in enumerate([header, *rows], start=1):
        for column, cell in enumerate(row, start=1):
            book.active.cell(number, column, cell)
    book.save(path)
    return path


def cache_photo(address: str, cache_dir: Path) -> Path:
    path = cached_photo_path(address, cache_dir)
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def sample_of(*photos: Path, product_id: str = "A1", row: int = 7) -> Sample:
    return Sample(row, product_id, "a mug", (15.0, 12.0, 8.0), photos, "mugs.xlsx")


def load(path: Path, **options) -> tuple[list[Sample], list[RowProblem]]:
    return load_samples(path, path.parent / "cache", **options)


# The cache's names

@pytest.mark.parametrize("address, name", [
    ("https://example.com/abo/B0799CK52K/25ffa37c.jpg", "96c1a738907a48b249fd660a339228a0.jpg"),
    ("https://x.example/a.PNG", hashlib.md5(b"https://x.example/a.PNG").hexdigest() + ".PNG"),
    ("https://x.example/a.png?w=1.5", hashlib.md5(b"https://x.example/a.png?w=1.5").hexdigest() + ".png"),
    ("https://x.example/photo?file=a.png", hashlib.md5(b"https://x.example/photo?file=a.png").hexdigest() + ".jpg"),
    ("https://x.example/杯子", hashlib.md5("https://x.example/杯子".encode()).hexdigest() + ".jpg"),
])
def test_cached_photo_path(address, name, tmp_path):
    assert cached_photo_path(address, tmp_path) == tmp_path / name


ODD = ["https://x.example/i/1.v=1601398380000", "https://x.example/a.png?x-oss-process=image/resize,w_500",
       "https://x.example/a.jpg!w500", "https://x.example/none", "https://x.example/%E6%9D%AF.v=1/b", "https://x/a.b c"]


@pytest.mark.parametrize("address", ODD)
def test_a_cache_filled_by_the_literal_rule_is_found(address, tmp_path):
    assert cached_photo_path(address, tmp_path).suffix in (".jpg", ".png")
    assert find_cached_photo(address, tmp_path) is None
    md5 = hashlib.md5(address.encode()).hexdigest()
    for literal in {os.path.splitext(address)[1], os.path.splitext(address.partition("?")[0])[1]}:
        (tmp_path / (md5 + literal)).write_bytes(b"")
        assert find_cached_photo(address, tmp_path) == str(tmp_path / (md5 + literal))
        (tmp_path / (md5 + literal)).unlink()
    cached_photo_path(address, tmp_path).write_bytes(b"")
    assert find_cached_photo(address, tmp_path) == str(cached_photo_path(address, tmp_path))


# Reading a sheet

@pytest.mark.parametrize("kind", [".csv", ".xlsx"])
def test_rows_keep_their_numbers_and_text_stays_text(kind, tmp_path):
    path = write_sheet(tmp_path / f"mugs{kind}", [
        ("007", " a mug\nof two lines, white ", "12 8 15"),
        (),
        ("", "", ""),
        ("0010", "a plate", "20 20 2"),
        ("11", "a cup", "N/A"),
        ("12", "a jug", ""),
        ("13", "", "1 2 3"),
    ])
    samples, problems = load(path)
    assert [(sample.row, sample.product_id) for sample in samples] == [(2, "007"), (5, "0010")]
    assert samples[0].text == "a mug\nof two lines, white"
    assert sorted(samples[0].label) == [8.0, 12.0, 15.0]
    assert samples[0].photos == () and samples[0].sheet == path.name
    assert [(problem.row, problem.product_id, problem.used) for problem in problems] == [
        (6, "11", False), (7, "12", False), (8, "13", False)]
    assert problems[0].problem.startswith("label missing: 'N/A': ")
    assert [problem.problem for problem in problems[1:]] == ["label missing", "text missing"]


def test_a_sheet_of_one_column_keeps_its_blank_rows(tmp_path):
    for kind in (".csv", ".xlsx"):
        path = write_sheet(tmp_path / f"texts{kind}", [("a mug",), (), ("a plate",)], header=("text",))
        samples, problems = load(path, require_label=False)
        assert [(sample.row, sample.text, sample.label) for sample in samples] == [(2, "a mug", ()), (4, "a plate", ())]
        assert problems == []


def test_numbers_typed_into_excel_read_as_typed(tmp_path):
    samples, _ = load(write_sheet(tmp_path / "typed.xlsx", [(4213086966614, "a cube", 12), ("2", "a cube", 7.5)]))
    assert [(sample.product_id, sample.label) for sample in samples] == [("4213086966614", (12.0,)), ("2", (7.5,))]


def test_an_excel_error_cell_is_a_missing_label(tmp_path):
    path = write_sheet(tmp_path / "broken_cell.xlsx", [("1", "a mug", "#N/A")])
    book = openpyxl.load_workbook(path)
    book.active["C2"].data_type = "e"
    book.save(path)
    assert load(path)[1] == [RowProblem(2, "1", "label missing", used=False)]


def test_without_required_labels_every_text_is_used(tmp_path):
    path = write_sheet(tmp_path / "new.csv", [("1", "a mug", "12 8 15"), ("2", "a cup", ""), ("3", "a jug", "large")])
    samples, problems = load(path, require_label=False)
    assert [sorted(sample.label) for sample in samples] == [[8.0, 12.0, 15.0], [], []]
    [problem] = problems
    assert (problem.row, problem.used) == (4, True) and problem.problem.startswith("label without a size: 'large': ")


def test_a_product_without_sku_id_is_known_by_its_text_and_photos(tmp_path):
    rows = [("a mug", "1 2 3", "x.jpg"), ("a mug", "1 2 3 cm", "x.jpg"), ("a mug", "1 2 3", "y.jpg"),
            ("a cup", "1 2 3")]
    path = write_sheet(tmp_path / "nameless.csv", rows, header=("text", "label", "sku_img"))
    ids = [sample.product_id for sample in load(path, missing_photos="text_only")[0]]
    assert len(ids) == 4 and ids[0] == ids[1] and len(set(ids)) == 3
    moved = write_sheet(tmp_path / "moved.csv", rows[::-1], header=("text", "label", "sku_img"))
    assert [sample.product_id for sample in load(moved, missing_photos="text_only")[0]] == ids[::-1]


@pytest.mark.parametrize("header, missing, nearest", [
    (("sku_id", "text", "lable"), "label", "'lable'"),
    (("sku_id", "Texts", "label"), "text", "'Texts'"),
])
def test_a_missing_column_is_named_with_the_nearest_and_those_there(header, missing, nearest, tmp_path):
    path = write_sheet(tmp_path / "mugs.xlsx", [("1", "a mug", "1 2 3")], header=header)
    with pytest.raises(DataError) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message and f"no column '{missing}'" in message and f"Is {nearest} meant?" in message
    assert ", ".join(header) in message


def test_a_column_nothing_resembles_is_to_be_added(tmp_path):
    path = write_sheet(tmp_path / "mugs.csv", [("1", "a mug")], header=("sku_id", "text"))
    with pytest.raises(DataError, match="Add 'label'"):
        load(path)
    assert len(load(path, require_label=False)[0]) == 1


def test_a_column_that_comes_twice_is_refused(tmp_path):
    path = write_sheet(tmp_path / "twice.csv", [("a mug", "1 2 3", "4 5 6")], header=("text", "label", "label"))
    with pytest.raises(DataError, match="'label' comes 2 times"):
        load(path)


@pytest.mark.parametrize("name, content, message", [
    ("absent.csv", None, "no such file"),
    ("absent.xlsx", None, "no such file"),
    ("mugs.doc", b"", "a sheet is .xlsx, .xlsm, .xls, .xlsb, .ods, .csv, .tsv, .jsonl, .json, .parquet, not .doc"),
    ("mugs.xls", b"no workbook", "no readable Excel workbook"),
    ("mugs.json", b"{}", "no list of JSON objects"), ("mugs.json", b"[1]", "entry 1 of the list is no JSON object"),
    ("mugs.json", b"[", "is no JSON"),
    ("mugs", b"", "not a file without extension"),
    ("empty.csv", b"", "is empty"),
    ("words.xlsx", b"no workbook", "no readable Excel workbook"),
    ("cut.xlsx", b"PK\x03\x04 cut off", "no readable Excel workbook"),
    ("odd.csv", b"text,label\n\x98\xff\x81\xff\x90,1 2 3\n", "in no encoding that could be guessed"),
    ("odd.jsonl", "{\"text\": \"杯子\"}\n".encode("gbk"), "can't be read as utf-8-sig"),
    ("list.jsonl", b'{"text": "a mug"}\n[1, 2]\n', "line 2 is no JSON object"),
    ("long.jsonl", b'{"text": "a mug", "label": ' + b"1" * 5000 + b"}\n", "line 1 is no JSON object"),
    ("words.jsonl", b'{"text": "a mug"}\n\nmug\n', "line 3 is no JSON object"),
    ("ragged.csv", b"text,label\na mug, white,1 2 3\n", "line 2"),
    ("quote.csv", b'text,label\n"a mug,1 2 3\n', "no well-formed CSV"),
])
def test_an_unreadable_sheet_says_what_to_do(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load(tmp_path / name)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_an_empty_workbook_and_a_folder_are_refused(tmp_path):
    openpyxl.Workbook().save(tmp_path / "empty.xlsx")
    with pytest.raises(DataError, match="is empty"):
        load(tmp_path / "empty.xlsx")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="can't be read"):
        load(tmp_path / "folder.csv")


# Photos of a row

def photo_sheet(tmp_path: Path) -> Path:
    """Row 2 has both photos, row 3 one of two, row 4 none of one, row 5 names none."""
    for name in ("a", "b", "c"):
        cache_photo(ADDRESS.format(name), tmp_path / "cache")
    named = [("a", "b"), ("c", "lost"), ("gone",), ()]
    return write_sheet(tmp_path / "mugs.csv", [
        (str(number), "a mug", "1 2 3", *[ADDRESS.format(name) for name in names]) for number, names in enumerate(named)
    ])


@pytest.mark.parametrize("missing_photos, photos_of_row", [
    ("use_rest", {2: 2, 3: 1, 5: 0}),
    ("drop_row", {2: 2, 5: 0}),
    ("text_only", {2: 2, 3: 1, 4: 0, 5: 0}),
    ("placeholder", {2: 2, 3: 2, 4: 1, 5: 0}),
])
def test_missing_photos(missing_photos, photos_of_row, tmp_path):
    samples, problems = load(photo_sheet(tmp_path), missing_photos=missing_photos)
    assert {sample.row: len(sample.photos) for sample in samples} == photos_of_row
    assert samples[0].photos == tuple(
        str(cached_photo_path(ADDRESS.format(name), tmp_path / "cache")) for name in "ab")
    assert [(problem.row, problem.used) for problem in problems] == [(3, 3 in photos_of_row), (4, 4 in photos_of_row)]
    for problem, column, name in zip(problems, ("spu_img_1", "sku_img"), ("lost", "gone"), strict=True):
        expected = cached_photo_path(ADDRESS.format(name), tmp_path / "cache")
        assert problem.problem == (f"photo missing: {column} {ADDRESS.format(name)} (expected as {expected}; python "
                                   "download_images.py fetches it)")


def test_a_missing_file_is_named_where_it_was_looked_for(tmp_path):
    [problem] = load(write_sheet(tmp_path / "mugs.csv", [("1", "a mug", "1 2 3", "photos/a.jpg")]))[1]
    assert problem.problem == f"photo missing: sku_img photos/a.jpg (expected as {tmp_path / 'photos/a.jpg'})"


def test_placeholders_stand_in_for_missing_photos(tmp_path):
    samples, problems = load(photo_sheet(tmp_path), missing_photos="placeholder")
    assert [photo.getpixel((0, 0)) for photo in load_photos(samples[1])] == [(254, 0, 0), (128, 128, 128)]
    assert count_photos(samples, problems) == "5 photos, 2 of them placeholders"
    assert count_photos(*load(photo_sheet(tmp_path))) == "3 photos"
    assert summarise_problems(problems).endswith("2 rows with problems: 0 left out, 2 used")


def test_use_rest_is_the_default_and_other_words_are_refused(tmp_path):
    path = photo_sheet(tmp_path)
    assert load(path) == load(path, missing_photos="use_rest")
    with pytest.raises(ValueError, match="drop_rows"):
        load(path, missing_photos="drop_rows")


def test_every_missing_photo_is_reported_and_a_row_left_out_has_no_used_problem(tmp_path):
    path = write_sheet(tmp_path / "mugs.csv", [("1", "a mug", "", *[ADDRESS.format(i) for i in range(5)])])
    samples, problems = load(path, missing_photos="text_only")
    assert samples == [] and not any(problem.used for problem in problems)
    assert [problem.problem.partition(":")[0] for problem in problems] == ["label missing"] + ["photo missing"] * 5


def test_a_local_path_is_used_as_it_is(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("one.png", "two.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name)
    path = write_sheet(tmp_path / "mugs.csv", [
        ("1", "a mug", "1 2 3", "photos/one.png", str(tmp_path / "photos" / "two.png"))])
    [sample], problems = load(path)
    assert sample.photos == (str(tmp_path / "photos/one.png"), str(tmp_path / "photos/two.png")) and problems == []


def test_an_address_longer_than_a_file_name_is_just_missing(tmp_path):
    path = write_sheet(tmp_path / "mugs.csv", [("1", "a mug", "1 2 3", "https://x.example/" + "a" * 5000)])
    samples, [problem] = load(path)
    assert samples == [] and problem.problem.startswith("photo missing: sku_img https://x.example/aaa")


# Decoding photos

def test_photos_are_read_only_when_asked_for(tmp_path):
    address = ADDRESS.format("a")
    cache_photo(address, tmp_path / "cache").write_bytes(b"not yet looked at")
    [sample], problems = load(write_sheet(tmp_path / "mugs.csv", [("1", "a mug", "1 2 3", address)]))
    assert problems == []
    with pytest.raises(PhotoError, match=r"mugs\.csv row 2 \(1\)"):
        load_photos(sample)


# Reporting

def test_summarise_problems():
    problems = [RowProblem(5, "B0", "label missing", False),
                RowProblem(6, "B1", "photo missing: x", True),
                RowProblem(6, "B1", "photo missing: y", True)]
    assert summarise_problems(problems) == (
        "row 5 (B0): label missing: left out\nrow 6 (B1): photo missing: x: used\nrow 6 (B1): photo missing: y: used\n"
        "2 rows with problems: 1 left out, 1 used")
    assert summarise_problems(problems, limit=1).splitlines()[1:] == [
        "... and 2 more", "2 rows with problems: 1 left out, 1 used"]
    assert summarise_problems([]) == "0 rows with problems: 0 left out, 0 used"


def test_require_usable_says_why_nothing_is_left(tmp_path):
    path = write_sheet(tmp_path / "mugs.csv", [
        ("1", "a mug", "1 2 3", "https://x.example/a.jpg", "https://x.example/b.jpg"), ("2", "a cup", ""),
        ("3", "a jug", "1 2 3", "https://x.example/c.jpg")])
    samples, problems = load(path)
    with pytest.raises(DataError) as error:
        require_usable(samples, problems, path, tmp_path / "cache", WITHOUT_PHOTOS)
    message = str(error.value)
    assert f"{path}: no row can be used, of 3: label missing (1 row), photo missing (2 rows)." in message
    assert "The first: row 2 (1): photo missing: sku_img https://x.example/a.jpg" in message
    assert f"looked for in {tmp_path / 'cache'}" in message and "--missing_photos text_only" in message
    assert f"Fetch them: python download_images.py --data_path {path} --image_cache_dir {tmp_path / 'cache'}" in message
    assert "Fill in the text and label" in message

    samples, problems = load(path, missing_photos="text_only")
    require_usable(samples, problems, path, tmp_path / "cache")


def test_require_usable_gives_only_advice_that_helps(tmp_path):
    path = write_sheet(tmp_path / "mugs.csv", [("1", "a mug", "", "https://x.example/a.jpg")])
    with pytest.raises(DataError) as error:
        require_usable(*load(path), path, tmp_path)
    assert "text_only" not in str(error.value) and "Fill in" in str(error.value)
    path = write_sheet(tmp_path / "mugs.csv", [("1", "a mug", "1 2 3", "photos/a.jpg")])
    with pytest.raises(DataError, match="Put them there, or give their folder with --image_cache_dir[.]$"):
        require_usable(*load(path), path, tmp_path)
    with pytest.raises(DataError, match="no rows below its header"):
        require_usable(*load(write_sheet(tmp_path / "bare.csv", [])), tmp_path / "bare.csv", tmp_path)


# Held-out products

def many(count: int) -> list[Sample]:
    return [sample_of(product_id=f"P{number}", row=number + 2) for number in range(count)]


def test_split_is_by_hash_of_the_product_id():
    train, held_out = split_held_out(many(2000), 0.2)
    assert 340 <= len(held_out) <= 460  # 400 expected; 3.3 standard deviations of 18 either way
    assert len(train) + len(held_out) == 2000
    first = int(hashlib.sha256(b"P0").hexdigest(), 16) / 2**256
    assert split_held_out(many(1), first - 1e-9)[1] == [] and split_held_out(many(1), first + 1e-9)[0] == []


def test_split_is_stable_under_reordering_and_adding_rows():
    samples = many(200)
    before = {sample.product_id for sample in split_held_out(samples, 0.3)[1]}
    shuffled = random.Random(1).sample(samples, k=200)
    assert {sample.product_id for sample in split_held_out(shuffled, 0.3)[1]} == before
    grown = {sample.product_id for sample in split_held_out(many(400), 0.3)[1]}
    assert {name for name in grown if int(name[1:]) < 200} == before
    assert before <= {sample.product_id for sample in split_held_out(samples, 0.5)[1]}


def test_all_rows_of_a_product_are_on_one_side():
    samples = many(50) + [sample_of(product_id=f"P{number}", row=number + 52) for number in range(50)]
    train, held_out = split_held_out(samples, 0.5)
    assert not {sample.product_id for sample in train} & {sample.product_id for sample in held_out}
    assert len(train) > 10 and len(held_out) > 10 and set(Counter(s.product_id for s in train).values()) == {2}


def test_split_at_the_ends():
    samples = many(20)
    assert split_held_out(samples, 0) == (samples, []) and split_held_out(samples, 1) == ([], samples)
    with pytest.raises(ValueError, match="from 0 to 1"):
        split_held_out(samples, 10)


# The order of the products

@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_pass_covers_each_product_once(world_size):
    count, batch_size = 24, 2
    steps = count // (batch_size * world_size)
    for first in (0, steps, 5 * steps):
        seen = [index for step in range(first, first + steps) for rank in range(world_size)
                for index in products_of_step(count, batch_size, step, 7, rank, world_size)]
        assert sorted(seen) == list(range(count))


def line_of_products(count: int, batch_size: int, steps: int, world_size: int) -> list[int]:
    """The products in the order of the line, the ranks' shares interleaved again."""
    line = []
    for step in range(steps):
        shares = [products_of_step(count, batch_size, step, 5, rank, world_size) for rank in range(world_size)]
        line += [index for turn in zip(*shares, strict=True) for index in turn]
    return line


@pytest.mark.parametrize("count, batch_size", [(10, 4), (7, 3), (3, 8), (1, 4)])
def test_batches_run_on_across_passes_and_world_sizes_agree(count, batch_size):
    line = line_of_products(count, 4 * batch_size, 10, world_size=1)
    assert line == line_of_products(count, 2 * batch_size, 10, world_size=2)
    assert line == line_of_products(count, batch_size, 10, world_size=4)
    for start in range(0, len(line) - count + 1, count):
        assert sorted(line[start:start + count]) == list(range(count))


def test_ranks_get_different_products_of_one_step():
    shares = [products_of_step(100, 5, 3, 0, rank, 4) for rank in range(4)]
    assert len({index for share in shares for index in share}) == 20


def test_products_of_step_is_pure_and_does_not_touch_the_global_generator():
    state = random.getstate()
    assert products_of_step(50, 8, 11, 3) == products_of_step(50, 8, 11, 3)
    assert random.getstate() == state


def test_seeds_and_passes_have_orders_of_their_own():
    first, second = (products_of_step(50, 50, step, 3) for step in (0, 1))
    assert first != second and first != products_of_step(50, 50, 0, 4) and first != list(range(50))


def test_the_order_of_a_seed_stays_what_it_was():
    assert products_of_step(6, 6, 0, 0) == [0, 5, 1, 4, 3, 2]


def test_no_products_no_batch():
    with pytest.raises(ValueError, match="no products"):
        products_of_step(0, 4, 0, 0)


# Rows that nobody here made

@pytest.mark.skipif(not (ABO / "products.xlsx").is_file(), reason="shared/data/abo is not beside this repository")
def test_real_rows_of_amazon_berkeley_objects():
    samples, problems = load_samples(ABO / "products.xlsx", ABO / "image_cache_new")
    assert [(sample.row, sample.product_id, len(sample.photos)) for sample in samples] == [
        (2, "B07GTFSCHB", 4), (3, "B074M5HPBD", 3)]
    assert problems == [RowProblem(4, "B0799CK52K", "label missing", used=False)]
    everything, _ = load_samples(ABO / "products.xlsx", ABO / "image_cache_new", require_label=False)
    photos = [photo for sample in everything for photo in load_photos(sample)]
    assert len(photos) == len(os.listdir(ABO / "image_cache_new")) == 12
    assert {photo.mode for photo in photos} == {"RGB"}


def test_labels_of_one_or_two_sizes(tmp_path):
    path = write_sheet(tmp_path / "data.xlsx", [("mug", "12 8 15"), ("pole", "高25cm"), ("rug", "120 80"),
                                                ("disc", "直径30cm")], header=("text", "label"))
    by_axis, problems = load_samples(path, tmp_path)
    assert [sample.label.axes for sample in by_axis] == [(), ("h",), (), ("round", "round")] and not problems
    assert describe_labels(by_axis) == ("labels: 1 of three sizes (sorted), 1 of two sizes (by their axes), 1 of two "
                                        "sizes (largest first), 1 of one size (by its axis)")
    largest, _ = load_samples(path, tmp_path, partial_labels="largest")
    assert [sample.label.axes for sample in largest] == [()] * 4 and largest == by_axis
    full, problems = load_samples(path, tmp_path, partial_labels="skip")
    assert [sample.row for sample in full] == [2] and [problem.row for problem in problems] == [3, 4, 5]
    assert "label partial: '高25cm' gives 1 of three sizes" in problems[0].problem and not problems[0].used


def test_html_in_a_text_is_read_as_a_person_sees_it_and_said(tmp_path):
    path = write_sheet(tmp_path / "data.xlsx", [("<b>mug</b> 12 &times; 8 cm", "12 8"), ("mug < cup", "12 8")],
                       header=("text", "label"))
    samples, problems = load_samples(path, tmp_path)
    assert [sample.text for sample in samples] == ["mug 12 × 8 cm", "mug < cup"]
    assert [(problem.row, problem.kind, problem.used) for problem in problems] == [(2, "text holds HTML", True)]
