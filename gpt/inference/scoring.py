"""Log-probabilities of given continuations, computed in batches on the mesh.

Shape suffixes: B rows, T length, C continuations of a row, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt import step
from gpt.checkpointing.loading import Loaded
from gpt.data.base import IGNORED
from gpt.inference import generation
from gpt.runtime.errors import UserError
from gpt.runtime.progress import task


def loglikelihoods(run: Loaded, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
    """Returns the log-probability of each continuation, and whether greedy decoding would generate it.

    Pairs with the same input, such as the answers "A", "B" and "C" to one question, share one row. The order of the
    rows depends on their tokens alone, so that processes with other orders of the pairs compute the same batches.

    Args:
      pairs: the tokens of a context and of its continuation. The model sees the last `block_size` tokens before the
        last token of the continuation.

    Raises:
      UserError: a context is empty, or a continuation is empty or longer than `block_size`.
    """
    length = run.model_config.length
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= length:
            raise UserError(
                f"A continuation of {len(continuation)} tokens after {len(context)} tokens cannot be scored: it needs "
                f"at least one token before it, and has to have between 1 and model.block_size={length} tokens."
            )
        rows.setdefault((*context, *continuation)[-length - 1 : -1], []).append(i)

    def score(params, inputs_BxT, targets_BxCxT):
        logits_BxTxV: Any = run.program.model.apply({"params": params}, inputs_BxT)
        losses_BxCxT = jax.vmap(step.token_losses, (None, 1), 1)(logits_BxTxV, targets_BxCxT)
        is_likeliest_BxCxT = targets_BxCxT == logits_BxTxV.argmax(axis=-1)[:, None]
        return -losses_BxCxT.sum(axis=-1), jnp.all(is_likeliest_BxCxT | (targets_BxCxT == IGNORED), axis=-1)

    compiled, results = jax.jit(score, out_shardings=run.program.layout.replicated), [(0.0, False)] * len(pairs)
    # The largest shapes come first, so that a lack of memory is found at once.
    ordered = sorted(rows.items(), key=lambda row: (len(row[1]), len(row[0]), row[0]), reverse=True)
    for _, part in parts(run, ordered):
        size = generation.round_up(max(len(inputs) for inputs, _ in part), generation.MIN_PROMPT, length)
        inputs_BxT = np.zeros((len(part), size), np.int32)  # causal: padding after the tokens changes nothing
        targets_BxCxT = np.full(
            (len(part), generation.round_up(len(part[0][1]), 1, len(pairs)), size), IGNORED, np.int32
        )
        for row, (inputs, indices) in enumerate(part):
            inputs_BxT[row, : len(inputs)] = inputs
            indices.sort(key=lambda i: tuple(pairs[i][1]))
            for number, i in enumerate(indices):
                targets_BxCxT[row, number, len(inputs) - len(pairs[i][1]) : len(inputs)] = pairs[i][1]
        layout = run.program.layout.for_decoding(len(part))
        with layout.use():
            arrays = jax.device_put((inputs_BxT, targets_BxCxT), layout.batch)
            log_p_BxC, is_greedy_BxC = jax.device_get(compiled(run.params, *arrays))
        for row, (_, indices) in enumerate(part):
            for number, i in enumerate(indices):
                results[i] = float(log_p_BxC[row, number]), bool(is_greedy_BxC[row, number])
    return results


def parts(run: Loaded, rows: list[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Yields rows in parts of one length, which the mesh divides, each with the number of its first row.

    The length is the batch size, or less for fewer rows. The last row is repeated to fill the last part.
    """
    shards = run.program.layout.batch_shards
    size = min(run.batch_size, -(-len(rows) // shards) * shards)
    with task("scoring", len(rows)) as shown:
        for first in range(0, len(rows), size or 1):
            part, shown.done = rows[first : first + size], first
            yield first, part + part[-1:] * (size - len(part))
