"""Lists the runs below a folder, from the records in their workdirs: run.json and the record of each checkpoint.

Neither arrays nor tokenizers are read, and nothing that a workdir contains can end the listing: whatever cannot be read
is listed as damaged, with the reason. This module imports no JAX, so that `gpt.runs` starts at once.
"""

import collections
import dataclasses
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from rich.cells import cell_len

from gpt.checkpointing.record import STEP, Damaged, Record, lowest, reason, saved_names
from gpt.data import storage
from gpt.runtime import files, pool
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.progress import columns, duration, short

DISK_THREADS, BUCKET_THREADS = (
    1,
    32,
)  # workdirs read at a time; on a disk, threads wait for each other (3.0 instead of 1.5 s)

Content = Mapping[str, tuple[int, float]]  # files in a workdir: path, bytes, time of the last change in seconds


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of a run without reading its arrays. None: not known, or there is none.

    Attributes:
      name: path of the workdir in the folder that was searched.
      state: "running" (a process holds the lock), "finished", "stopped", "never saved", "converted" (weights that no
        run trained), "unknown" (not finished, where there are no locks, as in a bucket), or "damaged".
      reason: what is damaged, or which process holds the lock.
      config: family and shape of the model, and kind of the data.
      step: step of the newest checkpoint.
      training_loss: running mean of the training loss at that step.
      tokens: number of tokens that were trained on until that step.
      age_seconds: time since the last change of a file.
      checkpoint_bytes: size of each checkpoint with a valid record, by step.
      base: path and step of the checkpoint that LoRA's adapters belong to.
    """

    name: str
    state: str
    reason: str = ""
    config: str | None = None
    step: int | None = None
    total_steps: int | None = None
    best_validation_loss: float | None = None
    last_validation_loss: float | None = None
    training_loss: float | None = None
    tokens: int | None = None
    age_seconds: float | None = None
    size_bytes: int = 0
    checkpoint_bytes: Mapping[int, int] = dataclasses.field(default_factory=dict)
    base: tuple[str, int] | None = None


def find(place: str) -> list[Summary]:
    """Returns the runs in a folder or bucket and in the folders below it, in the order of their names.

    Raises:
      UserError: the folder is missing or cannot be read.
    """
    if files.is_local(place):
        root = os.path.abspath(os.path.expanduser(place))
        try:
            os.listdir(root)
        except OSError as error:
            raise UserError(f"Cannot list {place}: {error.strerror}; name a folder with runs.") from None
        found, count = _on_disk(root), DISK_THREADS
    else:
        root, count = place.rstrip("/"), BUCKET_THREADS
        found = _in_bucket(root)

    def summary(item: tuple[str, Content | None, str]) -> Summary:
        path, content, problem = item
        return _summarize(path, path[len(root) :].strip("/") or os.path.basename(root), content, problem)

    return sorted(pool.thread_map(count)(summary, found), key=lambda run: run.name)


def locate(flag: str, run: str, folder: str) -> epath.Path:
    """Returns the workdir of a run that a flag names by its path, or by its name in a folder of runs."""
    for path in (epath.Path(run).expanduser(), epath.Path(folder).expanduser() / run):
        if (path / "run.json").exists():
            return path
    raise UsageError(f"--{flag}={run}: there is no such run; name a workdir, or a run of the list of {folder}.")


def _summarize(path: str, name: str, content: Content | None, problem: str) -> Summary:
    """Returns what is known of the run in a workdir.

    Args:
      content: the files in it; None for a local workdir, whose files are listed now.
      problem: why the content is not complete; "" if it is.
    """
    if content is None:
        content, problem = _content(path)
    holder = _holder(path) if files.is_local(path) else None
    changed = max((changed for _, changed in content.values()), default=None)
    age = None if changed is None else max(0.0, time.time() - changed)
    damaged = Summary(name, "damaged", age_seconds=age, size_bytes=sum(size for size, _ in content.values()))
    try:
        if not problem and "run.json" not in content and holder:
            return dataclasses.replace(damaged, state="running", reason=holder)
        if problem or "run.json" not in content:
            raise ValueError(problem or "run.json is missing")
        folder = Path(path) if files.is_local(path) else epath.Path(path)  # the former is faster
        return _with_records(damaged, folder, content, holder)
    except Damaged as error:
        return dataclasses.replace(damaged, reason=str(error).removeprefix(f"{path}/").rstrip("."))
    except Exception as error:  # anything may be in a file, and each client of a bucket raises its own types
        text = f"run.json has no {error}" if isinstance(error, KeyError) else reason(error)
        return dataclasses.replace(damaged, reason=text)


def _with_records(run: Summary, folder: Any, content: Content, holder: str | None) -> Summary:
    """Returns the summary of a run with the content of run.json and of the records of its checkpoints."""
    recorded = files.read_json(folder / "run.json")
    total, is_converted = _count(recorded["total_steps"]), recorded["data_fingerprint"] is None
    if "tokenizer.json" not in content:
        raise ValueError("tokenizer.json is missing")
    sizes: collections.Counter[str] = collections.Counter()
    for path, (size, _) in content.items():
        if path.startswith("checkpoints/"):
            sizes[path.split("/")[1]] += size
    names, records = saved_names(folder / "checkpoints"), []
    for name in sorted(filter(STEP.fullmatch, names), key=int):
        checkpoint = folder / "checkpoints" / name
        try:
            records.append(Record.open(checkpoint, str(recorded["id"])))
        except Damaged:
            if checkpoint.exists():  # else the run deleted it meanwhile
                raise
    if names and not records:
        raise ValueError(f"no checkpoint has a valid name, only {names[0]}")
    last = records[-1] if records else None
    losses = [each.validation_loss for each in records if each.validation_loss is not None]
    best = lowest(records, last.data) if last else None
    if holder:
        state = "running"
    elif is_converted:
        state = "converted"
    elif not last:
        state = "never saved"
    elif last.step >= total and last.validation_loss is not None:
        state = "finished"
    else:
        state = "unknown" if holder is None else "stopped"
    return dataclasses.replace(
        run,
        state=state,
        reason=holder or "",
        config=str(recorded["description"]),
        step=last.step if last else 0,
        total_steps=total,
        best_validation_loss=best[1] if best else None,
        last_validation_loss=_finite(losses[-1]) if losses else None,
        training_loss=_finite(last.mean_loss) if last else None,
        tokens=last.step * _count(recorded["tokens_per_step"]) if last else 0,
        checkpoint_bytes={each.step: sizes[str(each.step)] for each in records},
        base=(str(recorded["base"]["path"]), int(recorded["base"]["step"])) if recorded["base"] else None,
    )


def _count(number: Any) -> int:
    """Returns a number of steps or tokens. Raises ValueError if it is absurd."""
    if not 0 <= int(number) < 1 << 63:
        raise ValueError("run.json has a number of steps or tokens that is negative or above 2⁶³")
    return int(number)


def _finite(number: float | None) -> float | None:
    return float(number) if number is not None and math.isfinite(number) else None


def _holder(folder: str) -> str | None:
    """Returns which process holds the lock of a local workdir; "" if none does, None if the disk has no locks."""
    try:
        with open(os.open(f"{folder}/.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(200) or "another process"
    except FileNotFoundError:
        return ""
    except OSError:
        return None
    return ""


def _content(folder: str) -> tuple[Content, str]:
    """Returns the files in a local workdir, without following links, and why a part of them is missing, or ""."""
    content, problem, waiting = {}, "", [""]
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(f"{folder}/{inside}") as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{inside}{entry.name}/")
                    else:
                        found = entry.stat(follow_symlinks=False)
                        content[inside + entry.name] = found.st_size, found.st_mtime
        except FileNotFoundError:  # the run deleted it meanwhile
            continue
        except OSError as error:
            problem = f"{inside or folder}: {error.strerror}"
    return content, problem


def _on_disk(root: str) -> Iterator[tuple[str, Content | None, str]]:
    """Yields path, content and problem of each workdir below a folder, and of each folder that cannot be read."""
    problems: list[OSError] = []
    for parent, folders, names in os.walk(root, onerror=problems.append):
        folders[:] = [name for name in folders if name[0] != "."]
        if "run.json" in names or "checkpoints" in folders or (".lock" in names and _holder(parent)):
            folders.clear()  # what is inside a workdir belongs to it
            yield parent, None, ""
            continue
        for path in (f"{parent}/{name}" for name in folders + names if name[0] != "."):
            if os.path.islink(path) and not os.path.exists(path):
                yield path, {}, "a link to nothing"
            elif os.path.islink(path) and os.path.exists(f"{path}/run.json"):
                yield path, None, ""
    for error in problems:
        yield str(error.filename), {}, error.strerror or "unreadable"


def _in_bucket(root: str) -> Iterator[tuple[str, Content | None, str]]:
    """Yields path, content and "" of each workdir at an address in a bucket or below it."""
    listed = storage.listing(root)
    contents: dict[str, dict[str, tuple[int, float]]] = {}
    parts = {path: path.split("/") for path in listed}
    workdirs = {tuple(each[:-1]) for each in parts.values() if each[-1] == "run.json"}
    workdirs |= {tuple(each[: each.index("checkpoints")]) for each in parts.values() if "checkpoints" in each[:-1]}
    for path, each in parts.items():
        above = next((i for i in range(len(each)) if tuple(each[:i]) in workdirs), None)
        if above is not None:
            contents.setdefault("/".join(each[:above]), {})["/".join(each[above:])] = listed[path]
    for folder, content in contents.items():
        yield f"{root}/{folder}".rstrip("/"), content, ""


def compare(a: str, b: str, folder: str) -> Iterator[str]:
    """Yields a table of the config keys in which two runs differ; see `locate`.

    Raises:
      UserError: there is no such run, or its config cannot be read.
    """
    from gpt.config import differences  # imports JAX
    from gpt.config_files import read_recorded

    configs = []
    for run in (a, b):
        try:
            configs.append(read_recorded(str(locate("diff", run, folder))))
        except UserError as error:
            raise type(error)(f"--diff={run}: {error}") from None
    lines = [(key, repr(old), repr(new)) for key, (old, new) in differences(*configs).items()]
    if lines:
        yield from columns([("", a, b), *(tuple(map(printable, line)) for line in lines)], left=2)
    else:
        yield "The configs are equal."


def sort(runs: Sequence[Summary], column: str) -> list[Summary]:
    """Returns runs in the order of a column, reversed after "-". Runs without a value come last.

    Raises:
      UsageError: there is no such column.
    """
    name = column.removeprefix("-")
    if name not in COLUMNS:
        raise UsageError(f"--sort={column}: choose one of {', '.join(COLUMNS)}, or -COLUMN for the reverse order.")
    value = COLUMNS[name][0]
    known = [run for run in runs if value(run) is not None]
    return sorted(known, key=value, reverse=column[0] == "-") + [run for run in runs if value(run) is None]


# Columns of the table: the value that it is sorted by, which is None where it is not known, and the text of the value.
COLUMNS: dict[str, tuple[Callable[[Summary], Any], Callable[[Summary], str]]] = {
    "name": (lambda run: run.name, lambda run: run.name),
    "state": (lambda run: run.state, lambda run: run.state),
    "step": (lambda run: run.step, lambda run: f"{run.step:,}/{run.total_steps:,}"),
    "best": (lambda run: run.best_validation_loss, lambda run: f"{run.best_validation_loss:.4f}"),
    "last": (lambda run: run.last_validation_loss, lambda run: f"{run.last_validation_loss:.4f}"),
    "age": (lambda run: run.age_seconds, lambda run: duration(run.age_seconds or 0)),
    "size": (lambda run: run.size_bytes, lambda run: f"{short(run.size_bytes)}B"),
    "saved": (lambda run: len(run.checkpoint_bytes), lambda run: str(len(run.checkpoint_bytes))),
    "tokens": (lambda run: run.tokens, lambda run: short(run.tokens or 0)),
    "train": (lambda run: run.training_loss, lambda run: f"{run.training_loss:.4f}"),
    "config": (lambda run: run.config, lambda run: run.config or ""),
}
LEAST = ("config", "train", "tokens", "saved", "size", "last", "age", "best", "step", "state")  # left out in this order


def table(runs: Sequence[Summary], width: int) -> Iterator[str]:
    """Yields the lines of a table that fits into the width of a terminal, with the reason under each damaged run.

    A single run is followed by the list of its checkpoints.
    """
    cells = {name: [name] for name in COLUMNS}
    for name, (value, show) in COLUMNS.items():
        cells[name] += ["-" if value(run) is None else printable(show(run)) for run in runs]
    longest = {name: max(map(cell_len, column)) for name, column in cells.items()}
    widths = {name: min(size, {"name": 20, "config": 16}.get(name, 24)) for name, size in longest.items()}

    def left() -> int:
        return width - sum(widths.values()) - 2 * (len(widths) - 1)

    for name in LEAST:
        if left() < 0:
            del widths[name]
    for name in ("name", "config"):
        if name in widths:
            widths[name] = min(longest[name], widths[name] + left())
    for i in range(len(runs) + 1):
        line = []
        for name, size in widths.items():
            text = shortened(cells[name][i], size)
            space = " " * (size - cell_len(text))
            line.append(text + space if name in ("name", "state", "config") else space + text)
        yield "  ".join(line).rstrip()
        if i and runs[i - 1].state == "damaged":
            yield shortened(f"    {printable(runs[i - 1].reason)}", width)
    if len(runs) == 1:
        yield from (f"    checkpoint {step:,}: {short(size)}B" for step, size in runs[0].checkpoint_bytes.items())


def printable(text: str) -> str:
    """Returns a text with everything escaped that would move the cursor, or that a terminal cannot show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, width: int) -> str:
    """Returns a text with "…" in its middle if it takes more columns than `width`."""
    if cell_len(text) <= width:
        return text
    left, right = text[: width // 2], text[len(text) - (width - 1) // 2 :]
    while cell_len(left + right) >= max(width, 1):
        left, right = (left[:-1], right) if cell_len(left) > cell_len(right) else (left, right[1:])
    return f"{left}…{right}"
