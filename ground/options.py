"""Options parsed and checked: from the command line and YAML files, before anything heavy is imported.

jsonargparse reads flags and YAML through the same types, keeps the names flat and imports in a tenth of a second. Ours
are the checks of ranges and between options, and the hint at the nearest right name.
"""

import difflib
import importlib.util
import math
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from config import (
    DEFAULT_DATA_PATH,
    AnswerOptions,
    CheckRewardOptions,
    CompareOptions,
    DataOptions,
    DownloadOptions,
    ExportOptions,
    ServiceOptions,
    SheetOptions,
    TrainOptions,
)
from ground.errors import OptionError
from ground.files import write_text

T = TypeVar("T")
_FIELD = re.compile("text|label|length|width|height|unit|sku_id|category|photo|sku_img|spu_img_[0-9]+")
_REWARD = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)(?::(?P<weight>[^:]+))?|size(?::(?P<size_weight>[^:]+))?")


LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Parser(ArgumentParser):
    """jsonargparse's parser, with a hint at the nearest option name."""

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        message = re.sub(r"<class '(\w+)'>", r"\1", re.sub(r'Parser key "(\w+)"', r"--\1", message))
        names = [action.dest for action in self._actions]
        for word in message.replace("'", " ").replace("=", " ").replace(",", " ").split():
            near = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), names, n=1, cutoff=0.6)
            unknown = "unrecognized" in message or "is not accepted" in message
            if unknown and word.lstrip("-") not in names and near:
                message += f"\nDid you mean --{near[0]}?"
                break
        self.exit(2, f"{self.prog}: {message.strip()}\nAll options: {self.prog} --help\n")


def parse_options(options_class: type[T], description: str, argv: Sequence[str] | None = None,
                  more_checks: Callable[[T], None] | None = None) -> T:
    """Read options from the command line and --config YAML files (the command line wins) and check them.

    Exits with status 2 and one message when an option is unknown, of the wrong type or in a wrong combination.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with options; flags win")
    groups = [base for base in reversed(options_class.__mro__) if "__dataclass_fields__" in vars(base)]
    declared: set[str] = set()
    for group_class in groups:
        own = [item for item in fields(group_class) if item.name not in declared]
        if not own:
            continue
        group = parser.add_argument_group(group_class.__doc__)
        for item in own:
            declared.add(item.name)
            if item.metadata["positional"]:
                group.add_argument(item.name, help=item.metadata["help"], nargs="?", type=item.type)
            else:
                group.add_argument(f"--{item.name}", help=item.metadata["help"], **_argument_kind(item))
    namespace = parser.parse_args(argv)
    options = options_class(**_with_tuples(options_class, {name: value for name, value in vars(namespace).items()
                                                           if name in declared}))
    try:
        check_options(options)
        if more_checks:
            more_checks(options)
    except OptionError as problem:
        parser.error(str(problem))
    return options


def _with_tuples(options_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Turn the lists that YAML and the parser give into tuples where tuples are declared."""
    tuples = {item.name for item in fields(options_class) if typing.get_origin(item.type) is tuple}
    return {name: tuple(value) if name in tuples else value for name, value in values.items()}


def _argument_kind(item: Any) -> dict[str, Any]:
    if item.type is bool:  # --flag alone means true
        return {"type": bool, "nargs": "?", "const": True, "default": item.default}
    if typing.get_origin(item.type) is tuple:
        members = typing.get_args(item.type)
        count = "*" if members[-1] is Ellipsis else len(members)
        return {"type": members[0], "nargs": count, "default": list(item.default)}
    if typing.get_origin(item.type) is list:
        return {"action": "append", "default": []}
    return {"type": item.type, "default": item.default}


def check_options(options: Any) -> None:
    """Refuse values and combinations that can't work; raises OptionError naming the option."""
    check_ranges(options)
    for name, check in _CHECKS_BY_NAME.items():
        if hasattr(options, name):
            check(getattr(options, name))
    for kind, check in _CHECKS_BY_KIND.items():
        if isinstance(options, kind):
            check(options)


