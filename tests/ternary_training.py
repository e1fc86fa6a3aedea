"""Tiny ternary models, and runs of the real Trainer over them."""

from transformers import Trainer, TrainingArguments, default_data_collator

from transformers_minicpm4.quantization.bitcpm4.configuration import BitCPM4Config
from transformers_minicpm4.quantization.bitcpm4.qat import prepare_qat


def prepare(tiny_llama):
    return prepare_qat(tiny_llama(), BitCPM4Config(group_size=16))


def train(model, rows, folder, steps=6, callbacks=(), resume=False, **changes):
    arguments = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        **changes,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
