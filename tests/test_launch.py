"""The launch scripts with substitutes for the tools of a cluster, and the manifests against Kubernetes' schemas."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

pytestmark = pytest.mark.process
ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))
SMALL = (
    "-m",
    "gpt.main",
    "--config=configs/char_tiny.py",
    "--config.model.num_layers=1",
    "--config.model.embed_dim=32",
    "--config.model.block_size=16",
    "--config.train.sample_tokens=0",
    "--config.train.log_every=1",
)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Returns a function that puts an executable first on the PATH. Sets PYTHON to this interpreter."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)

    def write(name: str, text: str) -> None:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    return write


def run(*command, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 60, "cwd": ROOT} | options
    return subprocess.run([str(part) for part in command], **options)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return value


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


# --- the files themselves


def test_readme_names_every_file():
    readme = (LAUNCH / "README.md").read_text()
    assert [path.name for path in LAUNCH.iterdir() if path.name not in readme] in ([], ["README.md"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell(script):
    assert os.access(script, os.X_OK)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for check in (("bash", "-n"), (shellcheck, "--norc")):
        result = run(*check, script)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifest(manifest):
    """The parts of a JobSet that are from Kubernetes fit its schema, and the other parts have only known keys."""
    jobset = yaml.safe_load(manifest.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert jobset["spec"].keys() <= {"coordinator", "failurePolicy", "replicatedJobs"}
    assert jobset["spec"]["failurePolicy"].keys() == {"maxRestarts", "restartStrategy", "rules"}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "gpt"}, **replicated["template"]}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    # Checks of Kubernetes and JobSet that are not in their schemas.
    job, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"]
    assert pod["restartPolicy"] == "Never"
    assert {rule.get("onExitCodes", {}).get("containerName", "gpt") for rule in job["podFailurePolicy"]["rules"]} == {
        container["name"]
    }
    assert all(re.fullmatch(r"[A-Za-z]\w*", rule["name"]) for rule in jobset["spec"]["failurePolicy"]["rules"])


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_flags_of_manifest(manifest):
    (replicated,) = yaml.safe_load(manifest.read_text())["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    module, *flags = container["args"]
    assert module == "gpt.main"
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    if "num_processes" in given:
        assert int(given["num_processes"]) == job["parallelism"]
        assert given["process_id"] == "$(JOB_COMPLETION_INDEX)"
    flags = [flag.replace("$(JOB_COMPLETION_INDEX)", "0") for flag in flags]
    parse = "import sys, gpt.main; from absl import flags; sys.exit(len(flags.FLAGS(sys.argv)) - 1)"
    result = run(sys.executable, "-c", parse, *flags)
    assert result.returncode == 0, result.stderr


def test_dockerfile():
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    instructions = [line.split()[0] for line in lines if not line.startswith(" ")]
    known = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}
    assert set(instructions) == known
    assert instructions.index("USER") > max(i for i, name in enumerate(instructions) if name in ("RUN", "COPY"))
    for line in lines:
        name, _, rest = line.partition(" ")
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        if name in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(part, str) for part in json.loads(rest))


# --- local.sh

# A process that prints its arguments, and then behaves as its first argument says.
PROCESS = """
import os, signal, subprocess, sys, time
from pathlib import Path
_, behaviour, *rest = sys.argv
flags = dict(flag.removeprefix("--").split("=") for flag in rest[-3:])
index, count = int(flags["process_id"]), int(flags["num_processes"])
folder = Path(os.environ["FOLDER"])
if behaviour == "save":
    def save(number, _):
        time.sleep(0.2)
        os._exit(128 + number)
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "100"]) if behaviour == "fail" else None
(folder / f"secret{index}").write_text(os.environ.get("GPT_CLUSTER_SECRET", ""))
(folder / f"tmp{index}").write_text(f"{os.getpid()} {child.pid if child else os.getpid()}")
(folder / f"tmp{index}").rename(folder / f"pids{index}")
print(behaviour, index, count, flags["coordinator"], os.environ["XLA_FLAGS"], os.environ["JAX_PLATFORMS"], rest[:-3])
sys.stdout.flush()
if behaviour == "fail" and index == 1:
    sys.exit(7)
if behaviour != "end":
    time.sleep(100)
