"""The comparison's page: every number recomputed from the JSON, hostile text stays text, a thousand products fit."""

import json
import random
import re
from html.parser import HTMLParser
from math import sqrt
from statistics import fmean, median

import pytest

from evidence import measures, page
from evidence.comparison import Answers, build_report
from evidence.evaluation import Record
from evidence.page import write_page
from evidence.report import tables, write_sheet
from ground.files import write_json
from reward import calculate_reward, score_answer
from sheets.samples import Sample
from sizes.units import as_written
from tiny import noise_photo

HOSTILE = ['</script><script>alert("x")</script>', "<img src=x onerror=alert(1)> & 'quotes' \"{{ 7 * 7 }}\"",
           "{% raw %} \ud800 \x00 \x0b bell", "=cmd()|'/c'!A1", "x" * 3000, "长12厘米 宽8厘米", "5 x 5 x 5 mm"]
PROMISE = 0.2


def some_answers(rng, label, spread):
    """Four answers around the label, now and then one that slips a unit, lacks sides or can't be read."""
    answers = []
    for _ in range(4):
        sizes = [round(size * (1 + rng.uniform(-spread, spread)), 1) for size in label]
        chance = rng.random()
        if chance < 0.05:
            sizes = [size * 10 for size in label]
        sizes = sizes[:2] if chance > 0.95 else sizes
        text = json.dumps(dict(zip(("length", "width", "height"), sizes, strict=False)))
        answers.append("<b>no idea</b>" if 0.9 < chance < 0.95 else text)
    return answers


def make_records(count, spread, folder, seed=0, each=4):
    """Records of made-up products; the same rows, whatever the spread."""
    shop, rng = random.Random(1), random.Random(f"{seed}/{spread}")
    records = []
    for index in range(count):
        label = tuple(float(shop.randint(2, 40)) for _ in range(shop.choice([1, 2, 3, 3, 3])))
        photos = tuple(str(folder / f"{(index + place) % 5}.png") for place in range(index % 3))
        sample = Sample(index + 2, f"p{index}<i>", HOSTILE[index % len(HOSTILE)], label, photos, "s.xlsx",
                        category=shop.choice(["mug", "<b>box</b>", ""]))
        answers = some_answers(rng, label, spread)[:each]
        records.append(Record(sample, answers, [score_answer(answer, label) for answer in answers]))
    return records


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index in range(5):
        noise_photo(index, (90, 60)).save(folder / f"{index}.png")
    return folder


def make_report(count, photos):
    def both(spread, seed=0):
        return make_records(count, spread, photos, seed), make_records(count, spread, photos, seed, each=1)

    answers = [Answers("before", "before", "a", *both(0.6)), Answers("after", "after", "b", *both(0.1)),
               Answers("blank", "ablation", "b", both(0.5, 1)[0], []),
               Answers("run<2>", "also", "c", *both(0.2, 2), ("answered with its own --max_pixels",))]
    return build_report(answers, {"how": "4 answers a product", "rows": "held_out", "made": "2026-01-02 03:04",
                                  "facts": ["seed 0"], "promise": PROMISE, "sheet": "s<7>.xlsx, held out"}, PROMISE)


