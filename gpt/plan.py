"""Plans a run: compiles its training step for absent TPUs or GPUs, and reports memory, time and bottleneck.

    python -m gpt.plan --config=configs/pretrain.py:gpt2-124m --topology=v5e:4x4
    python -m gpt.plan --config=configs/pretrain.py:gpt3-175b --topology=v5p:8x8x16 --search --html=plan.html
    python -m gpt.plan --compare=before.json,after.json

It compiles the program that gpt.main would run, with the compiler of the TPU or GPU. Figures are those of one device
and one step; a GB is 10⁹ bytes. 4xv5p:8x8x16 means four slices, 4xh100:8 four hosts. See launch/PLANNING.md.
"""

from absl import flags

from gpt import config, config_files
from gpt.runtime import cli
from gpt.runtime.errors import UsageError

_CONFIG = cli.define_config_flag("As in gpt.main.", config.nearest_keys, config_files.help_rows)
_TOPOLOGY = flags.DEFINE_list("topology", None, "Devices to compile for, like v5e:16x16, 4xv5p:8x8x16 or h100:8.")
flags.DEFINE_integer(
    "batch_per_device",
    None,
    "Examples per device and step. Default: train.batch_size divided by the number of devices.",
    lower_bound=1,
    upper_bound=2**20,
)
flags.DEFINE_bool("search", False, "Search for the mesh, attention, remat and micro-batches of the fastest step.")
flags.DEFINE_integer("compilations", 8, "Number of candidates that --search compiles.", lower_bound=1)
flags.DEFINE_float("price", None, "Price of one device for an hour, in any currency.", lower_bound=0)
flags.DEFINE_string("html", None, "File to write an HTML page of the report to. The file must not exist.")
_COMPARE = flags.DEFINE_list(
    "compare", None, "Files of plans that --json wrote: compares these plans, and that of --config if it is set."
)
_JSON = flags.DEFINE_bool("json", False, "Print a line of JSON for each plan instead of text.")
_LIST = flags.DEFINE_bool("list_topologies", False, "Print the supported chips with their public figures, and exit.")


def main() -> int:
    from gpt.planning import plans, report

    if _LIST.value:
        print(*report.chips(), sep="\n")
        return 0
    options = plans.Options(as_json=_JSON.value, **cli.values(plans.Options))
    if _COMPARE.value and not (_CONFIG.value or _TOPOLOGY.value or cli.overrides()):
        return plans.run(None, (), options)
    if _CONFIG.value is None or not _TOPOLOGY.value:
        raise UsageError("Set a config file and a topology: --config=configs/pretrain.py:gpt2-124m --topology=v5e:4x4.")
    return plans.run(config_files.read(_CONFIG.value, cli.overrides()), _TOPOLOGY.value, options)


if __name__ == "__main__":
    cli.run(main, prints_result=True)
