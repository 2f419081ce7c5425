"""The commands as a user types them, in processes of their own: the main path, and every kind of mistake."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt import train
from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.config import default_config, flatten
from gpt.runtime import cli
from gpt.runtime.errors import UserError

ROOT = Path(__file__).parent.parent
SMALL = (
    "--config=configs/char_tiny.py",
    "--config.model.num_layers=2",
    "--config.model.embed_dim=32",
    "--config.model.block_size=16",
    "--config.train.sample_tokens=20",
    "--config.train.log_every=1",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, command, play):
    """A workdir in which `gpt.main` trained for six steps."""
    workdir = tmp_path_factory.mktemp("trained") / "a run"  # a space in the path
    result = command(
        "main", *SMALL, f"--config.data.path={play}", "--config.train.steps=6", f"--workdir={workdir}", fresh=True
    )
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_training_prints_what_it_does_and_nothing_else(trained):
    workdir, result = trained
    lines = result.stdout.splitlines()
    said = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert said[:5] == ["model", "data", "mesh", "memory", "run"]
    assert any(re.match(r" +block_\*/mlp/up/kernel +2 × \(32 × 128\) +0\.03  -$", line) for line in lines)
    assert any(
        re.match(r"step 6/6  loss [\d.]+ \(mean [\d.]+\)  eta \d+s  .*tok/s.*  \d\d:\d\d:\d\d$", x) for x in lines
    )
    assert re.match(rf"Done: 6 steps in \d+s, best validation loss \d\.\d{{4}}, in {workdir}$", lines[-1])
    assert result.stderr == ""
    files = {path.name.split(".")[0] for path in workdir.iterdir() if path.name != ".lock"}
    assert files == {"run", "tokenizer", "checkpoints", "events"}
    assert json.loads((workdir / "run.json").read_text())["config"]["train"]["steps"] == 6


def test_a_dry_run_checks_and_leaves_nothing(trained, command, play, tmp_path):
    flags = (*SMALL, f"--config.data.path={play}", "--dry_run")
    result = command("main", *flags, "--config.train.steps=6", f"--workdir={tmp_path}/new")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^step +[\d.,]+ MB a device while it runs, [\d.,]+ of them gradients", result.stdout, re.M)
    assert "largest parameters" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(f"the run would start in {tmp_path}/new.")
    assert not (tmp_path / "new").exists()

    copy = tmp_path / "copy"
    shutil.copytree(trained[0], copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    result = command("main", *flags, "--config.train.steps=9", f"--workdir={copy}")
    assert f"the run would resume after step 6 in {copy}." in result.stdout
    assert "largest parameters" not in result.stdout  # they were shown when the run began
    result = command("main", *flags, "--config.train.steps=9", f"--workdir={copy}", "--all_parameters")
    assert "logical axes" in result.stdout
    result = command("main", *flags, "--config.seed=1", f"--workdir={copy}")
    assert result.returncode == 1
    assert "seed" in result.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_config_takes_a_known_size(tmp_path, play, command):
    config = f"--config={Path(__file__).parent.parent}/configs/char.py:gpt-nano"
    flags = (config, "--config.train.steps=1", "--config.train.sample_tokens=0")
    result = command("main", *flags, f"--config.data.path={play}", "--config.train.batch_size=8", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "3 layers, 3 heads, 48 wide, block 128" in result.stdout
    assert (tmp_path / "runs" / "char-gpt-nano" / "run.json").exists()


def test_evaluate_needs_the_workdir_alone(trained, command):
    workdir, result = trained
    validation_loss = float(re.search(r"best validation loss ([\d.]+)", result.stdout)[1])
    shown = command("evaluate", f"--workdir={workdir}", fresh=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    assert float(re.search(r"^loss +([\d.]+)$", shown.stdout, re.M)[1]) == validation_loss
    # On one device instead of eight, with another batch, from the training split, as JSON.
    flags = (f"--workdir={workdir}", "--split=train", "--json", "--batch_size=100", "--checkpoint=6")
    one_device = {"env": os.environ | {"XLA_FLAGS": ""}}
    report = json.loads(command("evaluate", *flags, **one_device).stdout)
    assert report["tokens"] == 26_999
    assert report["step"] == 6
    assert report["perplexity"] == pytest.approx(2.718281828 ** report["loss"])
    # One byte a character here, so that only the unit differs.
    assert report["bits_per_byte"] == pytest.approx(report["loss"] / 0.6931471806, rel=1e-2)
    # Another text, shorter than a block, with windows that overlap.
    other = workdir.parent / "other.txt"
    other.write_text("KING: I am.")
    flags = (f"--workdir={workdir}", f"--data={other}", "--split=all", "--json")
    report = json.loads(command("evaluate", *flags, "--stride=4").stdout)
    assert report["tokens"] == 10
    refused = command("evaluate", *flags, "--stride=99")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--stride=99 is more than model.block_size" in refused.stderr


def test_sample_by_flags(trained, command):
    workdir, _ = trained
    flags = (f"--workdir={workdir}", "--prompt=KING:", "--num_tokens=30", "--temperature=1")

    def sample(*more):
        result = command("sample", *flags, *more)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return result.stdout

    first = sample("--seed=1")
    assert first.startswith("KING:")
    assert len(first) == len("KING:") + 30 + len("\n")
    assert sample("--seed=1") == first != sample("--seed=2")
    assert sample("--temperature=0", "--top_k=3") == sample("--temperature=0", "--seed=9")
    several = sample("--num_samples=3", "--top_k=20", "--top_p=0.95")
    assert re.findall(r"^--- sample (\d) of 3$", several, re.M) == ["1", "2", "3"]
    stop = first[len("KING:") + 9]
    assert sample("--seed=1", f"--stop={stop}") == "KING:" + first[5:].split(stop)[0] + "\n"
    assert sample("--stop_newlines=1", "--num_tokens=3000").count("\n") <= 2


def test_sample_several_prompts_with_logprobs(trained, command):
    """The first as if it were alone; and as JSON, a line each."""
    flags = (f"--workdir={trained[0]}", "--num_tokens=20", "--repetition_penalty=1.2", "--seed=4")
    several = command("sample", *flags, "--prompt=KING:", "--prompt=KING:")
    assert several.returncode == 0, several.stderr
    texts = re.split(r"^--- prompt \d of 2\n", several.stdout, flags=re.M)[1:]
    assert command("sample", *flags, input="KING:\n").stdout == texts[0] != texts[1]
    lines = command("sample", *flags, "--prompt=KING:", "--prompt=O", "--num_samples=2", "--logprobs").stdout
    found = [json.loads(line) for line in lines.splitlines()]
    assert [(line["prompt"], line["sample"]) for line in found] == [("KING:", 1), ("KING:", 2), ("O", 1), ("O", 2)]
    assert found[0]["prompt"] + found[0]["text"] + "\n" == texts[0]
    for line in found:
        assert "".join(line["pieces"]) == line["text"]
        assert len(line["tokens"]) == len(line["logprobs"]) == 20
        assert all(logprob <= 0 for logprob in line["logprobs"])


def test_sample_prompt_longer_than_the_block(trained, command):
    workdir, _ = trained
    result = command("sample", f"--workdir={workdir}", "--prompt=" + "long " * 10, "--num_tokens=5")
    assert result.returncode == 0
    assert result.stdout.startswith("long " * 10)
    assert result.stderr == "note: the prompt has 50 tokens; the model sees the last 16.\n"


def test_output_that_cannot_show_a_character_is_no_error(tmp_path, play, command):
    """Lines with × and │ on a stream in ASCII, and a prompt of bytes that are no text for a model of bytes."""
    ascii_only = {"env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    flags = (*SMALL, f"--config.data.path={play}", "--config.tokenizer.name=byte", "--config.train.steps=2")
    result = command("main", *flags, f"--workdir={tmp_path}", **ascii_only)
    assert result.returncode == 0, result.stderr
    assert "run    2 steps ? 256 tokens" in result.stdout
    result = command(
        "sample", f"--workdir={tmp_path}", os.fsdecode(b"--prompt=caf\xe9"), "--num_tokens=3", **ascii_only
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("caf?")


def test_prompt_on_stdin(monkeypatch):
    """A pipe, a file and /dev/null; as much of it as can be a prompt."""

    def read(content):
        monkeypatch.setattr(sys, "stdin", content and io.TextIOWrapper(io.BytesIO(content)))
        return cli.read_stdin()

    assert read(b"KING:\n") == read(b"KING:\r\n") == read(b"\xef\xbb\xbfKING:") == "KING:"
    assert read("é\n\nO\n\n".encode()) == "é\n\nO\n"
    assert read(b" ") == " "
    assert read(b"\n") == ""
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    assert cli.read_stdin() == ""
    assert read(None) == ""  # stdin is closed
    assert len(read(b"a" * cli.MAX_PIPED)) == cli.MAX_PIPED
    with pytest.raises(UserError, match=r"stdin has more than 1,048,576 bytes; pass only the last part"):
        read("é".encode() * cli.MAX_PIPED)
    with pytest.raises(UserError, match=r"stdin is not UTF-8 \(byte 3\); convert it to UTF-8"):
        read(b"caf\xe9")


def test_sample_without_prompt_or_terminal(trained, command):
    result = command("sample", f"--workdir={trained[0]}", "--num_tokens=5", stdin=subprocess.DEVNULL, fresh=True)
    assert result.returncode == 0
    assert len(result.stdout) == 5 + len("\n")


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments):
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen([sys.executable, "-m", *arguments], stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.screen = ""

    def wait_for(self, pattern, seconds=120):
        """Reads until the pattern has been shown since the last call; returns what was shown up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen, re.S)):
            if time.monotonic() > deadline:
                self.process.kill()
                pytest.fail(f"{pattern!r} did not appear in {self.screen!r}")
            if select.select([self._master], [], [], 1)[0]:
                self.screen += os.read(self._master, 4096).decode(errors="replace")
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return shown

    def type(self, text):
        os.write(self._master, text.encode())


