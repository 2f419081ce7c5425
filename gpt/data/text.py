"""Text as examples: windows of a fixed number of tokens over a tokenised corpus."""

import dataclasses
import functools
import json
import math
import os
import re
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from gpt.data import bpe, combined, paths, shards, storage, tokenizers
from gpt.data.base import IGNORED, DataConfig, Dataset, ModelShape, Source
from gpt.data.combined import Mixture, Sets
from gpt.data.packing import PackedDocuments
from gpt.data.paths import File
from gpt.data.shards import Stream, Tokens
from gpt.data.tokenizers import Labels, Tokenizer, TokenizerConfig
from gpt.data.tokens import make_tokenizer, scan, shakespeare, threshold, tokenise
from gpt.runtime import cache
from gpt.runtime.cache import Cache
from gpt.runtime.errors import UsageError, UserError, one_line
from gpt.runtime.fields import option
from gpt.runtime.progress import say

VALIDATION, TEST = {"val", "valid", "validation"}, {"test"}  # words in names of files
FARTHEST = 1 << 24  # tokens before the end of the training text in which the end of a document is looked for
READERS = 256  # windows to read at a time from a bucket


@dataclasses.dataclass(frozen=True)
class TextConfig(DataConfig):
    """Options of a text, which is tokenised and cut into windows of the context length."""

    kind: str = "text"
    # On disks or in buckets. Several sources have names: "plays=PATH,code=PATH".
    path: str = option("", "files, folders or patterns, with commas; empty: Shakespeare's plays", harmless=True)
    validation_path: str = option("", "the same for validation; empty: by file name, or a part of path", harmless=True)
    validation_fraction: float = option(0.1, "fraction of data.path that is for validation", above=0, below=1)
    # From step 500 on other shares: "…;500:plays=1".
    weights: str = option("", "shares of the sources, like plays=0.7,code=0.3; empty: by size")
    document_borders: bool = option(False, "attend within a document only, with positions from its first token")
    whole_documents: bool = option(False, "document_borders, and windows of whole documents: only longer ones are cut")
    cache_dir: str = option("", "folder for cached tokens; empty: the common one (GPT_CACHE_DIR)", harmless=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        combined.parse_weights(self.weights)

    def load(self, tokenizer, model) -> "Corpus":
        return load(self, tokenizer, model and model.length)

    def tokenizer(self, saved: dict[str, Any]) -> Tokenizer:
        tokenizer = tokenizers.from_tree(saved)
        if isinstance(tokenizer, Labels):
            raise ValueError("the file has names of classes instead of a tokenizer")
        return tokenizer

    def opened(self, path: str | None = None) -> "TextConfig":
        # The author of a workdir must not choose where files are written, nor which hosts are asked.
        config = dataclasses.replace(self, cache_dir="")
        if path is not None:
            return dataclasses.replace(config, path=path, validation_path="", weights="")
        for key in ("path", "validation_path"):
            if "://" in (setting := getattr(self, key)):
                raise UserError(
                    f"data.{key}={setting} of the workdir is an address on the network; name it with --data if you "
                    "trust its author."
                )
        return config

    def resumed(self, recorded: DataConfig, step: int) -> "TextConfig":
        if not isinstance(recorded, TextConfig) or not recorded.weights or not self.weights:
            return self
        old, new = combined.parse_weights(recorded.weights), combined.parse_weights(self.weights)
        if [stage for stage in old if stage[0] < step] == [stage for stage in new if stage[0] < step]:
            return self
        past = ";".join(part for part, (first, _) in zip(recorded.weights.split(";"), old, strict=True) if first < step)
        return dataclasses.replace(self, weights=f"{past};{step}:{self.weights}")

    @property
    def has_borders(self) -> bool:
        """Whether attention stays within documents."""
        return self.document_borders or self.whole_documents

    @property
    def extras(self) -> tuple[str, ...]:
        return ("starts",) if self.has_borders else ()


@dataclasses.dataclass(frozen=True)
class Corpus(Dataset):
    """A tokenised corpus.

    Attributes:
      sources: the training text by the names of its sources; "" if there is one.
      held_out: the validation text by the names of its sets; "" if there is one.
      fingerprint: a digest that changes with the text, the tokenizer and the split.
      config: the options of the text.
    """

    sources: dict[str, Stream]
    held_out: dict[str, Stream]
    tokenizer: Tokenizer
    fingerprint: str
    config: TextConfig

    @property
    def train(self) -> Tokens:
        """The tokens of all sources."""
        return Tokens([stream.tokens for stream in self.sources.values()])

    @property
    def validation(self) -> Tokens:
        """The tokens of all validation sets."""
        return Tokens([stream.tokens for stream in self.held_out.values()])

    @property
    def border(self) -> int | None:
        """The first token of documents if attention stays within documents, else None."""
        return self.tokenizer.begin if self.config.has_borders else None

    def training(self, model: ModelShape, seed: int) -> Source | Mixture:
        parts = {name: self._training(stream, model, seed) for name, stream in self.sources.items()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        by_size = {name: float(len(part)) for name, part in parts.items()}
        return Mixture(parts, combined.parse_weights(self.config.weights) or ((0, by_size),), seed)

    def _options(self, stream: Stream, model: ModelShape) -> dict[str, Any]:
        return {"border": self.border, "counts": stream.counts, "num_targets": model.num_targets}

    def _training(self, stream: Stream, model: ModelShape, seed: int) -> Source:
        if not self.config.whole_documents:
            return TrainingWindows(stream.tokens, model.length, seed, **self._options(stream, model))
        if model.num_targets != model.length:
            raise UserError("data.whole_documents needs a model that predicts all tokens; leave it out.")
        has_first = self.tokenizer.begin != self.tokenizer.separator
        return PackedDocuments(stream.tokens, model.length, stream.find_ends(), has_first, stream.counts)

    def evaluation(self, split: str, model: ModelShape, stride: int | None = None) -> Sets:
        if stride and stride > model.num_targets:
            raise UsageError(
                f"--stride={stride} is more than {model.length_key}={model.num_targets} and would leave gaps; "
                "choose a smaller stride."
            )
        found: dict[str, Source] = {}
        streams = self.split(split)
        for name, stream in streams.items():
            if len(stream.tokens) < 2:
                tokens = len(stream.tokens)
                raise UserError(f"The {split} split has {tokens} tokens: too few to predict any; try --split=all.")
            options = self._options(stream, model)
            found[name] = EvaluationWindows(stream.tokens, model.length, stride=stride, **options)
        if not any(map(_any_counts, streams.values())):
            raise UserError(f"The {split} split has no completions, only prompts; try --split=all.")
        return Sets(found, self.tokenizer.byte_lengths)

    def split(self, name: str) -> dict[str, Stream]:
        """Returns the streams of the split "train" or "val", or of both, "all"."""
        if name != "all":
            return {"train": self.sources, "val": self.held_out}[name]
        both = {}
        for name in self.sources | self.held_out:
            streams = [stream for stream in (self.sources.get(name), self.held_out.get(name)) if stream]
            ends = [streams[0].tokens[-1:], streams[-1].tokens[:1], np.array([self.tokenizer.separator])]
            if len(streams) == 2 and ends[0] == ends[1] == ends[2]:  # one separator is enough
                streams[1] = streams[1].between(1, len(streams[1].tokens))
            both[name] = shards.joined(streams)
        return both

    def describe(self) -> str:
        sizes = f"{len(self.train):,} training and {len(self.validation):,} validation tokens"
        return f"{sizes}, vocabulary {self.tokenizer.vocab_size}"

    def report(self, source: Any, result: dict[str, Any]) -> dict[str, float]:
        """Returns the number of targets, the loss in nats per token, its perplexity, and bits per byte of the text.

        Of several sets, it has the loss and the bits per byte of each as well.
        """

        def bits_per_byte(loss: float, targets: float, size: int) -> float:
            return loss * targets / math.log(2) / max(1, size)

        loss, targets, sizes = result["loss"], result["targets"], source.num_bytes
        measures = {
            "tokens": targets,
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": bits_per_byte(loss, targets, sum(sizes.values())),
        }
        for name, (own_loss, own_targets) in result["groups"].items() if len(sizes) > 1 else ():
            measures[f"loss/{name}"] = own_loss
            measures[f"bits_per_byte/{name}"] = bits_per_byte(own_loss, own_targets, sizes[name])
        return measures


def _any_counts(stream: Stream) -> bool:
    """Returns whether a token counts in the loss."""
    counts = stream.counts
    places = range(1, len(stream.tokens), shards.SCAN)
    return counts is None or any(counts[at : at + shards.SCAN].any() for at in places)


def load(
    config: TextConfig,
    tokenizer: Tokenizer | TokenizerConfig,
    block_size: int | None,
) -> Corpus:
    """Opens the corpus that the config names: token shards, or text, whose tokens the cache keeps.

    Args:
      tokenizer: an existing tokenizer, or the options of one to create for this text.
      block_size: context length in tokens, which both splits have to exceed; None: splits of any length are accepted.

    Raises:
      UserError: a file is missing, empty, not UTF-8, damaged or too short, or has characters or tokens that the
        tokenizer does not have; or the tokenizer cannot be created, or has no separator although borders of documents
        need one.
    """
    store = Cache(config.cache_dir)
    named = _sources(config.path, "data.path") or {"": _plays(store)}
    divided = {name: _by_split(files) for name, files in named.items()}
    train = {name: _Files(sides["train"], store) for name, sides in divided.items()}
    if config.validation_path:
        named = _sources(config.validation_path, "data.validation_path")
        groups = {name: _by_folder(files) for name, files in named.items()}
    else:
        groups = {name: sides["val"] for name, sides in divided.items()}
    found = {
        "/".join(filter(None, (name, group))): files
        for name, inside in groups.items()
        for group, files in inside.items()
    }
    if len(found) > 1 and "" in found:
        found["others"] = found.pop("")
    validation = {name: _Files(files, store) for name, files in found.items()}
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer = _new_tokenizer(tokenizer, [*train.values()], [*validation.values()], store)
    if config.has_borders and tokenizer.begin is None:
        raise UserError(
            "data.document_borders and data.whole_documents need a tokenizer with a separator of documents: "
            "tokenizer.name=bpe or gpt2."
        )
    sources, held_out = {}, {}
    for name, files in train.items():
        is_given = config.validation_path or divided[name]["val"]
        fraction = 0.0 if is_given else config.validation_fraction
        sources[name], rest = files.open(tokenizer, fraction, store)
        if rest and not is_given:
            held_out[name] = rest
    for name, files in validation.items():
        stream, rest = files.open(tokenizer, 0.0, store)
        held_out[name] = rest or stream
    if block_size is not None:
        _check_length(config, sources, held_out, block_size)
    _check_weights(config.weights, sources)
    prints = [[name, stream.fingerprint] for streams in (sources, held_out) for name, stream in streams.items()]
    return Corpus(sources, held_out, tokenizer, cache.digest(tokenizer.to_json(), prints), config)


Named = list[tuple[File, PurePosixPath]]  # files, each with its path below the folder that was named


def _plays(store: Cache) -> Named:
    path = shakespeare(store)
    return [(File.of(path), PurePosixPath(path.name))]


def _sources(setting: str, key: str) -> dict[str, Named]:
    """Returns the files of a setting by the names of sources, or under "" if it has no names."""
    starts = [] if os.path.exists(setting) else [*re.finditer(r"(?:^|,)\s*(\w+)=", setting)]
    if not starts:
        return {"": paths.named(setting, key)} if setting else {}
    ends = [*(match.start() for match in starts[1:]), len(setting)]
    found = {m[1]: paths.named(setting[m.end() : end], key) for m, end in zip(starts, ends, strict=True)}
    if len(found) < len(starts) or starts[0].start():
        raise UserError(f"{key}={setting!r} has to be NAME=PATH,NAME=PATH with different names, or paths alone.")
    return found


def _by_split(files: Named) -> dict[str, Any]:
    """Returns the files for training, {"train": [file]}, and the sets for validation, {"val": {name: [file]}}.

    The names of files and folders tell. If none of them is for validation, or all are, all are for training.
    """
    words = [
        set(re.findall("[a-z]+", " ".join([*path.parts[:-1], path.name.split(".")[0]]).lower())) for _, path in files
    ]
    is_val, is_test = ([bool(kind & of_file) for of_file in words] for kind in (VALIDATION, TEST))
    if not any(is_val) or all(is_val) or any(file.path.name == shards.INDEX for file, _ in files):
        return {"train": [file for file, _ in files], "val": {}}
    train = [file for (file, _), val, test in zip(files, is_val, is_test, strict=True) if not val and not test]
    held_out: dict[str, list[File]] = {}
    for (file, path), val in zip(files, is_val, strict=True):
        if val:
            after = next((i + 1 for i, part in enumerate(path.parts) if part.lower() in VALIDATION), len(path.parts))
            name = path.parts[after] if after < len(path.parts) - 1 else ""
            held_out.setdefault(name, []).append(file)
    left_out = f", and {sum(is_test):,} for testing are left out" if any(is_test) else ""
    say(f"note   by their names, {sum(is_val):,} of {len(files):,} files are for validation{left_out}")
    return {"train": train, "val": held_out}


def _by_folder(files: Named) -> dict[str, list[File]]:
    """Returns the files by the folder in the folder that was named, or under "" if they are not in one."""
    found: dict[str, list[File]] = {}
    has_index = any(path.name == shards.INDEX and len(path.parts) == 1 for _, path in files)
    for file, path in files:
        found.setdefault(path.parts[0] if len(path.parts) > 1 and not has_index else "", []).append(file)
    return found


class _Files:
    """The files of a source or a set: texts, or token shards.

    Attributes:
      texts: the results of the first pass over the texts; empty for token shards.
      indices: the indices of shards of `gpt.tokenize`.
    """

    def __init__(self, files: list[File], store: Cache):
        shards.refuse_pickle(files)
        of_shards = [file for file in files if shards.is_for(file)]
        self.files, self.is_tokens = files, bool(of_shards)
        self.indices = [file for file in files if file.path.name == shards.INDEX]
        folders = tuple(f"{storage.folder(index.place)}/" for index in self.indices)
        first = self.indices or of_shards
        others = [file for file in files if not (file.place.startswith(folders) if folders else file in of_shards)]
        if first and others:
            raise UserError(
                f"{first[0]} belongs to token shards, and {others[0]} does not belong to them; name one kind of files "
                "in a path, or give each kind a name: data.path=a=PATH,b=PATH."
            )
        self.texts = [] if of_shards else [scan(file, store) for file in files]

    def saved_tokenizer(self, index: File) -> Tokenizer:
        """Returns the tokenizer beside an index of shards. Raises UserError if it is missing or damaged."""
        place = f"{storage.folder(index.place)}/{shards.TOKENIZER}"
        file = next((file for file in self.files if file.place == place), None)
        if file is None:
            raise UserError(f"{place} is missing, the tokenizer of the shards; copy it again, or tokenise again.")
        try:
            return TextConfig().tokenizer(json.loads(file.read(0, file.size)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{place} is damaged ({one_line(error)[:100]}); copy it again.") from None

    def open(self, tokenizer: Tokenizer, fraction: float, store: Cache) -> tuple[Stream, Stream | None]:
        """Returns the tokens for training and for validation.

        Args:
          fraction: part of the tokens that is for validation, unless the index of the shards tells.
        """
        separator = tokenizer.separator if tokenizer.begin == tokenizer.separator else None
        files, indices = self.files, self.indices
        for index in indices:
            if self.saved_tokenizer(index).to_json() != tokenizer.to_json():
                raise UserError(f"{index} was written with another tokenizer; tokenise the text again.")
        if self.texts:
            below = threshold(self.texts, fraction) if fraction else 0
            folder = tokenise(self.texts, tokenizer, below, store)
            files = [File.of(path) for path in sorted(folder.glob("*"))]
            indices = [file for file in files if file.path.name == shards.INDEX]
        if indices:
            by_place = {file.place: file for file in files}
            found = [shards.of_index(index, by_place, tokenizer.vocab_size) for index in indices]
            held_out = [rest for _, rest in found if rest]
            stream, rest = shards.joined([train for train, _ in found]), shards.joined(held_out) if held_out else None
        else:
            stream, rest = shards.of_files(files, tokenizer), None
        stream = shards.with_separator(stream, separator)
        if rest is None and fraction:
            stream, rest = _divided(stream, fraction, tokenizer.separator)
            if stream.tokens[-1:].tolist() != [tokenizer.separator]:  # within a document
                return stream, rest
        return stream, rest and shards.with_separator(rest, separator)


def _divided(stream: Stream, fraction: float, separator: int | None) -> tuple[Stream, Stream]:
    """Divides a stream between two documents or, if there is no such place near, within one.

    Args:
      fraction: the part of the tokens that is for validation; documents may make it twice as much.
    """
    size = len(stream.tokens)
    end = int(size * (1 - fraction))
    if separator is not None:
        start = max(1, end - min(FARTHEST, int(size * fraction)))
        (places,) = np.nonzero(stream.tokens[start - 1 : end] == separator)
        end = start + int(places[-1]) if len(places) else end
    return stream.between(0, end), stream.between(end, size)


def _new_tokenizer(config: TokenizerConfig, train: list[_Files], validation: list[_Files], store: Cache) -> Tokenizer:
    """Returns the tokenizer of token shards, or the one that the config selects, created from the texts if needed."""
    everything = [*train, *validation]
    if saved := next((files for files in everything if files.indices), None):
        say(f"note   the tokenizer is that of {saved.indices[0]}")
        return saved.saved_tokenizer(saved.indices[0])
    of_tokens = [files for files in everything if files.is_tokens]
    if of_tokens and config.name not in ("gpt2", "byte"):
        if not all(shards.are_of_gpt2(files.files) for files in of_tokens):
            raise UserError(
                f"{of_tokens[0].files[0]} has tokens, but not their tokenizer; name it with tokenizer.name=gpt2, and "
                "with tokenizer.path=DIR if it is another than GPT-2's, or with tokenizer.name=byte."
            )
        say("note   the tokenizer is GPT-2's, as the format of the tokens tells; tokenizer.path=DIR names another")
        return bpe.gpt2()
    texts, others = ([text for files in side for text in files.texts] for side in (train, validation))
    return make_tokenizer(config, texts, others, store)


def _check_weights(weights: str, sources: dict[str, Stream]) -> None:
    """Raises UserError unless the weights are for the sources."""
    for _, stage in combined.parse_weights(weights):
        if set(stage) - set(sources) or len(sources) == 1:
            names = ", ".join(filter(None, sources)) or "no names; name them: data.path=a=PATH,b=PATH"
            raise UserError(f"data.weights={weights!r} is for {', '.join(stage)}, but the sources have {names}.")


def _check_length(config: TextConfig, sources: dict[str, Stream], held_out: dict[str, Stream], block_size: int) -> None:
    """Raises UserError unless all sources and validation sets are longer than a window."""
    for kind, streams in (("training", sources), ("validation", held_out)):
        key = "validation_path" if kind == "validation" and config.validation_path else "path"
        for name, stream in streams.items():
            if len(stream.tokens) <= block_size:
                raise UserError(
                    f"The {kind} text{f' {name}' * bool(name)} has {len(stream.tokens)} tokens, but "
                    f"model.block_size={block_size} needs at least {block_size + 1}; give more text in "
                    f"data.{key}={getattr(config, key)}, or set another data.validation_fraction (of gpt.tokenize, "
                    "--validation_fraction) or a smaller model.block_size."
                )


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Windows of `block_size` input tokens.

    Attributes:
      tokens: the tokens of a split.
      block_size: number of inputs in a window.
      border: the first token of documents if attention stays within documents, else None.
      counts: for each token whether it counts in the loss as a target; None: all tokens count.
      num_targets: number of tokens at the end of a window that have a target; None: all.
    """

    tokens: Tokens | np.ndarray
    block_size: int
    border: int | None = dataclasses.field(default=None, kw_only=True)
    counts: Tokens | np.ndarray | None = dataclasses.field(default=None, kw_only=True)
    num_targets: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    def _num_targets(self) -> int:
        return self.num_targets or self.block_size

    @property
    def threads(self) -> int:
        """The largest number of examples that are worth reading at once."""
        return READERS if getattr(self.tokens, "is_remote", False) else 1

    def _window(self, start: int, has_starts: bool) -> dict[str, np.ndarray]:
        """Returns the window whose first input is token `start`.

        Where it exceeds the tokens, which it does on the left if `start` is negative, inputs are 0 and targets
        `IGNORED`.

        A separator is the first input of its document and the last target of the document before. So every target,
        including the end of a document, is predicted from its own document alone.

        Args:
          has_starts: whether to add "starts", the position in the window at which the document of each input begins.
        """
        first, empty = max(0, start), max(0, -start)
        tokens = self.tokens[first : start + self.block_size + 1]
        place = slice(empty, empty + len(tokens) - 1)
        inputs, targets = np.zeros(self.block_size, np.int32), np.full(self.block_size, IGNORED, np.int32)
        inputs[place], targets[place] = tokens[:-1], tokens[1:]
        if self.counts is not None:
            targets[place][~self.counts[first + 1 : first + len(tokens)]] = IGNORED
        example = {"inputs": inputs, "targets": targets[-self._num_targets :]}
        if has_starts:
            starts = np.zeros(self.block_size, np.int32)
            if self.border is not None:
                (places,) = np.nonzero(inputs == self.border)
                starts[places] = places
            starts[empty] = empty
            example["starts"] = np.maximum.accumulate(starts)
        return example


@dataclasses.dataclass(frozen=True)
class TrainingWindows(_Windows):
    """Windows whose targets tile the corpus, from another offset in each epoch.

    Attributes:
      seed: seed of the offsets.
    """

    seed: int

    def __len__(self) -> int:
        """Returns the number of windows in an epoch."""
        return max(1, (len(self.tokens) - self.block_size) // self._num_targets)

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns "inputs" [block_size] and "targets" [num_targets], int32: the token that follows each input.

        If there is a border, "starts" [block_size] holds for each input the position at which its document begins.
        """
        slack = len(self.tokens) - (self.block_size - self._num_targets) - len(self) * self._num_targets
        start = _epoch_offset(self.seed, epoch, slack) + index * self._num_targets
        return self._window(start, has_starts=self.border is not None)


@dataclasses.dataclass(frozen=True)
class EvaluationWindows(_Windows):
    """Windows over a split from its first token to its last, in which every target counts once.

    A window begins `stride` tokens after the previous one. Of its targets, only the last `stride` count, each of which
    is predicted from at least block_size - stride tokens; the others, which count in an earlier window, are `IGNORED`.

    Attributes:
      stride: tokens between the beginnings of two windows; None: num_targets, so that the targets tile the split.
    """

    stride: int | None = dataclasses.field(default=None, kw_only=True)

    def __len__(self) -> int:
        after_the_first = max(0, len(self.tokens) - 1 - self._num_targets)
        return 1 + -(-after_the_first // (self.stride or self._num_targets))

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """Returns the same as `TrainingWindows.example`, in each epoch.

        If not all inputs have a target, the first windows begin before the first token. Attention to the inputs that
        are missing there is masked by "starts".
        """
        stride, unpredicted = self.stride or self._num_targets, self.block_size - self._num_targets
        has_starts = self.border is not None or unpredicted > 0
        example = self._window(index * stride - unpredicted, has_starts)
        if index > 0:
            example["targets"][: self._num_targets - stride] = IGNORED
        return example


@functools.lru_cache(maxsize=8)
def _epoch_offset(seed: int, epoch: int, slack: int) -> int:
    return int(np.random.default_rng((seed, epoch)).integers(slack))