"""


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Returns a function that starts local.sh with copies of PROCESS. None of them may run after the test."""
    (tmp_path / "process.py").write_text(PROCESS)
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setenv("PYTHON", sys.executable)
    started = []

    def start(count: int, *arguments: str, **env: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [LAUNCH / "local.sh", str(count), tmp_path / "process.py", *arguments],
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # SIGINT is ignored if the tests run in the background, and bash cannot change that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        wait_until(lambda: all((tmp_path / f"pids{index}").exists() for index in range(count)), 20)
        return process

    yield start
    for process in started:
        process.kill()
    pids = [int(pid) for path in tmp_path.glob("pids*") for pid in path.read_text().split()]
    assert len(pids) > 1
    # A zombie without a parent exists until the system's first process reaps it.
    wait_until(lambda: not any(is_alive(pid) for pid in pids), 10)


def test_local_starts_processes(processes):
    process = processes(3, "end", "a b", XLA_FLAGS="--of_mine", DEVICES_PER_PROCESS="4")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    found = re.findall(r"end (\d) 3 127\.0\.0\.1:(\d+) --of_mine (\S+) cpu \['a b'\]", out)  # two may share a line
    assert sorted(index for index, _, _ in found) == ["0", "1", "2"]
    assert len({port for _, port, _ in found}) == 1
    assert {flag for _, _, flag in found} == {"--xla_force_host_platform_device_count=4"}


def secrets(folder) -> set[str]:
    return {path.read_text() for path in folder.glob("secret*")}


def test_local_makes_a_secret_of_each_job(processes, tmp_path, monkeypatch):
    """All processes of a job get the same secret, unless the user set one."""
    monkeypatch.delenv("GPT_CLUSTER_SECRET", raising=False)
    found = []
    for _ in range(2):
        for path in tmp_path.glob("pids*"):
            path.unlink()
        processes(2, "end").communicate(timeout=20)
        found += secrets(tmp_path)
    assert len(set(found)) == len(found) == 2
    assert all(re.fullmatch(r"[0-9a-f]{32}", secret) for secret in found)
    processes(2, "end", GPT_CLUSTER_SECRET="mine").communicate(timeout=20)
    assert secrets(tmp_path) == {"mine"}


def test_local_failure_ends_the_others(processes):
    process = processes(2, "fail", GRACE="1")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 7
    assert err == "error: killed process 0, which did not end in 1 s\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(processes, number):
    process = processes(2, "save")
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number


def test_local_ends_the_deaf(processes):
    process = processes(2, "deaf", GRACE="1")
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL
    assert err == "error: killed process 0 1, which did not end in 1 s\n"


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        ((), {}),
        (("2",), {}),
        (("two", "-m", "gpt.main"), {}),
        (("0", "-m", "gpt.main"), {}),
        (("2", "-m", "gpt.main"), {"DEVICES_PER_PROCESS": "0"}),
        (("2", "-m", "gpt.main"), {"GRACE": "soon"}),
        (("2", "-m", "gpt.main"), {"PLATFORM": "tpu"}),
    ],
)
def test_local_mistakes(arguments, env):
    result = run(LAUNCH / "local.sh", *arguments, env=os.environ | env)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: .+\n", result.stderr)


# --- gpu_host.sh


