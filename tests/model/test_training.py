"""Training with sparse attention on: gradients, packed rows, LoRA, and the trainers of Transformers and TRL."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from tolerances import assert_close
from transformers_minicpm4 import MiniCPM4Config
from transformers_minicpm4.generation.chat import chat_template
from transformers_minicpm4.infllm_v2 import backend
from transformers_minicpm4.registration import LORA_TARGET_MODULES


# Relative root mean square of a parameter's gradient: (tolerance, measured 2026-11-24 as in tolerances.py).
GRADIENT_FLOAT64 = (8e-15, 2.1e-15)
GRADIENT_FLOAT32 = (3e-6, 7.7e-7)
LOG_PROBS_FLOAT32 = (3.5e-6, 9.5e-7)  # absolute, log-probabilities down to -7
LOSS_PACKED = (1.9e-6, 4.8e-7)  # absolute, mean of 20 log-probabilities in float32


def weighted_sum(logits: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient differs at every logit."""
    generator = torch.Generator().manual_seed(1)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradient of every parameter, taken out of the model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        scale = gradient.pow(2).mean().sqrt()
        assert scale > 0, f"{name} has no gradient, the comparison would be empty"
        error = ((got[name] - gradient).pow(2).mean().sqrt() / scale).item()
        assert error <= tolerance, f"gradient of {name}: off by {error:.1e}, tolerance {tolerance:.1e}"


@pytest.fixture
def sparse_model(tiny_model, sparse_config):
    return tiny_model(sparse_config=sparse_config).train()


@pytest.fixture
def ids():
    return torch.randint(1, 120, (2, 150))


class TestGradients:
    @pytest.fixture
    def plain(self, sparse_model, ids):
        weighted_sum(sparse_model(ids).logits).backward()
        return gradients(sparse_model)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_changes_nothing(self, sparse_model, ids, plain, use_reentrant):
        sparse_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        forwards = []
        sparse_model.model.layers[0].self_attn.register_forward_hook(lambda *_: forwards.append(1))
        weighted_sum(sparse_model(ids, use_cache=False).logits).backward()
        assert len(forwards) == 2, "the layer did not run again in the backward pass"
        assert_same_gradients(gradients(sparse_model), plain, tolerance=0)

    def test_equal_those_of_the_definition(self, sparse_model, ids, plain, monkeypatch):
        calls = []

        def definition(name):
            calls.append(name)
            return backend.IMPLEMENTATIONS["reference"]

        monkeypatch.setattr(backend, "_implementation", definition)
        weighted_sum(sparse_model(ids).logits).backward()
        assert len(calls) == sparse_model.config.num_hidden_layers
        assert_same_gradients(plain, gradients(sparse_model), GRADIENT_FLOAT64[0])

    def test_differ_from_dense_ones(self, sparse_model, ids, plain):
        """Otherwise nothing above would be about sparse attention."""
        sparse_model.set_attn_implementation("sdpa")
        weighted_sum(sparse_model(ids).logits).backward()
        dense = gradients(sparse_model)["model.layers.0.self_attn.v_proj.weight"]
        assert (dense - plain["model.layers.0.self_attn.v_proj.weight"]).abs().max() > 1e-3


