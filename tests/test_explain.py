"""Explanations: losses and attention weights against the model's own logits, and the page."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt.checkpointing import loading
from gpt.checkpointing.workdir import Workdir
from gpt.inference import explanation
from gpt.runtime.errors import UserError

ROOT = Path(__file__).parent.parent
TEXT = "what <light> is it?"


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("explain")
    (path / "text.txt").write_text("what <light> is it, that breaks?\n" * 40)
    command = [sys.executable, "-m", "gpt.main", "--config=configs/char_tiny.py", f"--workdir={path / 'run'}"]
    options = {
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.embed_dim": 16,
        "model.block_size": 32,
        "model.scan_layers": request.param,
        "train.steps": 3,
        "train.batch_size": 8,
        "train.sample_tokens": 0,
        "data.path": path / "text.txt",
    }
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True, timeout=300)
    return loading.load(Workdir(str(path / "run")), "last", batch_size=1)


def test_losses_are_those_of_the_model_and_attention_looks_back(run):
    seen = explanation.explain(run, TEXT)
    assert "".join(seen.pieces) == TEXT
    tokens = run.tokenizer.encode(TEXT)
    rows = np.tile(tokens, (run.program.layout.batch_shards, 1))
    with run.program.layout.use():
        log_p = np.asarray(jax.nn.log_softmax(run.program.model.apply({"params": run.params}, rows)[0]))
    assert np.isnan(seen.losses_T[0])
    wanted = [-log_p[t - 1, token] for t, token in enumerate(tokens) if t]
    np.testing.assert_allclose(seen.losses_T[1:], wanted, atol=1e-5)
    for log_p_V, likeliest in zip(log_p, seen.expected, strict=False):
        np.testing.assert_allclose(likeliest[0][1], np.exp(log_p_V.max()), rtol=1e-4)

    ranks = [1 + (log_p[t - 1] > log_p[t - 1, token]).sum() for t, token in enumerate(tokens) if t]
    assert seen.ranks_T.tolist() == [0, *ranks]

    attention = seen.attention_LxHxTxT
    assert attention.shape == (2, 2, len(tokens), len(tokens))
    np.testing.assert_allclose(attention.sum(axis=-1), 1, atol=1e-5)
    assert not np.triu(attention, 1).any()
    assert not np.allclose(attention[0], attention[1])
    np.testing.assert_array_equal(seen.visible_LxT, [np.arange(len(tokens)) + 1] * 2)


def test_the_entropy_is_that_of_the_rows():
    """Two heads of two tokens: one attends to the first token, the other to all visible tokens equally."""
    attention = np.array([[[[1, 0], [1, 0]], [[1, 0], [0.5, 0.5]]]], np.float32)
    seen = explanation.Explanation(["a", "b"], np.zeros(2), np.zeros(2), [[]], attention, np.array([[1, 2]]))
    np.testing.assert_allclose(seen.entropy_LxH, [[0, np.log(2) / 2]])


def test_the_attention_is_what_the_model_computes_with(run):
    """The first layer's, from its parameters by NumPy."""
    params = run.params
    block = jax.tree.map(lambda x: x[0], params["blocks"]) if "blocks" in params else params["block_0"]
    block = jax.tree.map(np.asarray, block)
    tokens = run.tokenizer.encode(TEXT)
    x = np.asarray(params["token_embedding"]["embedding"])[tokens]
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * block["norm_1"]["scale"] + block["norm_1"]["bias"]
    qkv = np.einsum("td,dhk->thk", x, block["attention"]["qkv"]["kernel"]) + block["attention"]["qkv"]["bias"]
    q, k, _ = np.split(qkv, 3, axis=-1)
    half = q.shape[-1] // 2
    angles = np.arange(len(tokens))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)

    def rotated(x):
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)

    scores = np.einsum("thk,shk->hts", rotated(q), rotated(k)) / np.sqrt(2 * half)
    weights = np.exp(scores) * np.tri(len(tokens))
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(explanation.explain(run, TEXT).attention_LxHxTxT[0], weights, atol=1e-5)


def test_a_text_of_the_wrong_length_is_refused(run):
    for text in ("w", "what " * 20):
        with pytest.raises(UserError, match=r"texts of 2 to model\.block_size=32"):
            explanation.explain(run, text)


def test_the_page_holds_all_and_no_text_ends_its_script(run):
    page = explanation.explain(run, "is <light> it").page("title")
    data = page.split("const d = ")[1].split(";\n")[0]
    assert "<" not in data
    assert "".join(json.loads(data)["pieces"]) == "is <light> it"
    assert page.count("</script>") == 1


def test_the_command_writes_a_page_and_never_over_one(run, tmp_path):
    out = tmp_path / "page.html"
    command = [sys.executable, "-m", "gpt.explain", f"--workdir={run.workdir.path}", f"--prompt={TEXT}", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{len(TEXT)} tokens" in done.stdout
    written = out.read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert out.read_text() == written
