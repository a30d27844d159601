"""Run a command in float64: python tests/in_float64.py test_model.py --model_path demo/model --text mug"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rounding import float64  # noqa: E402

if __name__ == "__main__":
    del sys.argv[0]
    with float64():
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
