"""The vision transformer in transformers: `ViTForImageClassification`."""

import dataclasses
import json
from typing import Any

from gpt.checkpointing.run import Run
from gpt.data.images import ImagesConfig
from gpt.data.tokenizers import Labels
from gpt.interop import image_processor
from gpt.interop.architecture import Architecture, Source, Tensor, Vocabulary
from gpt.interop.config_file import ConfigFile
from gpt.models.vit import ViTConfig
from gpt.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT(Architecture[ViTConfig]):
    """A classifier of images, whose class names are in config.json and whose pixels an image processor scales."""

    config_class: type[ViTConfig] = ViTConfig

    def outer_tensors(self, config: ViTConfig) -> dict[str, Tensor]:
        width, length, classes = config.embed_dim, config.length, config.vocab_size
        channels, side = config.channels, config.patch_size
        # A convolution over patches that do not overlap. Its kernel is [output, channel, row, column].
        patches, kernel = "embeddings.patch_embeddings.projection", (width, channels, side, side)
        return {
            "class_token": Tensor(("embeddings.cls_token",), ((1, 1, width),), (width,)),
            "position_embedding": Tensor(("embeddings.position_embeddings",), ((1, length, width),), (length, width)),
            "patch_embedding/kernel": Tensor(
                (f"{patches}.weight",), (kernel,), (side * side * channels, width), axes=(2, 3, 1, 0)
            ),
            "patch_embedding/bias": Tensor((f"{patches}.bias",), ((width,),), (width,)),
            "head/kernel": Tensor(("classifier.weight",), ((classes, width),), (width, classes), axes=(1, 0)),
            "head/bias": Tensor(("classifier.bias",), ((classes,),), (classes,)),
        }

    def read_rest(self, file: ConfigFile, fields: dict[str, Any]) -> dict[str, Any]:
        return fields | {"vocab_size": _labels(file).vocab_size}

    def read(self, source: Source, vocab_multiple: int) -> tuple[ViTConfig, Vocabulary, dict[str, Any]]:
        config = self.read_config(source.config)
        pixels, images = image_processor.read(source.config)
        return dataclasses.replace(config, **pixels), _labels(source.config), {"data": images}

    def write_rest(self, config: ViTConfig) -> dict[str, Any]:
        return {"id2label": {str(i): str(i) for i in range(config.vocab_size)}}  # `write_files` knows the names

    def write_files(self, config: ViTConfig, run: Run) -> tuple[dict[str, Any], dict[str, str]]:
        assert isinstance(run.tokenizer, Labels)
        assert isinstance(run.config.data, ImagesConfig)
        names = run.tokenizer.names
        keys = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        processor = image_processor.write(config, run.config.data)
        return keys, {image_processor.FILE: json.dumps(processor, indent=2) + "\n"}


def _labels(file: ConfigFile) -> Labels:
    """Returns the names of the classes."""
    names = file.values.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers' default
    try:
        return Labels.from_dict({"names": [names[str(i)] for i in range(len(names))]})
    except (TypeError, KeyError, AttributeError, ValueError):
        raise UserError(f"{file.path}: id2label does not name the classes 0, 1, …") from None
