"""Small tokenizers and chat templates in the manner of released models, built offline; see tests/test_chat.py."""

import functools
import json
from pathlib import Path
from typing import Any

SPLIT_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
SPLIT_LLAMA3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_QWEN = SPLIT_LLAMA3.replace("{1,3}", "")
TEXT = (
    "The cat sat on the mat, and the rat sat on the hat!\n\nIt's 1234 years; they'll see 56 of them (or 7).\n"
    "def f(x):\n    return x + 1\n\nGrüße aus Köln. Русский текст. 中文字符 日本語。\n"
)

TURN_MARKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
INSTRUCTIONS = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the roles have to alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') "
    "+ message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
MODEL_ROLE = """{{ bos_token }}{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
PLAIN_ROLES = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}"
)
# Thoughts are in the last answer only, and answers are marked.
THOUGHTS = """{%- set last = namespace(user=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}
{%- if loop.index0 > last.user %}{{- '<think>\n' + message.thought | default('') + '\n</think>\n\n' }}{% endif %}
{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
{%- else %}{{- message.content + '<|im_end|>\n' }}{% continue %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


def _trained(words: Any, special: list[str], size: int) -> Any:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = words
    is_byte_level = "ByteLevel" in str(words)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if is_byte_level else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    model.train_from_iterator([TEXT] * 4, trainer)
    return model


def _byte_level(split: str | None, special: list[str], bos: str = "", digits: bool = False, nfc: bool = False) -> Any:
    import tokenizers
    from tokenizers import pre_tokenizers, processors

    words = [pre_tokenizers.Digits(individual_digits=True)] * digits
    if split:
        words.append(pre_tokenizers.Split(tokenizers.Regex(split), "isolated"))
    words.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    model = _trained(pre_tokenizers.Sequence(words), special, 500)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.normalizer = tokenizers.normalizers.NFC() if nfc else None
    model.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        template = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, model.token_to_id(bos))]
        )
        model.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return model


def _byte_fallback(form: str, special: list[str], bos: str) -> Any:
    """A vocabulary like those of SentencePiece: "▁" for a space, and a token for each byte."""
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers, processors

    names = [f"<0x{byte:02X}>" for byte in range(256)]
    saved = json.loads(_trained(pre_tokenizers.Metaspace(), special + names, 600).to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in special]
    saved["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    saved["pre_tokenizer"] = None
    model = tokenizers.Tokenizer.from_str(json.dumps(saved))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if form == "prepend":
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif form == "first":
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        model.normalizer = normalizers.Replace(" ", "▁")
        model.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if form != "bare":
        parts.append(decoders.Strip(" ", 1, 0))
    model.decoder = decoders.Sequence(parts)
    model.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, model.token_to_id(bos))]
    )
    return model


@functools.cache
def _family(name: str) -> tuple[str, dict[str, Any]]:
    """Returns the text of tokenizer.json, and the content of tokenizer_config.json."""
    marks, heads = ["<|im_start|>", "<|im_end|>"], ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    roles: dict[str, Any] = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    if name == "llama2":
        model, template = _byte_fallback("prepend", ["<unk>", "<s>", "</s>"], "<s>"), INSTRUCTIONS
        roles |= {"add_bos_token": True, "add_eos_token": False}
    elif name == "zephyr":
        model, template = _byte_fallback("prepend", ["<unk>", "<s>", "</s>"], "<s>"), PLAIN_ROLES
    elif name == "mistral":
        model = _byte_fallback("first", ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>")
        template = [{"name": "default", "template": INSTRUCTIONS}, {"name": "tool_use", "template": "-"}]
    elif name == "gemma":
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        model, template = _byte_fallback("bare", special, "<bos>"), MODEL_ROLE
        model.add_tokens(["\n\n", "▁▁▁"])
        roles = {"bos_token": {"content": "<bos>", "__type": "AddedToken"}, "eos_token": "<eos>", "pad_token": "<pad>"}
    elif name == "llama3":
        model = _byte_level(SPLIT_LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", *heads], "<|begin_of_text|>")
        template, roles = HEADERS, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    elif name == "qwen":
        model, template = _byte_level(SPLIT_QWEN, ["<|endoftext|>", *marks], nfc=True), THOUGHTS
        model.add_tokens(["<think>", "</think>"])
        roles = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    elif name == "smollm":
        model, template = _byte_level(None, ["<|endoftext|>", *marks], digits=True), TURN_MARKS
        roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "additional_special_tokens": marks}
    else:
        model, template = _byte_level(None, ["<|endoftext|>", "<|padding|>"], nfc=True), None
        model.add_tokens([" " * n for n in (4, 3, 2)])
        roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096} | roles
    return model.to_str(pretty=True), settings | ({"chat_template": template} if template else {})


FAMILIES = ("llama2", "zephyr", "mistral", "gemma", "llama3", "qwen", "smollm", "neox")
CHATS = FAMILIES[:-1]


def write(name: str, folder: Path, **changes: Any) -> Path:
    """Writes a folder of transformers with the tokenizer of a family; the template of half of them is a file."""
    definition, settings = _family(name)
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings | changes
    if name in ("gemma", "qwen"):
        (folder / "chat_template.jinja").write_text(settings.pop("chat_template"), encoding="utf-8")
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    roles = {role: value for role, value in settings.items() if role.endswith("_token") and isinstance(value, str)}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder
