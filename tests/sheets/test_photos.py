"""Odd photos: each gives the right upright RGB picture or a named refusal, and damaged bytes crash nothing."""

import random
import struct
import zlib
from pathlib import Path

import pytest
from loguru import logger
from PIL import Image

from sheets import photos as photos_module
from sheets.photos import LARGEST_SIDE, PhotoError, content_key, open_photo, open_photos
from sheets.samples import Sample, load_photos

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
TURNED = 6  # EXIF: "turn 90 degrees clockwise to show"


def halves(mode="RGB", size=(64, 32)):
    """A picture, red on the left and blue on the right."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, *size))
    return picture.convert(mode)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def noise(size, seed=0):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def corners(picture):
    """The colours near the first and the last pixel, each channel 0 or 255."""
    width, height = picture.size
    return [tuple(255 * (channel > 127) for channel in picture.getpixel(place))
            for place in ((2, 2), (width - 3, height - 3))]


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deep_png(colour_type, samples):
    """A 16-bit PNG of 8 x 8 equal pixels, by hand: Pillow writes none with colour."""
    row = b"\0" + struct.pack(f">{len(samples)}H", *samples) * 8
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour_type, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b""))


# name -> how it is made, its size when upright, the colours of its first and last corner
GOOD = {
    "plain.jpg": (lambda path: halves().save(path, quality=95), (64, 32), [RED, BLUE]),
    "progressive.jpg": (lambda path: halves().save(path, progressive=True, quality=95), (64, 32), [RED, BLUE]),
    "turned.jpg": (lambda path: halves().save(path, exif=exif(TURNED), quality=95), (32, 64), [RED, BLUE]),
    "upside_down.jpg": (lambda path: halves().save(path, exif=exif(3), quality=95), (64, 32), [BLUE, RED]),
    "mirrored.png": (lambda path: halves().save(path, exif=exif(2)), (64, 32), [BLUE, RED]),
    "turned.webp": (lambda path: halves().save(path, exif=exif(TURNED), lossless=True), (32, 64), [RED, BLUE]),
    "cmyk.jpg": (lambda path: halves("CMYK").save(path, quality=95), (64, 32), [RED, BLUE]),
    "plain.png": (lambda path: halves().save(path), (64, 32), [RED, BLUE]),
    "palette.png": (lambda path: halves("P").save(path), (64, 32), [RED, BLUE]),
    "plain.gif": (lambda path: halves().save(path), (64, 32), [RED, BLUE]),
    "moving.gif": (lambda path: halves().save(path, save_all=True, append_images=[Image.new("RGB", (64, 32))]),
                   (64, 32), [RED, BLUE]),
    "moving.webp": (lambda path: halves().save(path, save_all=True, append_images=[Image.new("RGB", (64, 32))],
                                               lossless=True), (64, 32), [RED, BLUE]),
    "two_views.jpg": (lambda path: halves().save(path, "MPO", save_all=True, quality=95,
                                                 append_images=[Image.new("RGB", (64, 32))]), (64, 32), [RED, BLUE]),
    "png_named.jpg": (lambda path: halves().save(path, "PNG"), (64, 32), [RED, BLUE]),
    "nameless": (lambda path: halves().save(path, "JPEG", quality=95), (64, 32), [RED, BLUE]),
    "clear.png": (lambda path: Image.new("RGBA", (64, 32), (0, 0, 0, 0)).save(path), (64, 32), [WHITE, WHITE]),
    "clear_colour.gif": (lambda path: Image.new("P", (64, 32), 0).save(path, transparency=0), (64, 32), [WHITE, WHITE]),
    "grey_alpha.png": (lambda path: Image.new("LA", (64, 32), (0, 0)).save(path), (64, 32), [WHITE, WHITE]),
    "grey_16.png": (lambda path: path.write_bytes(deep_png(0, [200 * 256])), (8, 8), [WHITE, WHITE]),
    "colour_16.png": (lambda path: path.write_bytes(deep_png(2, [65535, 0, 0])), (8, 8), [RED, RED]),
    "colour_alpha_16.png": (lambda path: path.write_bytes(deep_png(6, [0, 0, 0, 0])), (8, 8), [WHITE, WHITE]),
    "one_bit.png": (lambda path: Image.new("1", (64, 32), 1).save(path), (64, 32), [WHITE, WHITE]),
    "wide.jpg": (lambda path: halves(size=(LARGEST_SIDE * 2, 64)).save(path), (LARGEST_SIDE, 32), [RED, BLUE]),
    "vast.jpg": (lambda path: Image.new("L", (9000, 9000), 255).save(path), (4096, 4096), [WHITE, WHITE]),
    "tagged.tiff": (lambda path: halves("CMYK").save(path, compression="tiff_lzw"), (64, 32), [RED, BLUE]),
    "modern.avif": (lambda path: halves().save(path, quality=95), (64, 32), [RED, BLUE]),
}


def cut(path, kind):
    noise((64, 64)).save(path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def claims(width, height):
    """A PNG that claims a size and holds next to nothing."""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


BAD = {
    "empty.jpg": (lambda path: path.write_bytes(b""), "it is empty"),
    "page.jpg": (lambda path: path.write_bytes(b"\xef\xbb\xbf <!DOCTYPE html><p>404"), "it is a web page"),
    "words.png": (lambda path: path.write_bytes(b"%PDF-1.7"), "no photo in a known format"),
    "cut.jpg": (lambda path: cut(path, "JPEG"), "it is truncated"),
    "cut.png": (lambda path: cut(path, "PNG"), "it is truncated"),
    "cut.webp": (lambda path: cut(path, "WEBP"), "it is truncated"),
    "bomb.png": (lambda path: path.write_bytes(claims(60_000, 60_000)), "it is too large"),
    "vast.png": (lambda path: path.write_bytes(claims(8000, 8000)), "it is too large: 8000 x 8000"),
    "script.jpg": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
                   "no photo in a known format"),
    "measured.tiff": (lambda path: Image.new("F", (8, 8), 0.5).save(path), "measurements"),
    "dot.gif": (lambda path: Image.new("P", (1, 1)).save(path), "too small to see: 1 x 1"),
    "line.png": (lambda path: Image.new("RGB", (500, 3)).save(path), "too small to see: 500 x 3"),
    "narrow.png": (lambda path: Image.new("RGB", (7, 500)).save(path), "too small to see: 7 x 500"),
    "strip.png": (lambda path: Image.new("RGB", (32768, 32)).save(path), "too small to see: 4096 x 4"),
    "gone.jpg": (lambda path: None, "it can't be read: No such file"),
    "folder.jpg": (lambda path: path.mkdir(), "can't be read"),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_photos_come_out_upright_and_rgb(name, tmp_path):
    make, size, colours = GOOD[name]
    make(tmp_path / name)
    picture = open_photo(tmp_path / name)
    assert (picture.mode, picture.size, corners(picture)) == ("RGB", size, colours)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_photo_is_refused_by_name(name, tmp_path):
    make, said = BAD[name]
    make(tmp_path / name)
    with pytest.raises(PhotoError, match=said):
        open_photo(tmp_path / name)


def test_shades_are_kept(tmp_path):
    Image.new("I;16", (8, 8), 128 * 256).save(tmp_path / "deep.png")
    assert open_photo(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 51))
    half.save(tmp_path / "half.png")
    assert open_photo(tmp_path / "half.png").getpixel((0, 0)) == (204, 204, 204)  # 255 * (1 - 51/255)


def test_an_oversized_photo_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    halves(size=(100, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)  # Pillow refuses beyond twice this
    with pytest.raises(PhotoError, match="too large"):
        open_photo(tmp_path / "huge.png")
    monkeypatch.setattr(photos_module, "LARGEST_FILE", 10)
    with pytest.raises(PhotoError, match="at most"):
        open_photo(tmp_path / "huge.png")


def test_equal_files_count_once_and_order_is_kept(tmp_path):
    names = ["a.png", "b.png", "c.png", "d.png"]
    for name, colour in zip(names, (RED, BLUE, RED, WHITE), strict=True):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    (tmp_path / "e.png").write_bytes(b"no photo")
    opened = open_photos([tmp_path / name for name in [*names, "e.png"]])
    assert [photo.getpixel((0, 0)) for _, photo in opened[:3]] == [RED, BLUE, WHITE]
    assert [path.name for path, _ in opened] == ["a.png", "b.png", "d.png", "e.png"]
    assert isinstance(opened[3][1], PhotoError)
    assert content_key(tmp_path / "a.png") == content_key(tmp_path / "c.png") != content_key(tmp_path / "b.png")
    assert content_key(tmp_path / "gone.png") == str(tmp_path / "gone.png")


def sample_of(paths, rule):
    return Sample(7, "A1", "a mug", (15.0, 12.0, 8.0), tuple(map(str, paths)), "mugs.xlsx", rule)


@pytest.mark.parametrize(("rule", "left"), [("use_rest", 1), ("text_only", 1), ("placeholder", 2)])
def test_a_broken_photo_is_named_and_the_rest_used(rule, left, tmp_path):
    halves().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    lines = []
    sink = logger.add(lines.append, level="WARNING")
    try:
        pictures = load_photos(sample_of([tmp_path / "a.png", tmp_path / "b.png"], rule))
        load_photos(sample_of([tmp_path / "a.png", tmp_path / "b.png"], rule))
    finally:
        logger.remove(sink)
    assert len(pictures) == left and pictures[0].size == (64, 32)
    assert len(lines) == 1 and "mugs.xlsx row 7 (A1)" in lines[0] and "b.png" in lines[0] and "empty" in lines[0]


@pytest.mark.parametrize(("rule", "sizes"), [("use_rest", [(64, 32)]), ("text_only", [(64, 32)]),
                                             ("placeholder", [(224, 224), (64, 32)])])
def test_a_photo_too_small_to_see_is_handled_as_a_broken_one(rule, sizes, tmp_path):
    Image.new("RGB", (40, 3)).save(tmp_path / "a.png")
    halves().save(tmp_path / "b.png")
    assert [photo.size for photo in load_photos(sample_of([tmp_path / "a.png", tmp_path / "b.png"], rule))] == sizes
    with pytest.raises(PhotoError, match=r"mugs.xlsx row 7 .* photo .*a.png can't be used: it is too small to see"):
        load_photos(sample_of([tmp_path / "a.png", tmp_path / "b.png"], "drop_row"))


@pytest.mark.parametrize(("rule", "count"), [("drop_row", 2), ("use_rest", 1), ("use_rest", 2)])
def test_where_no_photo_is_left_the_product_is_named(rule, count, tmp_path):
    for index in range(count):
        (tmp_path / f"{index}.png").write_bytes(b"broken %d" % index)
    with pytest.raises(PhotoError, match=r"mugs.xlsx row 7 \(A1\)"):
        load_photos(sample_of([tmp_path / f"{index}.png" for index in range(count)], rule))
    assert load_photos(sample_of([tmp_path / "0.png"], "text_only")) == []


def damage(whole, dice):
    """Cut, overwrite or replace at random places."""
    damaged = bytearray(whole)
    kind = dice.randrange(3)
    if kind == 0:
        return damaged[: dice.randrange(len(damaged))]
    if kind == 1:
        for _ in range(dice.randrange(1, 8)):
            damaged[dice.randrange(min(len(damaged), 300))] = dice.choice([0, 127, 255, dice.randrange(256)])
    else:
        place = dice.randrange(len(damaged))
        damaged[place:place + dice.randrange(20)] = dice.randbytes(dice.randrange(20))
    return damaged


def test_damaged_bytes_raise_nothing_but_photo_error(tmp_path: Path, capfd):
    dice, refused = random.Random(3), 0
    for kind, mode in (("jpg", "RGB"), ("jpg", "CMYK"), ("png", "RGBA"), ("png", "P"), ("webp", "RGBA"), ("gif", "P"),
                       ("tiff", "RGB"), ("bmp", "RGB"), ("avif", "RGB")):
        path = tmp_path / f"photo.{kind}"
        noise((24, 16)).convert(mode).save(path)
        whole = path.read_bytes()
        for _ in range(60):
            path.write_bytes(damage(whole, dice))
            try:
                assert open_photo(path).mode == "RGB"
            except PhotoError:
                refused += 1
    assert refused > 200
