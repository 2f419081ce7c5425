"""Trains the model of a config file, or resumes its run.

    python -m gpt.main --config=configs/char.py --workdir=runs/char --config.train.steps=1000

The config file is a Python file, or JSON that --print_config printed. --config.KEY=VALUE changes any of its values.
"""

import dataclasses
import json

from absl import flags

import gpt
from gpt import config, config_files
from gpt.runtime import cli

_CONFIG = cli.define_config_flag(
    "Config file, like configs/char.py, which is found in any folder.", config.nearest_keys, config_files.help_rows
)
_WORKDIR = cli.define_workdir_flag("Folder of the run. Default: runs/NAME-OF-THE-CONFIG-FILE.", required=False)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Resume the run in the workdir although its config was another."
)
_PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the config as JSON, which --config reads, and exit.")
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps for TensorBoard's profiler.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Read and check everything, compile the step, show memory and mesh, and train nothing."
)
_ALL_PARAMETERS = flags.DEFINE_bool("all_parameters", False, "Show the sharding of all parameters at the start.")
_JOB = cli.define_cluster_flags()


def main() -> int:
    settings = config_files.read(_CONFIG.value, cli.overrides())
    if _PRINT_CONFIG.value:
        print(json.dumps(dataclasses.asdict(settings), indent=2))
        return 0
    workdir = _WORKDIR.value or config_files.default_workdir(_CONFIG.value)
    return gpt.train_model(
        settings,
        workdir,
        allow_config_change=_ALLOW_CONFIG_CHANGE.value,
        profile=_PROFILE.value,
        dry_run=_DRY_RUN.value,
        all_parameters=_ALL_PARAMETERS.value,
        job=_JOB(),
    )


if __name__ == "__main__":
    cli.run(main)
