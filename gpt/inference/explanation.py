"""Explains how a trained model reads a text: loss, predictions and attention weights of each token."""

import base64
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt.checkpointing.loading import Loaded
from gpt.data.tokenizers import Labels
from gpt.inference import generation
from gpt.models import attention
from gpt.runtime.errors import UserError

EXPECTED = 5  # number of predictions shown for each token


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a model reads a text of T tokens.

    Attributes:
      pieces: the text of each token.
      losses_T: loss of each token in nats. The first token has no context, and so its loss is NaN.
      expected: for each token after the first, the most probable tokens with their probabilities.
      attention_LxHxTxT: attention weights of each layer and head; row t holds the weights of token t on all tokens.
    """

    pieces: list[str]
    losses_T: np.ndarray
    expected: list[list[tuple[str, float]]]
    attention_LxHxTxT: np.ndarray

    def page(self, title: str) -> str:
        """Returns an HTML page that shows the explanation without network access or libraries."""
        data = {
            "title": title,
            "pieces": self.pieces,
            "losses": [None, *(round(float(x), 4) for x in self.losses_T[1:])],
            "expected": [[], *self.expected],
            "shape": self.attention_LxHxTxT.shape,
            "attention": base64.b64encode(np.round(self.attention_LxHxTxT * 255).astype(np.uint8).tobytes()).decode(),
        }
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        # A text with "</script>" would end the script.
        return template.replace("DATA", json.dumps(data).replace("<", "\\u003c"))


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
        return jax.nn.log_softmax(logits_BxTxV[0]), sown["intermediates"]

    with run.program.layout.use():
        log_p_TxV, intermediates = jax.device_get(read(run.params, np.tile(tokens_T, (rows, 1))))
    predicted_TxV, targets_T = log_p_TxV[:-1], tokens_T[1:]
    losses_T = -np.take_along_axis(predicted_TxV, targets_T[:, None], axis=-1)[:, 0]
    most_probable = np.argsort(-predicted_TxV, axis=-1)[:, :EXPECTED]
    expected = [
        [(run.tokenizer.piece(int(token)), math.exp(log_p[token])) for token in tokens]
        for tokens, log_p in zip(most_probable, predicted_TxV, strict=True)
    ]
    pieces = [run.tokenizer.piece(int(token)) for token in tokens_T]
    weights = _attention(intermediates, config)
    return Explanation(pieces, np.concatenate([[np.nan], losses_T]), expected, weights)


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
