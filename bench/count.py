"""Count the multiply-adds of one step, TRL's way and ours: the speed-up that arithmetic allows.

    python bench/count.py                               # the small model of step.py, and MiniCPM-o-2_6
    python bench/count.py --measured step.json          # with step.py's measurements beside the limits

Counted: every matrix product, attention's two over the pairs of tokens that see each other. Not counted: norms,
activations, softmax, the optimizer, anything done by Python. A backward pass costs two forward passes where weights
train, and nothing where they don't. One step: one product, G answers of T tokens to a prompt of P.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the program's own files

from config import option
from ground.errors import OptionError


@dataclass
class CountOptions:
    """What to show"""

    measured: str | None = option(None, "a JSON file of step.py, whose ratios are printed beside the limits")



if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from ground.commands import start

    start(CountOptions, "Count the multiply-adds of one step, TRL's way and ours.")

from cases import ANSWER_TOKENS, GRID, TEXT_MODEL, VISION_MODEL, Case

BACKWARD = 2  # in forward passes


@dataclass(frozen=True)
class Text:
    """A decoder of the Qwen2 kind."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    vocabulary: int

    @property
    def token(self) -> int:
        """A token through the linear layers, the head left out."""
        attention = self.hidden * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def pair(self) -> int:
        """A query with a key and its value."""
        return self.layers * 2 * self.heads * self.head_width

    @property
    def logits(self) -> int:
        """A token through the head."""
        return self.hidden * self.vocabulary


