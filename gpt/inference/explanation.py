"""How a trained model reads a text: the loss of each token, what it expected there, and what each head looks at."""

import base64
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt.checkpointing.loading import Loaded
from gpt.inference import generation
from gpt.runtime.errors import UserError

EXPECTED = 5  # tokens shown that the model holds for likeliest


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a model reads a text of T tokens.

    Attributes:
      pieces: the tokens as text.
      losses_T: nats; the first token has none (NaN), as nothing is before it.
      expected: for each token after the first, the likeliest ones there, each with its probability.
      attention_LxHxTxT: weights of each layer and head, from a token (row) to those that it sees.
    """

    pieces: list[str]
    losses_T: np.ndarray
    expected: list[list[tuple[str, float]]]
    attention_LxHxTxT: np.ndarray

    def page(self, title: str) -> str:
        """Returns an HTML page of the explanation, which needs no network and no library."""
        data = {
            "title": title,
            "pieces": self.pieces,
            "losses": [None, *(round(float(x), 4) for x in self.losses_T[1:])],
            "expected": [[], *self.expected],
            "shape": self.attention_LxHxTxT.shape,
            "attention": base64.b64encode(np.round(self.attention_LxHxTxT * 255).astype(np.uint8).tobytes()).decode(),
        }
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        # "<" would let a text end the script.
        return template.replace("DATA", json.dumps(data).replace("<", "\\u003c"))


def explain(run: Loaded, text: str) -> Explanation:
    """Reads a text with a trained model, as `gpt.loaded.load` opens it.

    Raises:
      UserError: the model reads no text with self-attention over all of it, or the text is too short or too long.
    """
    config = run.model_config
    if config.family != "gpt":
        raise UserError(f"--workdir={run.workdir.path} has a model of family {config.family}; only a gpt is explained.")
    tokens_T = generation.encode_prompt(run.tokenizer, text, "--prompt")
    if not 2 <= len(tokens_T) <= config.block_size:
        raise UserError(
            f"--prompt has {len(tokens_T)} tokens; texts of 2 to model.block_size={config.block_size} can be explained."
        )
    rows = run.program.layout.batch_shards

    @jax.jit
    def read(params, tokens_BxT):
        logits_BxTxV, found = run.program.model.apply({"params": params}, tokens_BxT, mutable=["intermediates"])
        return jax.nn.log_softmax(logits_BxTxV[0]), found["intermediates"]

    with run.program.layout.use():
        log_p_TxV, found = jax.device_get(read(run.params, np.tile(tokens_T, (rows, 1))))
    before_TxV, after_T = log_p_TxV[:-1], tokens_T[1:]
    losses_T = -np.take_along_axis(before_TxV, after_T[:, None], axis=-1)[:, 0]
    likeliest = np.argsort(-before_TxV, axis=-1)[:, :EXPECTED]
    expected = [
        [(run.tokenizer.piece(int(token)), math.exp(log_p[token])) for token in tokens]
        for tokens, log_p in zip(likeliest, before_TxV, strict=True)
    ]
    pieces = [run.tokenizer.piece(int(token)) for token in tokens_T]
    attention = _attention(found, config.num_layers, config.scan_layers)
    return Explanation(pieces, np.concatenate([[np.nan], losses_T]), expected, attention)


def _attention(found: dict[str, Any], layers: int, is_stacked: bool) -> np.ndarray:
    """[L, H, T, T] weights of the first row, from the queries and keys that `SelfAttention` leaves."""
    weights = []
    for i in range(layers):
        block = found["blocks" if is_stacked else f"block_{i}"]["attention"]
        (q,), (k,) = block["queries"], block["keys"]
        q_TxHxK, k_TxHxK = (np.float32(x[i][0] if is_stacked else x[0]) for x in (q, k))
        scores_HxTxT = np.einsum("thk,shk->hts", q_TxHxK, k_TxHxK) / math.sqrt(q_TxHxK.shape[-1])
        scores_HxTxT = np.where(np.tri(len(q_TxHxK), dtype=bool), scores_HxTxT, -np.inf)
        scores_HxTxT = np.exp(scores_HxTxT - scores_HxTxT.max(axis=-1, keepdims=True))
        weights.append(scores_HxTxT / scores_HxTxT.sum(axis=-1, keepdims=True))
    return np.stack(weights)
