"""What a workdir records of a run, and which changes a resumed run may make."""

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any

from etils import epath

from gpt.config import Config, differences, is_harmless
from gpt.data import tokenizers
from gpt.runtime.errors import UserError

ORDER = "order of examples"  # in the environment of a run


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir's record of what is trained in it."""

    config: Config
    tokenizer: tokenizers.Tokenizer
    fingerprint: str | None  # of the data; None for weights that were converted, whose data is not known
    base: "Base | None" = None  # of a run that trains adapters
    skipped: tuple[int, ...] = ()  # numbers of the batches that are left out: see `train.on_nonfinite`
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # versions, devices: what exactness needs
    # The checkpoints of the run carry the same. Two runs of one config are equal otherwise.
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8), compare=False)


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint whose weights a run's adapters belong to.

    Attributes:
      path: of its workdir.
      digest: of what that checkpoint holds.
    """

    path: str
    step: int
    digest: int


def refuse_changes(
    old: Run, new: Run, workdir: epath.Path, allow: bool, obstacle: str = ""
) -> dict[str, tuple[Any, Any]]:
    """The differences between a workdir's run and the one wanted, if they may be, environments included.

    Args:
      obstacle: why the newest checkpoint cannot be restored under the new config, in a sentence; "": it can.

    Raises:
      UserError: the data, the order of examples, or a key that is not harmless, has changed and `allow` is false.
    """
    serious = describe_differences(old, new, "→", besides=is_harmless)
    if serious and not allow:
        advice = obstacle or "To resume with the changes, add --allow_config_change."
        raise UserError(
            f"--workdir={workdir} holds a run with another config: {'; '.join(serious)}. Choose another --workdir, or "
            f"undo the changes. {advice}"
        )
    keys = [key for key in new.environment if key in old.environment and old.environment[key] != new.environment[key]]
    if ORDER in keys and not serious and not allow:
        versions = ", ".join(f"{key} {old.environment[key]} → {new.environment[key]}" for key in keys if key != ORDER)
        raise UserError(
            f"--workdir={workdir}: the examples would come in another order than before ({versions or 'grain'}). "
            "Install the versions that the run began with, or add --allow_config_change."
        )
    environments = {key: (old.environment[key], new.environment[key]) for key in keys if key != ORDER}
    return differences(old.config, new.config) | environments


def describe_differences(a: Run, b: Run, sign: str, besides: Callable[[str], bool] = lambda key: False) -> list[str]:
    """In words, with the sign between the values: where configs and data of two runs differ."""
    changes = differences(a.config, b.config)
    found = [f"{key} {was!r} {sign} {now!r}" for key, (was, now) in changes.items() if not besides(key)]
    if a.fingerprint != b.fingerprint:
        found.append(f"fingerprint of the data {a.fingerprint} {sign} {b.fingerprint}")
    return found