class TestPackedRows:
    LENGTHS = (90, 7, 130)

    @pytest.fixture
    def sequences(self):
        return [torch.randint(1, 120, (length,)) for length in self.LENGTHS]

    @pytest.fixture
    def alone(self, sparse_model, sequences):
        """Logits of each sequence on its own, and the sum of the gradients."""
        logits = torch.cat([sparse_model(sequence[None]).logits for sequence in sequences], dim=1)
        weighted_sum(logits).backward()
        return logits.detach(), gradients(sparse_model)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_equal_the_separate_sequences(self, sparse_model, sequences, alone, checkpointing):
        if checkpointing:
            sparse_model.gradient_checkpointing_enable()
        positions = torch.cat([torch.arange(length) for length in self.LENGTHS])
        logits = sparse_model(torch.cat(sequences)[None], position_ids=positions[None]).logits
        assert_close(logits, alone[0], "logits_float64", "logits of the packed row")
        weighted_sum(logits).backward()
        assert_same_gradients(gradients(sparse_model), alone[1], GRADIENT_FLOAT64[0])

    def test_what_the_trl_collator_packs(self, sparse_model, sequences, alone):
        sft = pytest.importorskip("trl.trainer.sft_trainer", reason="TRL is not installed: extra `rl`")
        collate = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        batch = collate([{"input_ids": sequence.tolist()} for sequence in sequences])
        assert "attention_mask" not in batch
        logits = sparse_model(**batch, use_cache=False).logits
        assert_close(logits, alone[0], "logits_float64", "logits of the packed row")

    def test_forgetting_where_they_restart_mixes_them(self, sparse_model, sequences, alone):
        logits = sparse_model(torch.cat(sequences)[None]).logits
        later = slice(self.LENGTHS[0], None)
        assert (logits - alone[0])[:, later].abs().max() > 0.1


class TestFusedLogProbs:
    """TRL multiplies hidden states by the head itself and must divide them as the model does: `logits_scaling`."""

    @pytest.fixture
    def add_fused_lm_head(self):
        return pytest.importorskip("trl.trainer.utils", reason="TRL is not installed: extra `rl`").add_fused_lm_head

    @pytest.fixture
    def model(self, tiny_model, sparse_config):
        model = tiny_model(sparse_config=sparse_config).float()
        assert model.config.logits_scaling == 4
        return model

    @staticmethod
    def plain(model, ids):
        log_probs = model(ids).logits[:, :-1].log_softmax(-1)
        return log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)

    def test_equal_the_plain_ones(self, model, ids, add_fused_lm_head):
        wanted = self.plain(model, ids)
        wanted.sum().backward()
        wanted_gradients = gradients(model)
        add_fused_lm_head(model)
        output = model(ids, labels=ids, fused_lm_head=True)
        torch.testing.assert_close(output.log_probs, wanted, atol=LOG_PROBS_FLOAT32[0], rtol=0)
        output.log_probs.sum().backward()
        assert_same_gradients(gradients(model), wanted_gradients, GRADIENT_FLOAT32[0])

    def test_are_wrong_without_logits_scaling(self, model, ids, add_fused_lm_head, monkeypatch):
        wanted = self.plain(model, ids)
        with monkeypatch.context() as without:
            without.setattr(MiniCPM4Config, "logits_scaling", None)
            add_fused_lm_head(model)
        output = model(ids, labels=ids, fused_lm_head=True)
        assert (output.log_probs - wanted).abs().mean() > 1


class TestLora:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft", reason="PEFT is not installed: extra `rl`")

    @pytest.fixture
    def adapted(self, peft, sparse_model):
        adapted = peft.get_peft_model(sparse_model, peft.LoraConfig(task_type="CAUSAL_LM", r=4))
        # A fresh adapter adds nothing; a trained one does.
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return adapted.double().eval()

    def test_default_targets_are_the_seven_linears_of_every_layer(self, peft, adapted):
        layers = adapted.config.num_hidden_layers
        hit = [
            name.split(".")[-1]
            for name, module in adapted.named_modules()
            if isinstance(module, peft.tuners.lora.Linear)
        ]
        assert sorted(hit) == sorted(LORA_TARGET_MODULES * layers)
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert len(trained) == 2 * len(hit)

    def test_a_saved_adapter_loads_the_same(self, peft, adapted, ids, tmp_path, tiny_model, sparse_config):
        wanted = adapted(ids).logits
        adapted.save_pretrained(tmp_path)
        base = tiny_model(sparse_config=sparse_config)
        assert (base(ids).logits - wanted).abs().max() > 0.1
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).double().eval()
        assert torch.equal(loaded(ids).logits, wanted)

    @pytest.mark.parametrize("tied", [True, False])
    def test_merged_saved_and_loaded(self, peft, tiny_model, sparse_config, ids, tmp_path, tied):
        model = tiny_model(sparse_config=sparse_config, tie_word_embeddings=tied)
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
        adapted = adapted.double().eval()
        wanted = adapted(ids).logits
        merged = adapted.merge_and_unload()
        assert_close(merged(ids).logits, wanted, "logits_float64", "logits after merging")
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert loaded.config.sparse_config == sparse_config.to_dict()
        assert loaded.config._attn_implementation == "infllm_v2"
        assert torch.equal(loaded(ids).logits, merged(ids).logits)


