"""`minicpm4 grpo`: its help, its errors, the recipes, and real training runs of a tiny policy."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from arithmetic import make_policy, make_tokenizer, prompts


pytest.importorskip("trl", reason="trl is not installed: extra `rl`")

import datasets
import torch
import transformers
from safetensors.torch import load_file

from transformers_minicpm4 import MiniCPM4Config, MiniCPM4ForCausalLM
from transformers_minicpm4.cli import grpo
from transformers_minicpm4.cli.errors import UserError
from transformers_minicpm4.rl import ChunkwiseGRPOConfig


RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"

REWARDS = """
def digits(prompts, completions, answer, **kwargs):
    return [sum(character.isdigit() for character in text) / (1 + len(text)) for text in completions]

def graded(prompts, completions, grade, rubric, **kwargs):
    return [0.0] * len(prompts)

def broken(prompts, completions, **kwargs):
    raise KeyError("no such thing")

number = 3
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_policy().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder, with problems and rewards in it, as a user has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    rows = list(prompts(16))
    (tmp_path / "problems.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


@pytest.fixture
def grpo_cli(run_cli, policy):
    def run(*changes, steps=2, output="out"):
        settings = {
            "model_name_or_path": policy,
            "dataset_name": "problems.jsonl",
            "reward_funcs": "my_rewards.digits",
            "max_completion_length": 16,
            "chunk_length": 4,
            "num_generations": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "output_dir": output,
            "max_steps": steps,
            "save_steps": 2,
            "use_cpu": True,
        }
        return run_cli("grpo", *[word for name, value in settings.items() for word in (f"--{name}", value)], *changes)

    return run


# --- Training --------------------------------------------------------------------------------------------------------


def test_it_trains_and_goes_on_where_it_stopped(work, policy, grpo_cli):
    whole = grpo_cli(steps=3, output="whole")
    assert whole.code == 0, whole.err
    assert "a batch is 2 of them x 4 completions = 8 on 1 process(es)" in whole.out
    assert "chunks of 4" in whole.out
    assert "trained 3 steps; the model is in whole" in whole.out
    first = grpo_cli(steps=2, output="parts")
    assert first.code == 0, first.err
    second = grpo_cli("--resume_from_checkpoint", steps=3, output="parts")
    assert second.code == 0, second.err
    whole, parts, start = (
        load_file(folder / "model.safetensors") for folder in (work / "whole", work / "parts", policy)
    )
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert any(not torch.equal(whole[name], start[name]) for name in whole)

    card = (work / "whole" / "README.md").read_text()
    assert "chunkwise-grpo" in card
    assert "2506.07900" in card
    assert str(work) not in card
    model = transformers.AutoModelForCausalLM.from_pretrained(work / "whole")
    assert len(transformers.AutoTokenizer.from_pretrained(work / "whole")) == model.config.vocab_size


def test_a_recipe_with_lora_chat_prompts_and_a_folder_of_data(work, policy, run_cli):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}|{{ message['content'] }}{% endfor %}="
    make_policy().save_pretrained("chat")
    tokenizer.save_pretrained("chat")
    (work / "data").mkdir()
    for split in ("train", "test"):
        rows = [{"question": row["prompt"], "prompt": "other"} for row in prompts(8)]
        (work / "data" / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (work / "recipe.yaml").write_text(
        "model_name_or_path: chat\nuse_peft: true\nlora_r: 2\nlora_target_modules: [q_proj, v_proj]\n"
        'dataset_name: data\nprompt_column: question\nprompt_template: "{prompt} + {x}"\nchat: true\n'
        "reward_funcs: my_rewards.seen\ndynamic_sampling: false\nlearning_rate: 1e-4\nmax_completion_length: 8\n"
        "num_generations: 4\noutput_dir: nowhere\nuse_cpu: true\nmax_steps: 5\nlogging_steps: 1\n"
        "eval_strategy: steps\neval_steps: 1\n"
    )
    with (work / "my_rewards.py").open("a") as file:
        file.write(
            "def seen(prompts, completions, **kwargs):\n"
            "    for prompt in prompts: print('prompt:', prompt)\n"
            "    return [len(reply[0]['content']) / 100 for reply in completions]\n"
        )
    result = run_cli("grpo", "--config=recipe.yaml", "--max_steps", 1, "--output_dir", "out")
    assert result.code == 0, result.err
    seen = [ast.literal_eval(line[8:]) for line in result.out.splitlines() if line.startswith("prompt: ")]
    asked = {f"{row['question']} + {{x}}" for row in rows}
    assert seen
    assert [prompt for [prompt] in seen if prompt["role"] != "user" or prompt["content"] not in asked] == []
    assert "eval_reward" in result.out
    assert json.loads((work / "out" / "adapter_config.json").read_text())["r"] == 2
    assert not (work / "nowhere").exists()


def test_the_papers_recipe_at_a_small_size(work, run_cli):
    """Loss, filters, KL, replaced reference and optimizer are the recipe's; model, data, reward and sizes are not."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}="
    tokenizer.save_pretrained("tiny")
    torch.manual_seed(0)
    MiniCPM4ForCausalLM(
        MiniCPM4Config(
            vocab_size=43, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, dim_model_base=16, scale_emb=2, initializer_range=0.2, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    ).save_pretrained("tiny")  # fmt: skip
    with (work / "my_rewards.py").open("a") as file:
        file.write(
            "def replied(completions, **kwargs):\n"
            "    return [sum(map(str.isdigit, reply[0]['content'])) / (1 + len(reply[0]['content']))"
            " for reply in completions]\n"
        )
    small = {
        "model_name_or_path": "tiny", "dataset_name": "problems.jsonl", "reward_funcs": "my_rewards.replied",
        "num_generations": 4, "max_completion_length": 16, "chunk_length": 4, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "steps_per_generation": 2, "ref_model_sync_steps": 1, "max_steps": 2,
        "save_steps": 2, "output_dir": "out", "use_cpu": True,
    }  # fmt: skip
    changes = [word for name, value in small.items() for word in (f"--{name}", value)]
    result = run_cli("grpo", "--config", RECIPES / "minicpm4_rl.yaml", *changes)
    assert result.code == 0, result.err
    assert "trained 2 steps" in result.out
    checkpoint = work / "out" / "checkpoint-2"
    policy, reference = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "reference_model"))
    start = load_file(work / "tiny" / "model.safetensors")
    # Replaced after the last step; head and embeddings are one, which each file keeps under a name of its own.
    assert all(torch.equal(reference[name], policy[name]) for name in policy.keys() & reference.keys())
    assert any(not torch.equal(policy[name], start[name]) for name in policy)
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["kl"] >= 0 for entry in history if "kl" in entry] == [True, True]
    assert type(transformers.AutoModelForCausalLM.from_pretrained(work / "out")) is MiniCPM4ForCausalLM


def test_two_processes(work, policy):
    # About 15 s of CPU time, most of it importing torch and Transformers three times.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "transformers_minicpm4.cli.grpo", "--model_name_or_path", str(policy), "--use_cpu"]
    command += ["--dataset_name", "problems.jsonl", "--reward_funcs", "my_rewards.digits", "--num_generations", "4"]
    command += ["--max_completion_length", "8", "--per_device_train_batch_size", "4", "--max_steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", "out"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "a batch is 2 of them x 4 completions = 8 on 2 process(es)" in done.stdout
    assert done.stdout.count("trained 2 steps") == 1
    assert (work / "out" / "model.safetensors").is_file()


def test_a_fault_while_training_shows_where(work, grpo_cli):
    result = grpo_cli("--reward_funcs", "my_rewards.broken")
    assert result.code == 1
    assert "Traceback" in result.err
    assert "'broken' raised KeyError: 'no such thing'" in result.err.splitlines()[-1]


# --- What can be wrong with the input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, parts",
    [
        (("--reward_funcs", "math_rewards"), ["no reward 'math_rewards'", "did you mean math_reward?", "code_reward"]),
        (("--reward_funcs", "no_such.reward"), ["'no_such.reward' cannot be imported", "No module named 'no_such'"]),
        (("--reward_funcs", "my_rewards.digit"), ["has no function digit;", "broken, digits, graded"]),
        (("--reward_funcs", "my_rewards.number"), ["has no function number;"]),
        (("--reward_funcs", "my_rewards.graded"), ["graded needs", "'grade' and a column 'rubric'", "prompt, answer"]),
        (("--reward_funcs", "accuracy_reward"), ["accuracy_reward needs a column 'solution'", "prompt, answer"]),
        (("--reward_funcs", "code_reward"), ["problems.jsonl: code_reward needs", "'tests'", "'answer', 'prompt'"]),
        (("--format_gate", "("), ["--format_gate: ", "'(' is no regular expression"]),
        (("--prompt_column", "question"), ["no column 'question'", "prompt, answer", "--prompt_column"]),
        (("--prompt_template", "Solve it."), ["--prompt_template must have {prompt}", "'Solve it.'"]),
        (("--dataset_name", "missing.jsonl"), ["no such file or folder: missing.jsonl"]),
        (("--dataset_name", "my_rewards.py"), ["my_rewards.py must be a .jsonl"]),
        (("--dataset_name", "owner/missing"), ["owner/missing cannot be loaded"]),
        (("--dataset_name", "broken.jsonl"), ["broken.jsonl cannot be loaded"]),
        (("--dataset_name", "empty.jsonl"), ["empty.jsonl is empty"]),
        (("--dataset_name", "few.jsonl"), ["1 prompts, fewer than the 2 of one batch"]),
        (("--eval_strategy", "steps"), ["only the split 'train', not 'test'", "train.jsonl and test.jsonl"]),
        (("--model_name_or_path", "./missing"), ["there is no folder ./missing"]),
        (("--resume_from_checkpoint", "out/checkpoint-7"), ["no checkpoint out/checkpoint-7", "without a value"]),
        (("--resume_from_checkpoint",), ["No valid checkpoint found"]),
        (
            ("--output_dir", "used"),
            ["used has checkpoints of an earlier run", "checkpoint-40", "--resume_from_checkpoint"],
        ),
        (("--chunk_length", "0"), ["chunk_length must be an integer of 1 or more, got 0."]),
        (("--num_generations", "3"), ["generation_batch_size (8) must be divisible by num_generations (3)"]),
        (("--max_live_row", "8"), ["no setting --max_live_row; --max_live_rows has a similar name"]),
        (("stray",), ["no setting stray"]),
        (("--config", "missing.yaml"), ["no recipe 'missing.yaml'"]),
        (("--config",), ["no recipe ''"]),
        (("--config", "unknown.yaml"), ["no setting chunk_lenght of the recipe; --chunk_length"]),
        (("--config", "list.yaml"), ["list.yaml must contain a YAML mapping"]),
        (("--config", "damaged.yaml"), ["damaged.yaml"]),
    ],
    ids=lambda value: "=".join(value).strip("-") if isinstance(value, tuple) else "",
)
def test_unusable_input_is_one_sentence(work, grpo_cli, changes, parts):
    (work / "few.jsonl").write_text('{"prompt": "1=", "answer": "1"}\n')
    (work / "empty.jsonl").write_text("")
    (work / "used" / "checkpoint-40").mkdir(parents=True)
    (work / "broken.jsonl").write_text('{"prompt": "1=", "answer"\n')
    (work / "unknown.yaml").write_text("chunk_lenght: 4\n")
    (work / "list.yaml").write_text("- chunk_length\n")
    (work / "damaged.yaml").write_text("chunk_length: [\n")
    result = grpo_cli(*changes)
    assert result.code == 2, result.err
    assert result.sentence.startswith("minicpm4 grpo: ")
    assert [part for part in parts if part not in result.sentence] == [], result.sentence


@pytest.mark.parametrize(
    "given, missing", [((), "--reward_funcs"), (("--reward_funcs", "think_format_reward"), "--model_name_or_path")]
)
def test_what_every_run_needs_is_asked_for(work, run_cli, given, missing):
    result = run_cli("grpo", "--use_cpu", *given)
    assert result.code == 2
    assert f"no {missing}" in result.sentence


def test_without_trl_the_extra_is_named(run_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    result = run_cli("grpo", "--use_cpu")
    assert result.code == 2
    assert "pip install 'transformers_minicpm4[rl]'" in result.sentence


@pytest.mark.parametrize("kind", ["json", "jsonl.gz", "parquet", "saved", "saved_splits"])
def test_kinds_of_local_data(work, kind):
    rows, path = prompts(4), work / f"rows.{kind}"
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "saved":
        rows.save_to_disk(path)
    elif kind == "saved_splits":
        datasets.DatasetDict({"train": rows}).save_to_disk(path)
    else:
        rows.to_json(path, compression="gzip" if kind == "jsonl.gz" else None)
    script = grpo.GRPOScriptArguments(str(path))
    assert list(grpo.load_rows(script, "train", [])) == list(rows)
    if kind == "saved_splits":
        with pytest.raises(UserError, match="no split 'test'; its splits are train"):
            grpo.load_rows(script, "test", [])


# --- Rewards, help and recipes ---------------------------------------------------------------------------------------


def test_every_short_name_is_a_reward():
    for name, function in zip(grpo.REWARDS, grpo.find_rewards(list(grpo.REWARDS), 100)):
        assert callable(function), name
    # Only the last fifth is punished.
    punishment = grpo.find_rewards("soft_overlong_punishment", 100)[0]
    assert punishment(completion_ids=[[0] * 80, [0] * 90, [0] * 100]) == pytest.approx([0, -0.5, -1])
    assert grpo.find_rewards(["owner/reward-model"], 100) == ["owner/reward-model"]


def test_format_gate():
    rewards = grpo.find_rewards("soft_overlong_punishment", 100)

    def reward(completions, **columns):
        return [1.0] * len(completions)

    texts = ["<think>so</think>4", "so</think>4", "4"]
    for chosen, expected in ((None, [1, 1, 1]), ("think", [1, 0, 0]), ("think_opened", [0, 1, 0]), (r"\d", [0, 0, 1])):
        assert grpo.gated([reward], chosen)[0](completions=texts) == expected
    assert grpo.gated(["owner/reward-model"], "think") == ["owner/reward-model"]
    assert grpo.gated(rewards, None) is rewards


def test_help_has_our_settings_first_as_they_are(run_cli):
    result = run_cli("grpo", "--help")
    assert result.code == 0
    ours = {name: (default, text) for name, default, text in grpo._chunkwise()}
    assert list(ours) == list(ChunkwiseGRPOConfig.__annotations__)
    for setting in fields(ChunkwiseGRPOConfig):
        if setting.name in ours:
            assert ours[setting.name] == (setting.default, setting.metadata["help"])
    places = [result.out.index(f"  --{name} ") for name in (*ours, *grpo.OFTEN_USED)]
    assert places == sorted(places)
    assert "\n  minicpm4 grpo" in result.out.split("examples:")[1]
    assert "accelerate launch" in result.out
    assert max(map(len, result.out.splitlines())) < 120
    assert run_cli("grpo").out == result.out


def test_help_states_the_defaults_of_others_truly():
    defaults = {setting.name: setting.default for setting in fields(ChunkwiseGRPOConfig)}
    stated = {name: text.split("Default ")[1] for name, text in grpo.OFTEN_USED.items() if "Default " in text}
    del stated["dtype"], stated["bf16"]  # of ModelConfig; set after construction
    assert len(stated) > 5
    for name, text in stated.items():
        value = defaults[name]
        assert text == f"{str(value).lower() if isinstance(value, bool) else format(value, 'g')}.", name


def test_the_whole_help_lists_every_setting(run_cli):
    result = run_cli("grpo", "--help-all")
    assert result.code == 0
    names = {action.dest for action in grpo.make_parser()._actions}
    assert {name for name in names if f"  --{name}" not in result.out} == set()


@pytest.mark.parametrize(
    "recipe, batch, updates, prompts_in_batch",
    [("minicpm4_rl", 4096, 2, 256), ("ablation_1.5b_dapo", 512, 1, 64)],
)
def test_recipes_have_the_sizes_they_state(monkeypatch, recipe, batch, updates, prompts_in_batch):
    monkeypatch.setattr(transformers.TrainingArguments, "world_size", 8)
    script, config, model = grpo.parse(["--config", str(RECIPES / f"{recipe}.yaml"), "--use_cpu"])
    assert type(config) is ChunkwiseGRPOConfig
    assert config.generation_batch_size == batch
    assert batch // config.num_generations == prompts_in_batch
    assert config.steps_per_generation / config.gradient_accumulation_steps == updates
    assert (config.max_completion_length, config.chunk_length) == (32768, 8192)
    assert config.save_steps % updates == 0
    stated = {"minicpm4_rl": (16, 1e-5, 0.001, True), "ablation_1.5b_dapo": (8, 3e-6, 0.0, False)}[recipe]
    assert (config.num_generations, config.learning_rate, config.beta, config.sync_ref_model) == stated
    assert (config.temperature, config.top_p, config.entropy_coef) == (1.0, 1.0, 0.0)
    assert config.lr_scheduler_type == "constant"
    assert r"\boxed{}" in script.prompt_template
    assert script.prompt_template.count("{prompt}") == 1
    assert len(grpo.find_rewards(script.reward_funcs, config.max_completion_length)) == 1
    assert model.dtype == "float32"
    # Every name in a recipe is read by somebody: an unknown one is an error of `parse`.
    assert recipe in {path.stem for path in RECIPES.glob("*.yaml")}


def test_every_recipe_is_tested():
    assert sorted(path.stem for path in RECIPES.iterdir()) == ["ablation_1.5b_dapo", "minicpm4_rl"]
