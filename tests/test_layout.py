"""The house: imports go down only, nothing happens at import, the two READMEs give the same commands."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground floor up; a file imports only from files before it.
FLOORS = ["config", "prompts", "labels", "reward", "photos", "table", "sheet", "family", "data", "checks", "check_page",
          "fetch", "own_reward", "measures", "journal", "provenance", "replay_buffer", "remote_code",
          "family_minicpm_remote", "family_minicpm_v46", "family_qwen_vl", "shared_prefix", "decoding", "head", "lora",
          "models", "policy", "trainable", "loss", "rollout", "guard", "loading", "processes", "sharding", "checkpoint",
          "update", "preflight", "evaluation", "comparison", "report", "curves", "charts", "page", "demo", "doctor",
          "check_data", "download_images", "export", "test_model", "run", "train_vlm_parallel"]


def is_command(node):
    """The foot of a file that is also a command, which stands on the top floor."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def own_imports(tree):
    parts = [part for node in tree.body if not is_command(node) for part in ast.walk(node)]
    for node in parts:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_file_has_its_floor():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_go_down_only(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    above = set(FLOORS[FLOORS.index(name):])
    assert not above & set(own_imports(tree))


def test_the_ground_floor_knows_no_torch():
    for name in ("config", "prompts", "labels", "reward", "photos", "table", "sheet", "data", "checks", "check_page",
                 "fetch", "own_reward", "measures", "journal", "provenance"):
        assert "torch" not in set(own_imports(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", FLOORS)
def test_importing_a_file_does_nothing(name):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    body = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body
    assert ast.get_docstring(ast.Module(body, [])), "a file says what it is for"
    for node in body[1:]:
        assert is_command(node) or isinstance(node, allowed), ast.unparse(node)


def test_no_blanket_except():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                allowed = path.name == "own_reward.py"  # it runs a user's code, which may raise anything
                assert allowed or caught not in ("", "Exception", "BaseException"), f"{path.name}:{node.lineno}"


def code_blocks(name):
    return re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def commands(name):
    lines = [line.split("#")[0].strip() for block in code_blocks(name) for line in block.splitlines()]
    return [line for line in lines if line]


def test_both_readmes_give_the_same_commands():
    assert commands("README.md") == commands("README_zh.md")
    assert "make demo" in commands("README.md") and "make test" in commands("README.md")
