"""JSON files in a folder of transformers: reading them, and checking the values of their keys."""

import dataclasses
from pathlib import Path
from typing import Any, Self

from gpt.runtime.errors import UserError
from gpt.runtime.files import read_json

# Keys of config.json that do not change what a model computes: its origin, tokens, generation, training and losses.
HARMLESS = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path _num_labels architectures attn_implementation "
    "bad_words_ids begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout "
    "cls_token_id decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size "
    "encoder_stride eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder is_llama_config label2id "
    "length_penalty mask_token_id max_length min_length model_type n_ctx name_or_path "
    "no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions "
    "output_hidden_states output_past output_scores pad_token_id pooler_act pooler_output_size prefix pretraining_tp "
    "problem_type reorder_and_upcast_attn remove_invalid_values repetition_penalty return_dict "
    "return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p "
    "torch_dtype torchscript transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache "
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj".split()
)


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """The content of a JSON file, with the file's path for error messages.

    Attributes:
      values: the value of each key, defaults included where a reader has added them.
      read_keys: keys that `get` has read.
    """

    path: Path
    values: dict[str, Any]
    read_keys: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Returns the content of a file. Raises UserError if the file is not valid JSON or holds no JSON object."""
        try:
            values = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}.") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no JSON object.")
        return cls(path, values)

    def with_defaults(self, defaults: dict[str, Any]) -> Self:
        """Returns the same file with default values for the keys that the file leaves out."""
        return dataclasses.replace(self, values=defaults | self.values)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, or the default, and notes that the key has been read."""
        self.read_keys.add(key)
        return self.values.get(key, default)

    def check(self, key: str, is_supported: bool, supported: str) -> None:
        """Raises UserError with the supported values unless the value of a key is one of them."""
        if not is_supported:
            raise UserError(f"{self.path}: {key} is {self.values.get(key)!r}, but only {supported} can be converted.")

    def number(self, key: str, kind: type[int] | type[float], default: float | None = None) -> int | float:
        """Returns the value of a key as a number. Raises UserError if the value is not a number or is too large."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise UserError(f"{self.path}: {key} is {value!r}, which is not {KINDS[kind]}.")
        if not abs(value) < 2**31:
            raise UserError(f"{self.path}: {key} is not less than 2³¹.")
        return kind(value)

    def check_all_read(self) -> None:
        """Raises UserError if a key has a value, was not read, and may change what the model computes."""
        for key in sorted(self.values.keys() - self.read_keys - HARMLESS):
            if self.values[key] is not None:
                raise UserError(
                    f"{self.path}: {key} is {self.values[key]!r}, which is not known; remove the key if you are sure "
                    "that the model computes the same without."
                )


KINDS = {int: "a whole number", float: "a number"}
