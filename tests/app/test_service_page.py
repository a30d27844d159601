"""The page: one file, nothing from elsewhere, text stays text; in a browser where there is one."""

import base64
import re
import shutil
from contextlib import asynccontextmanager

import pytest

from app.page import page_and_policy
from serving import FAKE_SHEETS, png, serving
from test_api import played

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(not BROWSER, reason="no chromium here")


def test_the_page_is_one_file_under_a_strict_policy(tmp_path):
    page = page_and_policy()[0].decode()
    assert not re.search(r"""(src|href)=["'](?!data:,)|@import|url\(|innerHTML|outerHTML|insertAdjacent|eval\(""", page)
    assert not re.search(r"""\son\w+=["']|style=["']""", page), "the policy forbids them"
    words = page.partition("const WORDS = {")[2].partition("};")[0]
    en, zh = (set(re.findall(r"(\w+): \"", part)) for part in words.split("\n  zh: {"))
    assert zh == en and set(re.findall(r'data-say="(\w+)"', page)) <= en

    async def scene():
        async with serving(tmp_path) as place:
            answer = await place.client.get("/")
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
            assert "frame-ancestors 'none'" in policy and answer.headers["content-type"].startswith("text/html")
    played(scene)


@asynccontextmanager
async def browsing(place, **settings):
    """A page of the service in a browser; what it asked of which host, and what it complained of."""
    playwright = pytest.importorskip("playwright.async_api")
    async with playwright.async_playwright() as player:
        browser = await player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = await (await browser.new_context(**settings)).new_page()
        page.hosts, page.complaints = set(), []
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2] if "//" in request.url else ""))
        page.on("console", lambda line: page.complaints.append(line.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        await page.goto(f"http://127.0.0.1:{place.port}/")
        yield page
        assert page.hosts <= {f"127.0.0.1:{place.port}", ""}
        assert all(line.startswith("Failed to load resource") for line in page.complaints), page.complaints  # 4xx
        await browser.close()


def photo(seed, **more):
    return {"name": f"{seed}.png", "mimeType": "image/png", "buffer": png(seed, **more)}


DROP = """([content]) => {
  const data = new DataTransfer(), bytes = Uint8Array.from(atob(content), sign => sign.charCodeAt(0));
  data.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


@in_a_browser
def test_a_person_asks(tmp_path):
    async def scene():
        async with serving(tmp_path, accept_at=0.5, sheets=FAKE_SHEETS) as place, browsing(
                place, locale="en-GB", viewport={"width": 1280, "height": 900}) as page:
            await page.set_input_files("#files", [photo(1)])
            await page.evaluate(DROP, [base64.b64encode(png(2)).decode()])
            await page.locator(".thumb").nth(1).wait_for()
            await page.fill("#text", "<script>document.title = 'x'</script> mug")
            await page.keyboard.press("Control+Enter")
            size = page.locator("#result .size")
            await size.wait_for()
            assert re.fullmatch(r"\d+ × 3 × 1 cm", await size.inner_text())  # 3: two photos came
            assert "<script>" in await page.locator("#history button").inner_text()
            assert await page.title() == "Product sizes" and await page.locator("#result svg polygon").count() == 3
            assert await page.locator("#result .chip").inner_text() == "no need to look"
            label = await page.locator("#result svg").get_attribute("aria-label")
            assert label.startswith("length ") and "width 3" in label

            await page.fill("#text", "say nothing at all")
            await page.click("#ask")
            await page.get_by_text("No size could be read").wait_for()
            assert await page.locator("#result .chip").inner_text() == "Please check this one"

            await page.fill("#text", 'say {"length": 40, "width": 0}')
            await page.click("#ask")
            await page.get_by_text("No box: a side is missing.").wait_for()
            assert await page.locator("#result svg").count() == 0

            await page.fill("#text", "bad photo")
            await page.click("#ask")
            await page.get_by_text("photos[0]: it is damaged.").wait_for()
            await page.get_by_role("button", name="Remove photo 1").click()
            assert await page.locator(".thumb").count() == 1

            await page.set_input_files("#files", [{"name": "all.csv", "mimeType": "text/csv", "buffer": b"mug\nbowl"}])
            async with page.expect_download() as download:
                await page.get_by_role("link", name="Get the sheet").click()
            assert (await download.value).suggested_filename == "all.answers.xlsx"

            await page.click("#language")
            assert await page.title() == "商品尺寸" and await page.locator("html").get_attribute("lang") == "zh-CN"
            await page.reload()
            assert await page.locator("#history button").count() == 3  # the history stays, in the browser
            await page.click("#forget")
            assert await page.locator("#history button").count() == 0
    played(scene)


@in_a_browser
def test_with_the_keyboard_on_a_phone_in_the_dark(tmp_path):
    (tmp_path / "keys").write_text("a-key-of-sixteen-signs-or-more")

    async def scene():
        async with serving(tmp_path, key_file=str(tmp_path / "keys"), max_megapixels=0.01) as place, browsing(
                place, locale="zh-CN", viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True,
                has_touch=True) as page:
            await page.locator("#key").wait_for()
            await page.set_input_files("#files", [photo(1, size=(200, 100))])  # above the limit: made smaller
            await page.get_by_text("已缩小").wait_for()
            await page.focus("#language")
            for word in ("#key", "#files", ".thumb button", "#text", "#ask"):
                await page.keyboard.press("Tab")
                assert await page.locator(word).evaluate("node => node === document.activeElement"), word
                if word == "#key":
                    await page.keyboard.type("a-key-of-sixteen-signs-or-more")
                if word == "#text":
                    await page.keyboard.type("mug")
            await page.keyboard.press("Enter")
            await page.locator("#result .size").wait_for()
            assert await page.locator("#result .size").inner_text() == "3 × 2 × 1 cm"
            assert await page.evaluate("() => document.documentElement.scrollWidth") == 390
            dark = await page.evaluate("() => getComputedStyle(document.body).backgroundColor")
            assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 120
            await page.fill("#key", "a-wrong-key-of-sixteen-signs")
            await page.click("#ask")
            await page.get_by_text("send a valid key").wait_for()
    played(scene)
