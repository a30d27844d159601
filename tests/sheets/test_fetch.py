"""The downloader against a server of its own: every way an answer can go wrong, and nothing half-written."""

import gzip
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from config import FetchOptions, SheetOptions
from sheets import fetch
from sheets.fetch import Refused, check_address, download_missing, fetch_all, missing_addresses
from sheets.samples import cached_photo_path

ROOT = Path(__file__).resolve().parents[2]


def png(colour="red", size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


PHOTO = png()


class Shop(BaseHTTPRequestHandler):
    """Answers by path; what was asked is counted in the server."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, body=PHOTO, status=200, **headers):
        self.send_response(status)
        for name, value in ({"Content_Type": "image/png", "Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        with self.server.lock:
            self.server.asked[path] += 1
            self.server.headers_seen.append(dict(self.headers))
        count = self.server.asked[path]
        try:
            getattr(self, "on_" + path.strip("/").partition("/")[0].replace("-", "_"), self.on_any)(count)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def on_any(self, _):
        self.send()

    def redirect(self, target):
        self.send(b"", 301, Location=target, Set_Cookie="taste=good")

    def on_chain(self, _):
        left = int(self.path.rpartition("/")[2])
        self.redirect(f"/chain/{left - 1}" if left else "/photo.png")

    def on_loop(self, _):
        self.redirect("/loop")

    def on_gone(self, _):
        self.send(b"gone", 404)

    def on_busy(self, count):
        self.send(b"busy", 429, Retry_After="1") if count == 1 else self.send()

    def on_always_busy(self, _):
        self.send(b"busy", 429, Retry_After="0")

    def on_failing(self, count):
        self.send(b"oh", 500) if count <= 2 else self.send()

    def on_drip(self, _):
        self.send_response(200)
        self.send_header("Content-Length", str(len(PHOTO)))
        self.end_headers()
        for byte in PHOTO:
            self.wfile.write(bytes([byte]))
            time.sleep(0.1)

    def on_hang(self, _):
        self.server.stop.wait(20)

    def on_cut(self, count):
        if self.path.endswith("once") and count > 1:
            return self.send()
        self.send_response(200)
        self.send_header("Content-Length", str(len(PHOTO)))
        self.end_headers()
        self.wfile.write(PHOTO[: len(PHOTO) // 2])
        self.close_connection = True

    def on_huge(self, _):
        self.send_response(200)
        self.send_header("Content-Length", str(2 * 2 ** 30))
        self.end_headers()
        self.endless()

    def on_endless(self, _):
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        self.endless()

    def endless(self):
        for _ in range(100_000):
            self.wfile.write(b"\0" * 65536)

    def on_html(self, _):
        self.send(b"<!DOCTYPE html><html>please log in</html>", Content_Type="text/html")

    def on_words(self, _):
        self.send(b"%PDF-1.7 not a photo", Content_Type="image/jpeg")

    def on_empty(self, _):
        self.send(b"")

    def on_half(self, _):
        whole = png(size=(900, 900))
        self.send(whole[: len(whole) // 2])

    def on_bomb(self, _):
        self.send(self.server.bomb, Content_Encoding="gzip")

    def on_zipped(self, _):
        self.send(gzip.compress(PHOTO), Content_Encoding="gzip")

    def on_chunked(self, _):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(PHOTO), 20):
            piece = PHOTO[start:start + 20]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def on_to_private(self, _):
        self.redirect(f"http://127.0.0.2:{self.server.server_port}/secret.png")

    def on_to_metadata(self, _):
        self.redirect("http://169.254.169.254/latest/meta-data")

    def on_to_file(self, _):
        self.redirect("file:///etc/passwd")

    def on_to_credentials(self, _):
        self.redirect(f"http://me:secret@127.0.0.1:{self.server.server_port}/photo.png")

    def on_crowd(self, _):
        self.server.crowd.wait(60)
        self.send()

    def on_slow(self, _):
        time.sleep(0.05)
        self.send()


@pytest.fixture
def shop():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    server.daemon_threads = True
    server.asked, server.headers_seen, server.lock, server.stop = Counter(), [], threading.Lock(), threading.Event()
    server.crowd = threading.Barrier(32)
    server.bomb = gzip.compress(bytes(60 * 2 ** 20))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


QUICK = dict(retries=2, timeout=1.0, deadline=1.5, max_file_mb=1, allow_private=True)


def get(shop, tmp_path, *paths, **options):
    """Fetch paths of the shop; returns path -> reason."""
    addresses = [path if "://" in path else shop.url + path for path in paths]
    results = list(fetch_all(addresses, tmp_path / "cache", FetchOptions(**QUICK | options)))
    assert sorted(result.address for result in results) == sorted(addresses)
    for result in results:  # in the cache exactly when it succeeded, and nothing else is there
        assert cached_photo_path(result.address, tmp_path / "cache").is_file() == (result.reason == "")
    assert len(list((tmp_path / "cache").iterdir())) == sum(not result.reason for result in results)
    return {path: next(result.reason for result in results if result.address == address)
            for path, address in zip(paths, addresses, strict=True)}


def test_what_ends_well(shop, tmp_path):
    paths = ["/photo.png", "/chain/4", "/busy/a.png", "/failing/a.png", "/cut/once", "/zipped", "/chunked",
             "/杯子 1.png", "/%E6%9D%AF%20.v=1601398380000", "/a.jpg?x-oss-process=image/resize,w_500", "/none",
             "/100%/a b#c.png"]
    begin = time.monotonic()
    assert set(get(shop, tmp_path, *paths).values()) == {""}
    assert time.monotonic() - begin >= 1  # the busy one asked to wait a second
    assert shop.asked["/busy/a.png"] == 2 and shop.asked["/failing/a.png"] == 3 and shop.asked["/cut/once"] == 2
    assert shop.asked["/杯子 1.png"] == 1 and shop.asked["/杯 .v=1601398380000"] == 1
    assert cached_photo_path(shop.url + "/photo.png", tmp_path / "cache").read_bytes() == PHOTO
    assert cached_photo_path(shop.url + "/zipped", tmp_path / "cache").read_bytes() == PHOTO


def test_what_fails_says_why(shop, tmp_path):
    expected = {
        "/loop": "redirected in a loop", "/chain/9": "more than 5 times", "/gone": "HTTP 404",
        "/always-busy": "HTTP 429 Too Many Requests, 3 times", "/drip": "not whole after 1.5 seconds",
        "/hang": "timed out", "/cut": "cut short", "/huge": "2147483648 bytes announced",
        "/endless": "larger than 1 MiB", "/html": "it is a web page, not a photo (sent as text/html)",
        "/words": "no photo in a known format", "/empty": "it is empty", "/half": "no usable photo: it is truncated",
        "/bomb": "larger than 1 MiB", "/to-file": "file: only http and https", "/to-credentials": "credentials",
        "ftp://127.0.0.1/a.png": "ftp: only http and https", "http://127.0.0.1:1/a.png": "refused",
        "http://[::1": "no address", "http:///a.png": "no host", "http://u:p@127.0.0.1/": "credentials",
        "http://nowhere.invalid/a.png": "nowhere.invalid",
    }
    found = get(shop, tmp_path, *expected)
    assert {path: reason for path, reason in found.items() if expected[path] not in reason} == {}
    assert shop.asked["/always-busy"] == 3 and shop.asked["/cut"] == 3 and shop.asked["/gone"] == 1
    assert all("Cookie" not in headers and "Authorization" not in headers for headers in shop.headers_seen)


def test_memory_stays_flat(shop, tmp_path):
    code = ("import sys, resource; sys.path.insert(0, sys.argv[1]); from sheets.fetch import fetch_all; "
            "from config import FetchOptions; from sheets.photos import open_photo\n"
            "list(fetch_all([sys.argv[3] + '/photo.png'], sys.argv[2], FetchOptions(allow_private=True)))\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "list(fetch_all([f'{sys.argv[3]}/{kind}/{n}' for n in range(8) for kind in ('bomb', 'endless', 'huge')], "
            "sys.argv[2], FetchOptions(allow_private=True, retries=0)))\n"
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)")
    done = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path, shop.url], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60  # MiB, for 24 answers of 60 MiB and more


def test_private_hosts_are_refused_also_after_a_redirect(shop, tmp_path, monkeypatch):
    assert "private network" in get(shop, tmp_path, "/photo.png", allow_private=False)["/photo.png"]
    assert sum(shop.asked.values()) == 0
    refuse = fetch._refuse_private
    monkeypatch.setattr(fetch, "_refuse_private", lambda host, ip: ip == "127.0.0.1" or refuse(host, ip))
    found = get(shop, tmp_path, "/to-private", "/to-metadata", allow_private=False)
    assert "127.0.0.2, on a private network" in found["/to-private"]
    assert "169.254.169.254, on a private network" in found["/to-metadata"]
    assert shop.asked["/secret.png"] == 0


def test_a_name_that_changes_its_address_is_refused_before_anything_is_sent(shop, tmp_path, monkeypatch):
    real, answers = socket.getaddrinfo, []

    def lookup(host, port, *args, **kwargs):
        if host != "changing.example":
            return real(host, port, *args, **kwargs)
        answers.append("93.184.216.34" if not answers else "127.0.0.1")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[-1], port or 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    address = f"http://changing.example:{shop.server_port}/photo.png"
    assert "127.0.0.1, on a private network" in get(shop, tmp_path, address, allow_private=False)[address]
    assert sum(shop.asked.values()) == 0 and answers == ["93.184.216.34", "127.0.0.1"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.1.1",
                                  "100.64.0.1", "0.0.0.0", "[::1]", "[fe80::1]", "[fc00::1]", "[::ffff:10.0.0.1]",
                                  "2130706433", "0x7f.1", "224.0.0.1", "[2002:7f00:1::]"])
def test_private_addresses_in_any_form(host):
    with pytest.raises(Refused, match="private network"):
        check_address(f"http://{host}/a.png", allow_private=False)
    check_address(f"http://{host}/a.png", allow_private=True)


def test_public_addresses_pass():
    for host in ("8.8.8.8", "[2606:4700::1111]"):
        check_address(f"https://{host}/a.png", allow_private=False)


def sheet_of(shop, tmp_path, count, path="/slow/{}.png"):
    lines = ["text,label,sku_img", *(f"mug {index},1 2 3,{shop.url}{path.format(index)}" for index in range(count))]
    (tmp_path / "data.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "data.csv"


def command(tmp_path, *argv):
    return [sys.executable, str(ROOT / "download_images.py"), "--data_path", str(tmp_path / "data.csv"),
            "--image_cache_dir", str(tmp_path / "cache"), "--report_path", str(tmp_path / "report.xlsx"),
            "--allow_private", *argv]


def test_five_hundred_photos_are_fetched_32_at_a_time(shop, tmp_path):
    """The shop answers none before 32 have asked, sixteen times over; how fast this machine is does not matter."""
    addresses = [f"{shop.url}/crowd/{index}.png" for index in range(16 * 32)]
    results = list(fetch_all(addresses, tmp_path / "cache", FetchOptions(workers=32, timeout=60, deadline=60,
                                                                         allow_private=True)))
    assert len(results) == 16 * 32 and not any(result.reason for result in results)
    assert set(shop.asked.values()) == {1}


def test_killed_half_way_and_started_again(shop, tmp_path):
    sheet_of(shop, tmp_path, 120)
    process = subprocess.Popen(command(tmp_path, "--workers", "4"), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while sum(shop.asked.values()) < 30 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    there = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".png"]
    assert 0 < len(there) < 120 and all(path.read_bytes() == PHOTO for path in there)
    (tmp_path / "cache" / "0123.png.999999999.partial").write_bytes(b"half")
    asked = sum(shop.asked.values())
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{120 - len(there)} photos fetched, 0 failed" in done.stdout
    assert sum(shop.asked.values()) - asked == 120 - len(there)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".png"] * 120


def test_the_command_reports_failures_by_host(shop, tmp_path):
    sheet_of(shop, tmp_path, 3, "/gone/=cmd{}")
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "127.0.0.1: 0 fetched, 3 failed" in done.stdout and "3 x HTTP 404" in done.stdout
    from openpyxl import load_workbook

    rows = list(load_workbook(tmp_path / "report.xlsx").active.values)
    assert rows[0] == ("host", "reason", "address") and len(rows) == 4
    assert rows[1][:2] == ("127.0.0.1", "HTTP 404 Not Found")


def test_only_what_is_missing_is_asked_for(shop, tmp_path):
    (tmp_path / "here.png").write_bytes(PHOTO)
    path = tmp_path / "data.csv"
    path.write_text(f"Products of May\ntext,sku_img,spu_img_1\na,here.png,{shop.url}/1.png\nb,{shop.url}/1.png,"
                    f"lost.png\n", encoding="utf-8")
    path.write_text(path.read_text().replace("Products of May\n", "Products of May,,\n"))
    assert missing_addresses(str(path), str(tmp_path / "cache"), SheetOptions()) == [f"{shop.url}/1.png", "lost.png"]
    download_missing(str(path), str(tmp_path / "cache"), SheetOptions())  # private: all fail, none raises
    assert list((tmp_path / "cache").iterdir()) == []
