"""run.json: what a run folder's checkpoints were made from and how far they came. No torch.

Options, versions, git revision, fingerprints of sheets and products, one entry for each start, and a summary.
"""

import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from config import TrainOptions
from ground.files import write_json
from sheets.samples import Sample

RUN_FILE = "run.json"
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "pillow", "numpy")


def write_start(options: TrainOptions, products: Sequence[Sample], held_out: Sequence[Sample], step: int) -> None:
    """Write what this start of the run is made from; a resumed run keeps the entries of its earlier starts."""
    path = Path(options.output_dir) / RUN_FILE
    earlier = _read(path)["starts"] if step and path.is_file() else []
    start = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "from_step": step, "command": sys.argv, "git": git_revision(),
             "python": platform.python_version(), "machine": platform.platform(), "packages": package_versions()}
    sheets = {str(sheet): file_fingerprint(Path(sheet)) for sheet in (options.data_path, options.eval_path) if sheet}
    write_json(path, {"options": asdict(options), "sheets": sheets, "products": fingerprint(products),
                  "held_out": fingerprint(held_out), "starts": [*earlier, start], "summary": {"step": step}})


def write_summary(output_dir: str, **facts: Any) -> None:
    """Put facts into the summary, over those of the same name."""
    path = Path(output_dir) / RUN_FILE
    content = _read(path)
    content["summary"] |= facts | {"time": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_json(path, content)


def fingerprint(samples: Sequence[Sample]) -> dict[str, Any]:
    """Count products and photos, and hash what is seen of them: ids, texts, labels, the photos' sizes in bytes."""
    digest, photos = hashlib.sha256(), 0
    for sample in samples:
        sizes = [Path(path).stat().st_size for path in sample.photos]
        photos += len(sizes)
        digest.update(json.dumps([sample.product_id, sample.text, sample.label, sizes]).encode())
    return {"products": len(samples), "photos": photos, "sha256": digest.hexdigest()}


def file_fingerprint(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_revision() -> str | None:
    """The revision of the program, with "+ changes" when files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parents[1]
    try:
        revision, changes = (subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True,
                                            timeout=10).stdout.strip()
                             for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]))
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + (" + changes" if changes else "")


def package_versions() -> dict[str, str]:
    """The versions of the packages that decide what a run gives."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
