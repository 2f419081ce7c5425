"""Runs tasks of EleutherAI's lm-evaluation-harness (the package lm-eval) on a trained model.

The adapter follows the harness's backend `hf` (lm_eval/models/huggingface.py): the same tokens before an empty context
and a text, the same truncation, the same ends of generated texts. Each process runs all tasks.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

os.environ["TQDM_DISABLE"] = "1"  # a progress bar consists of control characters, which `gpt.runtime.output` escapes
os.environ["DISABLE_MULTIPROC"] = "1"  # forked processes, which the harness would start, can hang beside JAX's threads

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from gpt.checkpointing.loading import Loaded
from gpt.inference import generation, scoring
from gpt.runtime.errors import UserError, one_line

MAX_TOKENS = 256  # the harness's greatest number of generated tokens, for a task that does not set max_gen_toks
REPORTED = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")


class Adapter(TemplateLM):
    """A trained model as the harness calls it."""

    def __init__(self, model: Loaded):
        super().__init__()
        self._model = model

    @property
    def eot_token_id(self) -> int:
        """The token before a text and before the continuation of an empty context."""
        return int(self._model.tokenizer.opening()[0])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self._model.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
        return scoring.loglikelihoods(self._model, [pair for _, *pair in requests])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        pairs, owners, totals = [], [], [0.0] * len(requests)
        for i, request in enumerate(requests):
            tokens = self.tok_encode(*request.args)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self._model.model_config.length, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(i)
        for i, (log_p, _) in zip(owners, scoring.loglikelihoods(self._model, pairs), strict=True):
            totals[i] += log_p
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        groups: dict[str, list[tuple[int, list[int], int]]] = {}
        texts = [""] * len(requests)
        for i, request in enumerate(requests):
            context, options = request.args
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            groups.setdefault(json.dumps(options, sort_keys=True), []).append((len(tokens), tokens, i))
        for options, rows in sorted(groups.items()):
            self._generate(normalize_gen_kwargs(json.loads(options), MAX_TOKENS), sorted(rows, reverse=True), texts)
        return texts

    def _generate(self, options: dict[str, Any], rows: list[tuple[int, list[int], int]], texts: list[str]) -> None:
        """Generates after the tokens of each row, and stores the text in `texts` at the row's index."""
        model, tokenizer, length = self._model, self._model.tokenizer, self._model.model_config.length
        count, stop_texts, is_random = (options.pop(name) for name in ("max_gen_toks", "until", "do_sample"))
        if not 0 < count < length:
            raise UserError(
                f"A task generates {count} tokens (max_gen_toks in its generation_kwargs), which has to be a number "
                f"between 1 and {length - 1}: model.block_size={length}, and the model needs a token to continue."
            )
        unknown = options.keys() - vars(generation.Sampling()).keys()
        if unknown:
            raise UserError(f"A task has {', '.join(unknown)} in its generation_kwargs, which gpt does not have.")
        # The default of 50 for top_k is that of transformers' generate().
        options = {"temperature": 0.0, "top_k": min(50, tokenizer.vocab_size)} | options
        sampling = generation.Sampling(**options if is_random else options | {"temperature": 0.0})
        sampling.check(tokenizer.vocab_size)
        layout, stop_tokens = model.program.layout, tokenizer.stop_tokens
        generator = generation.Generator(model.program.model, layout, sampling, stop_tokens=stop_tokens)
        for first, part in scoring.parts(model, rows):
            prompts = [np.array(tokens[count - length :]) for _, tokens, _ in part]
            decoding = generator.start(model.params, prompts, first_prompt=first)
            *_, samples = generation.continuations(decoding, tokenizer.decode, count, stop_texts=stop_texts)
            for (*_, i), sample in zip(part, samples, strict=True):
                texts[i] = sample.text


def run(model: Loaded, names: Sequence[str], folder: str | None = None, limit: int | None = None) -> tuple[dict, str]:
    """Returns the harness's results of tasks, and its tables of these results.

    Args:
      names: names of tasks, groups or tags; "*" stands for any characters.
      folder: YAML files of further tasks. They can name Python functions, which the harness calls.
      limit: number of examples of each task; None: all.

    Raises:
      UserError: the model's family is not "gpt", a task is not known or cannot be loaded, or the model cannot do it.
    """
    if model.model_config.family != "gpt":
        raise UserError(
            f"--workdir={model.workdir.path} has a model.family={model.model_config.family}; only gpt can do --tasks."
        )
    try:
        manager = TaskManager(include_path=folder)
        unknown = [name for name in names if not manager.match_tasks([name])]
        loaded = {} if unknown else manager.load(manager.match_tasks(list(names)))
    except Exception as error:  # whatever the files of tasks and of data, which others write, can raise
        raise UserError(
            f"--tasks={','.join(names)} cannot be loaded: {type(error).__name__}: {one_line(error)}"
        ) from None
    if unknown:
        raise UserError(f"--tasks={','.join(unknown)}: neither the harness nor --tasks_path has such a task.")
    inner = set().union(*loaded["group_map"].values())
    tasks = [task for name, task in (loaded["groups"] | loaded["tasks"]).items() if name not in inner]
    found = simple_evaluate(Adapter(model), tasks=tasks, task_manager=manager, limit=limit, log_samples=False)
    results = {key: found[key] for key in REPORTED if key in found}
    return results, "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))
