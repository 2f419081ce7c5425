"""What a workdir records about a run, and which changes a resumed run may make."""

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any

from etils import epath

from gpt.config import Config, differences, flatten, is_harmless
from gpt.data import tokenizers
from gpt.runtime import cache
from gpt.runtime.errors import UserError

ORDER = "order of examples"  # key of `Run.environment`: digest of the order in which examples come


@dataclasses.dataclass(frozen=True)
class Base:
    """The base of LoRA's adapters: the checkpoint whose frozen weights they were trained with.

    Attributes:
      path: workdir of the checkpoint.
      digest: digest of its parameters.
    """

    path: str
    step: int
    digest: int


@dataclasses.dataclass(frozen=True)
class Run:
    """The record of a run.

    Attributes:
      fingerprint: identifies the data; None for converted weights, whose data is not known.
      base: set if the run trains adapters.
      skipped: numbers of the batches that are left out; see `train.on_nonfinite`.
      evaluated: number of examples of an evaluation; 0 for converted weights.
      environment: versions, devices and other facts that an exact resume depends on.
      total_steps: length of the run; 0 for converted weights.
      id: is in every checkpoint of the run, and tells apart two runs of one config.
    """

    config: Config
    tokenizer: tokenizers.Tokenizer | tokenizers.Labels
    fingerprint: str | None
    base: Base | None = None
    skipped: tuple[int, ...] = ()
    evaluated: int = 0
    total_steps: int = 0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8), compare=False)


def refuse_changes(
    old: Run, new: Run, workdir: epath.Path, allow: bool, obstacle: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (old value, new value)} where config or environment of a resumed run differ from the record.

    Args:
      allow: permit all changes.
      obstacle: a sentence about why the newest checkpoint cannot be restored with the new config; "" if it can.

    Raises:
      UserError: `allow` is false, and the data, the order of examples, or a config key that is not harmless differs.
    """
    serious = describe_differences(old, new, "→", besides=is_harmless)
    if serious and not allow:
        advice = obstacle or "To resume with the changes, add --allow_config_change."
        raise UserError(
            f"--workdir={workdir} holds a run with a different config: {'; '.join(serious)}. Undo the changes, or "
            f"choose another --workdir. {advice}"
        )
    keys = [key for key in new.environment if key in old.environment and old.environment[key] != new.environment[key]]
    environment = {key: (old.environment[key], new.environment[key]) for key in keys}
    if environment.pop(ORDER, None) and not serious and not allow:
        versions = ", ".join(f"{key} {was} → {now}" for key, (was, now) in environment.items())
        raise UserError(
            f"--workdir={workdir}: the examples would come in a different order ({versions or 'grain'}). Install the "
            "versions that the run was started with, or add --allow_config_change."
        )
    return differences(old.config, new.config) | environment


def describe_differences(a: Run, b: Run, sign: str, besides: Callable[[str], bool] = lambda key: False) -> list[str]:
    """Returns phrases such as "train.batch_size 32 → 64" about the config and the data of two runs.

    Args:
      sign: stands between the values.
      besides: returns whether a config key is left out.
    """
    changes = differences(a.config, b.config)
    phrases = [f"{key} {old!r} {sign} {new!r}" for key, (old, new) in changes.items() if not besides(key)]
    if a.fingerprint != b.fingerprint:
        phrases.append(f"fingerprint of the data {a.fingerprint} {sign} {b.fingerprint}")
    return phrases


def validation_data(run: Run) -> str:
    """Returns a hash of the data of a run and its form: only losses measured on the same data can be compared."""
    options = flatten(dataclasses.asdict(run.config.data), "data.")
    form = {key: value for key, value in options.items() if not is_harmless(key)}
    return cache.digest(run.fingerprint, run.evaluated, sorted(form.items()))
