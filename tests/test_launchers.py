"""The launch scripts under real launchers: Slurm on a cluster of this host alone, and Open MPI.

They need Debian's packages slurm-wlm, munge and openmpi-bin, and Slurm needs root.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launch import SMALL

ROOT = Path(__file__).parent.parent
TRAIN = (*SMALL, "--config.train.eval_every=0")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

pytestmark = [pytest.mark.process, pytest.mark.slow]


def run(*command) -> str:
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    ).stdout


def wait_until(condition, what, seconds=240):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, what()
        time.sleep(0.2)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm cluster whose only node is this host."""
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("needs root, slurm-wlm and munge")
    host = socket.gethostname().partition(".")[0]
    folder = tmp_path / "slurm"
    for name in (folder, folder / "state", folder / "spool"):
        name.mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=[free_port(), free_port()]))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = [
        f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("key-file", "socket", "pid-file", "log-file")
    ]
    files.append(f"--seed-file={folder}/munge.seed")
    processes = []

    def start(*command):
        with open(folder / f"{command[0]}.log", "wb") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    start("munged", "--foreground", "--force", *files)
    wait_until((folder / "munge.socket").exists, lambda: "munged does not start")
    start("slurmctld", "-D")
    start("slurmd", "-D", "-N", host)
    try:
        logs = lambda: "".join(log.read_text() for log in folder.glob("*.log"))  # noqa: E731
        wait_until(lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout, logs)
        yield
    finally:
        subprocess.run(["scancel", "--state=RUNNING", "--signal=KILL", "--full"], capture_output=True, check=False)
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def test_slurm_joins_two_tasks_saves_requeues_and_resumes(slurm, play, tmp_path, monkeypatch):
    monkeypatch.setenv("GPUS_PER_NODE", "0")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("XLA_FLAGS", "")
    out = tmp_path / "out.txt"
    flags = (*TRAIN, f"--config.data.path={play}", f"--workdir={tmp_path}/run", "--config.train.steps=1000000")
    options = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={out}")
    submitted = run("launch/slurm.sh", *options, *flags)
    job = re.fullmatch(r"Submitted batch job (\d+)\n", submitted)[1]

    def printed(pattern: str, count: int = 1) -> list[str]:
        def matches():
            found = re.findall(pattern, out.read_text(), re.M) if out.exists() else []
            return found if len(found) >= count else None

        return wait_until(matches, lambda: f"{pattern!r} did not appear in {out.read_text() if out.exists() else ''}")

    def state() -> str:
        return subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()

    printed("^step 3/")
    assert len(re.findall("^mesh .* of 2 processes", out.read_text(), re.M)) == 1
    run("scancel", "--signal=TERM", job)  # signals the tasks alone, as --signal=TERM@120 does before the time limit
    (saved,) = printed(r"saved after step ([\d,]+)")
    wait_until(lambda: state() == "PENDING", lambda: "the job is not requeued")
    run("scontrol", "update", f"JobId={job}", "StartTime=now")  # otherwise a requeued job waits for two minutes
    next_step = int(saved.replace(",", "")) + 1
    printed(rf"^step {next_step:,}/")
    run("scancel", job)
    printed(r"saved after step ([\d,]+)", 2)
    wait_until(lambda: state() in ("", "CANCELLED"), lambda: f"a cancelled job is {state()}")


@pytest.mark.skipif(not shutil.which("mpirun"), reason="needs openmpi-bin")
def test_mpirun_joins_two_processes(play, tmp_path):
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    flags = (*TRAIN, f"--config.data.path={play}", f"--workdir={tmp_path}/run", "--config.train.steps=3")
    shown = run("mpirun", *root, "--oversubscribe", "-n", "2", sys.executable, *flags)
    assert len(re.findall("^mesh .* of 2 processes", shown, re.M)) == 1
    assert len(re.findall("^Done: 3 steps", shown, re.M)) == 1
