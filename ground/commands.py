"""How a command begins and ends: options before anything heavy is imported, one message for what a user can mend."""

import gc
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from loguru import logger
from tqdm import tqdm

from ground.errors import UserError
from ground.options import parse_options

PLAIN, TIMED = "{level:<7} {message}", "{time:HH:mm:ss} {level:<7} {message}"


def start(options_class: type, description: str) -> NoReturn:
    """Parse the options of the script that runs, import it and exit with the status that its main(options) returns.

    It stands at the head of a script, before the imports, so that --help and a misspelt option answer at once. A
    problem that the user can mend ends in one message and status 2.
    """
    options = parse_options(options_class, description)
    log_to_console(PLAIN)
    try:
        status = import_for_good(Path(sys.argv[0]).stem).main(options)
    except UserError as problem:
        logger.error(str(problem))
        status = 2
    sys.exit(status or 0)


def import_for_good(name: str) -> ModuleType:
    """Import a large module without looking for garbage, which takes a third of the time, then or at the end.

    What there is after the first import is never looked at again, so nothing large may be in memory yet.
    """
    if name not in sys.modules:
        gc.disable()
        try:
            import_module(name)
        finally:
            gc.freeze()
            gc.enable()
    return sys.modules[name]


def log_to_console(form: str, level: str = "INFO") -> None:
    """Log to stderr alone, above a progress bar where there is one."""
    logger.remove()
    logger.add(lambda line: tqdm.write(line, end="", file=sys.stderr), format=form, level=level, colorize=False)
