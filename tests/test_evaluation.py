"""Records to figures, sheets and tables: against numbers worked by hand; hostile text stays text."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from openpyxl import load_workbook

from data import Sample
from evaluation import Record, summarise, with_other_photos
from report import answer_line, change_lines, compare_products, curve_svg, summary_table, write_json, write_sheet
from reward import score_answer


def record(row, answers, label=(15.0, 12.0, 8.0), photos=()):
    sample = Sample(row=row, product_id=f"p{row}", text="mug", label=label, photos=photos, sheet="s.xlsx")
    return Record(sample, answers, [score_answer(answer, label) for answer in answers])


GOOD = '{"length": 15, "width": 12, "height": 8, "unit": "cm"}'  # reward 1
FAIR = '{"length": 15, "width": 12, "height": 4, "unit": "cm"}'  # reward 1 - 0.5 / 3
POOR = '{"length": 3, "width": 2.4, "height": 1.6, "unit": "cm"}'  # reward 0.2


def test_summary():
    summary = summarise([record(2, [GOOD, FAIR]), record(3, ["no idea", POOR])])
    assert summary["mean_reward"] == pytest.approx((1 + 1 - 0.5 / 3 + 0 + 0.2) / 4)
    assert summary["success_rate"] == 0.25 and summary["zero_rate"] == 0.25 and summary["valid_rate"] == 0.75
    assert summary["failure_rate"] == 0.5 and summary["products"] == 2 and summary["answers"] == 4
    assert summarise([]) == {}


def test_comparison_pairs_rows():
    before = [record(2, [POOR, POOR]), record(3, [GOOD]), record(4, [FAIR]), record(5, [GOOD])]
    after = [record(4, [FAIR]), record(3, [POOR]), record(2, [GOOD, POOR])]
    lines = compare_products(before, after)
    assert [line["row"] for line in lines] == [2, 3, 4]
    assert [line["change"] for line in lines] == pytest.approx([0.4, -0.8, 0])
    assert lines[0]["best_answer_after"] == GOOD and lines[0]["label_cm"] == "15 x 12 x 8"
    text = change_lines(lines)
    assert "1 improved, 1 worse, 1 the same" in text
    assert text.index("largest gains") < text.index("row 2") < text.index("largest losses") < text.index("row 3")


def test_table_shows_each_model():
    table = summary_table({"before": summarise([record(2, [POOR])]), "after": summarise([record(2, [GOOD])])})
    assert "0.200" in table and "1.000" in table and "100.0%" in table


def test_an_answer_without_a_label_has_no_reward_and_no_problem():
    read = answer_line(record(2, [GOOD], label=()))
    assert (read["size_1_cm"], read["size_3_cm"], read["problem"], read["reward"]) == (15, 8, "", None)
    unread = answer_line(record(3, ["no idea"], label=()))
    assert unread["size_1_cm"] is None and "no readable size" in unread["problem"]


def test_hostile_text_stays_text(tmp_path):
    hostile = ["=1+1", "+1", "-1", "@SUM(A1)", "\x00\x0bbell", "x" * 40000, "\ud800".encode(errors="replace").decode()]
    write_sheet(tmp_path / "out.xlsx", {"t": [{"text": text, "n": 1.5} for text in hostile], "empty": []})
    sheet = load_workbook(tmp_path / "out.xlsx")["t"]
    cells = [sheet.cell(row, 1) for row in range(2, 2 + len(hostile))]
    assert all(cell.data_type == "s" for cell in cells)
    assert cells[0].value == "=1+1" and cells[3].value == "@SUM(A1)"
    assert sheet.cell(2, 2).value == 1.5


def test_files_are_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"text": "长 12 cm"})
    write_json(tmp_path / "a.json", {"text": "new"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"text": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_every_product_gets_another_ones_photos():
    samples = [record(row, [GOOD], photos=tuple(Path(f"{row}{view}") for view in range(row % 2 + 1))).sample
               for row in range(2, 8)]
    swapped = with_other_photos(samples)
    for own, other in zip(samples, swapped, strict=True):
        assert own.photos != other.photos and len(own.photos) == len(other.photos)
        assert (own.row, own.label, own.text) == (other.row, other.label, other.text)


def test_a_curve_is_drawn_to_scale():
    svg = ElementTree.fromstring(curve_svg({"a <b>": [(0, 0.0), (50, 0.5), (100, 1.0)]}, "t & u"))
    line = svg.find("{http://www.w3.org/2000/svg}polyline")
    assert line.get("points") == "48.0,312.0 336.0,176.0 624.0,40.0"
    assert "a <b>" in "".join(svg.itertext()) and "t & u" in "".join(svg.itertext())
