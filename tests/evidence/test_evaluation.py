"""Records to figures, sheets and tables: against numbers worked by hand; hostile text stays text."""

import gc
import json
import weakref
from pathlib import Path

import pytest
from openpyxl import load_workbook

from evidence.comparison import Answers, build_report, histogram
from evidence.evaluation import Record, evaluate, summarise, with_other_photos
from evidence.report import answer_line, change_lines, confidence_line, review_rows, summary_table, tables, write_sheet
from ground.files import write_json
from reward import score_answer
from rollout import PromptEncoder
from rounding import float64
from sheets.samples import Sample
from tiny import noise_photo


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


def test_size_figures():
    slip = '{"length": 150, "width": 120, "height": 80}'
    summary = summarise([record(2, [GOOD, FAIR]), record(3, [slip, "no idea"]), record(4, [GOOD], (15.0, 12.0))])
    # errors, largest side first, of the five answers: 0 0 0, 0 0.1 (8 -> 4 is 0.5): see below, 9 9 9, 1 1 1, 0 0
    assert summary["within_5"] == 2 / 5 and summary["slip_rate"] == 1 / 5 and summary["valid_rate"] == 4 / 5
    assert (summary["largest_error"], summary["middle_error"], summary["smallest_error"]) == (0, 0.5, 0.5)
    assert summary["volume_error"] == pytest.approx((0.5 + 1) / 2)  # 0, 0.5, 999 and 1; none for two sizes
    assert "volume_error" not in summarise([record(2, [GOOD], (15.0, 12.0))])


def report_of(before, after):
    answers = [Answers("before", "before", "a", before, []), Answers("after", "after", "b", after, [])]
    return build_report(answers, {"promise": 0.2}, 0.2)


def test_comparison_pairs_rows():
    before = [record(2, [POOR, POOR]), record(3, [GOOD, GOOD]), record(4, [FAIR, FAIR]), record(5, [GOOD, GOOD])]
    after = [record(4, [FAIR, FAIR]), record(3, [POOR, POOR]), record(2, [GOOD, POOR])]
    report = report_of(before, after)
    assert [product["row"] for product in report["products"]] == [2, 3, 4] and report["unpaired"] == ["s.xlsx row 5"]
    assert [product["change"] for product in report["products"]] == pytest.approx([0.4, -0.8, 0])
    change = report["change"]["after"]
    assert change["mean"] == pytest.approx(-0.4 / 3)
    assert (change["better"], change["worse"], change["same"]) == (1, 1, 1)
    assert change["verdict"] == "unclear"
    text = change_lines(report)
    assert "1 improved, 1 worse, 1 the same" in text and "mean reward -0.133" in text
    assert text.index("largest gains") < text.index("row 2") < text.index("largest losses") < text.index("row 3")


def test_few_products_prove_nothing_and_many_do():
    def verdict(count, one, other):
        rows = range(2, count + 2)
        report = report_of([record(row, [one]) for row in rows], [record(row, [other]) for row in rows])
        return report["change"]["after"]

    assert verdict(2, POOR, GOOD)["verdict"] == "unclear" and verdict(2, POOR, GOOD)["interval"][0] > 0
    assert verdict(8, POOR, GOOD)["verdict"] == "up" and verdict(8, GOOD, FAIR)["verdict"] == "down"
    assert verdict(8, GOOD, GOOD)["verdict"] == "unclear"


def test_best_of_n_and_the_answer_most_agreed_on():
    records = [record(2, [POOR, FAIR, FAIR]), record(3, ["?", "?", GOOD])]
    samples = report_of(records, records)["samples"]["after"]
    fair = 1 - 0.5 / 3
    assert samples["best"] == pytest.approx((fair + 1) / 2) and samples["answers"] == 3
    assert samples["agreed"] == pytest.approx((fair + 0) / 2)
    assert samples["mean"] == pytest.approx(((0.2 + 2 * fair) / 3 + 1 / 3) / 2)


def test_what_is_to_be_reviewed():
    sure = [record(row, [GOOD, GOOD]) for row in range(2, 42)]
    unsure = [record(row, [POOR, GOOD]) for row in range(42, 52)]  # of two that agree alike the first counts
    report = report_of(sure + unsure, sure + unsure)
    accept = report["confidence"]["after"]["accept"]
    assert (accept["threshold"], accept["accepted"], accept["wrong"]) == (1, 40, 0)
    assert report["confidence"]["after"]["check"] is None  # 20 of 25 right ones are too few to promise anything
    assert [row["row"] for row in review_rows(report)] == list(range(42, 52))
    assert "accept from 1.000 on: 80% of products, 0 of 40 wrong" in confidence_line(report)
    assert "--num_samples" in confidence_line(report_of([record(2, [GOOD])], [record(2, [GOOD])]))
    assert set(tables(report)) == {"summary", "products", "review", "groups"}


