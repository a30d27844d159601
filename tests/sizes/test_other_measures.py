"""What is measured in anything but lengths, or counted, is planted in labels and texts: no size is found in it."""

import random

import pytest

from sizes.labels import LabelError, parse_label
from sizes.texts import sizes_in_text

# {} stands for a number.
MEASURES = {
    "weight": ["{} kg", "{}kg", "{}g", "{} g", "{} lbs", "{} lb.", "{} oz", "{}克", "{}公斤", "{}斤", "净重{}kg",
               "Weight: {} g", "Gewicht: {} kg", "{} pounds", "{} x {} kg", "{}*{}g"],
    "volume": ["{} l", "{}L", "{} ml", "{}ML", "{} fl oz", "{} gal", "{} litres", "{}升", "{}毫升", "容量{}ml",
               "{} x {} ml", "{}*{}毫升", "{} m³", "{} cm³", "{} m3", "{} cu ft"],
    "area": ["{} m²", "{}㎡", "{} sq ft", "{} m2", "{} cm2", "{}平方米"],
    "power": ["{}W", "{} W", "{} watts", "{} kW", "{}瓦", "{}V", "{} V", "{}A", "{} mAh", "{} Hz", "{}-{}V", "{} x {}W",
              "{} x {}V AAA", "{} lm", "{} dB"],
    "time": ["{}h", "{} h", "{} hours", "{} min", "{}小时", "{}分钟", "{} months", "{}天", "{} Jahre", "{} rpm",
             "{} m/s", "{} km/h"],
    "resolution": ["1920x1080", "1920 x 1080 px", "1920*1080p", "3840 × 2160", "4K", "4K (3840x2160)", "8k", "1080p",
                   "{} dpi", "{} MP", "{}万像素", "{} x {} px", "{} x {} pixels", "640 x 480", "2560X1440 @ {}Hz"],
    "count": ["2*48*74cm", "3x50x70", "set of {}", "Set of {}", "pack of {}", "{} pcs", "{}pcs", "{} pieces", "{} pack",
              "{}件套", "{}件", "{}个装", "{}片", "{}只", "{}套", "{}包", "{} x {} pcs", "{}*{}片", "{} x {} Stück",
              "{}-piece set", "3 in 1", "3-in-1", "{} in stock", "x{}", "{}er Set"],
    "other": ["{}%", "{} °C", "{} GB", "{}€", "${}", "￥{}", "{} Sterne", "No. {}", "Model X{}", "SPF {}"],
}
BETWEEN = [", ", "; ", ". ", "，", "。", " ", "\n", " / ", " | ", " (", ") ", "："]
TITLES = ["ceramic mug", "陶瓷杯子", "Holztisch massiv", "LED lamp", "收纳盒", "Wasserkocher mit Griff", "花瓶", "TV"]


def planted(chance, kind=None):
    """A measure of some kind with numbers in it."""
    form = chance.choice(MEASURES[kind or chance.choice([*MEASURES])])
    numbers = (chance.choice([chance.randint(1, 60), chance.randint(100, 5000), chance.randint(1, 99) / 10])
               for _ in range(form.count("{}")))
    return form.format(*numbers)


@pytest.mark.parametrize("kind", MEASURES)
def test_a_label_that_is_another_measure_is_refused(kind):
    chance = random.Random(kind)
    for _ in range(500):
        label = chance.choice(["", "", "about ", "约", "ca. "]) + planted(chance, kind)
        for written in (label, label.upper(), label.lower()):
            with pytest.raises(LabelError):
                raise AssertionError(f"{written!r} is read as {parse_label(written)}")


@pytest.mark.parametrize("kind", MEASURES)
def test_a_measure_beside_the_sizes_changes_none_of_them(kind):
    chance = random.Random(kind)
    for _ in range(500):
        sizes, unit = [chance.randint(11, 99) for _ in range(3)], chance.choice(["cm", " cm", "厘米"])
        size = chance.choice([" x ", "*", "×"]).join(map(str, sizes)) + unit
        measure, between = planted(chance, kind), chance.choice(BETWEEN)
        for label in (size + between + measure, measure + between + size):
            try:
                assert list(parse_label(label)) == sizes, label
            except LabelError:
                continue


def test_a_text_full_of_other_measures_names_no_size():
    chance = random.Random(0)
    for _ in range(3000):
        text = chance.choice(TITLES) + "".join(chance.choice(BETWEEN) + planted(chance)
                                               for _ in range(chance.randint(1, 5)))
        for written in (text, text.lower()):
            assert sizes_in_text(written) == [], written


def test_among_other_measures_a_text_names_its_size_alone():
    chance = random.Random(1)
    for _ in range(3000):
        sizes = [chance.randint(11, 99) for _ in range(3)]
        size = chance.choice([" x ", "*", "×"]).join(map(str, sizes)) + chance.choice(["cm", " cm", "厘米"])
        parts = [*(planted(chance) for _ in range(chance.randint(1, 4))), size]
        chance.shuffle(parts)
        text = chance.choice(TITLES) + "".join(chance.choice([", ", "; ", "，", "。", "\n"]) + part for part in parts)
        assert sizes_in_text(text) == sizes, text