def test_prompt_loop_on_a_terminal(trained):
    terminal = Terminal("gpt.sample", f"--workdir={trained[0]}", "--num_tokens=12")
    terminal.wait_for("exits.*prompt> ")
    terminal.type("KING\n")
    terminal.wait_for(r"KING\r\n.*KING\w.*prompt> ")
    terminal.type("жизнь\n")
    terminal.wait_for(r"error: --prompt: unknown characters 'ж' \(U\+0436\).*prompt> ")
    terminal.type("\x1b[A\x1b[A\n")  # twice arrow up: the history
    terminal.wait_for("KING.*KING.*prompt> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, play, command):
    flags = (*SMALL, f"--config.data.path={play}", "--config.train.steps=100000", f"--workdir={tmp_path}")
    terminal = Terminal("gpt.main", *flags, "--config.train.eval_every=0")
    terminal.wait_for(r"step \d+/100,000  loss")
    terminal.process.send_signal(signal.SIGINT)
    last = terminal.wait_for(r"Stopped by SIGINT, saved after step [\d,]+ of 100,000; the same command resumes")
    assert terminal.process.wait(30) == 128 + signal.SIGINT
    step = int(re.search(r"saved after step ([\d,]+)", last)[1].replace(",", ""))
    result = command("main", *flags[:-2], f"--config.train.steps={step + 2}", flags[-1])
    assert f"resuming after step {step:,}" in result.stdout
    assert f"Done: {step + 2:,} steps" in result.stdout


def test_sigterm_leaves_a_code_that_is_not_success(tmp_path, play):
    flags = (*SMALL, f"--config.data.path={play}", "--config.train.steps=100000", f"--workdir={tmp_path}")
    terminal = Terminal("gpt.main", *flags)
    terminal.wait_for(r"step \d+/100,000  loss")
    terminal.process.terminate()
    assert terminal.process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", ["main", "evaluate", "sample", "plot"])
@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_is_narrow_and_complete(command, name, flag):
    result = command(name, flag)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line for line in result.stdout.splitlines() if not line.startswith("    python -m gpt.")]
    assert max(map(len, lines)) <= 80
    flags = re.findall(r"^  --(\w+) ", result.stdout, re.M)
    assert "workdir" in flags
    assert ("coordinator" in flags) == (name != "plot")
    assert "pdb" not in flags
    if name == "main":
        for key, value in flatten(default_config().to_dict()).items():
            assert re.search(
                rf"^  {re.escape(f'{key}={value}')} *$|^  {re.escape(f'{key}={value}')}  +\w", result.stdout, re.M
            )


