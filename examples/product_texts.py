"""Product texts written here: a size in one of many notations among what else shops write, and its label in cm.

Beside the size stand numbers that are none: weights, loads, counts, volumes and the size of the parcel.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evidence.report import write_sheet

# A product: its sides in cm (least and most: length, width, height) and what is said of it.
KINDS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[str, ...]]] = {
    "storage box": (((20, 60), (15, 40), (8, 40)), ("Stacks safely", "Lid included", "Folds flat when empty")),
    "bookcase": (((40, 120), (22, 40), (75, 210)), ("Shelves can be moved", "Fix it to the wall")),
    "side table": (((35, 70), (35, 60), (38, 65)), ("Rounded edges", "Easy to lift with one hand")),
    "desk": (((90, 180), (50, 80), (70, 78)), ("Room for cables at the back", "Can be set up either way round")),
    "bench": (((80, 160), (30, 45), (42, 50)), ("For hall or kitchen", "Seat of one piece")),
    "wardrobe": (((60, 200), (45, 65), (170, 236)), ("Doors close softly", "With a rail for clothes")),
    "mirror cabinet": (((40, 100), (12, 20), (50, 90)), ("Hinges left or right", "Glass inside and out")),
    "planter": (((15, 60), (15, 45), (14, 50)), ("Hole for water at the bottom", "Frost does no harm")),
    "suitcase": (((50, 78), (35, 52), (20, 32)), ("Wheels turn all round", "Lock with three digits")),
    "drawer tray": (((20, 50), (10, 38), (4, 9)), ("Keeps cutlery in order", "Feet that do not slip")),
    "pet bed": (((45, 110), (35, 80), (12, 26)), ("Cover comes off for washing", "Warm underside")),
    "toolbox": (((30, 62), (17, 30), (14, 30)), ("Steel catches", "Tray lifts out")),
}
SYLLABLES = ("bra", "dun", "fel", "gor", "hav", "jol", "kel", "lum", "mir", "nor", "pel", "rosk", "sten", "tav", "vin")
MATERIALS = ("oak", "beech", "bamboo", "steel", "painted pine", "felt", "recycled plastic", "ash veneer", "aluminium")
COLOURS = ("white", "grey", "black", "dark green", "sand", "blue", "natural", "red", "light brown")
COUNTED = ("Set of {n}.", "Pack of {n}.", "{n} pieces.", "Comes with {n} screws.", "With {n} hooks.")
OTHER_NUMBERS = ("Weight {kg} kg.", "Weighs {kg} kg.", "Holds up to {load} kg.", "Volume {litres} litres.",
                 "{years} year guarantee.", "Article {article}.")
PARCELS = ("Parcel {p} cm.", "Packed: {p} cm.", "Ships in one parcel of {p} cm.", "Package size {p} cm.")
# How sides are written; {l} and so on are numbers in the notation's unit.
PLAIN = ("{l}x{w}x{h} {u}", "{l} x {w} x {h} {u}", "{l}×{w}×{h}{u}", "{l}*{w}*{h} {u}", "Size: {l} x {w} x {h} {u}",
         "{l} by {w} by {h} {u}", "Dimensions (L x W x H): {l} x {w} x {h} {u}", "LxWxH {l}/{w}/{h} {u}",
         "L {l} {u}, W {w} {u}, H {h} {u}", "Length: {l} {u}, width: {w} {u}, height: {h} {u}", "L{l} W{w} H{h} {u}",
         "{l} {u} long, {w} {u} wide and {h} {u} high", "Height {h} {u}, width {w} {u}, length {l} {u}",
         "W {w} {u} D {l} {u} H {h} {u}", "measures {l} {u} x {w} {u} x {h} {u}")
TWICE = ('{a}" x {b}" x {c}" ({l} x {w} x {h} cm)', "{l} x {w} x {h} cm ({a} x {b} x {c} in)")
CM_PER_INCH = 2.54
# How many of the products; few in inches alone: a model this small does not multiply by 2.54, and learns from such
# lessons to make numbers up.
NOTATIONS = {"cm": 0.74, "mm": 0.1, "cm and inch": 0.14, "inch": 0.02}
UNIT_WORDS = {"cm": ("cm", "cm", "cm", "centimetres"), "mm": ("mm",), "cm and inch": ("cm",),
              "inch": ("inches", "in", '"')}


@dataclass(frozen=True)
class ProductText:
    """A row of the sheet; label in cm."""

    category: str
    notation: str  # a key of NOTATIONS
    text: str
    label: tuple[float, ...]


def write_sheets(folder: Path, products: int, held_out: int, seed: int) -> None:
    """Write catalogue.xlsx and held_out.xlsx; no product stands in both."""
    written = [{"sku_id": f"text-{index:04d}", "category": product.category, "text": product.text,
                "label": " ".join(map(_number, product.label))}
               for index, product in enumerate(product_texts(seed, products + held_out))]
    write_sheet(folder / "catalogue.xlsx", {"products": written[:products]})
    write_sheet(folder / "held_out.xlsx", {"products": written[products:]})


def product_texts(seed: int, count: int) -> Iterator[ProductText]:
    """Write so many products, no two of the same name."""
    rng, names = random.Random(f"texts/{seed}"), set()
    while len(names) < count:
        more = len(names) // 800  # of two syllables there are 1,050 names
        stem = "".join(rng.sample(SYLLABLES, 2) + rng.choices(SYLLABLES, k=more)).upper()
        name = stem + rng.choice(["", " II", " Plus", " Mini", " Home"])
        if name not in names:
            names.add(name)
            yield _write(name, rng)


def _write(name: str, rng: random.Random) -> ProductText:
    category = rng.choice(sorted(KINDS))
    ranges, remarks = KINDS[category]
    sides = tuple(float(rng.randint(*bounds)) for bounds in ranges)
    if rng.random() < 0.15:
        sides = tuple(side + rng.choice([0.0, 0.5]) for side in sides)
    notation = rng.choices([*NOTATIONS], [*NOTATIONS.values()])[0]
    form = rng.choice(TWICE if notation == "cm and inch" else PLAIN)
    written, label = write_size(sides, notation, form, rng.choice(UNIT_WORDS[notation]))
    title = f"{name} {category}, " + rng.choice(["{material}, {colour}", "{colour} {material}", "{colour}"]).format(
        material=rng.choice(MATERIALS), colour=rng.choice(COLOURS))
    rest = [rng.choice(remarks) + "."]
    if rng.random() < 0.5:
        rest.append(rng.choice(OTHER_NUMBERS).format(
            kg=f"{rng.uniform(0.4, 40):.1f}", load=rng.randint(2, 24) * 5, litres=rng.randint(2, 90),
            years=rng.choice([2, 3, 5, 10]), article=f"{rng.randint(100, 999)}.{rng.randint(100, 999)}"))
    if rng.random() < 0.25:
        rest.append(rng.choice(COUNTED).format(n=rng.randint(2, 12)))
    rng.shuffle(rest)
    rest.insert(rng.randint(0, len(rest)), written[0].upper() + written[1:] + ".")
    if rng.random() < 0.2:  # behind the size, as shops have it
        parcel = " x ".join(_number(side + rng.randint(3, 12)) for side in sides)
        rest.append(rng.choice(PARCELS).format(p=parcel))
    return ProductText(category, notation, f"{title}. {' '.join(rest)}", label)


def write_size(sides: Sequence[float], notation: str, form: str, unit: str) -> tuple[str, tuple[float, ...]]:
    """Write sides in cm in a notation; also gives the label, which is what was written."""
    if notation == "mm":
        return _fill(form, [10 * side for side in sides], unit), tuple(sides)
    if notation == "inch":
        inches = [round(2 * side / CM_PER_INCH) / 2 for side in sides]  # halves, as shops round
        return _fill(form, inches, unit), tuple(round(size * CM_PER_INCH, 2) for size in inches)
    return _fill(form, sides, unit), tuple(sides)


def _fill(form: str, numbers: Sequence[float], unit: str) -> str:
    inches = {name: f"{number / CM_PER_INCH:.1f}" for name, number in zip("abc", numbers, strict=True)}
    return form.format(**dict(zip("lwh", map(_number, numbers), strict=True)), **inches, u=unit)


def _number(value: float) -> str:
    return f"{value:g}"