@pytest.fixture(scope="module")
def made(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("page")
    report = make_report(60, photos)
    write_json(folder / "compare.json", report)
    write_page(folder / "compare.html", report, {"sampled": [(0, 0.1), (5, 0.9)]})
    write_sheet(folder / "compare.xlsx", tables(report))
    return json.loads((folder / "compare.json").read_text()), (folder / "compare.html").read_text(), report


class Reader(HTMLParser):
    """Collect the numbers by their keys, the texts outside, and the tags."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.outside, self.tags, self.stack = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        assert not [name for name in attributes if name.startswith("on")]
        assert all(not str(attributes.get(name, "data:")).startswith(("http", "//", "javascript"))
                   for name in ("src", "href"))
        if tag not in ("meta", "img", "input", "br"):
            self.stack.append((tag, attributes.get("data-key"), attributes.get("class")))

    def handle_endtag(self, tag):
        if tag in [name for name, _, _ in self.stack]:
            while self.stack.pop()[0] != tag:
                pass

    def handle_data(self, text):
        key = next((key for _, key, _ in self.stack if key), None)
        if key:
            self.numbers.append((json.loads(key), text))
        elif not any(tag in ("svg", "style", "title") or kind and "told" in kind.split() for tag, _, kind in
                     self.stack):
            self.outside.append(text)


def recomputed(report):
    """Every figure again, from the products' answers alone."""
    products, again = report["products"], {}
    for kind, names in (("models", ["before", "after", "run<2>"]), ("ablations", ["blank"])):
        for name in names:
            again["summary", name] = figures(products, kind, name)
    for name in ("before", "after", "run<2>"):
        again["greedy", name] = figures(products, "greedy", name)
        rewards = [[answer["reward"] for answer in product["models"][name]["answers"]] for product in products]
        agreed = [measures.most_agreed([answer["sizes"] for answer in product["models"][name]["answers"]])
                  for product in products]
        again["samples", name] = {
            "answers": 4, "mean": fmean(map(fmean, rewards)), "best": fmean(map(max, rewards)),
            "agreed": fmean(row[index] for row, (index, _) in zip(rewards, agreed, strict=True))}
        wrong = [fmean(product["models"][name]["answers"][index]["errors"]) > 0.1 + 1e-9
                 for product, (index, _) in zip(products, agreed, strict=True)]
        again["confidence", name] = {"promise": PROMISE, **accepted([sure for _, sure in agreed], wrong)}
    for title, name, other in (("change", "after", "before"), ("change", "run<2>", "before"),
                               ("ablation", "blank", "after")):
        again[title, name] = moved(means(products, other), means(products, name))
    return again


def means(products, name):
    return [fmean(answer["reward"] for answer in (product["models"] | product["ablations"])[name]["answers"])
            for product in products]


def moved(before, after):
    moves = [two - one for one, two in zip(before, after, strict=True)]
    return {"mean": fmean(moves), "interval": measures.bootstrap_interval(moves),
            "p_value": measures.paired_p_value(moves), "better": sum(move > 0.01 for move in moves),
            "worse": sum(move < -0.01 for move in moves), "same": sum(abs(move) <= 0.01 for move in moves)}


def accepted(sure, wrong):
    lines = {}
    best = None
    for share in (1, 2, 3, 4, 5):
        cut = sorted(sure, reverse=True)[-(-len(sure) * share // 5) - 1]
        taken = [bad for value, bad in zip(sure, wrong, strict=True) if value >= cut]
        at_most = wilson_upper_end(sum(taken), len(taken))
        if at_most <= PROMISE:
            best = {"threshold": cut, "coverage": len(taken) / len(sure), "wrong": sum(taken), "accepted": len(taken),
                    "at_most": at_most}
    lines["accept"] = best
    return lines


def wilson_upper_end(hits, count, z=2.3263478740408408):
    """With 99 % on one side."""
    spread, share = z * z / count, hits / count
    return (share + spread / 2 + z * sqrt(share * (1 - share) / count + spread / (4 * count))) / (1 + spread)


def figures(products, kind, name):
    answers = [(answer, product["label"]) for product in products for answer in product[kind][name]["answers"]]
    rewards = [calculate_reward(answer["answer"], label) for answer, label in answers]
    errors = [answer["errors"] for answer, _ in answers]
    thirds = [(answer["sizes"], label) for answer, label in answers if len(label) == 3]
    own = [fmean(calculate_reward(answer["answer"], product["label"]) for answer in product[kind][name]["answers"])
           for product in products]
    return {"mean_reward": fmean(rewards), "success_rate": fmean(reward >= 0.9 for reward in rewards),
            "failure_rate": fmean(reward < 0.3 for reward in rewards), "zero_rate": fmean(not one for one in rewards),
            **{f"within_{percent}": fmean(max(row) <= percent / 100 + 1e-9 for row in errors)
               for percent in (5, 10, 20)},
            "largest_error": median(row[0] for row in errors),
            "middle_error": median(row[1] for row in errors if len(row) == 3),
            "smallest_error": median(row[-1] for row in errors if len(row) > 1),
            "volume_error": median(1.0 if len(sizes) < 3 else abs(sizes[0] * sizes[1] * sizes[2] /
                                   (label[0] * label[1] * label[2]) - 1) for sizes, label in thirds),
            "slip_rate": fmean(measures.unit_slip(answer["sizes"], label) is not None for answer, label in answers),
            "valid_rate": fmean(bool(answer["sizes"]) for answer, _ in answers), "products": len(products),
            "interval": measures.bootstrap_interval(own)}


def shown_as(value, text):
    """Whether a text shows a value to the precision that it has."""
    number = float(text.strip("%").replace(",", "")) / (100 if "%" in text else 1)
    decimals = len(text.strip("%").partition(".")[2].partition("e")[0]) + (2 if "%" in text else 0)
    return abs(number - value) <= max(0.5001 * 10 ** -decimals, 0.06 * abs(value) if decimals > 2 else 0)


def test_every_number_is_what_the_answers_give(made):
    report, text, _ = made
    again, seen = recomputed(report), set()
    for keys, shown in Reader(text).numbers:
        value = report
        for key in keys:
            value = value[key]
        assert shown_as(value, shown), (keys, value, shown)
        if tuple(keys[:2]) in again:
            seen.add(tuple(keys[:2]))
            own = again[tuple(keys[:2])]
            if keys[2] == "check":
                continue
            for key in keys[2:]:
                own = own[key]
            assert value == pytest.approx(own, abs=1e-9), keys
    assert seen == set(again)
    assert report["confidence"]["after"]["accept"] and not report["confidence"]["before"]["accept"]


def test_the_groups_and_products_add_up(made):
    report, _, _ = made
    products = report["products"]
    for line in (line for line in report["groups"] if line["by"] == "photos"):
        own = [product for product in products if len(product["photos"]) == int(line["value"])]
        assert line["products"] == len(own)
        assert line["rewards"]["after"] == pytest.approx(fmean(means(own, "after")))
        assert line["change"] == pytest.approx(fmean(means(own, "after")) - fmean(means(own, "before")))
    assert {line["by"] for line in report["groups"]} == {"category", "photos", "the text names"}
    for product, mean, other in zip(products, means(products, "after"), means(products, "before"), strict=True):
        assert product["models"]["after"]["reward"] == pytest.approx(mean)
        assert product["change"] == pytest.approx(mean - other)
    for name, counts in report["rewards"].items():
        assert sum(counts) == 240 and counts[-1] >= sum(
            answer["reward"] >= 0.95 for product in products
            for answer in (product["models"] | product["ablations"])[name]["answers"]) - 1


def test_no_number_stands_outside(made):
    _, text, _ = made
    outside = " ".join(Reader(text).outside)
    for known in ("0.9", "0.3", "95 %", "10 %", "100 %", "20 %", "5 %", "10 or 25.4", "2026-01-02 03:04",
                  "4 answers a product", "run<2>", "worth nothing, 0", "reward 0"):
        outside = outside.replace(known, "")
    assert not [line for line in outside.splitlines() if re.search(r"\d", line)]


def test_hostile_rows_stay_text(made):
    _, text, report = made
    reader = Reader(text)
    assert not reader.tags & {"script", "i", "iframe", "object", "link"}
    assert 'alert("x")' not in text and "&lt;img src=x onerror" in text and "{{ 7 * 7 }}" in text.replace("&#34;", "")
    assert "http-equiv" not in text and "<b>no idea" not in text and "run<2>" not in text
    assert "{% raw %} ? " in text  # half of a surrogate pair
    assert "answered with its own --max_pixels" in text


def test_cards_are_filtered_by_kind(made):
    report, text, _ = made
    cards = re.findall(r'<article class="card ([a-z ]+)" style="--n:(\d+)">', text)
    assert len(cards) == 60 and [int(rank) for _, rank in cards] == list(range(60))
    kinds = [kind.split() for kind, _ in cards]
    assert sum("better" in kind for kind in kinds) == report["change"]["after"]["better"]
    assert sum("gain" in kind for kind in kinds) == 8 and "worse" in kinds[-1] or "same" in kinds[-1]
    for kind in ("gain", "loss", "better", "worse", "same", "unread", "review"):
        shown = re.search(rf'for="f-{kind}">[a-z ]+<span class="told">(\d+)</span>', text)[1]
        assert int(shown) == sum(kind in own for own in kinds)
    for product in report["products"]:
        assert f'true size <span class="told">{" x ".join(f"{size:g}" for size in product["label"])}</span>' in text
    accept = report["confidence"]["after"]["accept"]
    assert sum("review" in kind for kind in kinds) == 60 - accept["accepted"]
    assert text.count("data:image/jpeg") == sum(len(product["photos"]) for product in report["products"])


def test_all_thumbnails_together_keep_their_budget(tmp_path, photos, monkeypatch):
    """A tenth of a thousand products with five photos each, in a tenth of the room."""
    sources = [noise_photo(seed, (400, 300)) for seed in range(5)]  # noise packs worst
    monkeypatch.setattr(page, "load_photos", lambda sample: [photo.copy() for photo in sources])
    monkeypatch.setattr(page, "PHOTO_BYTES", page.PHOTO_BYTES // 10)
    report = make_report(100, photos)
    for product in report["products"]:
        product["photos"] = ["x.jpg"] * 5
    write_page(tmp_path / "page.html", report, {})
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 500
    assert (tmp_path / "page.html").stat().st_size < 2_000_000


def test_a_photo_that_is_gone_is_left_out(tmp_path, photos, said):
    report = make_report(5, photos)
    report["products"][1]["photos"] = [str(tmp_path / "gone.png")]
    write_page(tmp_path / "page.html", report, {})
    assert "gone.png" in "".join(said)


def test_the_page_names_models_and_sheet_and_writes_sizes_as_a_person_does(tmp_path, photos):
    report = make_report(5, photos)
    product = report["products"][0]
    product["label"] = [14.25, 3.0]
    model = product["models"]["before"]
    model["answers"][model["agreed"]]["sizes"] = [14890.0, 2080.4, 0.0000012]
    write_page(tmp_path / "page.html", report, {})
    text = (tmp_path / "page.html").read_text()
    top = text[text.index("<h1>"):text.index("<section>")]
    for named in ("<dt>before</dt><dd>a</dd>", "<dt>after</dt><dd>b</dd>", "<dd>s&lt;7&gt;.xlsx, held out</dd>"):
        assert named in top
    assert "14890 x 2080 x 0.000001" in text and "1,045</span> times the true size" in text
    assert not re.search(r"[0-9]e[+-]?[0-9]+ (?:x|cm)", text)
    assert text.count('class="cue"') >= 3 and "max-width: 640px) { .cue { display: block" in text


@pytest.mark.parametrize(("number", "digits", "text"), [
    (12.0, 6, "12"), (14890.4, 4, "14890"), (1e9, 6, "1000000000"), (59.437, 4, "59.44"), (0.2, 4, "0.2"),
    (1234567.0, 6, "1234567"), (0.00001, 6, "0.00001"), (1e-9, 4, "0")])
def test_numbers_are_written_without_exponents(number, digits, text):
    assert as_written(number, digits) == text
