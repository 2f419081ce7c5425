"""Loggers that write through the libraries of Weights & Biases and MLflow."""

import html
import io
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt.runtime.errors import UserError, one_line
from gpt.runtime.loggers import Logger, Session, describe
from gpt.runtime.progress import say

PROJECT = "gpt-spmd"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another one
LONGEST_WAIT = 30  # seconds for a server at the start of a session


class WeightsAndBiases(Logger):
    """Writes a run of Weights & Biases, with the ID of the run, so that a resumed run continues it.

    The files are in `wandb` in the workdir. The library sends them to the server in another process. Without an API key
    or a network it only writes the files, which `wandb sync` sends later. The server keeps the first value of a step:
    values of steps that a resumed run repeats, which are the same, are left out.
    """

    def __init__(self, session: Session):
        import wandb

        # The library prints nothing, and starts nothing but the process that sends and the measurements of the system.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            symlink=False,  # a workdir with links is refused
            x_save_requirements=False,
            init_timeout=LONGEST_WAIT,
            finish_timeout=10 * LONGEST_WAIT,
        )
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT") or PROJECT,
            "name": os.environ.get("WANDB_NAME") or session.path.name,
            "id": session.id or None,
            "dir": None if "://" in str(session.path) else str(session.path),
            "resume": "allow",
            "config": dict(session.config),
            "settings": settings,
        }
        wandb.setup(settings)
        self._library = wandb
        try:
            may_send = os.environ.get("WANDB_MODE") or wandb.login(prompt=False)
            reason = "" if may_send else "there is no API key: `wandb login`"
            self._run = wandb.init(mode="offline" if reason else None, **options)
        except (wandb.Error, TimeoutError) as error:
            reason = one_line(error).rstrip(".")
            self._run = wandb.init(mode="offline", **options)
        if reason:
            folder = Path(self._run.dir).parent
            say(f"note: Weights & Biases is offline ({reason}); `wandb sync {folder}` sends the run later.")
        self._remove_links()
        self._run.define_metric("validation/loss", summary="min,last")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._run.log({tag: self._library.Html(f"<pre>{html.escape(markdown)}</pre>", inject=False)}, step=step)

    def image(self, step: int, tag: str, png: bytes) -> None:
        self._run.log({tag: self._library.Image(_decoded(png), caption=describe(tag))}, step=step)

    def histogram(self, step: int, tag: str, counts: np.ndarray, edges: np.ndarray) -> None:
        self._run.log({tag: self._library.Histogram(np_histogram=(counts, edges))}, step=step)

    def close(self, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)
        self._remove_links()

    def _remove_links(self) -> None:
        """Removes the link to the library's log: a workdir with links is refused."""
        for path in Path(self._run.dir).parent.rglob("*"):
            if path.is_symlink():
                path.unlink(missing_ok=True)


class MLflow(Logger):
    """Writes a run of the MLflow server that MLFLOW_TRACKING_URI names; MLflow has no histograms.

    A resumed run continues the run of MLflow that has its ID as the tag `run`. MLflow keeps both values of a step that
    a resumed run repeats; they are the same.
    """

    def __init__(self, session: Session):
        if not (address := os.environ.get("MLFLOW_TRACKING_URI")):
            raise UserError("train.loggers=mlflow needs the address of an MLflow server: set MLFLOW_TRACKING_URI.")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(LONGEST_WAIT))  # training waits as long
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient, entities, exceptions

        self._entities, self._client = entities, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        try:
            experiment = self._client.get_experiment_by_name(name)
            place = experiment.experiment_id if experiment else self._client.create_experiment(name)
            found = self._client.search_runs([place], f"tags.run = '{session.id}'")
            tags = {"run": session.id}
            run = found[0] if found else self._client.create_run(place, tags=tags, run_name=session.path.name)
            self._id = run.info.run_id
            self._client.update_run(self._id, "RUNNING")
            known = run.data.params  # the value of a parameter is final
            new = [entities.Param(key, str(value)) for key, value in session.hparams.items() if key not in known]
            self._client.log_batch(self._id, params=new)
            self._client.log_dict(self._id, dict(session.config), f"config/{session.step}.json")
        except exceptions.MlflowException as error:
            raise UserError(f"MLFLOW_TRACKING_URI={address} cannot record the run: {one_line(error)}") from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(_allowed(tag), value, now, step) for tag, value in values.items()]
        for i in range(0, len(metrics), 1000):  # the most that a server takes at once
            self._client.log_batch(self._id, metrics[i : i + 1000])

    def text(self, step: int, tag: str, markdown: str) -> None:
        self._client.log_text(self._id, markdown, f"{tag}/{step}.md")

    def image(self, step: int, tag: str, png: bytes) -> None:
        self._client.log_image(self._id, _decoded(png), key=_allowed(tag), step=step)

    def close(self, is_complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_complete else "KILLED")


def _decoded(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png))


def _allowed(tag: str) -> str:
    """Returns a tag without the characters that MLflow refuses."""
    return re.sub(r"[^\w\-. :/]", "_", tag)