def test_gpu_host(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    # Written in one piece, because two processes write.
    words = "{os.environ['JAX_PLATFORMS']} {os.getenv('CUDA_VISIBLE_DEVICES')} {sys.argv[1:]}"
    show = ("-c", f'import os, sys; os.write(1, f"{words}\\n".encode())')
    result = run(LAUNCH / "gpu_host.sh", *show, "a b", env=os.environ | {"CUDA_VISIBLE_DEVICES": "4,6"})
    assert result.stdout == "cuda 4,6 ['a b']\n"
    several = os.environ | {"CUDA_VISIBLE_DEVICES": "4,6", "PROCESSES": "2"}
    result = run(LAUNCH / "gpu_host.sh", *show, "a b", env=several)
    assert sorted(re.findall(r"cuda (\d) \['a b', '--coordinator=.*'--process_id=(\d)'\]", result.stdout)) == [
        ("4", "0"),
        ("6", "1"),
    ]
    result = run(LAUNCH / "gpu_host.sh")
    assert result.returncode == 2
    assert re.fullmatch(r"error: .+\n", result.stderr)


# --- slurm.sh

# Starts two tasks on this host like srun, and saves their process ids.
SRUN = """#!/usr/bin/env bash
echo "$@" >>"$FOLDER/srun"
while [[ $1 == --* ]]; do shift; done
for id in 0 1; do
  SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$id SLURM_LOCALID=$id "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" >"$FOLDER/tmp" && mv "$FOLDER/tmp" "$FOLDER/tasks"
for task in "${tasks[@]}"; do
  wait "$task" || { last=$?; ((last > code)) && code=$last; }
done
exit "${code:-0}"
"""


@pytest.fixture
def slurm(tmp_path, tool, monkeypatch):
    """Returns a function that starts slurm.sh as a job. JAX computes a free port from the number of the job."""
    tool("srun", SRUN)
    tool("scontrol", '#!/usr/bin/env bash\necho "$@" >>"$FOLDER/scontrol"\n')
    port = next(port for port in range(61440 + os.getpid() % 4000, 65536) if is_free(port))
    monkeypatch.setenv("SLURM_JOB_ID", str(port - 61440))
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")
    started, alarms = [], []

    def start(*arguments: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # The new session makes it possible to kill all of its processes after the test.
        started.append(subprocess.Popen([LAUNCH / "slurm.sh", *arguments], cwd=ROOT, start_new_session=True, **pipes))
        alarms.append(threading.Timer(240, os.killpg, (started[-1].pid, signal.SIGKILL)))
        alarms[-1].start()
        return started[-1]

    yield start
    for alarm in alarms:
        alarm.cancel()
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def signal_tasks(folder: Path) -> None:
    """Sends SIGTERM to the tasks and not to the script, like --signal=TERM@120."""
    for task in wait_until(lambda: (folder / "tasks").exists() and (folder / "tasks").read_text()).split():
        os.kill(int(task), signal.SIGTERM)


def test_slurm_trains_saves_and_resumes(tmp_path, slurm, play):
    """Two tasks train together, SIGTERM saves and requeues the job, and the next run of the job resumes."""
    flags = (*SMALL, f"--config.data.path={play}", f"--workdir={tmp_path}/a run", "--config.train.eval_every=1000000")
    job = slurm(*flags, "--config.train.steps=1000000")
    shown = ""
    while not re.search(r"step 3/", shown):
        line = job.stdout.readline()
        assert line, shown
        shown += line
    assert re.search(r"^mesh .* of 2 processes", shown, re.M), shown
    assert len(re.findall(r"^mesh ", shown, re.M)) == 1
    signal_tasks(tmp_path)
    shown += job.communicate()[0]
    assert job.returncode == 143, shown
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.environ['SLURM_JOB_ID']}\n"
    saved = int(re.search(r"saved after step ([\d,]+)", shown)[1].replace(",", ""))

    job = slurm(*flags, f"--config.train.steps={saved + 2}")
    shown = job.communicate()[0]
    assert job.returncode == 0, shown
    assert f"step {saved + 2:,}/{saved + 2:,}" in shown
    assert f"step {saved:,}/" not in shown
    assert (tmp_path / "scontrol").read_text().count("requeue") == 1


def test_slurm_keeps_other_codes(tmp_path, slurm):
    job = slurm("-c", "import os; exit(3 if os.environ['SLURM_PROCID'] == '1' else 0)")
    job.communicate()
    assert job.returncode == 3
    assert not (tmp_path / "scontrol").exists()
    assert (tmp_path / "srun").read_text().startswith(f"--kill-on-bad-exit=0 --wait=120 {sys.executable} -c ")


def test_slurm_makes_a_secret_of_each_job(slurm, monkeypatch):
    monkeypatch.delenv("GPT_CLUSTER_SECRET", raising=False)
    shown = slurm("-c", "import os; os.write(1, os.environb[b'GPT_CLUSTER_SECRET'] + b'\\n')").communicate()[0]
    first, second = shown.split()
    assert first == second
    assert re.fullmatch(r"[0-9a-f]{32}", first)


def test_slurm_does_not_requeue_what_was_cancelled(tmp_path, slurm):
    job = slurm("-c", "import time; time.sleep(60)")
    wait_until((tmp_path / "tasks").exists)
    job.terminate()
    signal_tasks(tmp_path)
    job.communicate()
    assert job.returncode == 143
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (None, ["--ntasks-per-node=8", "--gpus-per-node=8"]),
        ("4", ["--ntasks-per-node=4", "--gpus-per-node=4"]),
        ("0", ["--ntasks-per-node=1"]),
    ],
)
def test_slurm_submits_with_or_without_gpus(tool, gpus, expected):
    """Flags of sbatch come first, and the flags of Python are passed on unchanged."""
    tool("sbatch", "#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("SLURM_JOB_ID", "GPUS_PER_NODE")}
    environment |= {"GPUS_PER_NODE": gpus} if gpus else {}
    python = ["-m", "gpt.main", "--workdir=a run"]
    result = run(LAUNCH / "slurm.sh", "--nodes=4", "--time=1:00:00", *python, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [*expected, "--nodes=4", "--time=1:00:00", str(LAUNCH / "slurm.sh"), *python]
    assert "gpu" not in "".join(re.findall("#SBATCH.*", (LAUNCH / "slurm.sh").read_text()))


@pytest.mark.parametrize(("gpus", "platform"), [("8", "cuda"), ("0", "cpu")])
def test_slurm_runs_on_what_it_asked_for(slurm, monkeypatch, gpus, platform):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("GPUS_PER_NODE", gpus)
    shown = slurm("-c", "import os; os.write(1, os.environb[b'JAX_PLATFORMS'] + b'\\n')").communicate()[0]
    assert shown.split() == [platform] * 2


@pytest.mark.parametrize(("arguments", "gpus"), [((), "8"), (("--nodes=2",), "8"), (("-m", "gpt.main"), "many")])
def test_slurm_mistakes(arguments, gpus):
    result = run(LAUNCH / "slurm.sh", *arguments, env=os.environ | {"GPUS_PER_NODE": gpus})
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: .+\n", result.stderr)


# --- tpu.sh

GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$FOLDER/calls"
echo >>"$FOLDER/calls"
[[ $4 != scp ]] || cp "$5" "$FOLDER/copied.tgz"
"""


@pytest.fixture
def tpu(tmp_path, tool, monkeypatch):
    """Returns a function that runs tpu.sh and returns gcloud's arguments after `queued-resources` for each call."""
    tool("gcloud", GCLOUD)
    for name, value in {
        "FOLDER": str(tmp_path),
        "ZONE": "here",
        "TYPE": "v6e-16",
        "VERSION": "v2-alpha-tpuv6e",
    }.items():
        monkeypatch.setenv(name, value)

    def call(*arguments: str, **env: str) -> list[list[str]]:
        (tmp_path / "calls").write_text("")
        result = run(LAUNCH / "tpu.sh", *arguments, env=os.environ | env)
        assert result.returncode == 0, result.stderr
        calls = [text.split("\0") for text in (tmp_path / "calls").read_text().split("\0\n")[:-1]]
        assert all(call[:3] == ["compute", "tpus", "queued-resources"] and "--zone=here" in call for call in calls)
        return [call[3:] for call in calls]

    return call


def test_tpu_create_and_delete(tpu):
    ((verb, name, *flags),) = tpu("create", "--spot")
    assert (verb, name) == ("create", "gpt")
    assert {"--node-id=gpt", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot"} < set(flags)
    ((_, _, *flags),) = tpu("create", NAME="big", SLICES="4")
    assert {"--node-count=4", "--node-prefix=big"} < set(flags)
    assert not any(flag.startswith(("--node-id", "--spot")) for flag in flags)
    assert tpu("status")[0][:2] == ["describe", "gpt"]
    assert tpu("delete")[0][:4] == ["delete", "gpt", "--force", "--quiet"]


def test_tpu_install(tpu, tmp_path):
    copy, install = tpu("install")
    assert (copy[0], copy[2], *copy[3:5]) == ("scp", "gpt:gpt.tgz", "--node=all", "--worker=all")
    assert not Path(copy[1]).exists()
    with tarfile.open(tmp_path / "copied.tgz") as archive:
        names = archive.getnames()
    assert {"gpt/main.py", "configs/char.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"} < set(names)
    assert not any("__pycache__" in name for name in names)
    assert install[:4] == ["ssh", "gpt", "--node=all", "--worker=all"]
    assert run("bash", "-n", "-c", on_worker(install)).returncode == 0


def on_worker(call: list[str]) -> str:
    (command,) = (flag.removeprefix("--command=") for flag in call if flag.startswith("--command="))
    return command


def test_tpu_train(tpu, tool, tmp_path):
    """The worker's shell passes the flags on unchanged."""
    flags = ("-m", "gpt.main", "--config=configs/char.py", "--workdir=gs://bucket/a run", "--config.x='$HOME'")
    (call,) = tpu("train", *flags)
    assert call[:4] == ["ssh", "gpt", "--node=all", "--worker=all"]
    tool("sudo", '#!/usr/bin/env bash\nprintf "%q " "$@"\n')
    result = run("bash", "-c", on_worker(call), env=os.environ | {"HOME": "/home/me", "USER": "me"})
    started = shlex.split(result.stdout)
    assert started[0] == "systemd-run"
    assert {"--unit=gpt", "--uid=me", "--working-directory=/home/me/gpt", "--property=Restart=on-failure"} < set(
        started
    )
    assert "--property=StandardOutput=append:/home/me/gpt.log" in started
    assert started[-6:] == ["/home/me/gpt/.venv/bin/python", *flags]
    (secret,) = [flag for flag in started if flag.startswith("--setenv=")]
    assert re.fullmatch(r"--setenv=GPT_CLUSTER_SECRET=[0-9a-f]{32}", secret)
    assert secret not in on_worker(tpu("train", *flags)[0])
    assert on_worker(tpu("logs")[0]).endswith("~/gpt.log")
    assert tpu("logs", SLICE="1", WORKER="2")[0][2:4] == ["--node=1", "--worker=2"]
    assert "systemctl stop gpt" in on_worker(tpu("stop")[0])


@pytest.mark.parametrize(
    ("arguments", "missing"), [((), ""), (("fly",), ""), (("train",), ""), (("status",), "ZONE"), (("create",), "TYPE")]
)
def test_tpu_mistakes(tpu, arguments, missing):
    env = {name: value for name, value in os.environ.items() if name != missing}
    result = run(LAUNCH / "tpu.sh", *arguments, env=env)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: .+\n", result.stderr)
    assert missing in result.stderr
