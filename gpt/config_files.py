"""Reads config files and the flags that change them: a Python file, to an ml_collections tree, to a `Config`."""

import difflib
import inspect
import re
import runpy
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_collections

from gpt.config import Config, default_config, flatten, from_tree, unknown_key
from gpt.data.base import KINDS
from gpt.models.base import FAMILIES
from gpt.runtime.errors import UsageError, UserError, one_line

PACKAGE = Path(__file__).parent
# The config files of an installation, or of a checkout.
CONFIGS = next((folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()), PACKAGE)


def read(place: str | None, changes: Iterable[tuple[str, str | None]] = ()) -> Config:
    """Returns the config of a config file with changes.

    Args:
      place: FILE, or FILE:ARGUMENT; None: the user named none.
      changes: keys and new values as text, as `override` takes them.

    Raises:
      UserError: there is no such file, an error in it, or a change that is refused.
    """
    if place is None:
        raise UsageError("Name a config file: --config=configs/char.py.")
    tree = read_file(place)
    for key, text in changes:
        override(tree, key, text)
    return from_tree(tree)


def default_workdir(place: str) -> Path:
    """Returns runs/NAME for a config file NAME.py, or runs/NAME-ARGUMENT."""
    file, _, argument = place.partition(":")
    return Path("runs") / "-".join(filter(None, (Path(file).stem, Path(argument).name)))  # it may be a path


def read_file(place: str) -> ml_collections.ConfigDict:
    """Returns the tree that a config file makes.

    Args:
      place: FILE, or FILE:ARGUMENT for a `get_config` with a parameter.

    Raises:
      UsageError: there is no such file, it is not a config file, or it has an error.
    """
    name, colon, argument = place.partition(":")
    path = Path(name).expanduser()
    if not path.exists() and path.parts[:1] == ("configs",):
        path = CONFIGS.joinpath(*path.parts[1:])
    if not path.is_file():
        stems = {file.stem: Path("configs", file.name) for file in sorted(CONFIGS.glob("*.py"))}
        for folder in ("configs", Path(name).expanduser().parent):
            stems |= {file.stem: file for file in sorted(Path(folder).glob("*.py"))}
        near = difflib.get_close_matches(path.stem, stems, n=1)
        what = "is a folder, not a config file" if name and path.is_dir() else "there is no such config file"
        hint = f"did you mean {stems[near[0]]}{colon}{argument}?" if near else "name one, like configs/char.py."
        raise UsageError(f"--config={place}: {what}; {hint}")
    if path.suffix != ".py":
        raise UsageError(f"--config={place}: a config file is a Python file, like configs/char.py.")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if not callable(get_config):
            raise UsageError("it defines no function get_config(); see configs/char.py.")
        arguments = [argument] if colon else []
        try:
            inspect.signature(get_config).bind(*arguments)
        except TypeError:
            takes = "takes no argument; leave out" if colon else "needs an argument; add"
            raise UsageError(f"its get_config() {takes} {colon or ':'}{argument or 'ARGUMENT'}.") from None
        tree = get_config(*arguments)
        if not isinstance(tree, ml_collections.ConfigDict) or set(tree) != set(default_config()):
            raise UsageError(f"get_config() has to return what default_config() returns, not a {type(tree).__name__}.")
    except UserError as error:
        raise UsageError(f"--config={place}: {error}") from None
    except Exception as error:  # an error of the user's code, unless it was raised within this package
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).is_relative_to(Path(__file__).parent) and frames[-1].name != read_file.__name__:
            raise
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        what = _describe(error)
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines, what = [error.lineno], error.msg
        line = f"line {lines[-1]}: " if lines else ""
        raise UsageError(f"--config={place}: {line}{what if what.endswith('?') else what.rstrip('.') + '.'}") from None
    return tree


def _describe(error: Exception) -> str:
    """Returns a description of an exception in a config file; those of a locked ConfigDict are hard to read."""
    text = one_line(error).replace("\\n", " ")
    if key := re.match(r"\W*(?:Key )?['\"]+(\w+)['\"]+(?: does not exist| Did you mean|$)", text):
        return str(unknown_key(key[1]))
    if wrong := re.match(
        r"Could not override field '(\w+)'.*?\. (.*) is of original type .* type <class '(.*)'>", text
    ):
        if "ConfigDict" in wrong[3]:
            return f"{wrong[1]} is a group of keys and cannot be set to {wrong[2]}"
        return f"{wrong[1]}={wrong[2]} has to be of type {wrong[3]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    int: (int, "a whole number, like 1000"),
    float: (float, "a number, like 0.1"),
    bool: (lambda text: BOOLEANS[text.lower()], "true or false"),
    str: (str, "a text"),
}


def override(tree: ml_collections.ConfigDict, key: str, text: str | None) -> None:
    """Sets a key of a tree to the value of a flag.

    Args:
      text: the value as text; None: the flag has no value, which means true for a boolean key.

    Raises:
      UsageError: there is no such key, or the value has another type.
    """
    values, flag = flatten(tree.to_dict()), f"--config.{key}"
    if key not in values:
        given = flag if text is None else f"{flag}={text}"
        for inside in values:
            if inside.startswith(f"{key}."):
                raise UsageError(f"{given}: {key} is a group of keys; set one of them, like --config.{inside}=VALUE.")
        raise UsageError(str(unknown_key(key)))
    if key in ("model.family", "data.kind") and text != values[key] and text in (*FAMILIES, *KINDS):
        raise UsageError(f"{flag}={text}: other keys depend on it, so start from a config file for {text}.")
    if text is None and not isinstance(values[key], bool):
        raise UsageError(f"{flag} needs a value: {flag}=VALUE.")
    read, wanted = READERS[type(values[key])]
    try:
        tree.update_from_flattened_dict({key: read("true" if text is None else text)})
    except (ValueError, KeyError):
        raise UsageError(f"{flag}={text} has to be {wanted}.") from None
