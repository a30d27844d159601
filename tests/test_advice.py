"""What messages advise: every option that a command may name is one that it has.

A message names an option as --option, or behind another command: download_images.py --workers. What a command may say
is told from its code: the strings of every function that it may come to by the names that are used.
"""

import ast
import re
from dataclasses import fields
from functools import cache

import pytest

import config
from ground import options
from test_layout import COMMANDS, FLOORS, path_of

OPTION = re.compile(r"(?:(\w+)\.py [^.;:]{0,60}?)?--([a-z][a-z0-9]*(?:_[a-z0-9]+)*)")
OF_OTHERS = {"help", "config", "nproc_per_node", "logdir", "standalone", "porcelain", "untracked"}  # torchrun, git, ...
NOT_FOLLOWED = {"config", "ground.options", "ground.commands"}  # the checks of each command's own options: see below


def kind_of(command):
    """The options that a command's head reads."""
    return getattr(config, re.search(r"start\((\w+),", path_of(command).read_text(encoding="utf-8"))[1])


def names_of(kind):
    return {item.name for item in fields(kind)}


def strings_of(node):
    """Every string in a piece of code but docstrings; an f-string as one, with {} for what is filled in."""
    for part in ast.walk(node):
        body = getattr(part, "body", None)
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
            part.body = body[1:]
    parts = {id(value) for part in ast.walk(node) if isinstance(part, ast.JoinedStr) for value in part.values}
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            yield "".join(value.value if isinstance(value, ast.Constant) else "{}" for value in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in parts:
            yield part.value


@cache
def definitions_of(module):
    """Each function, method and constant of a file by its name: the strings in it, and the names that it uses."""
    found = {}
    for node in ast.parse(path_of(module).read_text(encoding="utf-8")).body:
        pieces = [node]
        if isinstance(node, ast.ClassDef):
            pieces = [piece for piece in node.body if isinstance(piece, ast.FunctionDef)]
            found[node.name] = ([], {piece.name for piece in pieces if piece.name.startswith("__")})
        for piece in pieces:
            targets = getattr(piece, "targets", [getattr(piece, "target", None)])
            names = [piece.name] if isinstance(piece, ast.FunctionDef) else [
                target.id for target in targets if isinstance(target, ast.Name)]
            uses = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(piece)}
            strings = list(strings_of(piece))
            for name in names:  # methods of several classes may share a name
                old_strings, old_uses = found.get(name, ([], set()))
                found[name] = (old_strings + strings, old_uses | uses)
    return found


@cache
def files_of(command):
    """The files that a command imports, itself or through another, at their head or inside a function."""
    files, todo = {command}, [command]
    while todo:
        names = set()
        for node in ast.walk(ast.parse(path_of(todo.pop()).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        new = (names & set(FLOORS)) - files
        files |= new
        todo += new
    return files - NOT_FOLLOWED


def messages(command):
    """What a command may say, with where it is written."""
    by_name = {}
    for file in files_of(command):
        for name in definitions_of(file):
            by_name.setdefault(name, []).append((file, name))
    reached, todo = set(), [(command, name) for name in definitions_of(command)]
    while todo:
        place = todo.pop()
        if place not in reached:
            reached.add(place)
            todo += [other for used in definitions_of(place[0])[place[1]][1] for other in by_name.get(used, [])]
    for file, name in sorted(reached):
        yield from ((f"{file}.{name}", text) for text in definitions_of(file)[name][0])


def unknown_options(texts, kind):
    for place, text in texts:
        for other, option in OPTION.findall(text):
            known = names_of(kind_of(other)) if other in COMMANDS else names_of(kind)
            if option not in known | OF_OTHERS:
                yield place, option, text


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"demo"}))  # it reads no sheet and no model of the user's
def test_a_command_names_only_options_that_it_has(command):
    assert not list(unknown_options(messages(command), kind_of(command)))


@pytest.mark.parametrize("kind", options._CHECKS_BY_KIND, ids=lambda kind: kind.__name__)
def test_a_check_of_options_names_only_those_of_its_command(kind):
    check = options._CHECKS_BY_KIND[kind].__name__
    texts = [(check, text) for text in definitions_of("ground.options").get(check, ([], ()))[0]]
    assert texts or check == "<lambda>"
    assert not list(unknown_options(texts, kind))


def test_advice_is_found_wherever_a_command_may_come_to():
    said = {command: " ".join(text for _, text in messages(command)) for command in COMMANDS}
    assert all("--missing_photos text_only" in said[command] for command in ("check_data", "train_vlm_parallel"))
    assert "--image_cache_dir" in said["check_reward"] and "--column photo=NAME" in said["run"]
    assert "--sheet_name" in said["test_model"] and "Say which with --encoding" in said["export"]


def test_an_option_of_another_command_is_told_from_ones_own():
    text = "take --group_size, or download_images.py --retries, or fetch --retries"
    assert list(unknown_options([("here", text), ("there", "run.py --rows")], config.TrainOptions)) == [
        ("here", "retries", text)]
