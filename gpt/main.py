"""Trains the model of a config file, or goes on with a run that was begun.

    python -m gpt.main --config=configs/char.py --workdir=runs/char --config.train.steps=1000

Any value of the config can be changed by --config.KEY=VALUE. The keys, with the defaults that
config files start from:
"""

from pathlib import Path

from absl import flags

from gpt import cli, cluster, config

_CONFIG = flags.DEFINE_string("config", None, "Config file, like configs/char.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run. Default: runs/NAME-OF-THE-CONFIG-FILE.")
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on with the run in the workdir although its config was another."
)
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps for TensorBoard's profiler.")
flags.adopt_module_key_flags(cluster)

__doc__ += "\n" + "\n".join(
    f"    {key}={value!r}" for key, value in config.flatten(config.default_config().to_dict()).items()
)
__doc__ += f"""

Each family of models ({", ".join(config.FAMILIES)}) and kind of data ({", ".join(config.KINDS)}) has its own keys under
model and data: those of its class in gpt/models or gpt/data.
"""


def main() -> int:
    settings = cli.config()
    from gpt import backend, train  # after the flags: help and mistakes in them need not wait for it
    from gpt.checkpoint import Workdir

    backend.start()
    backend.divide_cpu(settings, settings.train.batch_size // settings.train.micro_batches)
    file, _, argument = _CONFIG.value.partition(":")
    name = "-".join(filter(None, (Path(file).stem, Path(argument).name)))  # the argument may be a path
    workdir = Workdir(_WORKDIR.value or Path("runs") / name)
    return train.train(settings, workdir, allow_config_change=_ALLOW_CONFIG_CHANGE.value, profile=_PROFILE.value)


if __name__ == "__main__":
    cli.run(main)
