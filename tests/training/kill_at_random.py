"""Kill runs at random moments, resume each, and compare the weights bit by bit with those of an undisturbed run.

    python tests/training/kill_at_random.py --kills 20                   # one process; some ten seconds a kill
    python tests/training/kill_at_random.py --kills 20 --processes 2     # two under torchrun: all of the tree is
                                                                         # killed, or every third time one alone
    python tests/training/kill_at_random.py --kills 20 --sft_steps 12    # the first half of the steps from labels

Each time a fresh run of the tiny shop is killed with SIGKILL at a moment between its first rollout and its end, then
resumed with --resume auto until it is done. Saving takes a large share of such a small run's time, so many moments lie
in the middle of a save. Ends with status 1 if any weight or optimizer state differs.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import demo  # noqa: E402
from runs import as_flags, train_options, write_shop  # noqa: E402

STEPS = 24


def command_of(options, processes):
    """The command line of a run."""
    script = [str(ROOT / "train_vlm_parallel.py"), *as_flags(options)]
    if processes == 1:
        return [sys.executable, *script]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *script]


def start(options, processes, log):
    """Start a run whose log goes to a file."""
    with log.open("w") as file:
        return subprocess.Popen(command_of(options, processes), stdout=file, stderr=file)


def wait_for(log, words, process, seconds=600):
    """Wait until the log holds the words; returns False when the run ended before."""
    deadline = time.monotonic() + seconds
    while words not in log.read_text(errors="replace"):
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"{log}: no {words!r} within {seconds} s")
        time.sleep(0.005)
    return True


def tree(pid):
    """A process and all below it, the deepest first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            found += tree(int(child))
    return [*found, pid]


def kill(process, one_only=False):
    """SIGKILL a run, or one of its workers alone: then torchrun ends the rest by itself."""
    pids = tree(process.pid)
    for pid in pids[:1] if one_only else reversed(pids):  # torchrun first, before it can tell its workers
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait(timeout=60)


def same(one, other):
    """Whether two checkpoints hold the same weights and optimizer state, bit by bit."""
    weights = [load_file(path / "model.safetensors") for path in (one, other)]
    states = [torch.load(path / "trainer_state.pt", weights_only=True)["optimizer"]["state"] for path in (one, other)]
    return all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()) and all(
        torch.equal(value, states[1][key][name]) for key, values in states[0].items() for name, value in values.items())


def run_to_the_end(options, processes, log):
    """Run to the end; returns the seconds from the first rollout on, and the last checkpoint."""
    process = start(options, processes, log)
    wait_for(log, "pre-flight:", process)
    begin = time.monotonic()
    if process.wait(timeout=900):
        raise RuntimeError(f"{log}: status {process.returncode}\n{log.read_text()[-2000:]}")
    return time.monotonic() - begin, Path(options.output_dir) / f"step_{STEPS:06d}"


def kill_a_run(shop, folder, processes, delay, one_only=False, words="pre-flight:", steps=STEPS, **changes):
    """Kill a fresh run some seconds after it said the words, those of its first rollout; returns where it was, and the
    options that resume it."""
    options = settings(shop, folder, processes, steps, **changes)
    log = folder / "killed.log"
    process = start(options, processes, log)
    wait_for(log, words, process)
    time.sleep(delay)
    kill(process, one_only)
    partial = any(Path(options.output_dir).glob("*.partial"))
    steps = re.findall(r"step (\d+)/", log.read_text(errors="replace"))
    place = f"after step {steps[-1] if steps else 0}{', in the middle of a save' if partial else ''}"
    options.resume = "auto"
    return place, options


def settings(shop, folder, processes, steps=STEPS, **changes):
    """Options of a run of a few seconds that saves at every other step. changes: further ones."""
    folder.mkdir(parents=True, exist_ok=True)
    return train_options(shop, folder, max_steps=steps, batch_size=4 // processes, save_every=2, keep_last=2,
                         eval_every=0, lr_scheduler="linear", min_lr_ratio=0.1, kl_weight=0.1,
                         num_threads=int(os.environ["OMP_NUM_THREADS"]), **changes)  # other threads round otherwise


def main():
    """Kill, resume and compare as often as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sft_steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    moments, different = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory(prefix="kills_") as name:
        folder = Path(name)
        processor = MiniCPMV4_6ImageProcessorPil(max_slice_nums=4, scale_resolution=64, patch_size=16,
                                                 downsample_mode="4x", use_image_id=True)
        shop = write_shop(folder, demo.make_tokenizer(seed=0), processor)
        whole = settings(shop, folder / "whole", given.processes, sft_steps=given.sft_steps)
        seconds, wanted = run_to_the_end(whole, given.processes, folder / "whole.log")
        for number in range(given.kills):
            delay = moments.uniform(0, 0.9 * seconds)  # its end is leaving, not training
            one_only = given.processes > 1 and number % 3 == 2
            killed = folder / f"kill_{number}"
            place, options = kill_a_run(shop, killed, given.processes, delay, one_only, sft_steps=given.sft_steps)
            equal = same(wanted, run_to_the_end(options, given.processes, killed / "resumed.log")[1])
            different += not equal
            print(f"{number + 1}: killed{' one process' if one_only else ''} {delay:.2f} s in, {place}: "
                  f"{'equal' if equal else 'DIFFERENT'}", flush=True)
    print(f"{given.kills - different} of {given.kills} equal bit by bit")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
