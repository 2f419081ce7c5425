"""Explains how a trained model reads a text: loss, predictions and attention weights of each token."""

import base64
import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from gpt.checkpointing.loading import Loaded
from gpt.data.tokenizers import Labels
from gpt.inference import generation
from gpt.models import attention
from gpt.runtime.errors import UserError

EXPECTED = 5  # number of predictions shown for each token
STEPS = 1000  # the page has attention weights in steps of 1/1000
OVERVIEW = 48  # rows and columns of each head in the page's overview, for a text that has more tokens


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a model reads a text of T tokens.

    Attributes:
      pieces: the text of each token.
      losses_T: loss of each token in nats. The first token has no context, and so its loss is NaN.
      ranks_T: rank of each token among the predictions for its place; 1 is the most probable. 0 for the first token.
      expected: for each token after the first, the most probable tokens with their probabilities.
      attention_LxHxTxT: attention weights of each layer and head; row t holds the weights of token t on all tokens.
      visible_LxT: number of tokens that each token may attend to: it and the preceding ones, within the layer's window.
    """

    pieces: list[str]
    losses_T: np.ndarray
    ranks_T: np.ndarray
    expected: list[list[tuple[str, float]]]
    attention_LxHxTxT: np.ndarray
    visible_LxT: np.ndarray

    @property
    def entropy_LxH(self) -> np.ndarray:
        """Entropy of the attention weights of each layer and head in nats, averaged over the tokens."""
        return np.stack([_entropy(heads_HxTxT) for heads_HxTxT in self.attention_LxHxTxT])

    def page(self, title: str) -> str:
        """Returns an HTML page that shows the explanation without network access or libraries."""
        data = {
            "title": title,
            "steps": STEPS,
            "pieces": self.pieces,
            "losses": [None, *(round(float(x), 4) for x in self.losses_T[1:])],
            "ranks": self.ranks_T.tolist(),
            "expected": [[], *self.expected],
            "layers": [*map(_layer, self.attention_LxHxTxT, self.visible_LxT)],
        }
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        # A text with "</script>" would end the script.
        return template.replace("DATA", json.dumps(data).replace("<", "\\u003c"))


def _layer(heads_HxTxT: np.ndarray, visible_T: np.ndarray) -> dict[str, Any]:
    """Returns the attention of a layer for the page. If there are several heads, their mean is one more head."""
    if len(heads_HxTxT) > 1:
        heads_HxTxT = np.concatenate([heads_HxTxT, heads_HxTxT.mean(axis=0, keepdims=True)])
    length = heads_HxTxT.shape[-1]
    steps_HxN = np.rint(heads_HxTxT[:, *np.tril_indices(length)] * STEPS).astype(np.uint16)
    # The overview has, for each block of queries and keys, the mean over the queries of the largest weight. This keeps
    # lines that are one token wide.
    starts = np.linspace(0, length, min(length, OVERVIEW), endpoint=False).astype(int)
    pooled = np.add.reduceat(np.maximum.reduceat(heads_HxTxT, starts, axis=-1), starts, axis=-2)
    pooled /= np.diff([*starts, length])[:, None]
    return {
        "window": int(visible_T.max()),
        "entropies": _entropy(heads_HxTxT).tolist(),
        "largest": np.log(visible_T).mean(),
        "overview": _packed(np.rint(255 * np.sqrt(pooled)).astype(np.uint8)),
        # Low bytes before high bytes, which are mostly 0: this order compresses better.
        "heads": [_packed(np.stack([steps_N & 255, steps_N >> 8]).astype(np.uint8)) for steps_N in steps_HxN],
    }


def _entropy(weights: np.ndarray) -> np.ndarray:
    """Returns the entropy of the rows [..., T, T] in nats, averaged over the rows."""
    return scipy.special.entr(weights).sum(axis=-1).mean(axis=-1)


def _packed(values: np.ndarray) -> str:
    """Returns the bytes of an array, compressed, as text."""
    return base64.b64encode(gzip.compress(values.tobytes(), 6)).decode()


def explain(run: Loaded, text: str) -> Explanation:
    """Returns how a trained model reads a text.

    Args:
      run: a trained model, as `gpt.checkpointing.loading.load` returns it.

    Raises:
      UserError: the model's family is not "gpt", the text has unknown characters, or it is too short or too long.
    """
    config = run.model_config
    if config.family != "gpt":
        raise UserError(f"--workdir={run.workdir.path} has a model.family={config.family}; only gpt can be explained.")
    assert not isinstance(run.tokenizer, Labels)
    tokens_T = generation.encode_prompt(run.tokenizer, text, "--prompt")
    if not 2 <= len(tokens_T) <= config.length:
        raise UserError(
            f"--prompt has {len(tokens_T)} tokens; texts of 2 to model.block_size={config.length} can be explained."
        )
    rows = run.program.layout.batch_shards  # the mesh divides a batch of this size

    @jax.jit
    def read(params, tokens_BxT):
        logits_BxTxV, sown = run.program.model.apply({"params": params}, tokens_BxT, mutable=["intermediates"])
        log_p_TxV = jax.nn.log_softmax(logits_BxTxV[0, :-1])
        target_Tx1 = jnp.take_along_axis(log_p_TxV, tokens_BxT[0, 1:, None], axis=-1)
        losses_T = jnp.pad(-target_Tx1[:, 0], (1, 0), constant_values=jnp.nan)
        ranks_T = jnp.pad(1 + (log_p_TxV > target_Tx1).sum(axis=-1), (1, 0))
        most_probable = jax.lax.top_k(log_p_TxV, min(EXPECTED, log_p_TxV.shape[-1]))
        return losses_T, ranks_T, most_probable, sown["intermediates"]

    with run.program.layout.use():
        found = jax.device_get(read(run.params, np.tile(tokens_T, (rows, 1))))
    losses_T, ranks_T, most_probable, intermediates = found
    pieces = [run.tokenizer.piece(int(token)) for token in tokens_T]
    expected = [
        [(run.tokenizer.piece(int(token)), math.exp(log_p)) for log_p, token in zip(*pairs, strict=True)]
        for pairs in zip(*most_probable, strict=True)
    ]
    length = len(tokens_T)
    visible_LxT = np.stack([np.minimum(np.arange(length) + 1, window or length) for window in config.windows])
    return Explanation(pieces, losses_T, ranks_T, expected, _attention(intermediates, config), visible_LxT)


def _attention(intermediates: dict[str, Any], config: Any) -> np.ndarray:
    """Returns the attention weights [L, H, T, T] of the first row, from the queries and keys that the model sows."""
    weights = []
    with jax.default_matmul_precision("highest"):
        for i, window in enumerate(config.windows):
            block = intermediates["blocks" if config.scan_layers else f"block_{i}"]["attention"]
            (q,), (k,) = block["queries"], block["keys"]
            q_1xTxHxK, k_1xTxGxK = (jnp.asarray((x[i] if config.scan_layers else x)[:1], jnp.float32) for x in (q, k))
            positions = jnp.arange(q_1xTxHxK.shape[1])
            mask = attention.causal_mask(positions, positions, window)
            weights.append(attention.attention_weights(q_1xTxHxK, k_1xTxGxK, mask, config.attention_softcap)[0])
    return np.stack(weights)
