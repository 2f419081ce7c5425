"""Compiles the training step of a config for TPUs or GPUs that are not present: will it fit, how fast is it, and why.

    python -m gpt.plan --config=configs/gpt2_124m.py --topology=v5e:4x4
    python -m gpt.plan --config=configs/gpt3_175b.py --topology=v5p:8x8x16 --search --html=plan.html

The program is the one that gpt.main would run there, and the compiler is the TPU's or the GPU's own, which needs
none of them. All figures are those of one device and one step; GB are 10⁹ bytes. 4xv5p:8x8x16 are four slices,
4xh100:8 four hosts.
"""

from absl import flags

from gpt import config, config_files
from gpt.runtime import cli
from gpt.runtime.errors import UsageError

_CONFIG = cli.define_config_flag("Config file, like configs/gpt2_124m.py.", config.known_keys)
_TOPOLOGY = flags.DEFINE_list("topology", None, "What to compile for: v5e:16x16, 4xv5p:8x8x16, h100:8, … or several.")
_BATCH_PER_DEVICE = flags.DEFINE_integer(
    "batch_per_device",
    None,
    "Examples of the batch for each device. Default: train.batch_size over all.",
    lower_bound=1,
    upper_bound=2**20,
)
_SEARCH = flags.DEFINE_bool("search", False, "Look for the mesh, remat policy and micro-batches of the shortest step.")
_COMPILATIONS = flags.DEFINE_integer("compilations", 8, "How many candidates --search compiles.", lower_bound=1)
_ADVISE = flags.DEFINE_bool("advise", True, "Where it does not fit, look for the nearest change that does.")
_PRICE = flags.DEFINE_float("price", None, "Price of a device for an hour, in whatever currency.", lower_bound=0)
_HTML = flags.DEFINE_string("html", None, "File to write a page of the same report to; it must not exist.")
_JSON = flags.DEFINE_bool("json", False, "Print a line of JSON for each plan instead.")
_CACHE = flags.DEFINE_bool("cache", True, "Look up what was compiled before, and keep what is compiled now.")
_LIST = flags.DEFINE_bool("list_topologies", False, "Print the chips that can be asked for, and their public figures.")


def main() -> int:
    from gpt.planning import plans, report

    if _LIST.value:
        print(*report.chips(), sep="\n")
        return 0
    if _CONFIG.value is None or not _TOPOLOGY.value:
        raise UsageError("Name a config file and what to plan for: --config=configs/gpt2_124m.py --topology=v5e:4x4.")
    options = plans.Options(
        batch_per_device=_BATCH_PER_DEVICE.value,
        search=_SEARCH.value,
        compilations=_COMPILATIONS.value,
        advise=_ADVISE.value,
        price=_PRICE.value,
        html=_HTML.value,
        as_json=_JSON.value,
        use_cache=_CACHE.value,
    )
    return plans.run(config_files.read(_CONFIG.value, cli.overrides()), _TOPOLOGY.value, options)


if __name__ == "__main__":
    cli.run(main, prints_result=True)
