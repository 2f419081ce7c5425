"""Deletes checkpoints of a run that are not needed any more."""

import contextlib
import sys

from gpt.checkpointing import overview, writing
from gpt.checkpointing.record import reason
from gpt.checkpointing.workdir import Workdir
from gpt.runtime import files
from gpt.runtime.errors import UsageError, UserError
from gpt.runtime.progress import short


def prune(run: str, folder: str, keep: list[str], is_confirmed: bool) -> int:
    """Deletes checkpoints of a run after a confirmation, while no process can train in its workdir.

    The best and the last checkpoint are kept, and those that LoRA's adapters in `folder` belong to. The arrays of the
    best and the last checkpoint are read and verified before others are deleted.

    Args:
      run: workdir of the run, or its name in `folder`.
      folder: folder with runs.
      keep: further steps to keep.
      is_confirmed: delete without asking.

    Returns:
      The exit code: 1 if the answer was not yes, else 0.

    Raises:
      UserError: the run is in use, a checkpoint is damaged or cannot be deleted, or nobody can be asked.
    """
    workdir = Workdir(overview.locate("prune", run, folder))
    (found,) = overview.find(str(workdir.path))
    if found.state in ("running", "damaged"):
        problem = "is in use by" if found.state == "running" else "is damaged:"
        raise UserError(f"--prune={run} {problem} {found.reason}; nothing was deleted.")
    with workdir.lock():
        checkpoints, sizes = workdir.checkpoints(), found.checkpoint_bytes
        if unknown := set(keep) - {"best", "last", *map(str, sizes)}:
            raise UsageError(f"--keep={min(unknown)}: {run} has no such checkpoint, only {', '.join(map(str, sizes))}.")
        if len(sizes) < 2:
            print(f"Nothing to delete: {run} has {len(sizes) or 'no'} checkpoint.")
            return 0
        reasons = {int(name): "--keep" for name in keep if name in map(str, sizes)}
        with contextlib.suppress(UserError):  # there may be no such folder
            bases = {other.base: other.name for other in overview.find(folder) if other.base}
            reasons |= {step: f"base of {name}" for (path, step), name in bases.items() if path == str(workdir.path)}
        best, last = checkpoints.find("best"), checkpoints.find("last")
        reasons |= {last: "last", best: "best"} if best != last else {last: "best and last"}
        for step, size in sizes.items():
            action = f"keep ({reasons[step]})" if step in reasons else "delete"
            print(f"{step:>12,}  {short(size):>6}B  {action}")
        doomed = [step for step in sizes if step not in reasons]
        if not doomed:
            print("Nothing to delete.")
            return 0
        freed = short(sum(sizes[step] for step in doomed))
        what = f"{len(doomed)} checkpoint{'s' * (len(doomed) > 1)} ({freed}B) of {run}"
        if not files.is_local(workdir.path):
            print("There is no lock in a bucket: make sure that no process trains in this workdir.")
        if not is_confirmed and not _is_answered_yes(f"Delete {what}? [y/N] "):
            print("Nothing was deleted.")
            return 1
        for step in {best, last}:
            checkpoints[step].verify()
        for step in doomed:
            try:
                writing.delete(workdir.path / "checkpoints" / str(step))
            except OSError as error:
                raise UserError(f"Cannot delete checkpoint {step} of {run}: {reason(error)}.") from None
        print(f"Deleted {what}.")
    return 0


def _is_answered_yes(question: str) -> bool:
    """Asks a question on the terminal; returns whether the answer is yes. Raises UsageError if there is no terminal."""
    if not sys.stdin.isatty():
        raise UsageError("--prune needs a terminal to ask on; add --yes to delete these checkpoints without asking.")
    print(question, end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
