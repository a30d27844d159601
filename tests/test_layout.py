"""The house: imports go down only, between wings and inside them; nothing happens at import; two READMEs, one set of
commands."""

import ast
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A wing's rooms import from wings before it; a room imports from rooms before it in its own wing.
WINGS = {
    "": ["config"],
    "ground": ["errors", "files", "options", "commands"],
    "sizes": ["units", "forms", "labels", "answers", "texts"],
    "sheets": ["photos", "cells", "workbooks", "encodings", "text_files", "table", "addresses", "package",
               "rich_values", "pictures", "photo_columns", "sides", "headers", "columns", "samples", "summary", "order",
               "checks", "findings", "check_page", "fetch"],
    "models": ["checkpointing", "family", "weights", "remote_code", "minicpm_remote", "minicpm_v46", "rotation",
               "qwen_vision", "qwen_vl", "smolvlm", "lending", "preparing", "shared_prefix", "decoding", "packing",
               "head", "sampling", "lora", "lean", "loading", "memory", "policy", "trainable", "footprint", "processes",
               "optimizer", "sharding"],
    "the algorithm": ["prompts", "reward", "own_reward", "replay_buffer", "loss", "rollout", "update"],
    "evidence": ["measures", "journal", "evaluation", "comparison", "report", "charts", "page"],
    "training": ["provenance", "checkpoint", "trained", "setup", "guard", "preflight", "curves", "lessons",
                 "upkeep"],
    "examples": ["product_texts", "smollm2"],
    "the commands": ["check_data", "check_reward", "download_images", "demo", "export", "test_model", "run",
                     "train_vlm_parallel"],
    "app": ["refusals", "metrics", "waiting", "crew", "engines", "door", "intake", "results", "bulk", "chat", "page",
            "web", "worker", "sheet_process", "server"],
}
FLOORS = [room if wing.partition(" ")[0] in ("", "the") else f"{wing}.{room}" for wing, rooms in WINGS.items()
          for room in rooms]
COMMANDS = [*WINGS["the commands"], "app.server"]
NO_TORCH = ("config", "ground", "sizes", "sheets", "prompts", "reward", "own_reward", "evidence.measures",
            "evidence.journal", "training.provenance", "app")
SCRIPTS = [*ROOT.glob("*.py"), *(path for wing in WINGS if (ROOT / wing).is_dir() and wing
                                 for path in (ROOT / wing).glob("*.py"))]


def path_of(name, root=ROOT):
    return root / (name.replace(".", "/") + ".py")


def is_command(node):
    """The head of a command, which alone runs when the file is started as a script."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def own_imports(path):
    """Every module that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def upward_imports(name, root=ROOT):
    """Imports of a file from its own floor or from above it."""
    above = FLOORS[FLOORS.index(name):]
    return sorted(set(above) & set(own_imports(path_of(name, root))))


def test_every_file_has_its_floor():
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SCRIPTS if path.stem != "__init__"}
    assert found == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_go_down_only(name):
    assert not upward_imports(name)


@pytest.mark.parametrize(("name", "line", "found"), [
    ("sheets.photos", "from training.checkpoint import save_checkpoint", "training.checkpoint"),  # between wings
    ("sheets.photos", "from sheets.fetch import fetch", "sheets.fetch"),  # inside one
    ("models.head", "from models import policy", "models.policy"),
    ("reward", "import check_reward", "check_reward"),  # of the algorithm from a command
    ("loss", "def later():\n    from update import update", "update"),  # inside a function
    ("reward", "if __name__ == '__main__':\n    from check_reward import main", "check_reward"),  # at the foot
])
def test_an_upward_import_is_found(tmp_path, name, line, found):
    path = path_of(name, tmp_path)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(path_of(name), path)
    assert not upward_imports(name, tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    assert upward_imports(name, tmp_path) == [found]


def test_the_lower_floors_know_no_torch():
    for name in FLOORS:
        if name.startswith(NO_TORCH) and name not in ("app.worker", "app.sheet_process"):
            assert "torch" not in set(own_imports(path_of(name))), name


@pytest.mark.parametrize("name", FLOORS)
def test_importing_a_file_does_nothing(name):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign,
               ast.AnnAssign)
    body = ast.parse(path_of(name).read_text(encoding="utf-8")).body
    assert ast.get_docstring(ast.Module(body, [])), "a file says what it is for"
    heads = [place for place, node in enumerate(body) if is_command(node)]
    assert heads == ([1] if name in COMMANDS else []), "a command reads its options at its head, in one place"
    for node in body[1:]:
        assert is_command(node) or isinstance(node, allowed), ast.unparse(node)


def test_no_blanket_except():
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                allowed = path.name == "own_reward.py"  # it runs a user's code, which may raise anything
                assert allowed or caught not in ("", "Exception", "BaseException"), f"{path.name}:{node.lineno}"


def test_the_top_stays_small():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    files = [path for path in ROOT.iterdir() if path.is_file() and not any(map(path.match, ignored))]
    assert len([path for path in files if path.suffix == ".py"]) <= 16 and len(files) <= 25


OWNERS = {"torch", "transformers", "pandas", "openpyxl", "pillow", "loguru", "tensorboard", "requests"}
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}


def test_requirements_are_the_owners_packages_and_what_is_imported():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    named = {re.split("[=<>]", line)[0] for line in lines}
    imported = {module.partition(".")[0] for path in SCRIPTS for module in own_imports(path)}
    assert OWNERS <= named
    assert not {name for name in named if IMPORTED_AS.get(name, name.replace("-", "_")) not in imported}


def code_blocks(name):
    return re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def commands(name):
    lines = [line.split("#")[0].strip() for block in code_blocks(name) for line in block.splitlines()]
    return [line for line in lines if line]


def test_both_readmes_give_the_same_commands():
    assert commands("README.md") == commands("README_zh.md")
    assert "make demo" in commands("README.md") and "make test" in commands("README.md")
