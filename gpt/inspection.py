"""How a trained model reads a text: the loss of each token, what it expected there, and what each head looks at."""

import base64
import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np

from gpt import generate
from gpt.errors import UserError
from gpt.loaded import Loaded

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


def explain(run: Loaded, text: str) -> Explanation:
    """Reads a text with a trained model, as `gpt.loaded.load` opens it.

    Raises:
      UserError: the model reads no text with self-attention over all of it, or the text is too short or too long.
    """
    config = run.model_config
    if config.family != "gpt":
        raise UserError(f"--workdir={run.workdir.path} has a model of family {config.family}; only a gpt is explained.")
    tokens_T = generate.encode_prompt(run.tokenizer, text, "--prompt")
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


def page(explanation: Explanation, title: str) -> str:
    """An HTML page of it: no network, no library."""
    attention = explanation.attention_LxHxTxT
    data = {
        "title": title,
        "pieces": explanation.pieces,
        "losses": [None, *(round(float(x), 4) for x in explanation.losses_T[1:])],
        "expected": [[], *explanation.expected],
        "shape": attention.shape,
        "attention": base64.b64encode(np.round(attention * 255).astype(np.uint8).tobytes()).decode(),
    }
    # "<" would let a text end the script.
    return _PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c"))


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>How a model reads</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.3em; overflow-wrap: anywhere; }
#text { font: 17px/2 ui-monospace, monospace; } #text span { padding: 2px 1px; white-space: pre-wrap; cursor: default; }
#text span.now { outline: 2px solid currentColor; } .soft { opacity: .7; font-size: 13px; } #note { min-height: 3em; }
canvas { width: min(100%, 640px); image-rendering: pixelated; border: 1px solid #8888; } label { margin-right: 12px; }
</style>
<h1></h1>
<p class="soft">Shade: the loss of a token, in nats. Point at one (or tap it): what was expected there, and,
underlined, what the chosen head looks at from there.</p>
<p id="text"></p><p id="note"></p>
<p><label>layer <select id="layer"></select></label><label>head <select id="head"></select></label></p>
<canvas id="map" aria-label="attention: rows look at columns"></canvas>
<p class="soft">Rows look at columns; the darker, the more.</p>
<script>
const d = DATA, [L, H, T] = d.shape, w = Uint8Array.from(atob(d.attention), c => c.charCodeAt(0));
const at = id => document.getElementById(id), show = s => s.replace(/\\n/g, "⏎\\n");
document.querySelector("h1").textContent = d.title;
for (const [id, n] of [["layer", L], ["head", H]]) for (let i = 0; i < n; i++) at(id).add(new Option(i + 1, i));
at("head").add(new Option("mean", H)); at("head").value = H; at("layer").value = L - 1;
const weight = (t, s) => { const l = +at("layer").value, h = +at("head").value;
  const one = h => w[((l * H + h) * T + t) * T + s] / 255;
  if (h < H) return one(h); let sum = 0; for (let i = 0; i < H; i++) sum += one(i); return sum / H; };
const spans = d.pieces.map((piece, t) => { const e = document.createElement("span"); e.textContent = show(piece);
  if (d.losses[t] !== null) e.style.background = `rgba(224, 100, 40, ${Math.min(1, d.losses[t] / 6)})`;
  e.onmouseenter = e.onclick = () => point(t); at("text").append(e); return e; });
let now = T - 1;
function point(t) { now = t; draw(); }
function draw() {
  spans.forEach((e, s) => { e.className = s == now ? "now" : "";
    e.style.boxShadow = s <= now ? `inset 0 -${(6 * weight(now, s) + .01).toFixed(1)}px #2a6fdb` : "none"; });
  const loss = d.losses[now];
  at("note").textContent = loss === null ? "The first token: nothing is before it."
    : `${JSON.stringify(d.pieces[now])}: loss ${loss.toFixed(3)}. Expected: ` +
      d.expected[now].map(([piece, p]) => `${JSON.stringify(piece)} ${(100 * p).toFixed(1)} %`).join(", ");
  const map = at("map"), image = new ImageData(T, T); map.width = map.height = T;
  for (let t = 0; t < T; t++) for (let s = 0; s < T; s++)
    image.data.set([42, 111, 219, 255 * Math.sqrt(weight(t, s))], 4 * (t * T + s));
  map.getContext("2d").putImageData(image, 0, 0);
}
at("layer").onchange = at("head").onchange = draw; draw();
</script></html>
"""
