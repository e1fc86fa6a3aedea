"""Tiny ternary models, and runs of the real Trainer over them."""

from datasets import Dataset
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


def train_sft(trl, model, tokenizer, folder, settings, **parts):
    """Twenty steps of TRL's `SFTTrainer` over counting texts. Returns it, and the losses."""
    texts = [" ".join(f"w{3 + (start + step) % 20}" for step in range(16)) for start in range(40)]
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(folder),
            max_steps=20,
            per_device_train_batch_size=4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            gradient_checkpointing=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_length=16,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        **parts,
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