def check_ranges(options: Any) -> None:
    """Refuse the first option that lies outside of its interval; raises OptionError."""
    for item in fields(options):
        value, interval = getattr(options, item.name), item.metadata["within"]
        if value is None or not interval:
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(_lies_within(number, interval) for number in numbers):
            rule = {"(0, inf)": "above 0", "[0, inf)": "0 or more"}.get(interval, f"in {interval}")
            raise OptionError(f"--{item.name} {value}: must be {rule}")


def _lies_within(number: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low < number < high or interval[0] == "[" and number == low or interval[-1] == "]" and number == high
    return math.isfinite(number) and inside


def check_data_path(data_path: str) -> None:
    """Refuse a sheet that isn't there; with the default name the message says how to run the demo."""
    if Path(data_path).is_file():
        return
    if data_path == DEFAULT_DATA_PATH:
        raise OptionError(f"--data_path {data_path}: no such file. Give your own sheet with --data_path, or run the "
                          "built-in demo: make demo")
    raise OptionError(f"--data_path {data_path}: no such file")


def check_data(options: DataOptions) -> None:
    """Refuse sheets that aren't there; raises OptionError."""
    check_data_path(options.data_path)
    if options.eval_path and not Path(options.eval_path).is_file():
        raise OptionError(f"--eval_path {options.eval_path}: no such file")
    if options.eval_sheet_name and not options.eval_path:
        raise OptionError(f"--eval_sheet_name {options.eval_sheet_name} needs --eval_path")


def check_columns(pairs: Sequence[str]) -> None:
    """Refuse a --column that is no FIELD=NAME pair; raises OptionError."""
    for pair in pairs:
        name, _, column = pair.partition("=")
        if not column.strip() or not _FIELD.fullmatch(name.strip()):
            raise OptionError(f"--column {pair}: write FIELD=NAME, the field being text, label (or length, width, "
                              "height and unit), sku_id, category or photo (sku_img, spu_img_1, ... work too), as in "
                              "--column text=标题")


def check_prompt_file(prompt_file: str | None) -> None:
    """Refuse a prompt file that can't be read or lacks the {text} marker; raises OptionError."""
    if prompt_file is None:
        return
    if not Path(prompt_file).is_file():
        raise OptionError(f"--prompt_file {prompt_file}: no such file")
    if "{text}" not in Path(prompt_file).read_text(encoding="utf-8"):
        raise OptionError(f"--prompt_file {prompt_file}: it must contain {{text}}, where the product's text goes")


def split_reward(spec: str) -> tuple[str, str, float]:
    """Split file.py:function:weight, the file being "" for the built-in size; raises OptionError."""
    match = _REWARD.fullmatch(spec)
    weight = match and (match["weight"] or match["size_weight"] or "1")
    try:
        number = float(weight or "nan")
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise OptionError(f"--reward {spec}: give file.py:function, file.py:function:weight, size or size:weight")
    return match["file"] or "", match["name"] or "size", number


def check_rewards(specs: Sequence[str]) -> None:
    """Refuse a reward that is misspelt, whose file is not there or that stands there twice; raises OptionError."""
    for spec in specs:
        file, _, _ = split_reward(spec)
        if file and not Path(file).is_file():
            raise OptionError(f"--reward {spec}: no such file {file}")
    if len({split_reward(spec)[:2] for spec in specs}) < len(specs):
        raise OptionError(f"--reward {' '.join(specs)}: one of them is given twice")


def check_training(options: TrainOptions) -> None:
    """Refuse values and combinations that can't work; raises OptionError naming the option."""
    if not options.eval_path and options.eval_fraction == 0 and options.eval_every:
        raise OptionError("--eval_every needs held-out products: give --eval_path or an --eval_fraction above 0, "
                          "or turn it off with --eval_every 0")
    if options.group_size < 2:
        raise OptionError("--group_size 1 gives every candidate advantage 0, so nothing is learnt: take 2 or more")
    if options.minibatch_size is not None and options.minibatch_size > options.batch_size:
        raise OptionError(f"--minibatch_size {options.minibatch_size} is more than the --batch_size "
                          f"{options.batch_size} products of a step")
    if options.lr_scheduler == "constant" and options.min_lr_ratio:
        raise OptionError("--min_lr_ratio needs --lr_scheduler linear or cosine")
    if options.warmup_steps > options.max_steps:
        raise OptionError(f"--warmup_steps {options.warmup_steps} is more than --max_steps {options.max_steps}")
    check_lora(options)
    check_reference(options)
    check_optimizer(options)
    if options.stop_after and not options.eval_every:
        raise OptionError(f"--stop_after {options.stop_after} needs evaluations: give --eval_every")
    if options.stop_after and not options.save_best:
        raise OptionError(f"--stop_after {options.stop_after} without --save_best would throw the best weights away")
    if options.resume and options.overwrite_output_dir:
        raise OptionError("--resume and --overwrite_output_dir contradict each other: take one")


def check_optimizer(options: TrainOptions) -> None:
    """Refuse an optimizer that isn't there or can't work where its weights are; raises OptionError."""
    if options.offload and options.sharding == "none":
        raise OptionError("--offload needs --sharding fsdp, on one GPU too: it brings weights to the GPU in the parts "
                          "that fsdp splits them into")
    if options.offload and options.lora_rank is not None:
        raise OptionError("--offload and --lora_rank contradict each other: what trains is small, and the frozen "
                          "weights are wanted whole while answers are sampled; --quantize 4bit makes them smaller")
    if options.optimizer != "adamw_8bit":
        return
    if options.sharding != "none":
        raise OptionError(f"--optimizer adamw_8bit and --sharding {options.sharding} contradict each other: moments in "
                          "8 bits can't be shared out; take --sharding none, or --optimizer adamw")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OptionError("--optimizer adamw_8bit needs bitsandbytes, which is not installed here: pip install "
                          "bitsandbytes")


def check_reference(options: TrainOptions) -> None:
    """Refuse to move a reference policy that isn't there or can't be moved as asked; raises OptionError."""
    if not options.ref_sync_every:
        if options.ref_sync_mix != 1:
            raise OptionError(f"--ref_sync_mix {options.ref_sync_mix} needs --ref_sync_every")
        return
    asked = f"--ref_sync_every {options.ref_sync_every}"
    if options.lora_rank is not None:
        raise OptionError(f"{asked} and --lora_rank contradict each other: the reference policy is the model under the "
                          "adapter, which moves for neither. For another reference write the model with its adapter "
                          "merged (python export.py) and train a new adapter on that")
    if options.kl_weight == 0:
        raise OptionError(f"{asked} needs a reference policy: give a --kl_weight above 0")
    if options.dtype == "bfloat16" and options.ref_sync_mix < 0.5:
        raise OptionError(f"--ref_sync_mix {options.ref_sync_mix}: with --dtype bfloat16 the reference policy is held "
                          "in bfloat16, where moves so small are lost in rounding: take 0.5 or more")


def check_lora(options: TrainOptions) -> None:
    """Refuse options that need an adapter without one, or that it can't be trained with; raises OptionError."""
    if options.lora_rank is None:
        for name, default in (("lora_alpha", None), ("quantize", "none")):
            if getattr(options, name) != default:
                raise OptionError(f"--{name} {getattr(options, name)} needs --lora_rank: without adapters every "
                                  "weight trains")
    elif options.train_vision:
        raise OptionError("--train_vision and --lora_rank contradict each other: adapters are on the language "
                          "model only; take one")


def check_comparison(options: CompareOptions) -> None:
    """Refuse values that can't work; raises OptionError naming the option."""
    if not options.checkpoint_path:
        raise OptionError("--checkpoint_path is missing: give the checkpoint folder or model_stepN.pt to compare")
    for path in options.also:
        if not Path(path).exists() and path.count("/") != 1:  # one slash: perhaps a hub name
            raise OptionError(f"--also {path}: no such checkpoint or model folder")


def check_answering(options: AnswerOptions) -> None:
    """Refuse values and combinations that can't work; raises OptionError naming the option."""
    if not options.model_path and not options.checkpoint_path:
        raise OptionError("--model_path is missing: give a model folder, a hub name or a checkpoint folder")
    if (options.text is None) == (options.data_path is None):
        raise OptionError("give either --text (with --image for each photo) or --data_path")
    if options.data_path and (options.image or options.label):
        raise OptionError("--image and --label go with --text; a sheet brings its own photos and labels")
    if len(options.image) > 5:
        raise OptionError(f"--image: {len(options.image)} photos, at most 5 a product")


def check_reward_check(options: CheckRewardOptions) -> None:
    """Refuse values and combinations that can't work; raises OptionError naming the option."""
    if (options.answer is None) == (options.data_path is None):
        raise OptionError("give either an answer with its --label, or a --data_path with a --model_path")
    if options.answer is not None and options.label is None:
        raise OptionError("--label is missing: give the true size that goes with the answer")
    if options.data_path is not None and not options.model_path:
        raise OptionError("--model_path is missing: give the model that is to answer the sheet")


def check_export(options: ExportOptions) -> None:
    """Refuse values that can't work; raises OptionError naming the option."""
    if not options.checkpoint_path:
        raise OptionError("--checkpoint_path is missing: give the checkpoint folder to export")
    if not options.output_path:
        raise OptionError("--output_path is missing: give the folder to write the model to")
    if Path(options.output_path).exists():
        raise OptionError(f"--output_path {options.output_path} is there already: name a folder that isn't")


def check_service(options: ServiceOptions) -> None:
    """Refuse values and combinations that can't work or aren't safe; raises OptionError naming the option."""
    if options.host not in LOOPBACK and not options.key_file:
        raise OptionError(f"--host {options.host} can be reached from other machines, so it needs keys: write one a "
                          "line into a file and name it with --key_file")
    for name in ("key_file", "engine_key_file"):
        if getattr(options, name) and not Path(getattr(options, name)).is_file():
            raise OptionError(f"--{name} {getattr(options, name)}: no such file")
    if not options.devices:
        raise OptionError("--devices is empty: give auto, cpu, cuda or numbers of GPUs")
    for device in options.devices:
        if device not in ("auto", "cpu", "cuda") and not device.isdecimal():
            raise OptionError(f"--devices {device}: give auto, cpu, cuda or numbers of GPUs")
    for address in options.engine:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", address):
            raise OptionError(f"--engine {address}: give an address such as http://127.0.0.1:8001/v1")
    if options.engine and not (Path(options.model_path) / "serving.json").is_file():
        raise OptionError(f"--engine needs the wording: --model_path must name the folder that export.py wrote, with "
                          f"serving.json in it; {options.model_path or 'none'} has none")


_CHECKS_BY_NAME: dict[str, Callable[[Any], None]] = {
    "column": check_columns, "prompt_file": check_prompt_file, "reward": check_rewards}
_CHECKS_BY_KIND: dict[type, Callable[[Any], None]] = {
    TrainOptions: check_training, DataOptions: check_data, CompareOptions: check_comparison,
    AnswerOptions: check_answering, CheckRewardOptions: check_reward_check, ExportOptions: check_export,
    ServiceOptions: check_service,
    DownloadOptions: lambda options: check_data_path(options.data_path)}


def held_out_sheet(options: DataOptions) -> SheetOptions:
    """How to read eval_path: as data_path, but its own worksheet."""
    return SheetOptions(options.column, options.eval_sheet_name, options.encoding)


def sheet_options(own: SheetOptions, trained: DataOptions, own_sheet: bool, held_out: bool = False) -> SheetOptions:
    """How to read a sheet after training: as then, or, for a sheet of one's own, as said now (columns as then)."""
    if own_sheet:
        return SheetOptions(own.column or trained.column, own.sheet_name, own.encoding)
    then = held_out_sheet(trained) if held_out else trained
    return SheetOptions(own.column or then.column, own.sheet_name or then.sheet_name, own.encoding or then.encoding)


def write_options(options: TrainOptions, path: Path) -> None:
    """Write the resolved options as YAML that --config reads back."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def read_options(path: Path) -> TrainOptions:
    """Read options that write_options wrote; unknown names (of another version) raise OptionError."""
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(plain.get("scale_advantages"), bool):  # of a version that knew two of the three ways
        plain["scale_advantages"] = "group" if plain["scale_advantages"] else "none"
    known = {item.name for item in fields(TrainOptions)}
    unknown = sorted(set(plain) - known)
    if unknown:
        raise OptionError(f"{path}: options this version does not know: {', '.join(unknown)}")
    return TrainOptions(**_with_tuples(TrainOptions, plain))
