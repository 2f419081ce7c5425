"""GPT-2 weights in the layout of Hugging Face's transformers to a workdir, and a workdir to such a folder.

python -m gpt.convert --from_hf=FOLDER --workdir=runs/gpt2
python -m gpt.convert --workdir=runs/my_run --to_hf=FOLDER

A folder holds config.json, model.safetensors (or several such files and model.safetensors.index.json) and the files
of a tokenizer. All is read and written array by array, so a model need not fit in memory.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from absl import flags

from gpt import cli, tokenizers
from gpt.checkpoint import Deferred, Run, Workdir, write_params
from gpt.config import Config
from gpt.errors import UsageError, UserError, read_json
from gpt.loaded import Weights
from gpt.models.gpt import GPTConfig

_FROM_HF = flags.DEFINE_string("from_hf", None, "Folder with a GPT-2 of transformers, to be made into a workdir.")
_TO_HF = flags.DEFINE_string("to_hf", None, "Folder to be made, which transformers loads.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: to be made, or to be read.", required=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "To be read: best (lowest validation loss), last, or a step.")
_VOCAB_MULTIPLE = flags.DEFINE_integer(
    "vocab_multiple", 128, "model.vocab_multiple of a new workdir: mesh.model has to divide it.", lower_bound=1
)

INDEX = "model.safetensors.index.json"
OUR_TOKENIZER = "gpt_tokenizer.json"  # in a folder of transformers, a tokenizer of ours that it has no form for
# Their name of an activation: ours. All of GPT-2's own weights have gelu_new.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
ACTIVATIONS |= {"silu": "silu", "swish": "silu"}
# What config.json may say, with the value that is right where it says nothing: other values are other functions.
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
PADDED = ("wte.weight", "lm_head.weight")  # with a row for each token
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # masks that old files hold: no parameters


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter there and here.

    Attributes:
      name: there, without "transformer."; "{}" stands for the number of a layer, where there is one for each.
      shape: there.
      ours: its shape here, for one layer; those with a row for each token may have more rows, of zeros.
      packed: the last axis holds queries, keys and values: one kind after the other there, one head after the
        other here.
      transposed: the axes are in the other order there.
    """

    name: str
    shape: tuple[int, ...]
    ours: tuple[int, ...]
    packed: bool = False
    transposed: bool = False

    def read(self, theirs: Any, ours: Any) -> None:
        """Fills `ours`, of zeros, from `theirs`; NumPy arrays."""
        if self.packed:
            *rows, heads, width = self.ours
            theirs = theirs.reshape(*rows, 3, heads, width // 3).swapaxes(-3, -2)
        ours = self._without_padding(ours)
        ours[...] = theirs.reshape(ours.shape)

    def write(self, ours: Any) -> Any:
        """Theirs of ours."""
        if self.packed:
            *rows, heads, width = self.ours
            ours = ours.reshape(*rows, heads, 3, width // 3).swapaxes(-3, -2)
        return self._without_padding(ours).reshape(self.shape)

    def _without_padding(self, ours: Any) -> Any:
        ours = ours.T if self.transposed else ours
        return ours[: self.shape[0]] if self.name in PADDED else ours


def tensors(config: GPTConfig) -> dict[str, Tensor]:
    """Every parameter of a model, by its name in a checkpoint."""
    d, f, heads, kv = config.embed_dim, config.mlp_dim, config.num_heads, config.head_dim
    vocab, padded = config.vocab_size, config.padded_vocab_size
    found = {
        "token_embedding/embedding": Tensor("wte.weight", (vocab, d), (padded, d)),
        "position_embedding/embedding": Tensor("wpe.weight", (config.block_size, d), (config.block_size, d)),
    }
    norms = {"blocks/norm_1": "h.{}.ln_1", "blocks/norm_2": "h.{}.ln_2", "final_norm": "ln_f"}
    for name, theirs in norms.items():
        found[f"{name}/scale"] = Tensor(f"{theirs}.weight", (d,), (d,))
        found[f"{name}/bias"] = Tensor(f"{theirs}.bias", (d,), (d,))
    for name, theirs, inputs, outputs in (
        ("attention/qkv", "attn.c_attn", (d,), (heads, 3 * kv)),
        ("attention/out", "attn.c_proj", (heads, kv), (d,)),
        ("mlp/up", "mlp.c_fc", (d,), (f,)),
        ("mlp/down", "mlp.c_proj", (f,), (d,)),
    ):
        packed, width = name == "attention/qkv", {"attention/qkv": 3 * d, "mlp/up": f}.get(name, d)
        rows = f if name == "mlp/down" else d
        found[f"blocks/{name}/kernel"] = Tensor(f"h.{{}}.{theirs}.weight", (rows, width), (*inputs, *outputs), packed)
        found[f"blocks/{name}/bias"] = Tensor(f"h.{{}}.{theirs}.bias", (width,), outputs, packed)
    if not config.tie_embeddings:
        found["head/kernel"] = Tensor("lm_head.weight", (vocab, d), (d, padded), transposed=True)
    return found


class Folder:
    """The tensors of a folder in the layout of transformers: headers now, each array when it is asked for.

    Attributes:
      shapes: of each tensor, by its name without "transformer.".

    Raises:
      UserError: there are no safetensors, or a file is missing or damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[str, str]] = {}  # file and full name
        for file in self._files():
            with self._open(file) as tensors_:
                for name in tensors_.keys():  # noqa: SIM118  not a dictionary
                    short = name.removeprefix("transformer.")
                    if BUFFERS.fullmatch(short):
                        continue
                    if short in self._places:
                        raise UserError(f"{path / file}: {name} is there twice, here and in {self._places[short][0]}.")
                    part = tensors_.get_slice(name)
                    if part.get_dtype() not in ("F32", "F16", "BF16"):
                        raise UserError(
                            f"{path / file}: {name} is of type {part.get_dtype()}; only F32, F16 and BF16 can be read."
                        )
                    self.shapes[short] = tuple(part.get_shape())
                    self._places[short] = file, name

    def _files(self) -> list[str]:
        if (self._path / "model.safetensors").is_file():
            return ["model.safetensors"]
        if (self._path / INDEX).is_file():
            names = _read_json(self._path / INDEX).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
                raise UserError(f"{self._path / INDEX} has no weight_map that names files.")
            files, there = sorted(set(names.values())), {path.name for path in self._path.iterdir() if path.is_file()}
            for file in files:
                if Path(file).name != file or file not in there:
                    raise UserError(f"{self._path / INDEX} names {file}, which is not in the folder.")
            return files
        pickles = sorted(file.name for file in self._path.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{self._path / pickles[0]} is a pickle, and reading one can run any code that is in it, so it is "
                "not read; where you trust it, make model.safetensors of it: "
                'python -c "from transformers import GPT2LMHeadModel as G; '
                f"G.from_pretrained('{self._path}').save_pretrained('NEW_FOLDER')\"."
            )
        raise UserError(f"{self._path} has no model.safetensors.")

    def read(self, name: str) -> Any:
        """The array as float32."""
        file, full_name = self._places[name]
        # Opened anew for each: what was read through a memory map is held until it is closed.
        with self._open(file) as tensors_:
            return tensors_.get_tensor(full_name).astype("float32", copy=False)

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self._path / file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._path / file} is damaged or cut off ({error}).") from None


def read_config(path: Path, vocab_multiple: int) -> GPTConfig:
    """The model that a config.json of transformers describes.

    Raises:
      UserError: it is missing, damaged, or of another architecture.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: it tells the shape of the model.")
    theirs = _read_json(path)
    for key, right in FIXED.items():
        if theirs.get(key, None if key == "model_type" else right) != right:
            raise UserError(f"{path}: {key} is {theirs.get(key)!r}, but only {right!r} can be converted.")
    if (activation := theirs.get("activation_function", "gelu_new")) not in ACTIVATIONS:
        raise UserError(
            f"{path}: activation_function is {activation!r}, but only {', '.join(ACTIVATIONS)} can be converted."
        )

    def number(key: str, *, default: Any = None, kind: type = int) -> Any:
        value = theirs.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise UserError(f"{path}: {key} is {value!r}, and not a number.")
        if not abs(value) < 2**31:
            raise UserError(f"{path}: {key} is beyond all models.")
        return value

    width = number("n_embd")
    hidden = number("n_inner") if theirs.get("n_inner") is not None else 4 * width
    config = GPTConfig(
        vocab_size=number("vocab_size"),
        vocab_multiple=vocab_multiple,
        block_size=number("n_positions"),
        num_layers=number("n_layer"),
        num_heads=number("n_head"),
        embed_dim=width,
        mlp_factor=hidden / max(width, 1),
        tie_embeddings=bool(theirs.get("tie_word_embeddings", True)),
        activation=ACTIVATIONS[activation],
        embed_dropout=float(number("embd_pdrop", default=0.1, kind=float)),
        residual_dropout=float(number("resid_pdrop", default=0.1, kind=float)),
        attention_dropout=float(number("attn_pdrop", default=0.1, kind=float)),
    )
    if config.mlp_dim != hidden:
        raise UserError(f"{path}: n_inner is {hidden}, which no model.mlp_factor gives for a width of {width}.")
    return config


def write_config(config: GPTConfig, end_of_text: int | None) -> dict[str, Any]:
    """A config.json of transformers for a model.

    Args:
      end_of_text: token that ends a text, or None.

    Raises:
      UserError: GPT-2 there has no form for it.
    """
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    needed = {"norm": "layernorm", "positions": "learned", "bias": True, "qk_norm": False}
    for key, value in needed.items():
        if getattr(config, key) != value:
            raise UserError(f"transformers' GPT-2 has no model.{key}={getattr(config, key)}, only {value}.")
    if config.activation not in names:
        raise UserError(f"transformers' GPT-2 has no model.activation={config.activation}, only {', '.join(names)}.")
    return {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "activation_function": names[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "embd_pdrop": config.embed_dropout,
        "resid_pdrop": config.residual_dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer that a folder of transformers holds. Raises UserError where there is none, or it is damaged."""
    path = folder / OUR_TOKENIZER
    if not path.is_file():
        try:
            return tokenizers.BPETokenizer.from_folder(folder)
        except UserError as error:
            raise UserError(f"--from_hf: no tokenizer: {error}") from None
    try:
        return tokenizers.from_tree(read_json(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}).") from None


def write_tokenizer(tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """Names and texts of the tokenizer's files for a folder of transformers."""
    if isinstance(tokenizer, tokenizers.BPETokenizer):
        return tokenizer.files()
    return {OUR_TOKENIZER: tokenizer.to_json()}


def from_hf(folder: Path, workdir: Workdir, vocab_multiple: int) -> GPTConfig:
    """Makes a workdir of a folder.

    Raises:
      UserError: the folder is not a whole GPT-2, or there is something in the workdir already.
    """
    import numpy as np

    if not folder.is_dir():
        raise UserError(f"--from_hf={folder}: there is no such folder.")
    _refuse_to_overwrite("workdir", workdir.path)
    config, tokenizer, there = (
        read_config(folder / "config.json", vocab_multiple),
        read_tokenizer(folder),
        Folder(folder),
    )
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: vocab_size is {config.vocab_size} in config.json, but the tokenizer has "
            f"{tokenizer.vocab_size} tokens."
        )
    wanted = tensors(config)
    shapes = {}
    for name, tensor in wanted.items():
        for layer in _layers(name, config):
            shapes[tensor.name.format(layer)] = tensor.shape
    found, head, table = dict(there.shapes), "lm_head.weight", "wte.weight"
    if config.tie_embeddings and {head, table} <= found.keys():  # it may be there all the same, as a copy
        if not np.array_equal(there.read(head), there.read(table)):
            raise UserError(f"{folder}: {head} differs from {table}, but config.json has tie_word_embeddings.")
        del found[head]
    _compare_shapes(folder, found, shapes)

    def deferred(name: str, tensor: Tensor) -> Deferred:
        layers = _layers(name, config)
        lead = _lead(name, config)

        def make() -> np.ndarray:
            array = np.zeros((*lead, *tensor.ours), np.float32)
            for layer in layers:
                tensor.read(there.read(tensor.name.format(layer)), array[layer] if lead else array)
            return array

        return Deferred((*lead, *tensor.ours), make)

    workdir.create()
    write_params(workdir, _tree({name: deferred(name, tensor) for name, tensor in wanted.items()}))
    kind = tokenizers.TokenizerConfig(name=tokenizer.name)
    workdir.record(Run(Config(model=dataclasses.replace(config, vocab_size=0), tokenizer=kind), tokenizer, None))
    return config


def to_hf(workdir: Workdir, checkpoint: str, folder: Path) -> tuple[GPTConfig, int]:
    """Makes a folder of a workdir; returns the model's config and the step.

    Raises:
      UserError: there is no such checkpoint, transformers has no such model, or there is something in the folder.
    """
    run = workdir.read()
    if run.config.model.family != "gpt":
        raise UserError(f"--workdir={workdir.path} holds a model.family={run.config.model.family}, and no GPT-2.")
    config = run.config.model.without_kernel().resolve(run.tokenizer.vocab_size, "cpu")
    theirs = write_config(config, run.tokenizer.separator)
    weights = Weights(workdir, checkpoint)
    _refuse_to_overwrite("to_hf", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", config, weights)
        for name, text in write_tokenizer(run.tokenizer).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"Cannot write to --to_hf={folder}: {error.strerror or error}.") from None
    return config, weights.step


def write_safetensors(path: Path, config: GPTConfig, weights: Weights) -> None:
    """Writes the parameters in the safetensors format, one after the other.

    The format is eight bytes with the header's length, the header in JSON, and the arrays one after the other
    (https://github.com/huggingface/safetensors#format). The library's own writer wants them all in memory.
    """
    wanted, header, offset = tensors(config), {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in wanted.items():
        for layer in _layers(name, config):
            size = 4 * math.prod(tensor.shape)
            prefix = "" if tensor.name == "lm_head.weight" else "transformer."
            header[prefix + tensor.name.format(layer)] = {
                "dtype": "F32",
                "shape": tensor.shape,
                "data_offsets": (offset, offset + size),
            }
            offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        shapes = {name: _lead(name, config) + tensor.ours for name, tensor in wanted.items()}
        for (name, tensor), array in zip(wanted.items(), weights.restore_each(shapes), strict=True):
            for layer in _layers(name, config):
                ours = array[layer] if name.startswith("blocks/") else array
                out.write(tensor.write(ours).astype("<f4").tobytes())
    partial.replace(path)


def _layers(name: str, config: GPTConfig) -> range:
    return range(config.num_layers if name.startswith("blocks/") else 1)


def _lead(name: str, config: GPTConfig) -> tuple[int, ...]:
    """The axis of the layers, for what each of them has."""
    return (config.num_layers,) if name.startswith("blocks/") else ()


def _compare_shapes(folder: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    for what, names in (
        ("missing", sorted(wanted.keys() - found.keys())),
        ("not part of a GPT-2 of this shape", sorted(found.keys() - wanted.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{folder}: {', '.join(names[:3])}{more}: {what}, by config.json.")
    for name, shape in wanted.items():
        if found[name] != shape:
            there, right = (" × ".join(map(str, sizes)) for sizes in (found[name], shape))
            raise UserError(f"{folder}: {name} is {there}, but has to be {right} by config.json.")


def _refuse_to_overwrite(flag: str, path: Any) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--{flag}={path} exists and is not an empty folder; choose another.")


def _read_json(path: Path) -> dict:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object.")
    return found


def _tree(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree


def _describe(config: GPTConfig) -> str:
    return f"model  {config.num_parameters():,} parameters: {config.summary()}, vocabulary {config.vocab_size}"


def main() -> int:
    if (_FROM_HF.value is None) == (_TO_HF.value is None):
        raise UsageError("Give just one of --from_hf and --to_hf.")
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    workdir = Workdir(_WORKDIR.value)
    if _FROM_HF.value is not None:
        config = from_hf(Path(_FROM_HF.value).expanduser(), workdir, _VOCAB_MULTIPLE.value)
        print(_describe(config))
        print(f"Done: converted to {workdir.path}.")
    else:
        folder = Path(_TO_HF.value).expanduser()
        config, step = to_hf(workdir, _CHECKPOINT.value, folder)
        print(_describe(config))
        print(f"Done: step {step:,} of {workdir.path} converted to {folder}.")
    return 0


if __name__ == "__main__":
    cli.run(main)