def test_rewards_are_binned():
    assert histogram([0, 0.049, 0.05, 0.9, 0.95, 1, 1.5, -1]) == [3, 1] + [0] * 16 + [1, 3]


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


@pytest.mark.parametrize(("photos", "given"), [
    (["ab", "cde"], ["cd", "ab"]),  # none has as many: what another one has, as far as it goes
    (["a", "bcd", "ef"], ["b", "ef", "bc"]),
    (["ax", "bx", "cx"], ["b", "c", "a"]),  # a photo that all share is no other product's
    (["ab", "ab", "cd"], ["cd", "cd", "ab"]),  # two rows of one product
    (["a", "", "b"], ["b", None, "a"]),  # without photos there is nothing to take away
    (["a", "a", ""], [None, None, None]), ([""], [None]), (["ab"], [None]),
])
def test_nobody_is_shown_photos_of_its_own(photos, given):
    samples = [record(row, [GOOD], photos=tuple(each)).sample for row, each in enumerate(photos)]
    swapped = {sample.row: "".join(sample.photos) for sample in with_other_photos(samples)}
    assert [swapped.get(row) for row in range(len(photos))] == given


def test_an_ablation_is_compared_on_its_own_products_and_narrows_nothing():
    before, after = ([record(row, [answer]) for row in (2, 3, 4)] for answer in (FAIR, GOOD))
    blank = [record(4, [POOR]), record(2, [FAIR])]
    report = build_report([Answers("before", "before", "a", before, []), Answers("after", "after", "b", after, []),
                           Answers("blank", "ablation", "b", blank, [], ("1 of 3 left out",))], {"promise": 0.2}, 0.2)
    assert not report["unpaired"] and len(report["products"]) == 3
    assert report["ablation"]["blank"]["mean"] == pytest.approx(((1 - 0.5 / 3 - 1) + (0.2 - 1)) / 2)
    assert [list(product["ablations"]) for product in report["products"]] == [["blank"], [], ["blank"]]
    assert report["products"][2]["ablations"]["blank"]["reward"] == pytest.approx(0.2)
    assert report["summary"]["blank"]["products"] == 2 and report["models"][2]["notes"] == ["1 of 3 left out"]


def shown_samples(folder, count):
    """Products with none, one or two photos each, the longest in the middle."""
    samples = []
    for row in range(2, count + 2):
        paths = [folder / f"{row}_{view}.png" for view in range(row % 3)]
        for view, path in enumerate(paths):
            noise_photo(row * 10 + view).save(path)
        samples.append(Sample(row, f"p{row}", "box " * (row % 5), (9.0,), tuple(map(str, paths)), "s.xlsx"))
    return samples


def test_products_come_and_go_in_chunks(dense_policy, tmp_path, monkeypatch, bars):
    samples = shown_samples(tmp_path, 13)
    made, alive, good = [], [], (dense_policy.encode_prompt, dense_policy.photo_features, dense_policy.sample)

    def watched(place):
        def call(*args):
            found = good[place](*args)
            made.extend((place, weakref.ref(one)) for one in (found if place else [found]) if one is not None)
            return found
        return call

    def sample(*args):
        gc.collect()
        alive.append([sum(kind == place and ref() is not None for kind, ref in made) for place in (0, 1)])
        return good[2](*args)

    for place, name in enumerate(("encode_prompt", "photo_features")):
        monkeypatch.setattr(dense_policy, name, watched(place))
    monkeypatch.setattr(dense_policy, "sample", sample)
    with float64(dense_policy):
        records, failures = evaluate(PromptEncoder(dense_policy), samples, 2, 1.0, 4, 0, 3)
        monkeypatch.undo()
        at_once, _ = evaluate(PromptEncoder(dense_policy), samples, 2, 1.0, 4, 0, 13)
    assert not failures and [one.sample for one in records] == samples
    assert [one.answers for one in records] == [one.answers for one in at_once]
    assert len(alive) == 5 and sum(kind == 0 for kind, _ in made) == 13
    assert max(prompts for prompts, _ in alive) <= 6 and max(features for _, features in alive) <= 3
    assert bars[0].total == 13 and bars[0].shown == [0, 3, 6, 9, 12, 13]
