"""Fine-tuning: a short run that starts from the weights of another run, for example those of a converted model.

Takes the workdir with these weights as an argument: --config=configs/finetune.py:runs/gpt2. The model, the kind of data
and the tokenizer are those of that run. `python -m gpt.convert` creates such a workdir from Hugging Face weights or a
GGUF file. With ",lora" after the workdir, adapters of all linear layers are trained instead of the weights:
--config=configs/finetune.py:runs/smollm2,lora.

The recipe is nanoGPT's for GPT-2: a constant learning rate of at most a tenth of the training one, for few steps. The
model soon overfits a text of a million tokens, so watch the validation loss; the best checkpoint is kept. Adapters
learn with a larger rate.
"""

from gpt.config import default_config
from gpt.config_files import read_recorded
from gpt.runtime.errors import UserError
from gpt.runtime.fields import check_choice


def get_config(argument: str = ""):
    workdir, *options = argument.split(",")
    if not workdir:
        raise UserError("Name the workdir to start from: --config=configs/finetune.py:WORKDIR.")
    for option in options:
        check_choice("option", option, ["lora"])
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
    config.optimizer.decay = "constant"
    if "lora" in options:
        config.model.lora_rank = 8
        config.model.lora_targets = ",".join(trained.model.layer_weights)
        config.optimizer.learning_rate = 5e-4
        config.train.batch_size = 8
    if trained.model.reads == "tokens" and trained.model.positions == "rotary":
        config.model.block_size = min(256, trained.model.length)  # the context of a released model is too long to try
    return config
