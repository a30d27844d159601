"""Which encoding the bytes of a text are in, where no mark and no UTF-8 tells: what each makes of them is weighed.

A reading costs as many nats as its signs are unlikely in a language written so, and more for what no word looks like.
All are readings of the same bytes: the cheapest is the likeliest, and how much cheaper it is says how sure that is.
"""

import re
import unicodedata
from collections import Counter
from math import log

_CLEAR = 5.0  # nats by which a reading must be likelier than any other that reads otherwise
_ASCII, _STRANGE = 4.1, 16.5  # nats of a sign of ASCII, and of one that hardly any text holds
# Languages of thousands of signs: the most common of a product's words; a codec that has all in order, and nats by the
# first of a sign's two bytes in it: less for the first level, of common characters, more for the second and for others.
_SIMPLIFIED = (
    "不大小高中用家多能机水新儿童式色可包装加子手无人防木铁钢杯盒架桌椅箱灯套型生活室具品带件台款厚长宽个号客厅房全自动透明玻璃",
    "gb18030", ((0xB0, 0xD7, 9.0), (0xD8, 0xF7, 11.5), (0xA3, 0xA3, 9.0), (0xA1, 0xA9, 12.0)))
_TRADITIONAL = (
    "不大小高中用家多能機水新兒童式色可包裝加子手無人防木鐵鋼杯盒架桌椅箱燈套型生活室具品帶件台款厚長寬個號客廳房全自動透明玻璃",
    "cp950", ((0xA4, 0xC6, 9.3), (0xC9, 0xF9, 12.9), (0xA1, 0xA3, 12.0)))
_JAPANESE = ("", "euc_jp", ((0xA4, 0xA4, 5.6), (0xA5, 0xA5, 5.7), (0xB0, 0xCF, 9.1), (0xD0, 0xF4, 13.6),
                            (0xA3, 0xA3, 9.0), (0xA1, 0xA8, 12.0), (0x8E, 0x8E, 8.1)))
_KOREAN = (
    "이다에의는로하을가고지서한은기으대사시를리도인스일자전정보용수성제장구화상조원주나아오공어방해무비실선연모미소생물과차세마동라신유여진경드트",
    "cp949", ((0xB0, 0xC8, 8.6), (0xCA, 0xFD, 14.7), (0xA3, 0xA3, 9.0), (0xA1, 0xAC, 12.6)))
_RUSSIAN = "оеаинтсрвлкмдпугяызбйьчхжцшщэюёфъ"
# Each encoding with its languages, the commoner first; those of an alphabet by their letters beside ASCII, the more
# frequent first.
_LANGUAGES: dict[str, tuple[str | tuple, ...]] = {
    "gb18030": (_SIMPLIFIED, _TRADITIONAL), "cp950": (_TRADITIONAL,), "cp932": (_JAPANESE,), "euc_jp": (_JAPANESE,),
    "cp949": (_KOREAN,),
    "cp1252": ("äöüß", "éèàêçùâîôûëïœ", "ñáéíóú", "èàùòìé", "ãçéáóêíâúàõ", "åäöéø", "øåæéö", "ëïéèöü"),
    "cp1250": ("łąęóżśćńź", "íáéěřčžýšůúťňďó", "éáóöőüűí", "ăîţâş", "čćžšđ", "áíéčýžšťúľňďôäóĺŕ"),
    "cp1251": (_RUSSIAN, "оаніирвтесклудмпзяьбгйчхцїєґжшщю", "аоиенрсуткјвдмплгзбњљћђшжчџхцф"),
    "koi8_r": (_RUSSIAN,), "cp1254": ("ığşöüçİ",), "cp1253": ("ατοιενρσκηπςυμλίόάγέδήωχθύβφξζψώ",),
}
# Nats a sign, and nats in all beyond them, that the dearest of right readings cost.
_DEAREST = {"cp1252": 6.0, "cp1250": 6.0, "cp1254": 6.0, "cp1251": 4.5, "koi8_r": 4.5, "cp1253": 4.5}
_DEAREST_SIGNS, _BEYOND = 9.5, 12.0
_OUT_OF_USE = {"koi8_r": 8.0}  # nats that an encoding costs which hardly any program writes any more
_MARKS, _WIDE_MARKS = "×–’“”°²½€™®•…„«»¼¾³“‘¡¿±º§©µ", "，。、；：？！（）【】《》「」・ー～〜…—－／％＋\u3000"
_ODD = tuple((re.compile(form), nats) for form, nats in (  # what no word looks like, in the letters of _shape
    ("[vknVK](?=[vknVK])", 2.5),  # two accented letters together
    ("[acvkns](?=[VKS])|[vkns](?=[AC])", 4.6),  # a capital inside a word
    ("[acAC](?=[sS])|[sS](?=[acAC])", 7.0),  # two alphabets in one word
    ("(?<=[acAC])h(?=[ac])", 5.0), ("(?<=[ac])h(?!h)", 6.0),  # a single Chinese sign in a Latin word, or behind it
    ("[ac](?=q)|q(?=[ac])", 5.0), ("(?<=[acvknAC])[.m](?=[acvkn])", 5.0),  # half-width katakana or a mark in one
    ("(?<![aAvV])[kn](?![aAvV])", 4.0),  # an accented consonant among consonants
    ("n(?=[av])", 4.0),  # the Polish ń before a vowel
    ("(?<![acvknsACVKS])[sSVK](?![acvknsACVKS])", 4.0), ("(?<!q)q(?!q)", 3.0),  # a letter alone
    ("[SVK](?=[SVK])", -2.5), ("q(?=q)", -2.6),  # but capitals come in runs, and so does half-width katakana
    ("(?<=d)[xm]|(?<=d )x(?= ?d)", -4.0),  # 12×8, 12 × 8, 30½
))


