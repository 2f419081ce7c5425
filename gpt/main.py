"""Trains the model of a config file, or resumes its run.

    python -m gpt.main --config=configs/char.py --workdir=runs/char --config.train.steps=1000

--config.KEY=VALUE changes any value of the config. The keys, with the defaults that config files start from:
"""

from absl import flags

import gpt
from gpt import config, config_files
from gpt.runtime import cli

_CONFIG = cli.define_config_flag("Config file, like configs/char.py, which is found in any folder.", config.known_keys)
_WORKDIR = cli.define_workdir_flag("Folder of the run. Default: runs/NAME-OF-THE-CONFIG-FILE.", required=False)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Resume the run in the workdir although its config was another."
)
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of a few steps for TensorBoard's profiler.")
_JOB = cli.define_cluster_flags()

__doc__ += f"\n{config.help_text()}\n"


def main() -> int:
    settings = config_files.read(_CONFIG.value, cli.overrides())
    workdir = _WORKDIR.value or config_files.default_workdir(_CONFIG.value)
    return gpt.train_model(
        settings, workdir, allow_config_change=_ALLOW_CONFIG_CHANGE.value, profile=_PROFILE.value, job=_JOB()
    )


if __name__ == "__main__":
    cli.run(main)
