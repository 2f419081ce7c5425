"""`gpt.main` with batches 3 and 6 poisoned, for `test_nonfinite.py` to run as several processes."""

import sys
from pathlib import Path

import pytest
from absl import flags

from gpt import config_files
from gpt import main as gpt_main
from gpt.runtime import cli

sys.path.insert(0, str(Path(__file__).parent))
from test_nonfinite import poison


def main() -> int:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, config_files.read(flags.FLAGS.config, cli.overrides()), {3, 6})
        return gpt_main.main()


if __name__ == "__main__":
    cli.run(main)