def test_help_for_a_config_has_its_values(command):
    result = command("main", "--config=configs/char_tiny.py", "--config.train.steps=7", "--help")
    assert re.search(r"^\* train\.steps=7 +length of the run in steps \[>= 0;\s+default\s+5000\]$", result.stdout, re.M)
    result = command("main", "--config=configs/chr_tiny.py", "--help")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "did you mean configs/char_tiny.py?" in result.stderr


def test_a_printed_config_is_read_back(command, tmp_path):
    flags = ("--config=configs/llama.py:nano,muon", "--config.data.path=a\tж", "--config.optimizer.learning_rate=1e-5")
    printed = command("main", *flags, "--print_config")
    assert (printed.returncode, printed.stderr) == (0, "")
    (tmp_path / "again.json").write_text(printed.stdout)
    assert command("main", f"--config={tmp_path}/again.json", "--print_config").stdout == printed.stdout
    assert json.loads(printed.stdout)["data"]["path"] == "a\tж"


# Flags of gpt.main, the exit code, and what the one sentence has to say; then variables of the environment and packages
# that are not installed. {tmp} is a folder with files. tests/test_config.py has more of config files and overrides.
MAIN_MISTAKES = {
    "no config": ((), 2, "--config=configs/char.py"),
    "no config but keys": (("--config.train.steps=3",), 2, "Name a config file: --config=configs/char.py"),
    "empty config": (("--config=",), 2, "--config is empty"),
    "config file with an argument": (("--config=configs/char_tiny.py:gpt-mini",), 2, "takes no argument; leave out"),
    "config file of no such size": (("--config=configs/char.py:gpt-9",), 2, "size='gpt-9' is not known; choose one of"),
    "config file for nothing": (
        ("--config=configs/finetune.py:nowhere",),
        2,
        "finetune.py:nowhere: --workdir=nowhere holds no run",
    ),
    "config that is none": (("--config=README.md",), 2, "--config=README.md: a config file is a Python file"),
    "unknown key": (
        ("--config.model.num_layer=3",),
        2,
        "config key 'model.num_layer'; did you mean model.num_layers",
    ),
    "key without its group": (("--config.num_heads=3",), 2, "config key 'num_heads'; did you mean model.num_heads"),
    "key of nothing": (("--config.zzz=3",), 2, "no config key 'zzz'"),
    "wrong type": (("--config.model.num_layers=many",), 2, r"--config\.model\.num_layers=many"),
    "group as a value": (("--config.optimizer=3",), 2, r"--config\.optimizer=3"),
    "number of steps": (("--config.train.steps=1e3",), 2, r"--config\.train\.steps=1e3 has to be a whole number"),
    "negative steps": (("--config.train.steps=-1",), 1, r"train\.steps=-1 must not be negative"),
    "more steps than numbers": (("--config.train.steps=" + "9" * 30,), 1, r"train\.steps has to be less than 2³¹"),
    "not a number": (("--config.optimizer.learning_rate=nan",), 1, r"learning_rate=nan has to be a finite number"),
    "other family": (("--config.model.family=vit",), 2, "start from a config file for vit"),
    "unknown flag": (("--wrkdir=x",), 2, "no flag --wrkdir; did you mean --workdir"),
    "key as a flag": (("--train.steps=3",), 2, r"no flag --train\.steps; did you mean --config\.train\.steps"),
    "last part of a key as a flag": (("--steps=3",), 2, r"no flag --steps; did you mean --config\.train\.steps\?"),
    "misspelt key as a flag": (("--batch=3",), 2, r"no flag --batch; did you mean --config\.train\.batch_size\?"),
    "near rules": (("--config.mesh.rules=fdsp",), 1, r"one of dp, .*sp; did you mean fsdp\?"),
    "near argument": (("--config=configs/pretrain.py:gpt2-124",), 2, r"did you mean gpt2-124m\?"),
    "flag of nothing": (("--version",), 2, "no flag --version; see --help"),
    "flag file": (("--flagfile={tmp}/none",), 2, "--flagfile=.*none cannot be read"),
    "switch": (("--profile=maybe",), 2, "--profile=maybe has to be true or false"),
    "empty workdir": (("--workdir=",), 2, "--workdir is empty"),
    "workdir is a file": (("--workdir={tmp}/short.txt",), 1, r"Cannot write to --workdir=.*short\.txt: File exists"),
    "absent platform": ((), 1, "JAX_PLATFORMS=cuda is not available: .*; unset it", {"JAX_PLATFORMS": "cuda"}),
    "unknown platform": ((), 1, "JAX_PLATFORMS=abc is not available: .*; unset it", {"JAX_PLATFORMS": "abc"}),
    "unknown flag of XLA": ((), 1, "XLA_FLAGS=--xla_x=1 is refused by XLA: Unknown flag", {"XLA_FLAGS": "--xla_x=1"}),
    "flag of XLA": ((), 1, "XLA_FLAGS=.* value y for flag", {"XLA_FLAGS": "--xla_cpu_use_acl=y"}),
    "no tokenizers": (("--config.tokenizer.name=bpe",), 1, r"tokenizers: pip install .*\[bpe\]", {}, ["tokenizers"]),
    "no Pillow": (("--config=configs/vit_digits.py",), 1, r"Pillow: pip install .*\[images\]", {}, ["PIL"]),
    "stray argument": (("runs/x",), 2, "Unexpected argument 'runs/x'"),
    "missing file": (("--config.data.path={tmp}/none.txt",), 1, r"data\.path: there is no file or folder .*none\.txt"),
    "empty file": (("--config.data.path={tmp}/empty.txt",), 1, r"empty\.txt is empty"),
    "binary file": (("--config.data.path={tmp}/binary",), 1, "binary is not"),
    "latin-1 file": (("--config.data.path={tmp}/latin1.txt",), 1, r"latin1\.txt is not UTF-8 text: byte 0xe9"),
    "empty folder": (("--config.data.path={tmp}/folder",), 1, "folder holds no files"),
    "short text": (("--config.data.path={tmp}/short.txt",), 1, r"text has \d+ tokens, but model.block_size=16"),
    "heads": (("--config.model.num_heads=3",), 1, r"model\.num_heads=3 does not divide model\.embed_dim=32"),
    "attention": (
        ("--config.model.attention=flash",),
        1,
        r"model\.attention='flash' is not known; choose .* dense",
    ),
    "dropout": (("--config.model.embed_dropout=1",), 1, r"model\.embed_dropout=1\.0"),
    "batch": (("--config.train.batch_size=12",), 1, r"train\.batch_size=12 is not a multiple of 8"),
    "micro-batches": (("--config.train.micro_batches=3",), 1, r"train\.micro_batches=3"),
    "mesh": (("--config.mesh.data=16",), 1, r"mesh\.data=16 .* there are 8"),
    "mesh and heads": (
        ("--config.mesh.rules=fsdp_tp", "--config.mesh.model=8"),
        1,
        r"mesh\.model=8 does not divide the 4 heads of",
    ),
    "mesh without rules": (
        ("--config.mesh.model=8",),
        1,
        r"mesh\.rules=dp does not use the axis model; choose .*fsdp_tp",
    ),
    "rules": (("--config.mesh.rules=ddp",), 1, r"mesh\.rules=ddp: 'ddp' is not known; choose one of dp, fsdp"),
    "two lengths": (("--config.train.epochs=2",), 1, "Set just one of train.steps"),
    "no length": (("--config.train.steps=0",), 1, "Set just one of train.steps"),
    "learning rate": (("--config.optimizer.learning_rate=-1",), 1, r"optimizer\.learning_rate=-1\.0"),
    "unwritable workdir": (("--workdir={tmp}/short.txt/run",), 1, r"Cannot write to --workdir=.*short\.txt/run"),
    "unwritable cache": (("--config.data.cache_dir={tmp}/short.txt/c",), 1, r"Cannot write .*set data\.cache_dir"),
    "workdir of something else": (("--workdir={tmp}/other",), 1, "has checkpoints but no run.json"),
}

