"""Make the embedded default: a tiny MiniCPM-V-4.6, a catalogue drawn here, a warm-up in place of pretraining.

    python demo.py                                      # writes demo/, about a minute on one core; then cached
    python train_vlm_parallel.py --config configs/demo.yaml     # GRPO on it
    python demo.py --real --output_dir demo_real        # or real language weights, and product texts without photos

A product's text names its category and the spacing of the measuring grid (5, 10 or 20 cm); its two photos show it
from the front and from the side on that grid. Size = grid cells x spacing: neither text nor photos are enough.
The warm-up, which stands in for pretraining, learns from other products: to see from their right sizes, then, for fewer
steps, to answer with sizes of which cells were overlooked, so that GRPO has something left to teach.
"""

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt option answer at once
    from config import DemoOptions
    from ground.commands import start

    start(DemoOptions, "Make the embedded default: tiny model, catalogue, photos.")

import hashlib
import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from loguru import logger
from PIL import Image, ImageDraw
from torch import Tensor, nn

from config import DemoOptions
from evidence.report import write_sheet
from examples import product_texts, smollm2
from ground.commands import TIMED, log_to_console
from ground.files import whole_folder
from models.family import Prompt
from models.policy import Policy
from models.trainable import set_trainable
from prompts import build_prompt
from reward import score_answer
from rollout import draw_uniforms
from sheets.samples import cached_photo_path

PIXELS, CELLS = 64, 8  # a photo's side in pixels and in grid cells
CELL = PIXELS // CELLS
FEWEST, MOST = 2, 8  # cells that a side may take
SPACINGS = (5, 10, 20)  # cm
COLOURS = {"mug": (70, 110, 180), "box": (170, 120, 60), "lamp": (200, 160, 40), "chair": (120, 70, 40),
           "bag": (60, 130, 90), "shelf": (140, 140, 150), "vase": (150, 60, 110), "toy": (210, 80, 60)}
TEMPLATE = "{text}"  # the tiny model has learnt what is asked; a real one is told by prompts.py
OVERLOOKED = {0: 0.3, 1: 0.4, 2: 0.3}  # cells of a side: share. Perfect imitation: 0.77, 2.7 % within 10 %
LESSONS, WARM_UP_BATCH, LOG_EVERY = 2500, 16, 50
SEEING_LR, ANSWERING_LR, ANSWERING_STEPS = 5e-3, 2e-3, 80  # of the warm-up's two parts
# The first part goes on, so many steps at a time, until its loss is this low: some seeds learn to count late.
SEEN, MORE_STEPS, MORE_LR, ROUNDS = 0.08, 100, 3e-3, 5
MARKERS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
           "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
           "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
CHAT = ("{% for message in messages %}<|im_start|>{% for part in message.content %}{% if part.type == 'image' %}"
        "<|image_pad|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}")


@dataclass(frozen=True)
class Product:
    """One product of the catalogue; cells = (length, width, height)."""

    category: str
    spacing: int
    cells: tuple[int, int, int]

    @property
    def text(self) -> str:
        """What the sheet says of it."""
        return f"{self.category}, grid {self.spacing} cm"

    @property
    def label(self) -> tuple[int, ...]:
        """Its size in cm."""
        return tuple(cells * self.spacing for cells in self.cells)

    def photos(self, rng: random.Random) -> list[Image.Image]:
        """Draw it from the front (width x height) and from the side (length x height)."""
        length, width, height = self.cells
        return [draw_photo(self.category, width, height, rng), draw_photo(self.category, length, height, rng)]


def draw_product(rng: random.Random) -> Product:
    """Make up a product."""
    cells = tuple(rng.randint(FEWEST, MOST) for _ in range(3))
    return Product(rng.choice(sorted(COLOURS)), rng.choice(SPACINGS), cells)


