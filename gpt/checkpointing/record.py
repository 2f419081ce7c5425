"""What each checkpoint records about itself. This module imports no JAX, so that `gpt.runs` starts at once."""

import dataclasses
import json
import math
import os
import re
import zlib
from collections.abc import Iterable
from typing import Any

from etils import epath

from gpt.runtime import files
from gpt.runtime.errors import UserError

RECORD = "digests/metadata"  # path in the folder of a checkpoint, where orbax's own handler of JSON would write it
STEP = re.compile("0|[1-9][0-9]*")  # the name of a checkpoint's folder
UNFINISHED = ".orbax-checkpoint-tmp"  # suffix that orbax gives the folder of a save that has not finished


class Damaged(UserError):
    """A checkpoint differs from what was saved."""

    def __init__(self, folder: epath.Path, reason: str):
        super().__init__(f"{folder} is damaged ({reason}).")


@dataclasses.dataclass(frozen=True)
class Record:
    """The record of a checkpoint.

    Attributes:
      run: ID of the run.
      step: number of training steps done.
      data: identifies what `validation_loss` was measured on; see `validation_data`.
      arrays: digest of each array, by names such as "params/blocks/mlp/up/kernel"; see `gpt.checkpointing.integrity`.
      validation_loss: nats per target; None if the step was not evaluated.
      mean_loss: running mean of the training loss; None if the checkpoint has parameters only.
    """

    run: str
    step: int
    data: str
    arrays: dict[str, int]
    validation_loss: float | None = None
    mean_loss: float | None = None

    def to_json(self) -> str:
        """Returns the content of the file, which includes a checksum."""
        content = dataclasses.asdict(self)
        return json.dumps(content | {"checksum": _checksum(content)})

    @classmethod
    def open(cls, folder: epath.Path, run_id: str) -> "Record":
        """Returns the record of the checkpoint in a folder that is named after its step.

        Raises:
          Damaged: the record is missing or damaged, or belongs to another step or run.
        """
        try:
            record = cls.from_json(files.read_json(folder / RECORD))
            if record.step != int(folder.name):
                raise ValueError(f"it belongs to step {record.step}")
            if record.run != run_id:
                raise ValueError("it belongs to another run")
        except FileNotFoundError:
            raise Damaged(folder, f"{RECORD} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(folder, f"{RECORD}: {reason(error)}") from None
        return record

    @classmethod
    def from_json(cls, content: Any) -> "Record":
        """Returns the record in the parsed content of a file.

        Raises:
          ValueError, KeyError, TypeError, AttributeError: the content is not a record, or was changed.
        """
        values = {name: value for name, value in content.items() if name != "checksum"}
        if content["checksum"] != _checksum(values):
            raise ValueError("its checksum does not match")
        return cls(**values)


def saved_names(checkpoints: epath.Path) -> list[str]:
    """Returns the names in a folder of checkpoints, without hidden files and the remains of unfinished saves."""
    names = (entry.name for entry in checkpoints.iterdir()) if checkpoints.exists() else ()
    return sorted(name for name in names if not name.endswith(UNFINISHED) and name[0] != ".")


def lowest(records: Iterable[Record], data: str) -> tuple[int, float] | None:
    """Returns step and loss of the record with the lowest finite validation loss on some data, or None."""
    losses = [(each.validation_loss, each.step) for each in records if each.data == data]
    finite = [(loss, step) for loss, step in losses if loss is not None and math.isfinite(loss)]
    return min(finite)[::-1] if finite else None


def reason(error: Exception) -> str:
    """Returns a short reason for an error, because libraries wrap that of the system in a page of context."""
    text = getattr(error, "strerror", None) or str(error)
    system = re.search(r"\[os_error_code='(\d+)'|\[OS error (\d+):", text)  # of tensorstore
    return os.strerror(int(system[1] or system[2])) if system else " ".join(text.split())[:200]


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
