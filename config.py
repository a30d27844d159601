"""Every option, declared once: what a user can say, its type, its range and the sentence that --help shows.

How options are parsed and checked stands in ground/options.py.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

DEFAULT_DATA_PATH = "data.xlsx"
REWARD = ("a reward of your own, file.py:function, or file.py:function:weight; repeat to add several up; size is the "
          "built-in one, which is alone when none is given")
REWARD_AGAIN = "score with this reward (see train_vlm_parallel.py --help); default: the one of the training run"
TRUST_REMOTE_CODE = ("run the Python files that come with the model, with your rights; MiniCPM-o and the MiniCPM-V "
                     "before 4.6 need it")
WORKERS = ("processes that prepare photos ahead of the model and hold none of it; starting them takes some 5 CPU "
           "seconds; 0: a thread of this process; default: 0 on a CPU, on a GPU one a CPU core but one, 8 at most")


def option(default: Any, text: str, within: str = "", positional: bool = False) -> Any:
    """Declare an option: its default and the sentence that --help shows.

    within: the interval that a number, or each of several, must lie in, such as "[0, 1)" or "(0, inf)".
    """
    metadata = {"help": text, "within": within, "positional": positional}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelOptions:
    """Model"""

    model_path: str = option(
        "openbmb/MiniCPM-o-2_6", "folder or hub name of the policy; its frozen copy is the reference policy")
    checkpoint_path: str | None = option(
        None, "start from these weights instead: a checkpoint folder or a plain model_stepN.pt state dict; the "
              "reference policy stays model_path; with lora_rank a checkpoint folder with an adapter")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    train_vision: bool = option(False, "train the vision tower and its projection too, not only the language model")
    # No lora_dropout: sampling and update must see the same network.
    lora_rank: int | None = option(
        None, "train adapters of this rank on every linear layer of the language model instead of "
              "its weights; the reference policy is the same model with the adapters off; default: "
              "train the weights", within="(0, inf)")
    lora_alpha: int | None = option(
        None, "adapters are scaled by lora_alpha / lora_rank; default: 2 * lora_rank", within="(0, inf)")
    quantize: Literal["none", "4bit"] = option(
        "none", "4bit: keep the frozen model under the adapters in 4 bits; needs lora_rank and bitsandbytes")
    max_slice_nums: int | None = option(
        None, "slices a photo may be cut into; default: the model's own; for models that cut photos, as MiniCPM "
              "and SmolVLM do and Qwen does not", within="(0, inf)")
    max_pixels: int | None = option(
        None, "pixels of a photo at most, larger ones are scaled down; default: the model's own", within="(0, inf)")
    exact_path: bool = option(
        False, "compute every answer on a row of its own instead of a group that shares its prompt: the same "
               "numbers but for rounding, slower")
    gradient_checkpointing: bool = option(
        False, "keep only what enters a layer and compute the rest again in the backward pass: less memory, a third "
               "more time")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute; auto takes the GPU when there is one")
    gpu_ids: tuple[int, ...] = option(
        (), "GPUs of this machine to train on, a process each: 0 1 2 3; default: the first one. For more machines: "
            "torchrun")
    sharding: Literal["none", "fsdp", "hsdp"] = option(
        "none", "with several processes, none: each holds all weights and gradients; fsdp: each holds its share of "
                "them; hsdp: each holds its share of its machine's copy, so that between machines nothing goes but "
                "gradients, once an optimizer step")
    offload: bool = option(
        False, "with sharding fsdp, on one GPU too: leave weights, gradients and Adam's moments in the host's memory, "
               "which takes a step of the optimizer as well, and bring one layer after the other to the GPU; slower, "
               "for GPUs with little memory")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute dtype; trainable weights stay float32; auto takes bfloat16 on a GPU that has it, else "
                "float32; on a GPU products of float32 matrices are taken in TF32")
    num_threads: int | None = option(None, "CPU threads for torch; default: torch's own choice", within="(0, inf)")


@dataclass
class SheetOptions:
    """How to read a sheet"""

    column: list[str] = option(
        [], "FIELD=NAME, what a column of your sheet is: text, label (or length, width, height and unit), sku_id, "
            "category or photo; repeat for each; default: columns of these names, photos in sku_img, spu_img_1, ..., "
            "or without these in columns whose cells look like photo addresses")
    sheet_name: str | None = option(None, "worksheet of a workbook; default: the first that is not hidden")
    encoding: str | None = option(
        None, "encoding of a .csv, .tsv, .json or .jsonl; default: UTF-8, or a guess that is logged")


MissingPhotos = Literal["use_rest", "drop_row", "text_only", "placeholder"]
PartialLabels = Literal["axis", "largest", "skip"]


@dataclass
class DataOptions(SheetOptions):
    """Data"""

    data_path: str = option(
        DEFAULT_DATA_PATH, "the sheet: text, label, photo addresses, sku_id; .xlsx, .xlsm, .xls, .xlsb, .ods, .csv, "
                           ".tsv, .json, .jsonl or .parquet")
    image_cache_dir: str = option("image_cache_new", "folder with the photos, named md5(address) + extension")
    missing_photos: MissingPhotos = option(
        "use_rest", "a row with missing or broken photos: use_rest trains on the others and leaves the row out when "
                    "none is left; drop_row leaves it out when any is missing; text_only trains even without any; "
                    "placeholder puts grey pictures in their place, to try things out")
    partial_labels: PartialLabels = option(
        "axis", "labels of one or two sizes: axis compares those that name their axes by these, the others largest "
                "first; largest compares all largest first; skip leaves such rows out")
    on_bad_row: Literal["skip", "stop"] = option(
        "skip", "rows that can't be trained on: skip names them and trains on the others; stop ends before any weight "
                "loads")
    download_missing: bool = option(
        False, "fetch photos that are not in image_cache_dir before training, as download_images.py does; otherwise "
               "the network is never used")
    eval_path: str | None = option(None, "a sheet of held-out products; instead of eval_fraction")
    eval_sheet_name: str | None = option(None, "worksheet of eval_path")
    eval_fraction: float = option(
        0.1, "share of the products held out from data_path, chosen by a hash of the product", within="[0, 1)")
    prompt_language: Literal["zh", "en"] = option("zh", "wording of the prompt")
    prompt_file: str | None = option(None, "your own wording: a UTF-8 text file that contains {text}")
    max_prompt_length: int | None = option(
        None, "tokens of a prompt at most; a longer one loses whole photos from the end; default: "
              "no limit", within="(0, inf)")


@dataclass
class FetchOptions:
    """How to fetch photos"""

    workers: int = option(16, "photos fetched at the same time", within="(0, inf)")
    retries: int = option(
        4, "further tries after a busy server, a broken connection or a body cut short", within="[0, inf)")
    timeout: float = option(20.0, "seconds to wait for a connection, and for the next bytes", within="(0, inf)")
    deadline: float = option(120.0, "seconds that one photo may take to arrive", within="(0, inf)")
    max_file_mb: int = option(20, "MiB of a photo, at most", within="(0, inf)")
    allow_private: bool = option(False, "fetch from private, loopback and link-local addresses too")


@dataclass
class RolloutOptions:
    """Rollout"""

    batch_size: int = option(16, "products a step on each process", within="(0, inf)")
    group_size: int = option(12, "candidates a product", within="(0, inf)")
    max_length: int = option(64, "new tokens of a candidate, at most", within="(0, inf)")
    temperature: float = option(0.7, "sampling temperature; log-probs are taken at the same one", within="(0, inf)")
    resample_flat: int = option(
        0, "times at most that a group whose answers all earn the same is sampled again; one that stays so is left out "
           "of the update; for when zero_variance_share is high, so that few groups steer a step; 0: all are kept, and "
           "such groups add their KL term alone", within="[0, inf)")
    rollout_batch_size: int = option(
        0, "products sampled together, halved where memory runs out; more is faster; 0: all of a step that fit a GPU, "
           "4 on a CPU", within="[0, inf)")
    prompt_cache_mb: int = option(
        512, "host memory for prepared prompts and photos, kept or ahead of time, in MiB; five photos of 800 x 800 "
             "pixels take about 60", within="[0, inf)")
    workers: int | None = option(None, WORKERS, within="[0, inf)")


@dataclass
class LossOptions:
    """Reward and loss"""

    reward: list[str] = option([], REWARD)
    kl_weight: float = option(
        0.01, "weight of the KL term towards the reference policy; 0 leaves it out of the loss", within="[0, inf)")
    ref_sync_every: int = option(
        0, "steps after which the reference policy moves to where the policy is; for long runs in which a growing "
           "kl_divergence holds back a policy that still gets better; 0: never. Not with lora_rank; checkpoints then "
           "hold the reference policy too", within="[0, inf)")
    ref_sync_mix: float = option(
        1.0, "how far it moves: its weights become (1 - ref_sync_mix) * its own + ref_sync_mix * the policy's; below 1 "
             "for moves that come often, 0.6 is usual", within="(0, 1]")
    clip_eps: float = option(0.2, "the ratio is clipped to [1 - clip_eps, 1 + clip_eps]", within="(0, 1)")
    clip_eps_high: float | None = option(None, "another upper clip: 1 + clip_eps_high (clip-higher)", within="(0, inf)")
    clip_ratio_c: float | None = option(
        None, "dual clip: a token of an answer worse than its group's mean costs so many times its advantage at most, "
              "however far its ratio has risen; for when grad_norm jumps late in a step of several minibatches or "
              "epochs; 3 is usual; default: no such bound", within="(1, inf)")
    ratio_level: Literal["token", "sequence"] = option(
        "token", "what has a ratio of its own: token, or sequence: an answer, the geometric mean of its tokens' ratios "
                 "(GSPO), for when single tokens clip wildly: long answers, several minibatches or epochs, models of "
                 "experts; such ratios lie close to 1, so take a clip_eps of about 0.0004")
    entropy_weight: float = option(
        0.0, "weight of the tokens' entropy, a reward of its own; for when entropy falls towards 0 while rewards are "
             "still low, so that the answers of a group are all alike; begin with 0.001: too much of it makes babble",
        within="[0, inf)")
    look_weight: float = option(
        0.0, "weight of a reward for looking: how far, in nats a token, the policy's answers lie from those that it "
             "would give to grey pictures, 2 at most (PAPO); for when run.py --ablate shows that blanked photos change "
             "little, so that the text alone decides; begin with 0.01: too much of it pays for odd answers instead, "
             "then entropy rises. An update takes twice the time and memory", within="[0, inf)")
    sft_weight: float = option(
        0.0, "weight of the supervised loss of sft_steps, added to each update: beside a product's sampled answers its "
             "label's is learnt; for when hardly any sampled answer is good, so that rewards have nothing to say yet, "
             "or when answers drift away from the labels' form; begin with 0.1", within="[0, inf)")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = option(
        "grpo", "grpo: mean over the tokens of an answer, then over answers; dapo: mean over all tokens; dr_grpo: sum "
                "over tokens divided by answers x max_length")
    scale_advantages: Literal["group", "batch", "none"] = option(
        "group", "what a group's advantages are divided by: group: its standard deviation; batch: that of all rewards "
                 "of the step, for when groups of little spread are mostly noise; none: nothing, for when a group "
                 "shall count by its spread")
    std_floor: float = option(
        0.0, "lower bound for that standard deviation, against noise blown up to full size", within="[0, inf)")
    scale_rewards_each: bool = option(
        False, "with several rewards, turn each into advantages by itself, add these up by the rewards' weights and "
               "divide by their deviation over the step (GDPO); for when one reward varies so much more than another "
               "that the other is not learnt: weights then say how much each counts, whatever its scale")
    mask_truncated: bool = option(False, "leave answers that hit max_length without a stop token out of the loss")


@dataclass
class OptimizerOptions:
    """Optimizer"""

    optimizer: Literal["adamw", "adamw_8bit"] = option(
        "adamw", "adamw_8bit: AdamW with its moments in 8 bits, 2 bytes a number that trains instead of 8; needs "
                 "bitsandbytes, not with sharding")
    lr: float = option(5e-6, "AdamW's peak learning rate", within="(0, inf)")
    sft_lr: float | None = option(
        None, "peak learning rate in the supervised steps of sft_steps; its course is the same, counted over all "
              "steps; default: lr", within="(0, inf)")
    lr_scheduler: Literal["constant", "linear", "cosine"] = option("constant", "course of the rate after the warm-up")
    min_lr_ratio: float = option(0.0, "linear and cosine end at this share of lr", within="[0, 1]")
    warmup_steps: int = option(0, "steps in which the rate rises linearly to lr", within="[0, inf)")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay, on matrices only", within="[0, inf)")
    adam_betas: tuple[float, float] = option((0.9, 0.999), "AdamW's betas", within="[0, 1)")
    adam_eps: float = option(
        1e-8, "AdamW's epsilon; larger, such as 1e-5, for when the first steps jump, or weights with next to no "
              "gradient wander: Adam moves those as far as any others", within="(0, inf)")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", within="(0, inf)")
    epochs: int = option(1, "passes over a step's buffer", within="(0, inf)")
    minibatch_size: int | None = option(
        None, "products an optimizer step on each process, at most: a step's products are cut into even parts; "
              "default: all of them", within="(0, inf)")
    micro_batch_size: int = option(
        1, "products a forward and backward pass, halved where memory runs out; changes memory and speed, not the "
           "result; 0 starts with what fits the GPU (on a CPU, with all)", within="[0, inf)")
    reduce_once: bool = option(
        False, "with sharding, add gradients up over the processes once an optimizer step instead of after each pass: "
               "less to send where the network is slow, but until then each GPU holds the whole gradient, 4 bytes for "
               "each number that trains; adapters are added up once in any case")
    max_bad_steps: int = option(
        5, "stop after so many steps in a row without an optimizer step: no answers, none that counts, or no finite "
           "loss and gradient", within="(0, inf)")
    max_kl: float = option(
        1.0, "warn when the mean KL from the reference, in nats a token, has risen by more since the first step; again "
             "when it has doubled", within="(0, inf)")
    min_entropy: float = option(
        0.1, "warn when the mean entropy has fallen below this share of the first step's; again when it has halved",
        within="[0, 1)")


@dataclass
class RunOptions:
    """Run"""

    max_steps: int = option(1000, "steps in all; one step is a rollout and its update", within="(0, inf)")
    sft_steps: int = option(
        0, "the first so many of max_steps are supervised: nothing is sampled, the policy learns to give each label, "
           "written in cm as the built-in wording asks, with the mean -log-prob of its tokens, stop token included, as "
           "the loss (one pass over batch_size products, by minibatch_size); for when untrained answers earn next to "
           "nothing or labels are plenty; as many as max_steps: fine-tuning on labels alone. The model behind them is "
           "the reference policy of the steps that follow, and is kept in their checkpoints; Adam's moments and the "
           "course of the learning rate go on", within="[0, inf)")
    output_dir: str = option("outputs/vlm_grpo", "checkpoints, options.yaml and train.log")
    overwrite_output_dir: bool = option(False, "throw away the checkpoints of an earlier run in output_dir")
    log_dir: str = option("runs/vlm_grpo_parallel", "TensorBoard logs")
    save_every: int = option(100, "steps between checkpoints; the last step is always saved", within="(0, inf)")
    keep_last: int = option(3, "checkpoints kept, the newest; 0 keeps all", within="[0, inf)")
    eval_every: int = option(100, "steps between evaluations on held-out products; 0 for none", within="[0, inf)")
    show_every: int = option(50, "steps between tables of candidates in TensorBoard; 0 for none", within="[0, inf)")
    eval_samples: int = option(1, "answers sampled a held-out product at each evaluation", within="(0, inf)")
    save_best: bool = option(True, "keep the checkpoint with the best held-out mean reward in output_dir/best")
    stop_after: int = option(
        0, "stop after so many evaluations in a row without a better held-out mean reward; 0: go "
           "on to max_steps", within="[0, inf)")
    seed: int = option(0, "seed of the data order and of every sampled token", within="[0, inf)")
    preflight: bool = option(
        True, "run the largest product forward and backward before the first step and say what memory it took")
    resume: str | None = option(
        None, "auto: go on from the newest whole checkpoint in output_dir; or a checkpoint folder")


@dataclass
class TrainOptions(RunOptions, OptimizerOptions, LossOptions, RolloutOptions, DataOptions, ModelOptions):
    """All options of a training run, flat."""


@dataclass
class CompareOptions(SheetOptions):
    """What to compare"""

    model_path: str | None = option(None, "the model before; default: the one the checkpoint was trained from")
    checkpoint_path: str = option("", "the model after: a checkpoint folder or a plain model_stepN.pt state dict")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    data_path: str | None = option(None, "the sheet; default: the held-out products of the training run")
    image_cache_dir: str | None = option(None, "folder with the photos; default: that of the training run")
    rows: Literal["held_out", "all"] = option("held_out", "held_out products only, or every row of the sheet")
    num_samples: int = option(
        4, "answers sampled a product with each model, at the training temperature", within="(0, inf)")
    greedy: bool = option(False, "only one greedy answer a product, no sampled ones")
    ablate: bool = option(False, "also answer without photos, with blank ones and with other products' photos")
    also: list[str] = option([], "another checkpoint or model to answer too, with its own options; repeat for more")
    reward: list[str] = option([], REWARD_AGAIN)
    accept_error: float = option(
        0.2, "share of wrong answers at most among those to be accepted without review", within="(0, 1)")
    max_products: int | None = option(None, "look at the first so many products only", within="(0, inf)")
    eval_batch_size: int = option(8, "products answered together; halved when memory runs out", within="(0, inf)")
    workers: int | None = option(None, WORKERS, within="[0, inf)")
    seed: int = option(0, "seed of the sampled answers", within="[0, inf)")
    output_dir: str | None = option(
        None, "where compare.html, .xlsx and .json go; default: compare/ beside the checkpoint")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    num_threads: int | None = option(None, "CPU threads for torch", within="(0, inf)")


@dataclass
class AnswerOptions(SheetOptions):
    """What to answer"""

    model_path: str = option("", "a model folder, hub name or checkpoint folder")
    checkpoint_path: str | None = option(None, "weights to use instead: a checkpoint folder or model_stepN.pt")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    text: str | None = option(None, "the product's text")
    image: list[str] = option([], "a photo's path or address; repeat for up to five")
    allow_private: bool = option(False, "fetch a photo from private, loopback and link-local addresses too")
    label: str | None = option(None, "the true size, if known: prints the reward")
    data_path: str | None = option(None, "a sheet instead of one product")
    image_cache_dir: str | None = option(None, "folder with photos by address; default: as in training")
    local_photos: bool = option(True, "take files that a sheet names by their path, too; false for strangers' sheets")
    output_path: str | None = option(None, "the sheet to write; default: the sheet's name + .answers.xlsx")
    num_samples: int = option(
        4, "answers sampled a product; the one that agrees most with the others counts, and how far they agree is the "
           "confidence; 1: one greedy answer, no confidence", within="(0, inf)")
    accept_at: float | None = option(None, "confidence from which an answer needs no review, as run.py prints it")
    reward: list[str] = option([], REWARD_AGAIN)
    prompt_language: Literal["zh", "en"] | None = option(None, "wording of the prompt; default: as in training")
    prompt_file: str | None = option(None, "your own wording; default: as in training")
    eval_batch_size: int = option(8, "products answered together; halved when memory runs out", within="(0, inf)")
    workers: int | None = option(None, WORKERS, within="[0, inf)")
    seed: int = option(0, "seed of the sampled answers", within="[0, inf)")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    num_threads: int | None = option(None, "CPU threads for torch", within="(0, inf)")


@dataclass
class CheckRewardOptions(SheetOptions):
    """What to explain"""

    answer: str | None = option(None, "an answer as a model gives it", positional=True)
    label: str | None = option(None, "the true size that goes with it")
    text: str = option("", "the product's text, for a reward of your own that reads it")
    reward: list[str] = option([], REWARD)
    data_path: str | None = option(None, "a sheet instead of one answer: answers its products in groups")
    model_path: str = option("", "the model that answers: a folder, hub name or checkpoint")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    image_cache_dir: str | None = option(None, "folder with the sheet's photos; default: as in training")
    prompt_language: Literal["zh", "en"] | None = option(None, "wording of the prompt; default: as in training")
    prompt_file: str | None = option(None, "your own wording; default: as in training")
    group_size: int = option(12, "answers a product", within="(0, inf)")
    temperature: float | None = option(None, "sampling temperature; default: that of training", within="(0, inf)")
    max_length: int | None = option(None, "new tokens of an answer at most; default: as in training", within="(0, inf)")
    max_products: int | None = option(64, "look at the first so many products only", within="(0, inf)")
    eval_batch_size: int = option(8, "products answered together; halved when memory runs out", within="(0, inf)")
    seed: int = option(0, "seed of the sampled answers", within="[0, inf)")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    num_threads: int | None = option(None, "CPU threads for torch", within="(0, inf)")


@dataclass
class ExportOptions(SheetOptions):
    """What to export"""

    checkpoint_path: str = option("", "a checkpoint folder; an adapter in it is merged into the model under it")
    output_path: str = option("", "the model folder to write; it must not be there yet")
    model_path: str | None = option(None, "the model under the adapter; default: the one it was trained on")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    data_path: str | None = option(None, "a sheet with products to compare answers on; default: the training sheet")
    image_cache_dir: str | None = option(None, "folder with its photos; default: that of the training run")
    num_products: int = option(4, "products answered by the checkpoint and by what was written", within="(0, inf)")
    keep_audio: bool = option(
        False, "MiniCPM-o: write the makers' audio and TTS weights back beside the trained ones, for those of their "
               "programs that want them even where nobody speaks")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to compute")
    num_threads: int | None = option(None, "CPU threads for torch", within="(0, inf)")


@dataclass
class DownloadOptions(FetchOptions, SheetOptions):
    """What to download"""

    data_path: str = option(DEFAULT_DATA_PATH, "the sheet with the photo addresses")
    image_cache_dir: str = option("image_cache_new", "folder to put the photos in, named md5(address) + extension")
    report_path: str = option("download_report.xlsx", "the sheet to write: each address that failed, and why")


@dataclass
class CheckDataOptions(DataOptions):
    """What to check"""

    max_photos: int = option(5000, "photos opened, to see whether they are whole and to show them; 0 opens none",
                             within="[0, inf)")
    model_path: str | None = option(
        None, "folder of the model whose tokenizer counts for max_prompt_length; default: an estimate")
    html_path: str | None = option(None, "the page to write; default: the sheet's name + .check.html")
    output_path: str | None = option(
        None, "the sheet to write back, .xlsx, .csv or .tsv; default: the sheet's name + .check.xlsx for a workbook, "
              "+ .check.csv for any other sheet, which may have more rows than an .xlsx holds")


@dataclass
class DemoOptions:
    """What to make"""

    output_dir: str = option("demo", "folder for model, sheets and photos")
    real: bool = option(
        False, "real language weights from a package (examples/requirements.txt) under a small vision tower, and "
               "product texts that name their sizes, instead of a tiny model and drawings")
    products: int = option(800, "products to train on", within="(0, inf)")
    held_out: int = option(96, "products held out", within="(0, inf)")
    warm_up_steps: int = option(300, "steps of the warm-up in which the model learns to see", within="(0, inf)")
    seed: int = option(0, "seed of catalogue, model and warm-up", within="[0, inf)")


@dataclass
class LimitOptions:
    """Limits of the service"""

    max_photo_mb: float = option(6.0, "MiB of a photo, at most", within="(0, inf)")
    max_megapixels: float = option(16.0, "megapixels of a photo, at most", within="(0, inf)")
    decode_at_once: int = option(2, "photos decoded at the same time by each worker", within="(0, inf)")
    max_text: int = option(20_000, "characters of a product's text, at most", within="(0, inf)")
    max_body_mb: float = option(42.0, "MiB of a request, at most, counted as it comes", within="(0, inf)")
    body_seconds: float = option(
        15.0, "seconds for a request's body to come; longer where it keeps up 100 kB a second", within="(0, inf)")
    queue_size: int = option(64, "requests that wait, at most; a further one gets 429", within="(0, inf)")
    max_wait: float = option(30.0, "seconds; where the wait would be longer a request gets 429", within="(0, inf)")
    deadline: float = option(60.0, "seconds until a request gets 504", within="(0, inf)")
    drain_seconds: float = option(30.0, "seconds for what was accepted to be answered after a SIGTERM",
                                  within="[0, inf)")
    batch_size: int = option(16, "products answered together, at most", within="(0, inf)")
    batch_wait_ms: float = option(10.0, "milliseconds to wait for more products", within="[0, inf)")
    silent_seconds: float = option(
        15.0, "a worker process that gives no sign of life for so long is started again", within="(0, inf)")
    hang_seconds: float = option(
        180.0, "a worker process that is so long with one batch, or silent while it starts, is started again",
        within="(0, inf)")
    max_sheet_mb: float = option(20.0, "MiB of a sheet, at most", within="(0, inf)")
    max_rows: int = option(10_000, "products of a sheet, at most", within="(0, inf)")
    sheets_waiting: int = option(8, "sheets that wait for the one at work, at most", within="(0, inf)")
    sheet_hours: float = option(24.0, "hours that an answered sheet can be fetched", within="(0, inf)")


@dataclass
class ServiceOptions(LimitOptions):
    """The service"""

    model_path: str = option("", "a model folder, hub name or checkpoint folder; default: the demo's trained model; "
                                 "with --engine the folder that export.py wrote")
    checkpoint_path: str | None = option(None, "weights to use instead: a checkpoint folder or model_stepN.pt")
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    prompt_language: Literal["zh", "en"] | None = option(None, "wording of the prompt; default: as in training")
    prompt_file: str | None = option(None, "your own wording; default: as in training")
    samples: int = option(4, "answers sampled a product where a request does not say; 1: one greedy answer, no "
                             "confidence", within="[1, 16]")
    accept_at: float | None = option(None, "confidence from which an answer needs no review, as run.py prints it")
    seed: int = option(0, "seed of the sampled answers", within="[0, inf)")
    devices: tuple[str, ...] = option(
        ("auto",), "a worker process for each: auto, cpu, cuda, or the numbers of GPUs: 0 1 2 3")
    num_threads: int | None = option(None, "CPU threads for torch in each worker", within="(0, inf)")
    engine: list[str] = option(
        [], "answer with an OpenAI-compatible engine instead, as http://127.0.0.1:8001/v1; repeat for several in turn")
    engine_model: str | None = option(None, "the model's name at the engine; default: the first that it lists")
    engine_key_file: str | None = option(None, "file with the key to send to the engines")
    host: str = option("127.0.0.1", "address to listen at; any but this machine's own needs --key_file")
    port: int = option(8000, "port to listen at", within="[0, 65535]")
    allowed_hosts: tuple[str, ...] = option(
        (), "names under which the service may be asked, beside localhost and plain addresses")
    key_file: str | None = option(None, "file with the keys that clients may send as Bearer, one a line")
    fetch_hosts: tuple[str, ...] = option(
        (), "hosts from which photos are fetched by https or http address; default: none")
    image_cache_dir: str | None = option(None, "folder with photos by address, for sheets; default: none")
    state_dir: str = option("outputs/service", "folder for sheets at work and what run.sh keeps")
