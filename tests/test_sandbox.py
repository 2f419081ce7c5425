"""Commands on hostile workdirs start no process, use no network, and write only their own output.

One process runs all of them in forks (see tests/watched.py). Python's audit events show what Python code does, and
strace, where it works, what native code does.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorstore
from conftest import CACHE, ROOT
from test_hostile import Payload, _one_device, config, edit_json, trained  # noqa: F401  fixtures

from gpt.config import flatten

CALLS = "execve,execveat,connect,bind,sendto,openat,open,creat,mkdir,mkdirat,rmdir,unlink,unlinkat,rename,renameat,"
CALLS += "renameat2,link,linkat,symlink,symlinkat,truncate,chmod,fchmodat,mknod,mknodat"
TEXT = "dear " * 1000
HARMLESS = ("/dev/", "/proc/", "/memfd:")


def make_record(**groups) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        def edit(record: dict) -> None:
            for name, values in groups.items():
                (record if name == "base" else record["config"]).setdefault(name, {})
                if name == "base":
                    record[name] = values
                else:
                    record["config"][name].update(values)

        edit_json(run / "run.json", edit)

    return change


def _elsewhere(run: Path) -> None:
    """Changes every setting with a path to a path outside of the workdir."""
    outside = str(run.parent.parent / "outside")
    make_record(
        data={"cache_dir": outside}, tokenizer={"name": "gpt2", "path": outside}, train={"init_from": "gs://bucket/x"}
    )(run)


def _links(run: Path) -> None:
    outside = run.parent.parent / "outside"
    for name in (".lock", "run.json.partial", "tokenizer.json.partial", "events.out.tfevents.9", "checkpoints/3"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / "dear.txt")


def _linked_checkpoints(run: Path) -> None:
    (run / "checkpoints").rename(run.parent.parent / f"outside/{run.name}")
    (run / "checkpoints").symlink_to(run.parent.parent / f"outside/{run.name}")


def _fifo(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)

    return change


def _pickle(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).write_bytes(pickle.dumps(Payload(run.parent.parent / "outside/marker"), protocol=4))

    return change


def _foreign_values(prefix: str) -> Callable[[Path], None]:
    """Changes the manifest so that the values of an array are in a file with this prefix."""

    def change(run: Path) -> None:
        base = run / "checkpoints/2/params"
        spec = {"driver": "ocdbt", "base": f"file://{base}/"}
        store = tensorstore.KvStore.open(spec).result()
        values = {key: store.read(key).result().value for key in store.list().result()}
        context = tensorstore.Context()
        spec = {"driver": "ocdbt", "base": "memory://", "value_data_prefix": prefix}
        spec["config"] = {"max_inline_value_bytes": 0}
        store = tensorstore.KvStore.open(spec, context=context).result()
        for key, value in values.items():
            store.write(key, value).result()
        memory = tensorstore.KvStore.open("memory://", context=context).result()
        files = {key.decode(): memory.read(key).result().value for key in memory.list().result()}
        for name, content in files.items():
            if not name.startswith(prefix):
                (base / name).write_bytes(content)
        assert any(name.startswith(prefix) for name in files)

    return change


def _foreign_metadata(run: Path) -> None:
    """Changes orbax's and zarr's metadata to drivers and addresses of other hosts and folders."""
    for path in (run / "checkpoints/2").rglob("_*METADATA"):
        text = path.read_text()
        text = text.replace('"use_ocdbt": true', '"use_ocdbt": false').replace(
            '"use_zarr3": false', '"use_zarr3": true'
        )
        path.write_text(text.replace("token_embedding", "http://127.0.0.1:9/token_embedding"))


def _zarr(**values) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        base = f"file://{run}/checkpoints/2/params/"
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        key = b"token_embedding.embedding/.zarray"
        store.write(key, json.dumps(json.loads(store.read(key).result().value) | values).encode()).result()

    return change


FOREIGN = {"driver": "zarr", "kvstore": {"driver": "http", "base_url": "http://127.0.0.1:9"}, "id": "http"}
DRAWING = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/x) (w) file\n%%EOF\n"


def _pictures(run: Path) -> None:
    shutil.rmtree(run)
    for name in ("cat", "dog"):
        (run / name).mkdir(parents=True)
        for number in range(8):
            (run / name / f"{number}.png").write_bytes(DRAWING)


def _actions(run: Path) -> None:
    """Writes a config file that does everything that a workdir may not do."""
    (run.parent.parent / "outside/actions.py").write_text(
        "import socket, subprocess\n"
        "subprocess.run(['true'])\n"
        "socket.socket().connect_ex(('127.0.0.1', 9))\n"
        f"open({str(run.parent.parent / 'outside/written')!r}, 'w')\n"
    )


CONTROL = "actions of a config file"

# A change of a workdir, a command, its flags, the exit code, and its output. {run} is the workdir, {out} a name
# in a folder for output, {outside} another folder, {url} a server that listens.
SAMPLE = ("--workdir={run}", "--num_tokens=3", "--prompt=KING")
EVALUATE = ("--workdir={run}",)
EXPLAIN = (*SAMPLE[::2], "--out={out}.html")
CONVERT = ("--workdir={run}", "--to_hf={out}")
RESUME = ("--workdir={run}", "--config.train.steps=3")
CASES = {
    CONTROL: (_actions, "main", ("--config={outside}/actions.py",), 2, "no function get_config"),
    "sample: places": (_elsewhere, "sample", SAMPLE, 0, ""),
    "evaluate: places": (_elsewhere, "evaluate", EVALUATE, 0, ""),
    "explain: places": (_elsewhere, "explain", EXPLAIN, 0, ""),
    "convert: places": (_elsewhere, "convert", CONVERT, 0, ""),
    "resume: places": (_elsewhere, "main", RESUME, 1, "tokenizer.name|init_from"),
    "resume: a cache": (make_record(data={"cache_dir": "/nowhere/x"}), "main", RESUME, 0, "Done"),
    "evaluate: other data": (make_record(data={"path": "{outside}/dear.txt"}), "evaluate", EVALUATE, 1, "has changed"),
    "evaluate: a bucket": (
        make_record(data={"path": "gs://bucket/x.txt"}),
        "evaluate",
        EVALUATE,
        1,
        "address on the net",
    ),
    "evaluate: a pipe": (
        make_record(data={"path": "{outside}/pipe"}),
        "evaluate",
        EVALUATE,
        1,
        "a pipe and not a regular",
    ),
    "sample: base in a bucket": (
        make_record(base={"path": "gs://bucket/x", "step": 1, "digest": 1}),
        "sample",
        SAMPLE,
        1,
        "base.path=gs://bucket/x .* the network",
    ),
    "convert: base in a bucket": (
        make_record(base={"path": "s3://bucket/x", "step": 1, "digest": 1}),
        "convert",
        CONVERT,
        1,
        "base.path=s3://bucket/x .* the network",
    ),
    "sample: base on a server": (
        make_record(base={"path": "{url}/x", "step": 1, "digest": 1}),
        "sample",
        SAMPLE,
        1,
        "base.path=http://.* the network",
    ),
    "resume: base elsewhere": (
        make_record(base={"path": "{outside}", "step": 1, "digest": 1}),
        "main",
        RESUME,
        1,
        "holds no run",
    ),
    "sample: links": (_links, "sample", SAMPLE, 1, r"checkpoints/3 is damaged"),
    "resume: links": (_links, "main", RESUME, 1, "is a link"),
    "resume: linked checkpoints": (_linked_checkpoints, "main", RESUME, 1, "checkpoints is a link"),
    "sample: linked checkpoints": (_linked_checkpoints, "sample", SAMPLE, 0, ""),
    "sample: run.json a pipe": (_fifo("run.json"), "sample", SAMPLE, 1, "run.json is a pipe"),
    "evaluate: arrays a pipe": (
        _fifo("checkpoints/2/params/manifest.ocdbt"),
        "evaluate",
        EVALUATE,
        1,
        "manifest.ocdbt is a pipe",
    ),
    "resume: a pipe": (_fifo("events.out.tfevents.1"), "main", RESUME, 1, "is a pipe"),
    "sample: a pickle": (_pickle("checkpoints/2/params/_METADATA"), "sample", SAMPLE, 1, "damaged"),
    "explain: a pickle": (_pickle("checkpoints/2/params/manifest.ocdbt"), "explain", EXPLAIN, 1, "damaged"),
    "convert: a pickle": (_pickle("tokenizer.json"), "convert", CONVERT, 1, "damaged"),
    "resume: a pickle": (_pickle("checkpoints/2/digests/metadata"), "main", RESUME, 1, "none was changed"),
    "sample: foreign values": (_foreign_values("http://127.0.0.1:9/"), "sample", SAMPLE, 1, "damaged"),
    "evaluate: values outside": (_foreign_values("../../../../../outside/"), "evaluate", EVALUATE, 1, "damaged"),
    "sample: foreign metadata": (_foreign_metadata, "sample", SAMPLE, 1, "damaged|does not fit"),
    "convert: foreign codec": (_zarr(compressor=FOREIGN), "convert", CONVERT, 1, "damaged"),
    "resume: foreign store": (_zarr(kvstore=FOREIGN["kvstore"]), "main", RESUME, 0, "Done"),  # it is ignored
    "train: PostScript": (
        _pictures,
        "main",
        (
            "--config=configs/vit_digits.py",
            "--workdir={out}",
            "--config.data.kind=images",
            "--config.data.path={run}",
            "--config.train.batch_size=4",
            "--config.data.validation_fraction=0.5",
        ),
        1,
        r"\.png",
    ),
}


@dataclasses.dataclass
class Watched:
    code: int
    out: str
    err: str
    events: list[str]  # forbidden events of Python
    calls: list[str] | None  # forbidden system calls; None without strace


@pytest.fixture(scope="module")
def watched(trained, config, tmp_path_factory) -> dict[str, Watched]:  # noqa: F811
    tmp = tmp_path_factory.mktemp("watched").resolve()
    for name in ("outside", "runs", "out", "marks", "cache", "tmp"):
        (tmp / name).mkdir()
    (tmp / "outside/dear.txt").write_text(TEXT)
    os.mkfifo(tmp / "outside/pipe")
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"outside": tmp / "outside", "url": f"http://127.0.0.1:{server.getsockname()[1]}"}
        cases, allowed = [], []
        settings = [f"--config.{key}={value}" for key, value in flatten(dataclasses.asdict(config)).items()]
        for number, (change, command, flags, *_) in enumerate(CASES.values()):
            run, out = tmp / f"runs/{number}", tmp / f"out/{number}"
            shutil.copytree(trained, run)
            change(run)
            if (run / "run.json").is_file():
                text = (run / "run.json").read_text()
                for name, value in names.items():
                    text = text.replace("{" + name + "}", str(value))
                (run / "run.json").write_text(text)
            flags = [flag.format(run=run, out=out, **names) for flag in flags]
            if flags[0].startswith("--workdir") and command == "main":
                flags = ["--config=configs/char_tiny.py", *settings, *flags]
            cases.append([command, flags])
            allowed.append(
                [str(out), *([str(run)] if command == "main" and "PostScript" not in change.__name__ else [])]
            )
        strace = ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-s", "4096", "-e", f"trace={CALLS}", "-o"]
        traced = shutil.which("strace") and not subprocess.run([*strace, os.devnull, "true"]).returncode
        program = [sys.executable, str(ROOT / "tests/watched.py"), tmp / "events", tmp / "marks"]
        env = os.environ | {"XLA_FLAGS": "", "GPT_CACHE_DIR": str(tmp / "cache"), "TMPDIR": str(tmp / "tmp")}
        env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*([*strace, tmp / "calls"] if traced else []), *program],
            input=json.dumps(cases),
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp / "outside/dear.txt").read_text() == TEXT
        server.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody connected
            server.accept()
    usual = [str(tmp / "cache"), str(tmp / "tmp"), str(CACHE)]
    events = _events(tmp / "events", tmp / "marks", len(cases))
    calls = _calls(tmp / "calls", tmp / "marks", len(cases)) if traced else [None] * len(cases)
    return {
        name: Watched(
            *result, _forbidden(events[i], usual + allowed[i]), traced and _forbidden(calls[i], usual + allowed[i])
        )
        for i, (name, result) in enumerate(zip(CASES, json.loads(done.stdout), strict=True))
    }


def _forbidden(found: list[tuple[str, list[str]]], allowed: list[str]) -> list[str]:
    def permitted(path: str) -> bool:
        return path.startswith(HARMLESS) or any(path == each or path.startswith(f"{each}") for each in allowed)

    return [f"{what} {paths}" for what, paths in found if not (paths and all(map(permitted, paths)))]


def _split(entries: list[tuple[str, list[str]]], marks: Path, count: int) -> list[list[tuple[str, list[str]]]]:
    """Returns the entries of each case."""
    cases: list = [[] for _ in range(count)]
    number = None
    for what, paths in entries:
        if paths and paths[0].startswith(f"{marks}/case-"):
            number = int(paths[0].rpartition("-")[2])
        elif number is not None:
            cases[number].append((what, paths))
    return cases


def _events(log: Path, marks: Path, count: int) -> list[list[tuple[str, list[str]]]]:
    return _split([(event, paths) for event, *paths in map(json.loads, log.read_text().splitlines())], marks, count)


def _calls(log: Path, marks: Path, count: int) -> list[list[tuple[str, list[str]]]]:
    """Returns the system calls in strace's log that start a program, use the network, or change a file."""
    entries, unfinished = [], {}
    for line in log.read_text(errors="replace").splitlines():
        pid, _, text = line.partition(" ")
        if text.endswith("<unfinished ...>"):
            unfinished[pid] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r" *<\.\.\. \w+ resumed>", text):
            text = unfinished.pop(pid) + text[resumed.end() :]
        call = re.match(r" *(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?", text)
        if not call or (call[3].startswith("-") and call[1] not in ("connect", "execve", "sendto")):
            continue
        name, arguments, _, result = call.groups()
        if name in ("connect", "bind", "sendto"):
            if re.search("sa_family=AF_(?!UNIX|NETLINK)", line):  # pairs of sockets have no address
                entries.append((line, []))
        elif name.startswith("exec"):
            entries.append((line, []))
        elif name in ("open", "openat", "creat"):
            if re.search("O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments):
                entries.append((name, [result]))
        else:
            folders = re.findall(r"(?:AT_FDCWD|\d+)<([^>]*)>", arguments) or [str(ROOT)]
            paths = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
            if name.startswith(("symlink", "link")):
                paths = paths[-1:]
            entries.append(
                (name, [os.path.join(folders[min(i, len(folders) - 1)], path) for i, path in enumerate(paths)])
            )
    return _split(entries, marks, count)


@pytest.mark.parametrize("name", [name for name in CASES if name != CONTROL])
def test_a_hostile_workdir_reaches_nothing_outside(watched, name):
    _, _, _, code, says = CASES[name]
    found = watched[name]
    assert found.events == [], found
    assert found.calls in ([], None)
    assert found.code == code, found.out + found.err
    assert re.search(says, found.out + found.err)
    assert "Traceback" not in found.err
    if code:
        assert found.err.strip().splitlines()[-1].startswith("error: ")


def test_forbidden_actions_are_detected(watched):
    """A config file is the user's code, which may do what a workdir may not."""
    done = watched[CONTROL]
    assert done.code == 2
    assert [event.split()[0] for event in done.events] == ["subprocess.Popen", "socket.connect", "open"]
    if done.calls is None:
        pytest.skip("strace is missing or may not trace here, so that only Python's own events were seen")
    for call in ("execve", "connect", "openat"):
        assert any(call in line for line in done.calls), done.calls
