"""Reads config files and the flags that change them: Python or JSON, to an ml_collections tree, to a `Config`."""

import dataclasses
import inspect
import json
import os
import re
import runpy
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_collections
from etils import epath

from gpt.config import Config, default_config, flatten, from_tree, to_tree, unknown_key
from gpt.data.base import KINDS
from gpt.models.base import FAMILIES
from gpt.runtime.errors import UsageError, UserError, nearest, one_line
from gpt.runtime.fields import Options, describe
from gpt.runtime.files import read_json

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
    """Returns runs/NAME for a config file NAME.py or NAME.json, or runs/NAME-ARGUMENT; for a run.json, its folder."""
    file, _, argument = place.partition(":")
    if Path(file).name == "run.json":
        return Path(file).parent
    return Path("runs") / "-".join(filter(None, (Path(file).stem, Path(argument).name)))  # it may be a path


def read_recorded(workdir: str) -> Config:
    """Returns the config of the run in a workdir, for config files that start from another run.

    Raises:
      UserError: there is no run, or its record is damaged.
    """
    path = epath.Path(workdir).expanduser() / "run.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no run: {path.name} is missing.")
    return _from_json(path)


def read_file(place: str) -> ml_collections.ConfigDict:
    """Returns the tree that a config file makes.

    Args:
      place: FILE, or FILE:ARGUMENT for a `get_config` with a parameter.

    Raises:
      UsageError: there is no such file, it is not a config file, or it has an error.
    """
    path, argument = _find(place)
    try:
        if path.suffix == ".py":
            return _run(path, argument)
        if argument is not None:
            raise UsageError(f"a JSON file takes no argument; leave out :{argument}.")
        return to_tree(_from_json(path))
    except UserError as error:
        raise UsageError(f"--config={place}: {error}") from None
    except (Exception, SystemExit) as error:  # of the user's code, unless it was raised within this package
        source = traceback.extract_tb(error.__traceback__)[-1]
        is_ours = Path(source.filename).is_relative_to(Path(__file__).parent) and source.filename != str(path)
        if is_ours and source.name != _run.__name__ and not isinstance(error, ImportError):
            raise
        what = _describe(error)
        end = "" if what.endswith("?") else "."
        raise UsageError(f"--config={place}: {_line(error, path)}{what.rstrip('.')}{end}") from None


def help_rows(place: str | None, changes: Iterable[tuple[str, str | None]]) -> list[tuple[str, str]]:
    """Returns the keys of a config with their values for `--help`, marked by * if that is not the default.

    Args:
      place: config file, as `read` takes it; None: the defaults.
      changes: as `read` takes them; a key without a value selects the keys that begin with it.
    """
    selected = tuple(key for key, text in changes if text is None)
    config = read(place, ((key, text) for key, text in changes if text is not None)) if place else Config()
    rows = []
    parts = [part for part in vars(config).values() if isinstance(part, Options)]
    for part in (config, *parts):
        rows.append(("", ""))  # a blank line between the sections
        for field in dataclasses.fields(part):
            key, value = f"{part.section}.{field.name}".removeprefix("."), getattr(part, field.name)
            is_shown = not isinstance(value, Options) and field.name not in getattr(part, "unavailable", ())
            if is_shown and key.startswith(selected or ""):
                shown = repr(value) if isinstance(value, str) and not value.isprintable() else value
                rows.append((f"{' ' if value == field.default else '*'} {key}={shown}", describe(part, field)))
    return rows


def _find(place: str) -> tuple[Path, str | None]:
    """Returns the path and the argument of a config file."""
    name, colon, argument = place.partition(":")
    path = Path(name).expanduser()
    if path.parts[:1] == ("configs",) and not os.path.exists(path):
        path = CONFIGS.joinpath(*path.parts[1:])
    if not os.path.isfile(path):
        stems = {file.stem: f"configs/{file.name}{colon}{argument}" for file in sorted(CONFIGS.glob("*.py"))}
        files = (file for folder in ("configs", Path(name).parent) for file in sorted(Path(folder).glob("*.*")))
        stems |= {file.stem: f"{file}{colon}{argument}" for file in files if file.suffix in SUFFIXES and file.is_file()}
        near = nearest(path.stem, stems)
        what = "is a folder, not a config file" if name and os.path.isdir(path) else "there is no such config file"
        raise UsageError(f"--config={place}: {what}{near if near != '.' else '; name one, like configs/char.py.'}")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--config={place}: a config file is a Python file, like configs/char.py, or a JSON file.")
    return path, argument if colon else None


def _run(path: Path, argument: str | None) -> ml_collections.ConfigDict:
    """Returns the tree that the `get_config` of a Python file returns."""
    get_config = runpy.run_path(str(path)).get("get_config")
    if not callable(get_config):
        raise UsageError("it defines no function get_config(); see configs/char.py.")
    arguments = [] if argument is None else [argument]
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        takes = "takes no argument; leave out" if arguments else "needs an argument; add"
        raise UsageError(f"its get_config() {takes} :{argument or 'ARGUMENT'}.") from None
    tree = get_config(*arguments)
    if not isinstance(tree, ml_collections.ConfigDict) or set(tree) != set(default_config()):
        raise UsageError(f"get_config() has to return what default_config() returns, not a {type(tree).__name__}.")
    return tree


def _from_json(path: Any) -> Config:
    """Returns the config in a JSON file that `gpt.main --print_config` printed, or in the run.json of a workdir."""
    try:
        values = read_json(path)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON in line {error.lineno}: {error.msg}.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {one_line(error)}.") from None
    values = values.get("config", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no config; gpt.main --print_config prints one.")
    return from_tree(values)


def _line(error: BaseException, path: Path) -> str:
    """Returns the line of a config file, or of a module of the user that it imports, in which an exception arose."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    places += [(error.filename, error.lineno)] if isinstance(error, SyntaxError) and error.filename else []
    libraries = [Path(__file__).parent, *map(Path, map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))]
    for name, line in reversed(places):
        if name == str(path):
            return f"line {line}: "
        if Path(name).is_file() and not any(Path(name).is_relative_to(library) for library in libraries):
            return f"{name}, line {line}: "
    return ""


def _describe(error: BaseException) -> str:
    """Returns a description of an exception in a config file; those of a locked ConfigDict are hard to read."""
    if isinstance(error, SyntaxError):
        return error.msg
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


SUFFIXES = (".py", ".json")
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
