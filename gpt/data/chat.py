"""Chat templates: Jinja templates of released models that turn a conversation into text, as in transformers.

A template may come from an untrusted source. It runs in Jinja's sandbox with plain data, and a count of its steps ends
a template that would run without end.
"""

import datetime
import functools
import io
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt.data.bpe import ROLES, BPETokenizer
from gpt.data.tokenizers import Tokenizer
from gpt.runtime.errors import UserError, one_line

MOST_STEPS = 1 << 18  # iterations of loops and calls of functions while a template is rendered
LONGEST_TEMPLATE = 1 << 18  # characters; those of released models have at most 30,000
LONGEST_TEXT = 1 << 26  # characters that a template may write, or compute by an operator
# The date in the text of training data, so that the data is the same on each day: the default of Llama 3.1's template.
DATE = datetime.datetime(2024, 7, 26)

Messages = Sequence[dict[str, Any]]


def check(tokenizer: Tokenizer) -> BPETokenizer:
    """Returns the tokenizer. Raises UserError if it has no chat template."""
    if isinstance(tokenizer, BPETokenizer) and tokenizer.settings.get("chat_template"):
        return tokenizer
    raise UserError("the tokenizer has no chat template; use a model that was trained on conversations.")


def encode(tokenizer: Tokenizer, messages: Messages) -> np.ndarray:
    """Returns the tokens of a conversation that the model answers. Raises UserError as `render` does."""
    return tokenizer.encode(render(tokenizer, messages, add_generation_prompt=True))


def render(
    tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = False, now: datetime.datetime | None = None
) -> str:
    """Returns the text of a conversation by the tokenizer's chat template, as transformers' `apply_chat_template`.

    Args:
      messages: {"role": …, "content": …} of each message.
      add_generation_prompt: whether the text ends with what precedes the answer of the model.
      now: the time that a template can ask for; None: the present time.

    Raises:
      UserError: the tokenizer has no chat template, or the template refuses the conversation, fails or does not end.
    """
    tokenizer = check(tokenizer)
    context: dict[str, Any] = {role: text for role in ROLES if (text := tokenizer.role_text(role))}
    context |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
    context |= {"tools": None, "documents": None, "strftime_now": (now or datetime.datetime.now()).strftime}
    try:
        source = tokenizer.settings["chat_template"]
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}["default"]
        template, out = _compiled(source), io.StringIO()
        template.environment.steps = 0
        for part in template.generate(**context):
            out.write(part)
            if out.tell() > LONGEST_TEXT:
                raise ValueError(f"it writes more than {LONGEST_TEXT:,} characters")
    except UserError:
        raise
    except Exception as error:  # a template can raise exceptions of all types
        raise UserError(f"the chat template fails: {one_line(error)[:200]}.") from None
    return out.getvalue()


def turns(tokenizer: Tokenizer, messages: Messages) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Returns the text of a conversation, and the spans of characters that the assistant has to write.

    A span begins where the generation prompt ends, and includes the special token that ends the turn.

    Raises:
      UserError: the conversation cannot be rendered, or its text does not begin with the prompt of each answer.
    """
    text, spans = render(tokenizer, messages, now=DATE), []
    end_of_turn = re.compile(rf"\s*(?:{'|'.join(map(re.escape, check(tokenizer).special.values()))})")
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(tokenizer, messages[:i], add_generation_prompt=True, now=DATE)
            content = message["content"].strip()
            start = text.find(content, len(prompt))
            if not text.startswith(prompt) or start < 0:
                raise UserError(f"the chat template changes the text before or in message {i + 1} afterwards.")
            end = start + len(content)
            found = end_of_turn.match(text, end)
            spans.append((len(prompt), found.end() if found else end))
    return text, tuple(spans)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """Returns the template in a sandbox that counts steps in its attribute `steps`."""
    if len(source) > LONGEST_TEMPLATE:
        raise ValueError(f"it has more than {LONGEST_TEMPLATE:,} characters")
    try:
        from jinja2 import ext, nodes, sandbox, visitor
    except ImportError:
        raise UserError('chat templates need the package jinja2: pip install -e ".[chat]".') from None

    class Generation(ext.Extension):
        """The tag `generation`, which marks answers of the assistant and writes nothing itself."""

        tags = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Counted(visitor.NodeTransformer):
        """Counts the iterations of loops."""

        def visit_For(self, node: Any) -> Any:
            node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
            return self.generic_visit(node)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))
        steps = 0

        def count(self) -> None:
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise ValueError(f"it takes more than {MOST_STEPS:,} steps")

        def counted(self, values: Any) -> Any:
            for value in values:
                self.count()
                yield value

        def call(self, *arguments: Any, **options: Any) -> Any:
            self.count()
            return super().call(*arguments, **options)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            first, second = (len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right))
            if first * second > LONGEST_TEXT:
                raise ValueError(f"it computes {operator} of large values")
            return super().call_binop(context, operator, left, right)

        def _parse(self, *source: Any) -> Any:
            return Counted().visit(super()._parse(*source))

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters |= {"tojson": tojson, "counted": environment.counted}
    environment.globals["raise_exception"] = raise_exception
    del environment.globals["lipsum"]  # writes text of any length
    return environment.from_string(source)
