"""Weights split over two processes (gloo, CPU): the same tokens, log-probs and gradients as whole ones."""

import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "sharded_worker.py"


def test_two_processes_compute_what_one_does():
    """Every case of sharded_worker.py, in one pair of processes: starting them takes longer than the cases."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(WORKER)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2 * 4