# Flags of gpt.sample after --workdir of a trained model.
SAMPLE_MISTAKES = {
    "unknown characters": (("--prompt=naïve ж",), 1, r"--prompt: unknown characters 'ï' \(U\+00EF\), 'ж' \(U\+0436\)"),
    "top_k zero": (("--top_k=0",), 1, "--top_k=0 has to lie between 1 and"),
    "top_k too large": (("--top_k=1000",), 1, "--top_k=1000 has to lie between 1 and"),
    "top_p": (("--top_p=1.5",), 1, r"--top_p=1\.5"),
    "temperature": (("--temperature=-1",), 1, r"--temperature=-1\.0"),
    "repetition_penalty": (("--repetition_penalty=0",), 1, r"--repetition_penalty=0\.0"),
    "num_tokens": (("--num_tokens=0",), 2, "--num_tokens=0 has to be a positive integer"),
    "num_samples": (("--num_samples=many",), 2, "--num_samples=many has to be a whole number"),
    "num_samples beyond all": ((f"--num_samples={10**30}",), 2, f"--num_samples={10**30} has to be .* range"),
    "seed": (("--seed=-1",), 2, "--seed=-1 has to be an integer in the range"),
    "seed beyond 32 bits": ((f"--seed={2**32}",), 2, "--seed=4294967296 has to be .* range"),
    "seed beyond 64 bits": ((f"--seed={2**64}",), 2, "--seed=18446744073709551616 has to be .* range"),
    "prompt without a flag": (("ROMEO",), 2, "Unexpected argument 'ROMEO'; flags are written --name=value"),
    "flag without a value": (("--prompt",), 2, "Missing value for flag --prompt"),
    "config": (("--config=configs/char.py",), 2, "There is no flag --config"),
    "empty checkpoint": (("--checkpoint=",), 2, "--checkpoint is empty"),
    "file": (("--workdir={tmp}/short.txt",), 1, r"short\.txt: there is no such folder"),
    "checkpoint": (("--checkpoint=7",), 1, "--checkpoint=7: choose best, last or one of 6"),
    "no workdir": (("--workdir={tmp}/nowhere",), 1, "--workdir=.*nowhere: there is no such folder"),
    "no run": (("--workdir={tmp}/folder",), 1, "folder holds no run"),
    "no checkpoint": (("--workdir={tmp}/unsaved",), 1, "There is no checkpoint in .*unsaved/checkpoints"),
    "damaged record": (("--workdir={tmp}/damaged",), 1, r"run\.json or tokenizer\.json is damaged"),
}


