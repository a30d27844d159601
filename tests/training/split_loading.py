"""Weights that each of two processes reads a share of: to the bit those of a whole model, and what memory it takes.
Used by training_worker.py."""

import ctypes
import gc
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import demo
import train_vlm_parallel as training
from config import TrainOptions
from models.loading import load_minicpm
from models.optimizer import make_optimizer
from models.policy import load_policy
from models.processes import Processes
from models.sharding import load_optimizer_state, splitter, whole_weights
from models.trainable import set_trainable
from standin_minicpm import write_standin
from tiny import parts_of, tiny_model
from training.setup import hold_in

KINDS = ("hybrid", "qwen2_5_vl", "remote")
LAYERS = 16
MMAP_THRESHOLD = -3  # of malloc.h


def image_processor():
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    return MiniCPMV4_6ImageProcessorPil(max_slice_nums=4, scale_resolution=64, patch_size=16, downsample_mode="4x",
                                        use_image_id=True)


def by_the_main_process(write):
    if dist.get_rank() == 0:
        write()
    dist.barrier()


def write_model(kind, folder):
    if kind == "remote":
        write_standin(folder, demo.make_tokenizer(seed=0))
    else:
        for part in parts_of(kind, demo.make_tokenizer(seed=0), image_processor()):
            part.save_pretrained(folder)


def compare(kind, folder):
    """Policy, reference and loaded weights of a kind; an assertion that fails ends the process with its traceback."""
    by_the_main_process(lambda: write_model(kind, folder))
    whole, _, _ = load_minicpm(str(folder), trust_remote_code=True)
    parts = str(folder), TrainOptions(dtype="bfloat16", num_threads=1), "cpu", True
    policy = load_policy(*parts, splitter(torch.bfloat16))
    held = sum(parameter.to_local().numel() for parameter in policy.model.parameters())
    assert held < 0.6 * sum(parameter.numel() for parameter in whole.parameters())
    same(policy, whole)

    def more():
        state = load_file(folder / "model.safetensors")
        (folder / "more").mkdir()
        save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "more" / "model.safetensors")

    by_the_main_process(more)
    policy.load_weights(str(folder / "more"))
    with torch.no_grad():
        for parameter in set(whole.parameters()):
            parameter += 1
    same(policy, whole)

    def hold(model):
        hold_in(torch.bfloat16, model, policy.family.vision_modules(model))
        return splitter(torch.bfloat16)(model)

    whole, _, _ = load_minicpm(str(folder), trust_remote_code=True)
    hold_in(torch.bfloat16, whole, policy.family.vision_modules(whole))
    reference = load_policy(*parts, hold, trains=False)
    same(reference, whole)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32, torch.bfloat16}
    print(f"{kind}: read alike", flush=True)


def same(policy, whole):
    found, wanted = whole_weights(policy, keep=True), whole.state_dict()
    assert wanted.keys() - found.keys() == set(whole.all_tied_weights_keys)
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name
    buffers = dict(whole.named_buffers())
    for name, buffer in policy.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name


def write_large(folder):
    """A model of 17 million parameters in bfloat16, nearly all of them in its layers."""
    tokenizer = demo.make_tokenizer(seed=0)
    model = tiny_model(tokenizer, ["full_attention"])
    text = model.config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 256, 1024, LAYERS
    text.layer_types, text.head_dim, text.num_attention_heads = ["full_attention"] * LAYERS, 64, 4
    for part in (type(model)(model.config).to(torch.bfloat16), tokenizer, image_processor()):
        part.save_pretrained(folder)


def memory(folder, shop_options):
    """Hold what a start and a resume take against what is then held, as multiples of the float32 weights."""
    if not Path("/proc/self/status").is_file():
        return
    by_the_main_process(lambda: write_large(folder))
    options = replace(shop_options, model_path=str(folder), dtype="bfloat16", kl_weight=0.01)
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    layer, two = 1 / LAYERS, Processes(dist.get_rank(), dist.get_world_size())
    taken, (policy, _, _) = peak(lambda: training.load_models(replace(options, sharding="fsdp"), None, two), numbers)
    print(f"a start with fsdp: {taken:.2f} of the weights", flush=True)
    assert taken < 1.2 * (1 / 2 + 1 / 4) + layer  # half the policy in float32, half the reference in bfloat16
    check_starts(replace(options, sharding="fsdp"), folder, numbers, two)
    optimizer = make_optimizer(set_trainable(policy, True), options)
    by_the_main_process(lambda: write_moments(optimizer, folder / "state.pt"))
    taken, _ = peak(lambda: load_optimizer_state(optimizer, torch.load(folder / "state.pt", mmap=True)), numbers)
    print(f"Adam's moments with fsdp: {taken:.2f} of the weights", flush=True)
    assert taken < 1.2 + layer  # half of two moments a weight
    assert all((value.to_local() == 1).all() for held in optimizer.state.values() for name, value in held.items()
               if name != "step")
    taken, _ = peak(lambda: training.load_models(options, None, two), numbers)
    print(f"a start without: {taken:.2f} of the weights", flush=True)
    assert taken < 1 + 1 / 2 + layer  # and no copy in between


def check_starts(options, folder, numbers, two):
    """The guard gathers a layer at a time, in float32, too; a base under an adapter is split as well."""
    guarded = replace(options, missing_photos="text_only", image_cache_dir=str(folder), eval_every=0, preflight=False,
                      eval_fraction=0.0, output_dir=str(folder / "run"), log_dir=str(folder / "logs"))
    with mock.patch.object(training, "allocate_state"):  # what training holds comes later
        training.prepare(guarded, two)  # what libraries set up at their first call is as large as this model
        taken, _ = peak(lambda: training.prepare(guarded, two), numbers)
    print(f"a start with fsdp and the guard: {taken:.2f} of the weights", flush=True)
    assert taken < 1.6  # it was 2.2 with all of them gathered
    adapted = replace(options, lora_rank=4, dtype="float32")
    taken, _ = peak(lambda: training.load_models(adapted, None, two), numbers)
    print(f"a start with fsdp and an adapter: {taken:.2f} of the weights", flush=True)
    assert taken < 0.8  # the whole base would be 1


def write_moments(optimizer, path):
    """What a checkpoint holds of Adam, every moment 1."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {index: {"step": torch.tensor(1.0), "exp_avg": torch.ones(parameter.shape),
                       "exp_avg_sq": torch.ones(parameter.shape)} for index, parameter in enumerate(parameters)}
    torch.save({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}, path)


def peak(work, numbers):
    """The most memory that is this process's own while it works, above what was its own before; and the result."""
    gc.collect()
    ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, 2 ** 18)  # what is freed is given back, as that of large layers is
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, most, done = own_memory(), [0], threading.Event()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], own_memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    most[0] = max(most[0], own_memory())
    done.set()
    watcher.join()
    return (most[0] - before) / (4 * numbers), result


def own_memory():
    """Bytes of resident memory that no file stands behind: pages of a file can be dropped and read again."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("RssAnon:")[2].split()[0])
