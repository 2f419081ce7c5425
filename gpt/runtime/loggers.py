"""What writes the measurements of a run: TensorBoard, Weights & Biases and MLflow, behind one interface."""

import dataclasses
import importlib.util
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpt.runtime import progress
from gpt.runtime.errors import UserError, one_line
from gpt.runtime.fields import check_names, named

# The value of `train.loggers`, which is also the extra that installs the library, and the class.
LOGGERS = {
    "tensorboard": "gpt.runtime.tensorboard:TensorBoard",
    "wandb": "gpt.runtime.trackers:WeightsAndBiases",
    "mlflow": "gpt.runtime.trackers:MLflow",
}
RETRY_AFTER = 300.0  # seconds without a logger that has failed
_TAGS = tomllib.loads(Path(__file__).with_name("tags.toml").read_text(encoding="utf-8"))
CHARTS: dict[str, dict[str, str]] = _TAGS["charts"]


def check_loggers(names: str) -> None:
    """Raises UserError unless `names` is a value of `train.loggers`: "", or keys of `LOGGERS` with commas between."""
    check_names("train.loggers", names or "tensorboard", LOGGERS, "empty or ")


def require(names: str) -> None:
    """Raises UserError unless the libraries of the loggers are installed."""
    for name in filter(None, names.split(",")):
        if not getattr(importlib.util.find_spec(name), "origin", None):  # a folder of this name has none
            raise UserError(f'train.loggers={names} needs {name}: pip install "gpt-spmd[{name}]".')


@dataclasses.dataclass(frozen=True)
class Session:
    """What loggers know of a process that trains.

    Attributes:
      path: workdir of the run.
      step: number of finished steps. Measurements of later steps were made by an earlier process, after the checkpoint
        that this process resumed from.
      id: ID of the run.
      config: all settings of the run.
      hparams: the settings to compare runs by.
    """

    path: Path
    step: int = 0
    id: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Logger(Protocol):
    """Writes the measurements of a run. A logger is made from a `Session`, and its methods may raise any exception."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one number for each tag in `values`."""

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Writes a text in Markdown."""

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Writes an image. `png` is the content of a PNG file."""

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Writes a histogram of `counts`, [N], between `edges`, [N + 1], which are in increasing order."""

    def restart(self, step: int) -> None:
        """Hides what was written about steps after `step`, where that is possible."""

    def flush(self) -> None:
        """Writes all that is pending."""

    def close(self, is_complete: bool) -> None:
        """Ends the session, after the last step of the run or before it."""


class Loggers(Logger):
    """Writes to several loggers, none of which can end the run.

    Args:
      names: keys of `LOGGERS`, separated by commas.
      session: what the loggers know of the run.
      enabled: False to write nothing, on all processes except the first.
    """

    def __init__(self, names: str, session: Session, enabled: bool = True):
        self._names, self._session = names.split(",") if names and enabled else [], session
        self._loggers: dict[str, Logger] = {}
        self._failed_at: dict[str, float] = {}

    def begin(self) -> None:
        """Starts the loggers.

        Raises:
          UserError: a logger refuses its settings.
        """
        self._loggers = {name: named(LOGGERS[name])(self._session) for name in self._names}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._each("scalars", step, values)

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._each("text", step, tag, markdown)

    def image(self, step: int, tag: str, png: bytes) -> None:
        self._each("image", step, tag, png)

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
        self._each("histogram", step, tag, counts, edges)

    def restart(self, step: int) -> None:
        self._each("restart", step)

    def flush(self) -> None:
        self._each("flush")

    def close(self, is_complete: bool) -> None:
        self._failed_at.clear()
        self._each("close", is_complete)

    def _each(self, method: str, *arguments: Any) -> None:
        for name, logger in self._loggers.items():
            if time.monotonic() < self._failed_at.get(name, -RETRY_AFTER) + RETRY_AFTER:
                continue
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # each library raises its own types of exceptions
                if name not in self._failed_at:
                    text = f"note: cannot write to {name} ({type(error).__name__}: {one_line(error)})"
                    progress.say(f"{text}; the run continues and tries again every {RETRY_AFTER / 60:.0f} minutes.")
                self._failed_at[name] = time.monotonic()


def describe(tag: str) -> str:
    """Returns the description of a tag, which is that of its longest prefix with a description."""
    found: dict[str, str] = _TAGS["descriptions"]
    return found[max((prefix for prefix in found if tag.startswith(prefix)), key=len)]