# Flags of the other commands, after --workdir of a trained model where the flags name none.
MISTAKES = {
    "main": MAIN_MISTAKES,
    "sample": SAMPLE_MISTAKES,
    "evaluate": {
        "split": (("--split=test",), 2, "--split=test: choose one of"),
        "near split": (("--split=vall",), 2, r"did you mean val\?"),
        "near checkpoint": (("--checkpoint=bst",), 1, r"choose best, last or one of 6; did you mean best\?"),
        "near workdir": (("--workdir={tmp}/damagd",), 1, r"no such folder; did you mean .*/damaged\?"),
        "data": (("--data={tmp}/none.txt",), 1, r"there is no file or folder .*none\.txt"),
        "empty data": (("--data=",), 2, "--data is empty"),
        "batch size": (("--batch_size=99999999999",), 2, "--batch_size=99999999999 has to be an integer in the range"),
        "stride": (("--stride=99",), 2, r"--stride=99 is more than model\.block_size"),
        "checkpoint": (("--json", "--checkpoint=7"), 1, "--checkpoint=7: choose best, last or one of 6"),
    },
    "explain": {
        "no prompt": ((), 2, "--prompt is missing"),
        "out exists": (("--prompt=KING", "--out={tmp}/short.txt"), 1, r"--out=.*short\.txt exists already"),
        "no folder for out": (("--prompt=KING", "--out={tmp}/none/x.html"), 1, "Cannot write --out=.*No such file"),
    },
    "plot": {
        "no workdir": (("--workdir={tmp}/nowhere",), 1, "nowhere: there is no such folder"),
        "out exists": (("--out={tmp}/short.txt",), 1, r"--out=.*short\.txt exists already"),
        "out is a folder": (("--out={tmp}/folder",), 1, "--out=.*folder exists already"),
        "no folder for out": (("--out={tmp}/none/x.png",), 1, "Cannot write --out=.*No such file"),
        "format": (("--out={tmp}/x.html",), 1, "no picture format 'html'"),
        "no matplotlib": ((), 1, r"matplotlib: pip install .*\[plot\]", {}, ["matplotlib"]),
    },
    "convert": {
        "no direction": ((), 2, "Give just one of --from_hf, --to_hf, --from_peft"),
        "name of a hub": (("--from_hf=gpt2", "--workdir={tmp}/new"), 1, "--from_hf=gpt2: there is no such folder"),
        "empty folder": (("--from_hf={tmp}/folder", "--workdir={tmp}/new"), 1, r"config\.json is missing"),
        "empty": (("--to_hf=",), 2, "--to_hf is empty"),
        "workdir in use": (("--from_hf={tmp}/folder",), 1, "--workdir=.* is not an empty folder"),
    },
    "plan": {
        "no topology": (("--config=configs/pretrain.py",), 2, "Set a config file and a topology"),
        "near chip": (("--config=configs/pretrain.py", "--topology=h10:8"), 2, r"'h10'; .* did you mean h100\?"),
        "zeros": (("--config=configs/pretrain.py", "--topology=v5e:0x0"), 2, "v5e has 2 sizes, up to v5e:16x16"),
        "huge": (("--config=configs/pretrain.py", "--topology=v5e:1000x1000"), 2, "v5e has 2 sizes, up to v5e:16x16"),
        "three sizes": (("--config=configs/pretrain.py", "--topology=v5e:4x4x4"), 2, "v5e has 2 sizes"),
        "nonsense": (("--config=configs/pretrain.py", "--topology=x"), 2, "--topology=x has to look like v5e:16x16"),
        "html in a file": (
            ("--config=configs/pretrain.py", "--topology=v5e:2x2", "--html={tmp}/short.txt/x"),
            1,
            "Cannot write --html=.*Not a directory",
        ),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory, trained):
    """A folder with files and workdirs to stumble over."""
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "empty.txt").touch()
    (tmp / "binary").write_bytes(bytes(range(256)) * 10)
    (tmp / "latin1.txt").write_bytes("café ".encode("latin-1") * 1000)
    (tmp / "short.txt").write_text("short")
    (tmp / "folder").mkdir()
    (tmp / "other" / "checkpoints").mkdir(parents=True)
    for name in ("unsaved", "damaged"):
        (tmp / name).mkdir()
        for file in ("run.json", "tokenizer.json"):
            (tmp / name / file).write_bytes((trained[0] / file).read_bytes())
    (tmp / "damaged" / "run.json").write_text("{")
    return tmp


