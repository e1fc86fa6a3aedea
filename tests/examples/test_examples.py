"""Each example does what it says, on the real weights of `make assets`."""

import gzip
import importlib.util
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_minicpm4 import InfLLMv2Config, MiniCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.generation.chat import chat_template
from transformers_minicpm4.model.prefix_cache import PrefixCache


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.real


def test_every_example_is_tested():
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py"))
    assert [path.name for path in EXAMPLES.glob("*.py") if f"{path.stem}" not in tests] == []


def test_long_document(real_checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("MODEL", str(real_checkpoint))
    monkeypatch.setattr(sys, "argv", ["long_document.py"])
    runpy.run_path(str(EXAMPLES / "long_document.py"), run_name="__main__")
    out = capsys.readouterr().out
    read = re.findall(r"(\w+): the answer's first token read (\d+) of (\d+) blocks", out)
    total = read[0][2]
    assert read == [("infllm_v2", "12", total), ("sdpa", total, total)]
    assert int(total) > 36
    # The chapter says: "... are used to create anonymous functions".
    assert out.count("anonymous functions") == 2, out


def test_p_gptq(real_checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--model", str(real_checkpoint), "--output", str(tmp_path / "int4")]
    monkeypatch.setattr(sys, "argv", ["p_gptq.py", *arguments, "--num_samples", "4"])
    runpy.run_path(str(EXAMPLES / "p_gptq.py"), run_name="__main__")
    out = capsys.readouterr().out
    full, rounded, computed, stored = map(float, re.findall(r"perplexity ([\d.]+)", out))
    # Most of what rounding loses comes back where the stored prefix is used, and only there.
    assert math.log(stored / full) < 0.5 * math.log(rounded / full)
    assert computed > rounded
    assert "The capital of France is Paris" in out
    assert sorted(path.name for path in (tmp_path / "int4" / "prefix_cache").iterdir()) == ["keys_values.safetensors"]


def test_edge_engine(real_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["edge_engine.py", "--model", str(real_checkpoint), "--max_new_tokens", "40"])
    runpy.run_path(str(EXAMPLES / "edge_engine.py"), run_name="__main__")
    out = capsys.readouterr().out
    turns = re.findall(r"\[(\d+) tokens of prompt, (\d+) of them in the cache; (\d+) written in (\d+) passes\]", out)
    (first, none, written, passes), (second, reused, _, _) = [tuple(map(int, turn)) for turn in turns]
    assert none == 0
    assert first < reused < second
    assert passes < written / 3, "the draft copies most of what is repeated"
    assert "from left to right." in out


def test_executors(real_checkpoint, tmp_path, monkeypatch, capsys):
    for package in ("xllamacpp", "gguf"):
        pytest.importorskip(package, reason=f"{package} is not installed: extra `executors`")
    arguments = ["--model", str(real_checkpoint), "--output", str(tmp_path / "model.gguf"), "--type", "f32"]
    monkeypatch.setattr(sys, "argv", ["executors.py", *arguments, "--plot", str(tmp_path / "pairs.png")])
    runpy.run_path(str(EXAMPLES / "executors.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert float(re.search(r"slope +([\d.]+)", out)[1]) == pytest.approx(1, abs=1e-4)
    torch_says, llama_cpp_says = re.findall(r"^(?:torch|gguf): +(.*)$", out, re.MULTILINE)
    assert torch_says == llama_cpp_says
    assert "Gravity is" in torch_says
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")


def test_structured_output(real_checkpoint, monkeypatch, capsys):
    pytest.importorskip("llguidance", reason="llguidance is not installed: extra `edge`")
    monkeypatch.setattr(sys, "argv", ["structured_output.py", "--model", str(real_checkpoint)])
    runpy.run_path(str(EXAMPLES / "structured_output.py"), run_name="__main__")
    out = capsys.readouterr().out
    people = json.loads(out[: out.rindex("}") + 1])["people"]
    assert people[0]["name"] == "Anna Lindqvist"
    assert "with drafts the same text: True" in out


def test_chunkwise_grpo(tmp_path):
    """A few steps: the warm start has learned something, and rollouts were under way when training stopped."""
    arguments = ["--max_steps", "6", "--warm_start_steps", "40", "--tested", "16", "--output_dir", str(tmp_path)]
    command = [sys.executable, str(EXAMPLES / "chunkwise_grpo.py"), *arguments]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert len(re.findall(r"[\d.]+ of 16 answers right", out)) == 2
    steps = re.findall(r"^\| (\d+) \| [\d.]+ \| ([\d.]+) \|", out, re.MULTILINE)
    assert [int(step) for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert float(steps[-1][1]) > 0


def test_p_gptq_trained_from_scratch(tmp_path, monkeypatch, capsys):
    arguments = ["--train_steps", "12", "--output", str(tmp_path / "int4"), "--num_samples", "2"]
    monkeypatch.setattr(sys, "argv", ["p_gptq.py", *arguments])
    runpy.run_path(str(EXAMPLES / "p_gptq.py"), run_name="__main__")
    out = capsys.readouterr().out
    full, rounded, computed, stored = map(float, re.findall(r"perplexity ([\d.]+)", out))
    assert full < 1500, "below a guess among 2,048 tokens"
    assert max(rounded, computed, stored) < 1.1 * full
    prefix = PrefixCache.load(tmp_path / "int4")
    assert (len(prefix.keys), prefix.token_ids) == (4, [1])


def test_p_gptq_trains_the_same_model_again():
    train = runpy.run_path(str(EXAMPLES / "p_gptq.py"))["train"]
    (first, _), (second, _) = (train("\n".join(map(str, range(900))), 3, length=64) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_bitcpm4(real_checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--model", str(real_checkpoint), "--output_dir", str(tmp_path), "--steps", "4", "--eval_blocks", "4"]
    monkeypatch.setattr(sys, "argv", ["bitcpm4.py", *arguments])
    runpy.run_path(str(EXAMPLES / "bitcpm4.py"), run_name="__main__")
    out = capsys.readouterr().out
    full, rounded, trained, packed = map(float, re.findall(r"([\d.]+) nats a token", out))
    assert full < trained < rounded
    assert abs(packed - trained) < 0.02 * trained
    assert "0.141 of bfloat16" in out


def test_kernel(tmp_path, monkeypatch, capsys):
    folder = EXAMPLES.parent / "hub_kernels" / "infllm_v2"
    command = [sys.executable, folder / "scripts" / "build.py", "--target", tmp_path / "build"]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("LOCAL_KERNELS", f"local/infllm-v2={tmp_path}")
    monkeypatch.delenv("INFLLM_V2_KERNEL", raising=False)
    with pytest.raises(SystemExit, match="INFLLM_V2_KERNEL names no kernel"):
        runpy.run_path(str(EXAMPLES / "kernel.py"), run_name="__main__")
    monkeypatch.setenv("INFLLM_V2_KERNEL", "local/infllm-v2")
    runpy.run_path(str(EXAMPLES / "kernel.py"), run_name="__main__")
    out = capsys.readouterr().out
    differences = re.findall(r"kernel [\d.]+ ms, blockwise [\d.]+ ms; largest difference (\S+)", out)
    assert len(differences) == 2
    assert all(0 < float(difference) < 1e-5 for difference in differences)
    assert "the same tokens? True" in out
    assert "the kernel that answered: local/infllm-v2, build _infllm_v2_" in out


class TestSftLora:
    @pytest.fixture
    def example(self, monkeypatch):
        for package in ("trl", "peft"):
            pytest.importorskip(package, reason=f"{package} is not installed: extra `rl`")
        spec = importlib.util.spec_from_file_location("examples_sft_lora", EXAMPLES / "sft_lora.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # the argument parser looks up types there
        spec.loader.exec_module(module)
        return module

    @pytest.fixture
    def train(self, example, tmp_path, capsys):
        """Run the example; returns the trainer, the folder it saved to, and the two losses it printed."""

        def run(*arguments):
            trainer = example.main([*arguments, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"])
            out = capsys.readouterr().out
            losses = re.search(r"([\d.]+) before training, ([\d.]+) after", out).groups()
            return trainer, tmp_path / "out", [float(loss) for loss in losses]

        return run

    @pytest.fixture
    def ids(self, train):
        return torch.randint(10, 40_000, (1, 230))

    def test_documented_commands_are_understood(self, example):
        def commands(text):
            joined = text.replace("\\\n", " ")
            return [
                tuple(line.split()[2:]) for line in re.findall(r"^ *(python examples/sft_lora\.py.*)", joined, re.M)
            ]

        documented = commands(example.__doc__)
        page = EXAMPLES.parent / "docs" / "training.md"
        assert sorted(documented) == sorted(commands(page.read_text(encoding="utf-8")))
        assert len(documented) == 3
        parser = example.TrlParser((example.ScriptArguments, example.TrainingArguments))
        parsed = [parser.parse_args_and_config(arguments) for arguments in documented]
        assert sorted(script.full for script, _ in parsed) == [False, False, True]

    def test_adapter(self, train, real_checkpoint, ids):
        from peft import AutoPeftModelForCausalLM

        trainer, folder, (before, after) = train("--max_steps", "3", "--eval_rows", "1")
        assert after < 0.8 * before
        lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
        sparse_config = trainer.model.config.sparse_config
        sparse = InfLLMv2Config.from_dict(sparse_config)
        assert sum(length > sparse.selected_blocks * sparse.block_size for length in lengths) > 0.8 * len(lengths)

        loaded = AutoPeftModelForCausalLM.from_pretrained(folder, sparse_config=sparse_config, dtype=torch.float32)
        assert loaded.config._attn_implementation == "infllm_v2"
        trained = trainer.model.eval()
        with torch.no_grad():
            wanted = trained(ids).logits
            assert torch.equal(loaded.eval()(ids).logits, wanted)
            with trained.disable_adapter():
                assert (trained(ids).logits - wanted).abs().max() > 0.1
        assert AutoTokenizer.from_pretrained(folder).chat_template == chat_template("minicpm4")

    def test_all_weights_of_a_tiny_model_on_a_file(self, train, real_checkpoint, ids, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(real_checkpoint)
        fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = MiniCPM4Config(**fields, vocab_size=len(tokenizer), num_key_value_heads=2, dim_model_base=16)
        MiniCPM4ForCausalLM(config).save_pretrained(tmp_path / "tiny")
        tokenizer.save_pretrained(tmp_path / "tiny")
        messages = [{"role": "user", "content": "one two " * 150}, {"role": "assistant", "content": "three four"}]
        rows = tmp_path / "rows.jsonl"
        rows.write_text((json.dumps({"messages": messages}) + "\n") * 6, encoding="utf-8")

        source = ("--model_name_or_path", str(tmp_path / "tiny"), "--dataset_name", str(rows))
        trainer, folder, (before, after) = train("--full", *source, "--max_steps", "4", "--learning_rate", "1e-2")
        assert after < before
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert loaded.config._attn_implementation == "infllm_v2"
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


class TestUltraClean:
    """The whole loop on the test bed, and its parts from what this Python carries."""

    def run(self, name, *arguments):
        command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr[-2000:]
        return found.stdout

    def test_ultraclean_pipeline(self, shared_data, tmp_path):
        pools = {"handbook": [], "python": [], "uistrings": [], "genindex": []}
        with gzip.open(shared_data / "debian-docs-quality" / "en.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                name = row["source_set"].split(".")[-1]
                if name in pools and len(pools[name]) < 160:
                    pools[name].append({"text": row["text"], "source": name})
        corpus = [row for rows in pools.values() for row in rows[:80]]
        files = {name: rows[80:120] for name, rows in pools.items()}
        files |= {"corpus": corpus, "held_out": pools["handbook"][120:]}
        for name, rows in files.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        arguments = ["--corpus", tmp_path / "corpus.jsonl", "--evaluation", f"manuals={tmp_path / 'held_out.jsonl'}"]
        for flag, name in (("--positive", "python"), ("--negative", "uistrings"), ("--negative", "genindex")):
            arguments += [flag, f"{name}={tmp_path / name}.jsonl"]
        arguments += ["--output_dir", tmp_path / "out", "--stable_steps", 5, "--steps", 3, "--batch_size", 4]
        arguments += ["--bucket", 1000, "--dim", 16]
        first = self.run("ultraclean_pipeline.py", *arguments)
        summary = json.loads((tmp_path / "out" / "dataset" / "summary.json").read_text())
        assert summary["total"]["rows"] == len(corpus) == summary["total"]["kept"] + summary["total"]["rejected"]
        assert {"handbook", "genindex"} <= set(summary["sources"])
        assert f"{summary['total']['kept']:,}" in (tmp_path / "out" / "dataset" / "README.md").read_text()
        assert first.count("| manuals |") == 2

    def test_efficient_verification(self, tmp_path):
        tiny = ("--stable_steps", 4, "--steps", 2, "--batch_size", 2, "--output_dir", tmp_path)
        out = self.run("efficient_verification.py", *tiny)
        assert out.count("| reference |") == out.count("| docstrings |") == 2

    def test_ultrachat(self):
        assert self.run("ultrachat.py")
