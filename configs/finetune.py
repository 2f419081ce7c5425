"""Fine-tuning: a short run that starts from the weights of another run, for example converted GPT-2 weights.

Takes the workdir with these weights as an argument: --config=configs/finetune.py:runs/gpt2. The model, the kind of data
and the tokenizer are those of that run. `python -m gpt.convert` creates such a workdir from Hugging Face weights.

The recipe is nanoGPT's for GPT-2: a constant learning rate of at most a tenth of the training one, for few steps. The
model soon overfits a text of a million tokens, so watch the validation loss; the best checkpoint is kept.
"""

from gpt.config import default_config, read_recorded
from gpt.runtime.errors import UserError


def get_config(workdir: str = ""):
    if not workdir:
        raise UserError("Name the workdir to start from: --config=configs/finetune.py:WORKDIR.")
    trained = read_recorded(workdir)
    config = default_config(trained.model, type(trained.data)())
    config.tokenizer.name = trained.tokenizer.name
    config.train.init_from = workdir
    config.train.batch_size = 32
    config.train.steps = 200
    config.train.log_every = 1
    config.train.eval_every = 50
    config.train.checkpoint_every = 50
    config.optimizer.learning_rate = 3e-5
    config.optimizer.final_fraction = 1.0  # no decay
    return config
