"""A small model of subword tokens for two CPU cores: byte-level BPE with 4,096 tokens, trained on the corpus.

Your own text: --config.data.path=FILE_OR_FOLDER. Each file is a document, and <|endoftext|> splits a file into several
documents; --config.data.document_borders restricts attention to the same document. --config.tokenizer.name=gpt2 uses
GPT-2's vocabulary instead of training one. Takes a model size as an argument: --config=configs/bpe.py:gpt-mini.
"""

from gpt.config import default_config
from gpt.models.sizes import named_size


def get_config(size: str = ""):
    config = default_config()
    config.tokenizer.name = "bpe"
    config.tokenizer.vocab_size = 4096  # the plays become 1.6 million tokens of 3.1 bytes on average
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.embed_dim = 128
    if size:
        config.model.update(named_size(size))
    config.model.block_size = 64  # about 200 characters
    config.model.vocab_multiple = 128  # pads other vocabularies to full TPU tiles that `mesh.model` divides
    config.model.positions = "rotary"
    config.model.embed_dropout = 0.0  # the run is only two epochs long
    config.model.residual_dropout = 0.0
    config.model.attention_dropout = 0.0
    config.train.batch_size = 16
    config.train.steps = 3000
    config.train.log_every = 50
    config.train.eval_every = 1000
    config.train.sample_tokens = 100
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_tokens = 1e5
    return config