@pytest.mark.parametrize(("tool", "name"), [(command, name) for command in MISTAKES for name in MISTAKES[command]])
def test_a_mistake_is_one_sentence(mistaken, trained, play, command, tool, name):
    flags, code, sentence, *more = MISTAKES[tool][name]
    env, missing = [*more, *[{}, []][len(more) :]]
    flags = [flag.format(tmp=mistaken) for flag in flags]
    has, usual = " ".join(flags), []  # the flags that are not the mistake
    if tool == "main":
        usual = [f"--workdir={mistaken}/unused"]
        if "config" not in name and "--config=" not in has:
            data = [] if "data.path" in has else [f"--config.data.path={play}"]
            usual = [*SMALL, *data, *([] if "workdir" in has else usual)]
    elif tool != "plan" and "--workdir" not in has:
        usual = [f"--workdir={trained[0]}"]
    done = command(tool, *usual, *flags, missing=missing, env=os.environ | env, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert re.search(sentence, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout


def test_a_bug_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    """Only what is meant for the user is reduced to a sentence."""
    monkeypatch.setattr(train, "build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(tiny, Workdir(tmp_path))


def test_changed_corpus_is_noticed_after_training(tiny, tmp_path, play):
    text = tmp_path / "text.txt"
    text.write_text(play.read_text())
    data = type(tiny.data)(path=str(text))
    config = type(tiny)(model=tiny.model, data=data, train=type(tiny.train)(batch_size=16, steps=1, sample_tokens=0))
    train.train(config, Workdir(tmp_path / "run"))
    text.write_text(play.read_text()[::-1])
    with pytest.raises(Exception, match="has changed since the training began"):
        loading.load(Workdir(tmp_path / "run"), "best").dataset()
