"""TRL's arm of bench/learning.py: its own GRPOTrainer, unchanged, at the settings that learnt most in the trials.

In its favour: photos lie decoded in memory, all answers of a generation are scored in one pass where the update takes
them so, nothing is logged or saved, and what it spends on setting up is not counted.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from reward import calculate_reward
from sheets.samples import Sample, load_photos
from trl_side import PhotoProcessor


@dataclass(frozen=True)
class TrlSettings:
    """What TRL's trainer was tried with; the rest is as ours."""

    lr: float = 1e-3
    micro_batch: int = 48  # answers a pass
    updates: int = 2  # optimizer steps a generation
    loss_type: str = "dapo"
    beta: float = 0.003


class Watch(TrainerCallback):
    """Call a function before the first step and after each; it says whether to stop."""

    def __init__(self, begin: Callable[[], None], after: Callable[[int], bool]):
        self.begin, self.after = begin, after

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All is set up."""
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An optimizer step was made."""
        control.should_training_stop = self.after(state.global_step)


def make_trainer(task: Path, output: Path, products: list[Sample], settings: TrlSettings, group_size: int,
                 batch_size: int, max_length: int, optimizer_steps: int, seed: int, watch: Watch) -> GRPOTrainer:
    """Set a trainer up: batch_size products x group_size answers a generation, the learning rate as in ours."""
    warnings.filterwarnings("ignore", category=UserWarning)
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    processor = PhotoProcessor(Qwen2VLImageProcessorPil.from_pretrained(task / "model"), tokenizer,
                               chat_template=tokenizer.chat_template)
    model = AutoModelForImageTextToText.from_pretrained(task / "model", dtype=torch.float32)
    prompts = [[{"role": "user", "content": sample.text}] for sample in products]
    photos = [load_photos(sample) for sample in products]
    dataset = Dataset.from_dict({"row": list(range(len(products)))})
    dataset.set_transform(lambda batch: {"prompt": [prompts[row] for row in batch["row"]],
                                         "images": [photos[row] for row in batch["row"]],
                                         "row": batch["row"]})

    def reward(completions: list[Any], row: list[int], **kwargs: Any) -> list[float]:
        return [calculate_reward(completion[0]["content"], products[index].label)
                for completion, index in zip(completions, row, strict=True)]

    answers = batch_size * group_size
    per_update = answers // settings.updates
    config = GRPOConfig(
        output_dir=str(output), use_cpu=True, bf16=False, per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=per_update // settings.micro_batch,
        steps_per_generation=answers // settings.micro_batch, num_generations=group_size,
        max_completion_length=max_length, temperature=1.0, top_p=1.0, top_k=0, beta=settings.beta,
        loss_type=settings.loss_type, learning_rate=settings.lr, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch",
        adam_beta1=0.9, adam_beta2=0.95, gradient_checkpointing=False, max_steps=optimizer_steps, seed=seed,
        report_to="none", logging_strategy="no", save_strategy="no", eval_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False)
    trainer = GRPOTrainer(model, reward, config, dataset, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    return trainer
