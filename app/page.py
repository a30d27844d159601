"""The page, and the policy under which a browser shows it: its own script and style, by their hashes, nothing else."""

import base64
import hashlib
import re
from pathlib import Path


def page_and_policy() -> tuple[bytes, str]:
    """Read page.html; the policy lets in what stands in it, pictures made in the browser, and this service."""
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    hashes = {tag: " ".join(_hash(text) for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
              for tag in ("script", "style")}
    return page.encode(), (f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
                           "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                           "frame-ancestors 'none'")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
