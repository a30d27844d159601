"""TRL's side of the benchmark: its own GRPOTrainer, unchanged, with meters around its methods.

In its favour: photos lie decoded in memory, completion rows only are scored, nothing is logged, evaluated or saved,
the micro-batch is the fastest of those tried, and of the step before, whose inputs it still holds while it generates,
only a small one comes before memory is measured. Not in TRL: the processor class and the end of text, see below and
cases.py.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoTokenizer, PrinterCallback, ProcessorMixin, TrainerCallback
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from cases import ANSWER_TOKENS, LABEL, MARKERS, Case, seeded_rewards
from meter import Meter
from reward import calculate_reward
from sheets.samples import Sample, load_photos


class PhotoProcessor(Qwen2_5_VLProcessor):
    """Qwen's processor without its video processor, which wants torchvision; metered."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        self.image_token, self.video_token = MARKERS[:2]
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(list(MARKERS[:2]))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.meter = Meter()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare texts and photos."""
        with self.meter.phase("prepare"):
            return super().__call__(*args, **kwargs)


class MeteredTrainer(GRPOTrainer):
    """GRPOTrainer with its phases charged to a meter; what it does is unchanged."""

    meter = Meter()
    worked: dict[str, Any] = {}  # the last step's prompt ids and number of generated tokens

    def _generate(self, *args: Any) -> Any:
        with self.meter.phase("generate"):
            return super()._generate(*args)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        out = super()._generate_and_score_completions(inputs)
        self.worked = {"prompt_ids": out["prompt_ids"][0], "generated": int(out["completion_mask"].sum())}
        return out

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model is not self.ref_model:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with self.meter.phase("reference"):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)


class StepEnds(TrainerCallback):
    """Call a function before the first step and another at the end of each optimizer step."""

    def __init__(self, begin: Callable[[], None], then: Callable[[], None]):
        self.begin = begin
        self.then = then

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All is set up, no data has been fetched."""
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step done: weights moved, gradients dropped."""
        self.then()


def make_trainer(model_folder: Path, output: Path, case: Case, samples: Sequence[Sample], micro_batch: int,
                 checkpointing: bool, meter: Meter, model: Any = None, per_step: int = 1,
                 adapter: tuple[int, list[str]] | None = None, vllm: bool = False, **changes: Any) -> MeteredTrainer:
    """Set a trainer up for one optimizer step on each per_step samples, in order.

    model: None for that of the folder. adapter: its rank and the modules that get one. changes: of GRPOConfig.
    """
    warnings.filterwarnings("ignore", category=UserWarning)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    processor = PhotoProcessor(Qwen2VLImageProcessorPil.from_pretrained(model_folder), tokenizer,
                               chat_template=tokenizer.chat_template)
    if model is None:
        model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    model.model.visual.requires_grad_(case.train_vision)
    prompts = [[{"role": "user", "content": sample.text}] for sample in samples]
    photos = [load_photos(sample) for sample in samples]
    dataset = Dataset.from_dict({"row": list(range(len(samples)))})
    dataset.set_transform(lambda batch: {"prompt": [prompts[row] for row in batch["row"]],
                                         "images": [photos[row] for row in batch["row"]]})
    rewards = seeded_rewards(case)

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        for completion in completions:
            calculate_reward(completion[0]["content"], LABEL)
        return rewards * (len(completions) // len(rewards))

    settings = dict(
        output_dir=str(output), use_cpu=True, bf16=False, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=per_step * case.group_size // micro_batch, num_generations=case.group_size,
        max_completion_length=ANSWER_TOKENS, temperature=1.0, top_p=1.0, top_k=0, beta=0.01, loss_type="grpo",
        learning_rate=1e-6, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch",
        gradient_checkpointing=checkpointing, max_steps=len(samples) // per_step, shuffle_dataset=False,
        report_to="none", logging_strategy="no", save_strategy="no", eval_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
        generation_kwargs={"suppress_tokens": tokenizer.convert_tokens_to_ids(list(MARKERS))})
    if vllm:  # not tried: it reads the weights from the disk, and knows no tokens to suppress
        model.save_pretrained(model_folder)
        model.config.name_or_path = str(model_folder)
        settings |= {"use_vllm": True, "vllm_mode": "colocate", "generation_kwargs": None}
    lora = LoraConfig(r=adapter[0], lora_alpha=2 * adapter[0], target_modules=adapter[1]) if adapter else None
    trainer = MeteredTrainer(model, reward, GRPOConfig(**settings | changes), dataset, processing_class=processor,
                             peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    trainer.meter = processor.meter = meter
    return trainer


def run_steps(trainer: MeteredTrainer, then: Callable[[int], None]) -> None:
    """Train; `then` is called with each step's number, the meter charged, and the meter restarts after it."""
    numbers = count()

    def end() -> None:
        trainer.meter.charge()
        then(next(numbers))
        trainer.meter.restart()

    trainer.add_callback(StepEnds(trainer.meter.restart, end))
    trainer.train()


def reference_log_probs(trainer: MeteredTrainer, photos: list[Any], prompt_ids: torch.Tensor,
                        completions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score answers (N, T) as TRL does, under its reference, over the whole vocabulary and without the markers."""
    rows, columns = completions.shape
    ids = torch.cat([prompt_ids.expand(rows, -1), completions], 1)
    pixels = trainer.processing_class.image_processor(photos * rows, return_tensors="pt")
    inputs = {"mm_token_type_ids": (ids == trainer.processing_class.image_token_id).long(), **pixels}
    with torch.no_grad():
        scored, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.ref_model, ids, torch.ones_like(ids), columns, num_images=[len(photos)] * rows, **inputs)
        logits = trainer.ref_model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
    logits = logits[:, -columns - 1:-1].float()
    logits[..., trainer.processing_class.tokenizer.convert_tokens_to_ids(list(MARKERS))] = -torch.inf
    return scored, logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]
