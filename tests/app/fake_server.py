"""What run.sh starts in its tests: a server that serves nothing, and fails in the way it is told to."""

import os
import signal
import sys
import time
from pathlib import Path

how, state = os.environ["FAKE"], Path(sys.argv[sys.argv.index("--state_dir") + 1])
print("started with", " ".join(sys.argv[2:]), flush=True)
if how == "dies":
    print("for this reason", flush=True)
    sys.exit(2)
signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "stubborn" else lambda *_: sys.exit(0))
if how != "loading":
    (state / "ready").write_text("ready: http://127.0.0.1:1\n")
while True:
    time.sleep(0.05)
