"""Write a trained model as a folder to serve: plain transformers and vLLM load it, adapters are merged.

    python export.py --checkpoint_path outputs/vlm_grpo/step_001000 --output_path served

Some products of the training sheet are answered greedily by the checkpoint, and by the folder once it is read back
from the disk. Where they differ nothing is written. Weights are float32. Beside them: generation_config.json with the
sampling of training, which transformers and vLLM take as their default, and serving.json with the exact prompt and an
example, its photos in example/.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    from config import ExportOptions
    from ground.commands import start

    start(ExportOptions, "Write a trained model as a folder to serve; adapters are merged.")

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from config import ExportOptions, TrainOptions
from ground.files import whole_folder
from ground.options import sheet_options
from models.family import ModelError
from models.loading import stop_token_ids
from models.lora import base_of, is_adapter
from models.policy import Policy
from own_reward import Scorer
from prompts import build_prompt, read_template
from rollout import Group, rollout_groups
from sheets.cells import DataError
from sheets.samples import Sample, load_photos, load_samples
from sheets.summary import require_usable
from training.checkpoint import save_model
from training.trained import TrainedModel, open_trained, options_of


def main(options: ExportOptions) -> None:
    """Write the model to output_path; raises ModelError, and writes nothing, when it answers otherwise."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    trained = options_of(options.checkpoint_path) or TrainOptions()
    if trained.quantize != "none":
        logger.warning(f"this adapter was trained on a base in {trained.quantize}; it is merged into, and compared on, "
                       "the base in full, whose answers can differ from those seen in training")
    trained = replace(trained, dtype="float32", quantize="none")
    samples = choose_samples(options, trained)
    with whole_folder(Path(options.output_path)) as folder:
        expected = write_model(options, trained, samples, folder)
        merged = open_trained(trained, str(folder), None, options.device, options.trust_remote_code, Scorer())
        gap = compare_answers(expected, answer(merged, samples))
    print(f"{len(expected)} products answered alike, log-probs within {gap:.1e}; model to serve: {options.output_path}")


def write_model(options: ExportOptions, trained: TrainOptions, samples: Sequence[Sample], folder: Path) -> list[Group]:
    """Answer with the checkpoint, then write it, merged, with what a server needs to know; returns the answers."""
    adapter = is_adapter(options.checkpoint_path)
    base_path = options.model_path or (base_of(options.checkpoint_path) if adapter else trained.model_path)
    model = open_trained(trained, base_path if adapter or options.model_path else "", options.checkpoint_path,
                         options.device, options.trust_remote_code, Scorer())
    family = model.policy.family
    audio = family.audio_weights(base_path) if options.keep_audio else None
    expected = answer(model, samples)
    photos = write_photos(model, expected[0], folder)
    if adapter:
        model.policy.merge_adapter()
    save_model(model.policy, trained, base_path if adapter else options.checkpoint_path, folder)
    if audio is not None:
        family.save_audio(audio, base_path, folder)
    sampling = sampling_settings(model.policy, trained)
    _update_json(folder / "generation_config.json", {"do_sample": True, **sampling})
    _update_json(folder / "serving.json", serving_notes(model.policy, trained, expected[0], photos, sampling))
    return expected


def write_photos(model: TrainedModel, group: Group, folder: Path) -> list[str]:
    """Write the photos that are in a product's prompt, as they were before the model's processor; returns the names."""
    photos, encoder = load_photos(group.sample), model.encoder()
    while not torch.equal(encoder.encode_parts(group.sample.text, photos).input_ids, group.prompt.input_ids):
        photos.pop()  # --max_prompt_length drops them from the end
    names = [f"example/photo_{number}.png" for number in range(1, len(photos) + 1)]
    if photos:
        (folder / "example").mkdir()
    for photo, name in zip(photos, names, strict=True):
        photo.save(folder / name)
    return names


def sampling_settings(policy: Policy, trained: TrainOptions) -> dict[str, Any]:
    """The sampling of training, by the names that transformers and vLLM share."""
    return {"temperature": trained.temperature, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0,
            "max_new_tokens": trained.max_length, "eos_token_id": stop_token_ids(policy.model, policy.tokenizer)}


def serving_notes(policy: Policy, trained: TrainOptions, group: Group, photos: Sequence[str], sampling: dict[str, Any]
                  ) -> dict[str, Any]:
    """What decides an answer beside the weights: wording by number of photos, photo budget, sampling; an example."""
    template = read_template(trained.prompt_file)
    wording = {count: build_prompt("{text}", range(count), trained.prompt_language, template) for count in range(6)}
    ids = group.prompt.input_ids.tolist()
    return {
        "user_message": {f"{count} photos": text for count, text in wording.items()},
        "photos": {"at_most": 5, "before_the_text": True, "max_pixels": trained.max_pixels,
                   "max_slice_nums": trained.max_slice_nums, "max_prompt_length": trained.max_prompt_length},
        "sampling": sampling,
        "reading": "the first JSON object with length, width, height (reward.read_answer); sort before comparing",
        "example": {"text": group.sample.text, "photos": list(photos), "prompt_ids": ids,
                    "prompt": policy.tokenizer.decode(ids), "greedy_answer": group.answers[0]},
    }


def _update_json(path: Path, content: dict[str, Any]) -> None:
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    earlier.pop("_from_model_config", None)  # it would let transformers throw these settings away
    path.write_text(json.dumps(earlier | content, ensure_ascii=False, indent=2), encoding="utf-8")


def choose_samples(options: ExportOptions, trained: TrainOptions) -> list[Sample]:
    """The first products of the sheet; texts made up here when the training sheet is gone."""
    path = options.data_path or trained.data_path
    if options.data_path or Path(path).is_file():
        cache = options.image_cache_dir or trained.image_cache_dir
        samples, problems = load_samples(path, cache, trained.missing_photos, require_label=False,
                                         reading=sheet_options(options, trained, bool(options.data_path)))
        require_usable(samples, problems, path, cache)
        return samples[:options.num_products]
    logger.warning(f"{path}: the training sheet is gone; answers are compared on made-up texts without photos "
                   "(--data_path takes another sheet)")
    return [Sample(row=number, product_id="-", text=f"storage box no. {number}, {10 * number} x 20 x 15 cm", label=(),
                   photos=(), sheet="made up") for number in range(1, options.num_products + 1)]


def answer(model: TrainedModel, samples: Sequence[Sample]) -> list[Group]:
    """Answer each product greedily; raises DataError naming the first that can't be answered."""
    groups, failures = rollout_groups(model.encoder(), samples, 1, None, model.options.max_length, "export", 1)
    if failures:
        raise DataError(f"not answered, so the export can't be checked: {failures[0]}")
    return groups


def compare_answers(expected: Sequence[Group], found: Sequence[Group]) -> float:
    """Say how far apart the log-probs of the same ids are; raises ModelError with the first answer that differs."""
    gaps = [0.0]
    for one, other in zip(expected, found, strict=True):
        if not torch.equal(one.completions[one.action_mask], other.completions[other.action_mask]):
            sample = one.sample
            raise ModelError(f"the written model answers otherwise, so nothing is kept. {sample.sheet} row "
                             f"{sample.row}: checkpoint {one.answers[0]!r}, written {other.answers[0]!r}")
        gaps.append(float((one.old_log_probs - other.old_log_probs).abs().max()))
    return max(gaps)
