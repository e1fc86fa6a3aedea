"""A tiny random checkpoint with a real tokenizer, and a way to run the command line on it."""

import io
import json
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from transformers_minicpm4 import MiniCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.cli.main import main
from transformers_minicpm4.generation import chat_template


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The last line of standard error; whatever came before it was progress, never a traceback."""
        assert "Traceback" not in self.err, self.err
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def run_cli(capfd, monkeypatch):
    """Run `minicpm4 ...` in this process: exit code, standard output, standard error."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def run(*arguments, stdin=None):
        piped = Terminal() if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii")
        monkeypatch.setattr("sys.stdin", piped)
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capfd.readouterr())

    return run


def make_tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the user asks and the assistant answers", "three rivers and two lakes"], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template("minicpm4.1")
    return tokenizer


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, tokenizer):
    """Save a random MiniCPM4 with the given changes to its configuration; returns the folder."""

    def make(save_options=None, dtype=torch.float32, **changes):
        torch.manual_seed(0)
        fields = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "scale_emb": 2,
            "scale_depth": 1.4,
            "dim_model_base": 32,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
        }
        model = MiniCPM4ForCausalLM(MiniCPM4Config(**{**fields, **changes})).to(dtype)
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder, **(save_options or {}))
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def as_released():
    """Rewrite a checkpoint's config.json as the Hub's: `model_type` "minicpm", or none at all (the 0.5B)."""

    def rewrite(folder, form):
        config = json.loads((folder / "config.json").read_text())
        if form != "ours":
            config["architectures"] = ["MiniCPMForCausalLM"]
            config["model_type"] = "minicpm"
            config["auto_map"] = {"AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM"}
        if form == "unnamed":
            del config["model_type"]
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return rewrite


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint):
    return make_checkpoint()
