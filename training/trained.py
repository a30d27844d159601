"""A trained model opened as it was trained: weights, wording, photo budget, sampling, parser and reward.

run.py, test_model.py, check_reward.py and export.py all open models here, so that every one asks as training did.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import TrainOptions
from evidence.evaluation import Record, answer_together
from ground.errors import OptionError
from ground.options import read_options, split_reward
from models.lora import base_of, is_adapter
from models.policy import Policy, load_policy
from models.preparing import worker_count
from own_reward import Scorer
from prompts import read_template
from rollout import PromptEncoder, RolloutFailure
from sheets.samples import Sample
from training.checkpoint import OPTIONS_FILE, PROMPT_FILE, REWARD_FILE


@dataclass
class TrainedModel:
    """A policy with what decides how it is asked and what its answers earn."""

    policy: Policy
    options: TrainOptions  # those of its training, or what the user said instead
    scorer: Scorer
    batch_size: int = 8  # products answered together

    def encoder(self, workers: int | None = 0, **more: Any) -> PromptEncoder:
        """Prepare prompts as in training, in processes where workers says so (--workers); more: see PromptEncoder."""
        return PromptEncoder(self.policy, self.options.prompt_language, read_template(self.options.prompt_file),
                             self.options.prompt_cache_mb, self.options.max_prompt_length,
                             workers=worker_count(workers, self.policy.device), **more)

    def answer(self, encoder: PromptEncoder, samples: Sequence[Sample], num_samples: int, seed: int,
               greedy: bool = False) -> tuple[list[Record], list[RolloutFailure]]:
        """Answer a few products num_samples times each at the training temperature, or once greedily.

        Many go through evaluation.in_chunks first: what is prepared for these is held all at once.
        """
        return answer_together(encoder, samples, num_samples, None if greedy else self.options.temperature,
                               self.options.max_length, seed, self.batch_size, self.scorer)


def open_trained(options: TrainOptions, model_path: str, checkpoint_path: str | None, device: str,
                 trust_remote_code: bool, scorer: Scorer, batch_size: int = 8) -> TrainedModel:
    """Open what a user names: a model folder or hub name, a checkpoint, an adapter, a plain state dict.

    options: those that it was trained with (options_of). An adapter brings the model under it; a state dict is put on
    model_path, or on the model it was trained from.
    """
    weights = checkpoint_path
    if not weights and is_adapter(model_path):
        model_path, weights = "", model_path
    if not model_path and is_adapter(weights):
        model_path = base_of(weights)
    elif not model_path:
        model_path, weights = (options.model_path, weights) if Path(weights).is_file() else (weights, None)
    policy = load_policy(model_path, options, device, trust_remote_code)
    if weights:
        policy.load_weights(weights)
    return TrainedModel(policy, options, scorer, batch_size)


def asked_otherwise(trained: TrainOptions, prompt_language: str | None, prompt_file: str | None,
                    temperature: float | None = None, max_length: int | None = None) -> TrainOptions:
    """Put what a user says in place of what a model was trained with; None keeps that.

    A language alone means the built-in wording in it.
    """
    if prompt_language or prompt_file:
        trained = replace(trained, prompt_language=prompt_language or trained.prompt_language, prompt_file=prompt_file)
    said = {"temperature": temperature, "max_length": max_length}
    return replace(trained, **{name: value for name, value in said.items() if value is not None})


def options_of(checkpoint_path: str) -> TrainOptions | None:
    """Read the options a checkpoint was trained with; looks beside a plain .pt file too. None when there are none.

    The wording of the prompt is the copy kept in the checkpoint, wherever the original file has gone; a reward of the
    user's own is the original file where it is as it was, else the copy (see scorer_of).
    """
    path = Path(checkpoint_path)
    for folder in (path, path.parent):
        if (folder / OPTIONS_FILE).is_file():
            options = read_options(folder / OPTIONS_FILE)
            if (folder / PROMPT_FILE).is_file():
                options.prompt_file = str(folder / PROMPT_FILE)
            options.reward = [_reward_file(spec, folder, number) for number, spec in enumerate(options.reward, start=1)]
            return options
    return None


def _reward_file(spec: str, folder: Path, number: int) -> str:
    file, name, weight = split_reward(spec)
    copy = folder / REWARD_FILE.format(number)
    if not file:
        return spec
    original = Path(file)
    mine = original.is_file() and copy.is_file() and original.read_bytes() == copy.read_bytes()
    mine = mine and not original.resolve().is_relative_to(folder.resolve())
    return f"{file if mine else copy}:{name}:{weight:g}"


def scorer_of(trained: TrainOptions, own: Sequence[str], trust_remote_code: bool) -> Scorer:
    """The reward to score with: that of --reward, else the one the checkpoint was trained with.

    A checkpoint's copy of a reward runs only when it is trusted; raises OptionError otherwise.
    """
    if own:
        return Scorer(own)
    for spec in trained.reward:
        file = Path(split_reward(spec)[0])
        if file.name.startswith(REWARD_FILE.partition("{")[0]) and not trust_remote_code:
            raise OptionError(f"{file}: this checkpoint was trained with a reward of its own, and the original file is "
                              "gone or was changed since. Read the copy and allow it with --trust_remote_code, or "
                              "give --reward (--reward size for the built-in one)")
    return Scorer(trained.reward)