@dataclass(frozen=True)
class Vision:
    """A vision transformer and its way into the text model."""

    layers: int
    full_layers: int  # those that attend over the whole photo; the others within windows
    hidden: int
    intermediate: int
    mlp_products: int  # 2, or 3 with a gate
    patch_values: int
    window: int  # a window's side in patches
    out_hidden: int
    queries: int  # 0: a merger of 2 x 2 patches; else a resampler with so many tokens a slice

    def photo(self, down: int, across: int) -> int:
        """Multiply-adds of a photo or slice of down x across patches."""
        patches, width = down * across, self.hidden
        linear = patches * (self.patch_values * width + self.layers
                            * (4 * width ** 2 + self.mlp_products * width * self.intermediate))
        in_windows = _squares(down, self.window) * _squares(across, self.window) if self.window else 0
        pairs = self.full_layers * patches ** 2 + (self.layers - self.full_layers) * in_windows
        return linear + pairs * 2 * width + (self._resampler(patches) if self.queries else self._merger(patches // 4))

    def _merger(self, tokens: int) -> int:
        return tokens * (4 * self.hidden) * (4 * self.hidden + self.out_hidden)

    def _resampler(self, patches: int) -> int:
        keys = patches * (self.hidden * self.out_hidden + 2 * self.out_hidden ** 2)
        return keys + self.queries * (3 * self.out_hidden ** 2 + 2 * patches * self.out_hidden)


def _squares(length: int, window: int) -> int:
    """Sum of the squares of the pieces that a side is cut into."""
    return length // window * window ** 2 + (length % window) ** 2


@dataclass(frozen=True)
class Work:
    """What a step has to do."""

    prompt: int
    group: int
    answer: int
    vision: int  # multiply-adds of all photos of the product
    train_vision: bool = True


def causal(tokens: int) -> int:
    """Pairs of a token with itself and those before it."""
    return tokens * (tokens + 1) // 2


def decode(text: Text, work: Work) -> int:
    """Generate G answers behind a prefilled prompt: the prefill gives the first token, the last is not read."""
    steps = work.answer - 1
    pairs = steps * work.prompt + causal(steps)
    return work.group * (steps * text.token + pairs * text.pair + work.answer * text.logits)


def trl_way(text: Text, work: Work) -> dict[str, int]:
    """Every answer with its own photos and prompt."""
    group, tokens = work.group, work.prompt + work.answer
    prefill = group * (work.prompt * text.token + causal(work.prompt) * text.pair)
    rows = group * (tokens * text.token + causal(tokens) * text.pair + work.answer * text.logits)
    vision = group * work.vision
    return {"generate": vision + prefill + decode(text, work), "reference": vision + rows,
            "train": vision * (1 + BACKWARD * work.train_vision) + rows * (1 + BACKWARD)}


def our_way(text: Text, work: Work) -> dict[str, int]:
    """Photos and prompt once; frozen photos once for the whole step."""
    answers = work.group * work.answer
    prefill = work.prompt * text.token + causal(work.prompt) * text.pair
    pairs = causal(work.prompt) + answers * work.prompt + work.group * causal(work.answer)
    row = (work.prompt + answers) * text.token + pairs * text.pair + answers * text.logits
    vision = work.vision * work.train_vision
    return {"generate": work.vision + prefill + decode(text, work), "reference": vision + row,
            "train": vision * (1 + BACKWARD) + row * (1 + BACKWARD)}


def small_model() -> tuple[Text, Vision]:
    """The model of step.py."""
    text, vision = TEXT_MODEL, VISION_MODEL
    heads = text["num_attention_heads"]
    return (Text(text["num_hidden_layers"], text["hidden_size"], heads, text["num_key_value_heads"],
                 text["hidden_size"] // heads, text["intermediate_size"], text["vocab_size"]),
            Vision(vision["depth"], len(vision["fullatt_block_indexes"]), vision["hidden_size"],
                   vision["intermediate_size"], 3, 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
                   vision["window_size"] // vision["patch_size"], vision["out_hidden_size"], 0))


def work_of(case: Case, vision: Vision) -> Work:
    """The work of one of step.py's cases."""
    down, across = case.grid
    return Work(case.prompt_tokens, case.group_size, ANSWER_TOKENS, case.photos * vision.photo(2 * down, 2 * across),
                case.train_vision)


# MiniCPM-o-2_6 as its config.json has it: Qwen2-7B, SigLIP-400M in slices of 448 x 448, a resampler of 64 queries.
MINICPM_TEXT = Text(layers=28, hidden=3584, heads=28, kv_heads=4, head_width=128, intermediate=18944,
                    vocabulary=151700)
MINICPM_VISION = Vision(layers=27, full_layers=27, hidden=1152, intermediate=4304, mlp_products=2, patch_values=588,
                        window=0, out_hidden=3584, queries=64)
MINICPM_SLICES = {450: 5, 1500: 20, 3100: 45}  # prompt tokens: slices of the five photos, 64 tokens each


def minicpm_work(prompt: int, train_vision: bool) -> Work:
    """Twelve answers of 32 tokens to five photos in slices."""
    return Work(prompt, 12, ANSWER_TOKENS, MINICPM_SLICES[prompt] * MINICPM_VISION.photo(32, 32), train_vision)


def limit(text: Text, work: Work) -> float:
    """How many times more TRL's way has to multiply."""
    return sum(trl_way(text, work).values()) / sum(our_way(text, work).values())


def table(rows: Sequence[tuple[str, Text, Work, float | None]]) -> str:
    """Lay counts out as Markdown, in 10^9 multiply-adds."""
    lines = ["| | P, G | TRL: generate / reference / train, 10^9 | ours | limit | measured |",
             "|---|---|---|---|---|---|"]
    for name, text, work, measured in rows:
        counts = [" / ".join(f"{number / 1e9:,.1f}" for number in way(text, work).values())
                  for way in (trl_way, our_way)]
        lines.append(f"| {name}{'' if work.train_vision else ', vision frozen'} | {work.prompt}, {work.group} | "
                     f"{counts[0]} | {counts[1]} | {limit(text, work):.1f} | "
                     f"{'' if measured is None else format(measured, '.1f')} |")
    return "\n".join(lines)


def measured_ratios(path: str | None) -> dict[str, float]:
    """Read step.py's ratios by case; none without a file."""
    if path is None:
        return {}
    from step import total

    results = json.loads(Path(path).read_text(encoding="utf-8"))["cases"]
    return {result["case"]["name"]: total(result["trl"]) / total(result["ours"]) for result in results
            if "repeats" in result.get("trl", {})}


def main(options: CountOptions) -> None:
    """Print both tables."""
    if options.measured and not Path(options.measured).is_file():
        raise OptionError(f"--measured {options.measured}: no such file")
    text, vision = small_model()
    measured = measured_ratios(options.measured)
    rows = [("small", text, work_of(case, vision), measured.get(case.name)) for case in GRID]
    rows += [("MiniCPM-o-2_6", MINICPM_TEXT, minicpm_work(prompt, trained), None)
             for trained in (True, False) for prompt in MINICPM_SLICES]
    print(table(rows))
    for case in GRID[:3]:
        grown = [sum(our_way(text, replace(work_of(case, vision), group=group)).values()) for group in (4, 12, 32)]
        print(f"ours at {case.prompt_tokens} prompt tokens, G 4 -> 12 -> 32: {grown[1] / grown[0]:.2f} and "
              f"{grown[2] / grown[0]:.2f} times the work")
