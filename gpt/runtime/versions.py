"""What a result depends on besides its config: the code, the libraries, and the settings of JAX and XLA."""

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

from gpt.runtime import cache

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "jax-cuda13-plugin", "libtpu")
SUFFIXES = (".py", ".toml", ".textproto")  # of files that decide results
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def code_digest() -> str:
    """Returns the SHA-256 of the code and data files of the package gpt, in hexadecimal."""
    files = Path(__file__).parent.parent.rglob("*")
    return cache.code(sorted(path for path in files if path.suffix in SUFFIXES))


def facts() -> dict[str, str]:
    """Returns, by name, the versions and settings that have to be equal in all processes for their results to agree."""
    import jax
    from jax._src import config  # no public function lists the settings that change a compiled program

    facts = {
        "gpt's code": code_digest()[:12],
        "Python": platform.python_version(),
        "machine type": platform.machine(),
        "jax_platforms": str(jax.config.values["jax_platforms"]),
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", "unset"),
    }
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    settings = zip(config.trace_context_names(), config.trace_context(), strict=True)
    facts |= {name: str(value) for name, value in settings if name.startswith("jax_")}
    for variable in FLAG_VARIABLES:
        for flag in os.environ.get(variable, "").split():
            name, _, value = flag.partition("=")
            if "dump" not in name and "cache" not in name:  # each process may have its own folder
                facts[f"{variable} {name}"] = value  # XLA uses the last value of a repeated flag
    return facts


def differences(ours: dict[str, str], theirs: dict[str, str]) -> str:
    """Returns a text that lists the differences between the facts of two processes; "" if there are none."""
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    shown = [f"{name} ({ours.get(name, 'unset')} ≠ {theirs.get(name, 'unset')})" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