def likely_encodings(data: bytes) -> list[str]:
    """Name the encoding that bytes are in; several that read otherwise, likeliest first, where that can't be told.

    The list is empty where nothing that they may be read as looks like a text.
    """
    readings: dict[str, tuple[float, str]] = {}
    for encoding in _LANGUAGES:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        readings[encoding] = (_cost(text, encoding), text)
    order = sorted(readings, key=lambda encoding: readings[encoding][0])
    if not order:
        return []
    cost, text = readings[order[0]]
    signs = sum(not sign.isascii() for sign in text)
    if cost > _ASCII * (len(text) - signs) + _DEAREST.get(order[0], _DEAREST_SIGNS) * signs + _BEYOND:
        return []
    best = next(encoding for encoding, reading in readings.items() if reading[1] == text)  # the commonest of such
    return [best, *(other for other in order if readings[other][1] != text and readings[other][0] < cost + _CLEAR)]


def _cost(text: str, encoding: str) -> float:
    """Weigh a text in the likeliest of an encoding's languages."""
    counts = Counter(text)
    shape = text.translate({ord(sign): _shape(sign) for sign in counts})
    odd = _OUT_OF_USE.get(encoding, 0.0) + sum(nats * len(form.findall(shape)) for form, nats in _ODD)
    return odd + min(sum(count * _cost_of(sign, language) for sign, count in counts.items())
                     for language in _LANGUAGES[encoding])


def _cost_of(sign: str, language: str | tuple) -> float:
    if sign.isascii():
        return _ASCII
    if sign in _MARKS:
        return log(len(_MARKS) / 0.05)
    if isinstance(language, str):
        if sign in language:
            return log(3.2 * (language.index(sign) + 2))  # about as 1 / rank
        return log(len(language) / 0.06) if sign.lower() in language else 8.5 if sign.isalpha() else 10.5
    if sign in _WIDE_MARKS:
        return log(len(_WIDE_MARKS) / 0.05)
    if unicodedata.category(sign) in ("Co", "Cn"):  # no sign at all
        return 2 * _STRANGE
    common, codec, classes = language
    if sign in common:
        return log(len(common) / 0.4)
    try:
        first, *others = sign.encode(codec)
    except UnicodeEncodeError:
        return _STRANGE
    if len(others) != 1 or others[0] < 0xA1 and codec != "cp950":  # what a later codec adds to an older one
        return _STRANGE
    return next((nats for low, high, nats in classes if low <= first <= high), _STRANGE)


def _shape(sign: str) -> str:
    """Write a vowel as a, a consonant as c, accented ones as v and k, other alphabets as s; capitals as capitals."""
    if not sign.isalpha():
        if sign in "0123456789":
            return "d"
        return "x" if sign == "×" else "m" if sign in "°²³½¼¾€" else " " if sign.isascii() or sign == "’" else "."
    if sign.lower() == sign.upper():
        return "q" if "｡" <= sign <= "ﾟ" else "h"
    vowel = unicodedata.normalize("NFD", sign)[0].lower() in "aeiouyøæœı"
    if sign.isascii():
        shape = "a" if vowel else "c"
    elif not unicodedata.name(sign, "").startswith("LATIN"):
        shape = "s"
    else:
        shape = "n" if sign == "ń" else "v" if vowel else "k"
    return shape if sign.islower() else shape.upper()
