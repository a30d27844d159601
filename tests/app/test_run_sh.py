"""app/run.sh: every way a start, a stop and a status can go, each told from the others."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "app/run.sh")


class Runner:
    """run.sh with a state folder of its own, and with a fake server in place of the real one."""

    def __init__(self, folder):
        self.state = folder / "state"
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests/app/fake_server.py"} "$@"\n')
        self.python.chmod(0o755)

    def begin(self, action, *more, how="ready", python=None, cwd=ROOT, **environment):
        return subprocess.Popen(
            [SCRIPT, action, *more, "--state_dir", str(self.state)], cwd=cwd, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "APP_PYTHON": str(python or self.python), "FAKE": how, **environment})

    def __call__(self, action, *more, **settings):
        process = self.begin(action, *more, **settings)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    @property
    def pid(self):
        return int((self.state / "service.pid").read_text().split()[0])


@pytest.fixture
def run(tmp_path):
    runner = Runner(tmp_path)
    yield runner
    if (runner.state / "service.pid").is_file():
        runner("stop", STOP_SECONDS="1")


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_start_status_stop(run):
    assert run("status") == (3, "stopped\n")
    status, said = run("start", "--port", "8001")
    assert status == 0 and said == f"ready: http://127.0.0.1:1, process {run.pid}\n"
    assert run("status") == (0, said)
    first = run.pid
    status, said = run("start")
    assert status == 1 and f"it runs already, process {first}" in said and run.pid == first
    assert "started with --port 8001 --state_dir" in run("logs")[1]
    status, said = run("restart")  # with the options of the last start
    assert status == 0 and run.pid != first and not lives(first)
    assert run("logs")[1].count("started with --port 8001") == 2
    second = run.pid
    assert run("stop") == (0, "stopped\n") and not lives(second)
    assert run("status")[0] == 3 and run("stop") == (0, "it does not run\n")


def test_a_start_that_fails_shows_why(run):
    status, said = run("start", how="dies")
    assert status == 1 and "for this reason" in said and "it did not start" in said
    assert run("status")[0] == 3
    status, said = run("start", how="dies")
    assert said.count("for this reason") == 1  # of this start, not of those before


def test_a_killed_service_is_dead_and_can_be_started(run):
    run("start")
    os.kill(run.pid, signal.SIGKILL)
    while lives(run.pid):
        time.sleep(0.01)
    status, said = run("status")
    assert status == 1 and "dead" in said
    (run.state / "photos-x").mkdir()
    status, said = run("start")
    assert not (run.state / "photos-x").exists(), "what its requests had brought"
    assert status == 0 and "gone without having been stopped" in said and run("status")[0] == 0


def test_a_pid_that_another_program_has_now_is_left_alone(run):
    run("start")
    run("stop")
    other = subprocess.Popen(["sleep", "60"])
    began = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
    (run.state / "service.pid").write_text(f"{other.pid} {int(began) - 1}\n")
    assert run("status")[0] == 1
    assert run("stop") == (0, "it does not run\n") and other.poll() is None
    (run.state / "service.pid").write_text("nonsense\n")
    assert run("status")[0] == 1
    assert run("start")[0] == 0 and other.poll() is None
    other.kill()
    other.wait()


def test_one_that_loads_still(run):
    status, said = run("start", how="loading", START_SECONDS="1")
    assert status == 4 and "loading still" in said
    assert run("status")[0] == 4
    status, said = run("start")
    assert status == 1 and "runs already" in said
    assert run("stop")[0] == 0


def test_one_that_does_not_end_is_killed(run):
    run("start", how="stubborn")
    pid = run.pid
    status, said = run("stop", STOP_SECONDS="1")
    assert status == 0 and "was killed" in said and not lives(pid)


def test_two_starts_at_once_start_one(run):
    starts = [run.begin("start") for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in starts]
    assert sorted(process.returncode for process in starts) == [0, 1, 1, 1]
    assert sum("runs already" in words for words in said) == 3
    assert run("logs")[1].count("started with") == 1


def test_the_port_is_taken(run, shop):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, said = run("start", "--port", port, "--model_path", str(shop / "model"), python=sys.executable)
    assert status == 1 and f"--port {port} can't be listened at: Address already in use" in said
    assert "Traceback" not in said


def test_paths_are_found_from_where_the_user_stands(run, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/keys").write_text("x")
    run("start", "--key_file", "sub/keys", "--model_path", "owner/name", cwd=tmp_path)
    assert f"started with --key_file {tmp_path}/sub/keys --model_path owner/name" in run("logs")[1]


def test_in_the_foreground_signals_arrive(run):
    run.state.mkdir()
    process = run.begin("foreground")
    while not (run.state / "ready").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    process.stdout.close()


def test_a_wrong_word_shows_what_there_is():
    done = subprocess.run([SCRIPT, "begin"], capture_output=True, text=True)
    assert done.returncode == 2 and "app/run.sh foreground" in done.stdout