def training_arguments(folder, arguments_class=TrainingArguments, **changes):
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": True,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "bf16": False,
    }
    return arguments_class(**{**options, **changes})


def test_a_trainer_step_is_a_gradient_step(sparse_model, tmp_path):
    """Two rows of different length, padded on the right: the weights move by -learning_rate times the gradient."""
    rows = [torch.randint(1, 120, (length,)) for length in (150, 101)]
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100),
    }
    copied = copy.deepcopy(sparse_model)
    copied(**batch).loss.backward()
    wanted = {name: value - 0.1 * value.grad for name, value in copied.named_parameters()}

    trainer = Trainer(
        sparse_model,
        training_arguments(
            tmp_path, optim="sgd", learning_rate=0.1, max_steps=1, max_grad_norm=0, per_device_train_batch_size=2
        ),
        train_dataset=[{name: tensor[row] for name, tensor in batch.items()} for row in range(2)],
    )
    trainer.train()
    for name, value in sparse_model.named_parameters():
        assert_close(value, wanted[name], "gradient_float64", name)
        assert not torch.equal(value, wanted[name] + 0.1 * copied.get_parameter(name).grad), f"{name} did not move"


class TestSFTTrainer:
    ANSWERS = ("the block is near", "the block is far")

    @pytest.fixture
    def trl(self):
        return pytest.importorskip("trl", reason="TRL is not installed: extra `rl`")

    @pytest.fixture
    def tokenizer(self):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special_tokens = ["<unk>", "<|im_start|>", "<|im_end|>", "<pad>"]
        core.train_from_iterator(
            self.ANSWERS,
            trainers.BpeTrainer(
                vocab_size=280, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
            ),
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>"
        )
        tokenizer.chat_template = chat_template("minicpm4", training=True)
        return tokenizer

    @pytest.fixture
    def dataset(self):
        datasets = pytest.importorskip("datasets")
        questions = ("where is " * 12, "how far is " * 9)
        rows = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in zip(questions, self.ANSWERS)
        ]
        return datasets.Dataset.from_dict({"messages": rows})

    @pytest.fixture
    def train(self, trl, tiny_model, sparse_config, tokenizer, dataset, tmp_path):
        """A few steps of SFT, the answers alone in the loss; returns the trainer and its losses."""

        def run(**changes):
            fields = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 3}
            model = tiny_model(sparse_config=sparse_config, **fields).float()
            options = {"max_length": 400, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "max_steps": 6}
            arguments = training_arguments(tmp_path, trl.SFTConfig, assistant_only_loss=True, **{**options, **changes})
            trainer = trl.SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
            trainer.train()
            return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

        return run

    def test_assistant_only_loss_trains_the_answers(self, train, tokenizer, sparse_config):
        trainer, losses = train()
        rows = trainer.train_dataset.with_format(None)
        trained = [[label for label in labels if label != -100] for labels in rows["labels"]]
        assert [tokenizer.decode(labels) for labels in trained] == [answer + "<|im_end|>" for answer in self.ANSWERS]
        shortest = min(len(row) for row in rows["input_ids"])
        assert shortest > sparse_config.selected_blocks * sparse_config.block_size, "too short to be sparse"
        assert len(losses) == 6
        assert losses[-1] < 0.8 * losses[0], losses

    def test_packing_changes_no_loss(self, train):
        (_, padded), (trainer, packed) = train(max_steps=2), train(max_steps=2, packing=True)
        assert len(trainer.train_dataset) == 1, "nothing was packed"
        assert packed[0] == pytest.approx(padded[0], abs=LOSS_PACKED[0], rel=0)
        # Adam divides by the size of the gradient and so enlarges what rounding left of a gradient near 0.
        assert packed[1] == pytest.approx(padded[1], abs=1e-5, rel=0)