def draw_photo(category: str, wide: int, high: int, rng: random.Random) -> Image.Image:
    """Draw one view: the product to scale, standing at the left end of a measuring grid."""
    photo = Image.new("RGB", (PIXELS, PIXELS), (245, 245, 240))
    pen = ImageDraw.Draw(photo)
    for at in range(0, PIXELS, CELL):
        pen.line([(at, 0), (at, PIXELS)], fill=(205, 205, 205))
        pen.line([(0, at), (PIXELS, at)], fill=(205, 205, 205))
    body = tuple(min(255, max(0, channel + rng.randint(-15, 15))) for channel in COLOURS[category])
    pen.rectangle([0, PIXELS - high * CELL, wide * CELL - 1, PIXELS - 1], fill=body,
                  outline=tuple(channel // 2 for channel in body))
    return photo


def answer_text(sizes: Sequence[int]) -> str:
    """Write an answer as the model is to give it."""
    return json.dumps(dict(zip(("length", "width", "height"), sizes, strict=True)) | {"unit": "cm"})


def make_tokenizer(seed: int) -> Any:
    """Train a byte-level BPE with single digits on the catalogue's own wording."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"tokenizer/{seed}")
    products = [draw_product(rng) for _ in range(800)]
    trainer = trainers.BpeTrainer(vocab_size=512, show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *MARKERS.values()],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text for product in products
                                   for text in (product.text, answer_text(product.label))], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   extra_special_tokens=MARKERS)
    fast.chat_template = CHAT
    return fast


def make_model(tokenizer: Any, seed: int) -> tuple[nn.Module, Any]:
    """Build the tiny model, just under a million parameters, and its image processor."""
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    torch.manual_seed(seed)
    text = {"model_type": "qwen3_5_text", "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 256,
            "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 4096, "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
                                "mrope_section": [4, 4, 4]}}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": PIXELS, "patch_size": 16}
    model = MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(
        text_config=text, vision_config=vision, insert_layer_id=0, image_size=PIXELS, downsample_mode="4x",
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id, tie_word_embeddings=True))
    # transformers initialises tower and merger for weights that are loaded later; from scratch they need this.
    for part in (model.model.vision_tower, model.model.merger):
        for name, weight in part.named_parameters():
            if weight.dim() >= 2 and "position" not in name:
                nn.init.xavier_uniform_(weight.view(len(weight), -1))
    processor = MiniCPMV4_6ImageProcessorPil(max_slice_nums=1, scale_resolution=PIXELS, patch_size=16,
                                             downsample_mode="4x", use_image_id=False)
    return model, processor


def encode(policy: Policy, product: Product, rng: random.Random) -> Prompt:
    """Make a product's prompt without going through files."""
    photos = product.photos(rng)
    return policy.encode_prompt(build_prompt(product.text, photos, template=TEMPLATE), photos)


def miscounted(product: Product, rng: random.Random) -> list[int]:
    """Size a product as one would who overlooks cells of the grid, in cm."""
    missed = rng.choices(list(OVERLOOKED), list(OVERLOOKED.values()), k=3)
    return [max(1, cells - some) * product.spacing for cells, some in zip(product.cells, missed, strict=True)]


def warm_up(policy: Policy, options: DemoOptions) -> float:
    """Imitate right sizes for options.warm_up_steps and until the model sees, then miscounted ones; returns what
    sampled answers then earn."""
    rng = random.Random(f"warm-up/{options.seed}")
    products = [draw_product(rng) for _ in range(LESSONS)]
    prompts = [encode(policy, product, rng) for product in products]
    labels = [product.label for product in products]
    loss = imitate(policy, prompts, labels, options.warm_up_steps, SEEING_LR, rng)
    for _ in range(ROUNDS):
        if loss > SEEN:
            loss = imitate(policy, prompts, labels, MORE_STEPS, MORE_LR, rng)
    if loss > SEEN:
        logger.warning(f"the model hardly sees yet: its loss on right sizes is {loss:.2f} still, not {SEEN}, so that "
                       "training will gain little; take another --seed")
    imitate(policy, prompts, [miscounted(product, rng) for product in products], ANSWERING_STEPS, ANSWERING_LR, rng)
    probe = [draw_product(rng) for _ in range(96)]
    return sampled_reward(policy, probe, [encode(policy, product, rng) for product in probe], f"{options.seed}/probe")


def imitate(policy: Policy, prompts: Sequence[Prompt], sizes: Sequence[Sequence[int]], steps: int, lr: float,
            rng: random.Random) -> float:
    """Fine-tune all weights on answers that give these sizes, one for each prompt; returns the mean loss of the last
    LOG_EVERY steps."""
    tokenizer = policy.tokenizer
    lessons = [(prompt, torch.tensor(tokenizer(answer_text(some))["input_ids"] + [tokenizer.eos_token_id]))
               for prompt, some in zip(prompts, sizes, strict=True)]
    parameters = set_trainable(policy, train_vision=True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    losses = deque(maxlen=LOG_EVERY)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = rng.choices(lessons, k=WARM_UP_BATCH)
        answers, mask = pad_answers([answer for _, answer in batch])  # (B, T), (B, T)
        log_probs, _ = policy.log_probs([prompt for prompt, _ in batch], answers, mask, temperature=1.0)
        loss = -log_probs.sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % LOG_EVERY == 0:
            logger.info(f"warm-up step {step + 1} of {steps}: loss {fmean(losses):.3f}")
    return fmean(losses)


def pad_answers(answers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack answers of unequal length: ids and mask, both (B, T)."""
    ids = nn.utils.rnn.pad_sequence(list(answers), batch_first=True)
    lengths = torch.tensor([len(answer) for answer in answers])
    return ids, torch.arange(ids.shape[1])[None] < lengths[:, None]


def sampled_reward(policy: Policy, products: Sequence[Product], prompts: Sequence[Prompt], seed: str) -> float:
    """Sample two answers a product at temperature 1 and average the rewards."""
    with torch.no_grad():
        features = policy.photo_features(prompts)
    generation = policy.sample(prompts, features, draw_uniforms(seed, 2 * len(prompts), 24), temperature=1.0)
    answers = policy.answers(generation.completions, generation.action_mask)
    return fmean(score_answer(answer, products[index // 2].label).reward for index, answer in enumerate(answers))


def write_catalogue(folder: Path, name: str, products: Iterator[Product], rng: random.Random) -> None:
    """Write a sheet of products and their photos into the cache."""
    cache = folder / "image_cache"
    cache.mkdir(exist_ok=True)
    rows = []
    for index, product in enumerate(products):
        sku = f"{name}-{index:04d}"
        addresses = [f"https://demo.invalid/{sku}/{view}.png" for view in ("front", "side")]
        for address, photo in zip(addresses, product.photos(rng), strict=True):
            photo.save(cached_photo_path(address, cache))
        rows.append({"sku_id": sku, "category": product.category, "text": product.text, "sku_img": addresses[0],
                     "spu_img_1": addresses[1], "label": " ".join(str(size) for size in product.label)})
    write_sheet(folder / f"{name}.xlsx", {"products": rows})


def fingerprint(options: DemoOptions) -> str:
    """Tell whether what lies in the folder was made by this code with these options."""
    files = [__file__, *([product_texts.__file__, smollm2.__file__] if options.real else [])]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files) + repr(options).encode()).hexdigest()


def make_demo(options: DemoOptions) -> Path:
    """Write the demo folder, unless it is there already: model/, catalogue.xlsx, held_out.xlsx, image_cache/."""
    torch.set_num_threads(1)  # two threads cost double the CPU for the same wall time at this size
    final = Path(options.output_dir)
    stamp = final / "made_by"
    if stamp.is_file() and stamp.read_text() == fingerprint(options):
        logger.info(f"{final}/ is up to date")
        return final
    with whole_folder(final) as folder:
        what = fill_real_folder(folder, options) if options.real else fill_folder(folder, options)
        (folder / "made_by").write_text(fingerprint(options))
    logger.info(f"made {final}/: {what}")
    return final


def fill_real_folder(folder: Path, options: DemoOptions) -> str:
    """Write real language weights under a small vision tower and sheets of product texts; says what was made."""
    product_texts.write_sheets(folder, options.products, options.held_out, options.seed)
    smollm2.save_model(folder / "model", options.seed)
    return f"real language weights, {options.products} product texts, {options.held_out} held out"


def make_parts(seed: int) -> tuple[Any, nn.Module, Any]:
    """Make tokenizer, model and image processor."""
    tokenizer = make_tokenizer(seed)
    return tokenizer, *make_model(tokenizer, seed)


def fill_folder(folder: Path, options: DemoOptions,
                make: Callable[[int], tuple[Any, nn.Module, Any]] = make_parts) -> str:
    """Write sheets, photos, prompt and model; says what reward the model's sampled answers earn."""
    rng = random.Random(f"catalogue/{options.seed}")
    for name, count in (("catalogue", options.products), ("held_out", options.held_out)):
        write_catalogue(folder, name, (draw_product(rng) for _ in range(count)), rng)
    (folder / "prompt.txt").write_text(TEMPLATE, encoding="utf-8")
    tokenizer, model, processor = make(options.seed)
    policy = Policy(model, tokenizer, processor, exact_path=True)  # the warm-up has one answer a prompt: none to share
    reached = warm_up(policy, options)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder / "model")
    return f"sampled reward {reached:.3f} before GRPO"


def main(options: DemoOptions) -> None:
    """Make it, with the time of day before every line."""
    log_to_console(TIMED)
    make_demo(options)
