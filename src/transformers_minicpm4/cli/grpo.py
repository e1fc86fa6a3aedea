"""
`minicpm4 grpo`: GRPO with chunk-wise rollouts on a dataset, from the command line or from a YAML recipe.

Its arguments are the fields of three dataclasses, some 240 with those of Transformers and TRL, and TRL's parser reads
them. `--help` is written without importing TRL: our own settings first, then the ones every run needs.
"""

import ast
import difflib
import inspect
import os
import sys
import textwrap
import traceback
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path

from .errors import UserError, one_line
from .quantization import refuse_missing


USAGE = "minicpm4 grpo --model_name_or_path MODEL --dataset_name DATA --reward_funcs NAME [NAME ...] [settings]"

INTRODUCTION = """\
Train a policy with GRPO and chunk-wise rollouts (MiniCPM4, arXiv 2506.07900, 3.2.3): each training step samples at
most `chunk_length` tokens for every unfinished completion, so that a few long ones do not hold up the batch.
"""

EXAMPLES = """\
examples:
  minicpm4 grpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name problems.jsonl \\
      --reward_funcs math_reward --max_completion_length 4096 --chunk_length 1024 --output_dir out
  minicpm4 grpo --config examples/recipes/minicpm4_rl.yaml --output_dir out --max_steps 200
  minicpm4 grpo --config examples/recipes/minicpm4_rl.yaml --output_dir out --resume_from_checkpoint
  minicpm4 grpo ... --use_peft --lora_r 16 --learning_rate 1e-5
  minicpm4 grpo ... --reward_funcs my_rewards.length my_rewards.style --reward_weights 1.0 0.2

several processes:
  accelerate launch --num_processes 8 -m transformers_minicpm4.cli.grpo --config recipe.yaml
  torchrun --nproc_per_node 8 -m transformers_minicpm4.cli.grpo --config recipe.yaml     (on CPUs, too)

A recipe is a YAML file of the same names (`learning_rate: 1e-6`); the command line wins over it. A fault while
training shows its traceback; for other errors, `minicpm4 --debug grpo ...` does.
"""

# What a run needs most of TRL's and Transformers' settings, in the words of this command.
OFTEN_USED = {
    "output_dir": "Folder of checkpoints and of the final model.",
    "max_steps": "Optimizer steps; num_train_epochs counts passes over the dataset instead.",
    "learning_rate": "Default 1e-06.",
    "num_generations": "Completions of a prompt, over which rewards are compared. Default 8.",
    "max_completion_length": "Tokens a completion may have. Default 512.",
    "per_device_train_batch_size": "Completions of one forward and backward pass of a process. Default 8.",
    "gradient_accumulation_steps": "Passes of an optimizer step. Default 1.",
    "steps_per_generation": "Passes that share one batch of completions; default gradient_accumulation_steps, that "
    "is one optimizer step for each batch. The batch is per_device_train_batch_size x processes x this.",
    "beta": "Weight of the KL term; 0, the default, loads no reference model.",
    "temperature": "Of sampling. Default 1.",
    "save_steps": "Optimizer steps between checkpoints. Default 500.",
    "resume_from_checkpoint": "A checkpoint's folder; without a value, the last complete one in output_dir.",
    "dtype": "Of the loaded weights. Default float32.",
    "bf16": "Mixed precision. Default true, where fp16 is not set.",
    "gradient_checkpointing": "Less memory, more time. Default true.",
    "use_peft": "Train LoRA matrices (lora_r, lora_alpha, lora_target_modules) instead of all weights.",
}

OURS = "transformers_minicpm4.rl.rewards"
REWARDS = {
    "math_reward": OURS,
    "code_reward": OURS,
    "accuracy_reward": "trl.rewards",
    "reasoning_accuracy_reward": "trl.rewards",
    "think_format_reward": "trl.rewards",
    "soft_overlong_punishment": "trl.rewards",
}
# Of what TRL calls a reward function with, all that is not a column of the dataset.
NO_COLUMNS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


@dataclass
class GRPOScriptArguments:
    """
    What is trained on, and what is rewarded.

    Parameters:
        dataset_name (`str`):
            A .jsonl, .json or .parquet file, a folder of such files, a folder of `save_to_disk`, or an id of the Hub.
        dataset_config (`str`, *optional*):
            The configuration of a dataset of the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on. A single file has only `"train"`.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, where `eval_strategy` is set.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts: texts, or lists of messages.
        prompt_template (`str`, *optional*):
            Text around prompts that are texts, with `{prompt}` where the prompt goes.
        chat (`bool`, *optional*, defaults to `False`):
            Put prompts that are texts through the model's chat template, as a message of the user.
        reward_funcs (`list[str]`):
            Rewards: short names, import paths of functions, or ids of reward models. They are added up.
        format_gate (`str`, *optional*):
            Reward functions give 0 where a completion has not this format: `"think"`, `"think_opened"` (the chat
            template has written the `<think>`), or a regular expression that must match all of it.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A .jsonl, .json or .parquet file, a folder of such files or of save_to_disk, or an id of the Hub."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The configuration of a dataset of the Hub."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on. A single file has only 'train'."}
    )
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, where eval_strategy is set."}
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column of the prompts: texts, or lists of messages."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text around prompts that are texts, with {prompt} where the prompt goes."}
    )
    chat: bool = field(
        default=False,
        metadata={"help": "Put prompts that are texts through the model's chat template, as a message of the user."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Rewards, which are added up (reward_weights): {', '.join(REWARDS)}, import paths of functions "
            "such as my_rewards.length, or reward models (a folder, or an id of the Hub with a /)."
        },
    )
    format_gate: str | None = field(
        default=None,
        metadata={
            "help": "Reward functions give 0 where a completion has not this format: 'think' (<think>, reasoning, "
            "</think>, answer), 'think_opened' (the chat template has written the <think>), or a regular expression "
            "that must match all of it."
        },
    )


def register(subparsers) -> None:
    subparsers.add_parser("grpo", help="reinforcement learning: GRPO with chunk-wise rollouts", add_help=False)


def run(args) -> None:
    main(args.arguments)


def main(argv: list[str] | None = None) -> None:
    """
    Train as the arguments say.

    Raises:
        UserError: something that was given cannot be used.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(short_help())
    elif "--help-all" in argv or "--help_all" in argv:
        print(long_help())
    else:
        train(*parse(argv))


# --- Arguments ---------------------------------------------------------------------------------------------------


def make_parser(prog: str = "minicpm4 grpo"):
    """TRL's parser of `GRPOScriptArguments`, `ChunkwiseGRPOConfig` and TRL's `ModelConfig`, in this order."""
    try:
        from trl import ModelConfig, TrlParser

        from transformers_minicpm4.rl import ChunkwiseGRPOConfig
    except ImportError as error:
        raise UserError(
            f"`minicpm4 grpo` needs TRL and PEFT; add them with `pip install 'transformers_minicpm4[rl]'` "
            f"({one_line(error)})."
        ) from error
    types = (GRPOScriptArguments, ChunkwiseGRPOConfig, ModelConfig)
    parser = TrlParser(types, prog=prog, usage=f"{USAGE}\n       {prog} --help", add_help=False, allow_abbrev=False)
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "last"
    return parser


def parse(argv: list[str]) -> tuple:
    """The three dataclasses, from the command line and from the recipe that it names."""
    parser = make_parser()
    # TRL's parser takes the recipe's name from the word after `--config` only.
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in argv:
        recipe = [*argv, ""][argv.index("--config") + 1]
        if not Path(recipe).is_file():
            raise UserError(f"there is no recipe {recipe!r}; --config takes a YAML file.")
    try:
        *parsed, from_recipe, from_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except Exception as error:
        if "support bf16/gpu" in str(error):
            raise UserError("no GPU is found here; to train on the CPU, add --use_cpu or --bf16 false.") from error
        raise UserError(one_line(error)) from error
    unknown = [word for word in (*from_recipe, *from_line) if word.startswith("--")]
    if unknown or from_line:
        name = (unknown or from_line)[0]
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(name.split("=")[0], known, n=1)
        where = " of the recipe" if name in from_recipe else ""
        raise UserError(
            f"there is no setting {name.removeprefix('--') if where else name}{where}"
            f"{f'; {near[0]} has a similar name' if near else ''}. `minicpm4 grpo --help-all` lists all."
        )
    return tuple(parsed)


def short_help() -> str:
    """Our settings, read from the source of `ChunkwiseGRPOConfig`, for importing it takes seconds."""
    sections = [
        ("the model and the data", [("model_name_or_path", MISSING, "A folder, or an id of the Hub."), *_script()]),
        ("chunk-wise rollouts and the stabilisers of MiniCPM4", list(_chunkwise())),
        ("of TRL and Transformers, what most runs set", [(name, MISSING, text) for name, text in OFTEN_USED.items()]),
        ("more", [("config", MISSING, "A YAML recipe."), ("help-all", MISSING, "Every setting there is.")]),
    ]
    return "\n".join([f"usage: {USAGE}\n", INTRODUCTION, *map(_section, sections), EXAMPLES])


def long_help() -> str:
    make_parser()
    from transformers import TrainingArguments
    from trl import GRPOConfig, ModelConfig

    from transformers_minicpm4.rl import ChunkwiseGRPOConfig

    ours = [name for name, *_ in _chunkwise()]
    settings = {setting.name: setting for setting in fields(ChunkwiseGRPOConfig) if setting.init}
    general = [setting.name for setting in fields(TrainingArguments) if setting.init]
    names = [setting.name for setting in fields(GRPOConfig) if setting.init]
    groups = (
        ("chunk-wise rollouts and the stabilisers of MiniCPM4", ours),
        ("of TRL's GRPOConfig", [name for name in names if name not in (*ours, *general)]),
        ("of Transformers' TrainingArguments", [name for name in general if name not in ours]),
    )
    sections = [("the data and the rewards", list(_script()))]
    sections += [(title, [_described(settings[name]) for name in group]) for title, group in groups]
    sections += [("the model (of TRL's ModelConfig)", [_described(setting) for setting in fields(ModelConfig)])]
    return "\n".join([f"usage: {USAGE}\n", INTRODUCTION, *map(_section, sections), EXAMPLES])


def _script():
    return map(_described, fields(GRPOScriptArguments))


def _chunkwise():
    source = Path(__file__).parents[1] / "rl" / "chunkwise_grpo_config.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.value.keywords}
            yield node.target.id, given["default"], given["metadata"]["help"]


def _described(setting) -> tuple:
    return setting.name, setting.default, setting.metadata.get("help", "").replace("%%", "%")


def _section(section: tuple[str, list[tuple]]) -> str:
    title, settings = section
    lines = [f"{title}:"]
    for name, default, text in settings:
        if default is not MISSING and default is not None:
            text = f"{text.rstrip('.')}. Default {str(default).lower() if isinstance(default, bool) else default}."
        wrapped = textwrap.wrap(text, 115 - 32) or [""]
        if len(name) > 27:
            lines.append(f"  --{name}")
        else:
            lines.append(f"  --{name:<28}{wrapped.pop(0)}")
        lines += [" " * 32 + line for line in wrapped]
    return "\n".join(lines) + "\n"


# --- Rewards -----------------------------------------------------------------------------------------------------


def find_rewards(names: list[str] | str | None, max_completion_length: int) -> list:
    """Functions, and names of reward models as they are."""
    names = [names] if isinstance(names, str) else names
    if not names:
        raise UserError(f"no --reward_funcs: name one or more of {_allowed()}.")
    return [_find_reward(name, max_completion_length) for name in names]


def _find_reward(name: str, max_completion_length: int):
    if name == "soft_overlong_punishment":
        from trl.rewards import get_soft_overlong_punishment

        # The last fifth is punished step by step, as DAPO does with 4,096 of 20,480 tokens.
        return get_soft_overlong_punishment(max_completion_length, max_completion_length // 5)
    if name in REWARDS:
        return getattr(import_module(REWARDS[name]), name)
    if "/" in name or Path(name).is_dir():
        return name
    if "." not in name:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        raise UserError(
            f"there is no reward {name!r}{f'; did you mean {near[0]}?' if near else '.'} Allowed are {_allowed()}."
        )
    module_name, function_name = name.rsplit(".", 1)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look into the current folder
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"the reward {name!r} cannot be imported: {one_line(error)}. Its module must be installed, or be in the "
            "folder where the command runs."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        own = [found for found, _ in inspect.getmembers(module, inspect.isfunction) if not found.startswith("_")]
        raise UserError(
            f"the reward {name!r}: the module {module_name} has no function {function_name}; it has "
            f"{', '.join(own) or 'none'}."
        )
    return function


def gated(functions: list, chosen: str | None) -> list:
    """Reward functions that give 0 where the format is wrong; reward models as they are."""
    if chosen is None:
        return functions
    from transformers_minicpm4.rl.rewards import THINK_FORMAT, format_gate

    named = {"think": THINK_FORMAT, "think_opened": THINK_FORMAT.replace(r"\s*<think>", "", 1)}
    try:
        return [
            format_gate(function, named.get(chosen, chosen)) if callable(function) else function
            for function in functions
        ]
    except (ValueError, TypeError) as error:
        raise UserError(f"--format_gate: {one_line(error)}") from error


def _allowed() -> str:
    return f"{', '.join(REWARDS)}, the import path of a function (my_rewards.length), or a reward model (owner/name)"


def check_columns(function, columns: list[str], dataset: str) -> None:
    """
    Refuse a dataset that lacks a column without which a reward function cannot be called.

    Raises:
        UserError: with the columns there are.
    """
    if isinstance(function, str):
        return
    from transformers_minicpm4.rl.rewards import CodeReward, MathReward

    if isinstance(function, MathReward | CodeReward):
        try:
            function(completions=[], prompts=[], **{name: [] for name in columns})
        except ValueError as error:
            raise UserError(f"{dataset}: {one_line(error)}") from error
        return
    missing = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and name not in NO_COLUMNS
        and name not in columns
    ]
    if missing:
        raise UserError(
            f"the reward {getattr(function, '__name__', type(function).__name__)} needs a column "
            f"{' and a column '.join(map(repr, missing))} of {dataset}; its columns are {', '.join(columns)}. Rename "
            "the column that has it, or choose another reward."
        )


# --- Data --------------------------------------------------------------------------------------------------------


def load_rows(script: GRPOScriptArguments, split: str, rewards: list):
    """The dataset with a column `prompt`, and with every column that the rewards need."""
    rows = _load(script, split)
    column, columns = script.prompt_column, rows.column_names
    if column not in columns:
        raise UserError(
            f"{script.dataset_name} has no column {column!r}; its columns are {', '.join(columns)}: set "
            "--prompt_column to the one with the prompts."
        )
    if column != "prompt":
        if "prompt" in columns:
            rows = rows.remove_columns("prompt")
        rows = rows.rename_column(column, "prompt")
    for function in rewards:
        check_columns(function, rows.column_names, script.dataset_name)
    if not len(rows):
        raise UserError(f"{script.dataset_name} has no rows in the split {split!r}.")
    first = rows[0]["prompt"]
    if not isinstance(first, str):
        if script.chat or script.prompt_template:
            raise UserError(
                f"--chat and --prompt_template are for prompts that are texts; those of {script.dataset_name} are "
                f"{'lists of messages already' if isinstance(first, list) else type(first).__name__}."
            )
        return rows
    template = script.prompt_template
    if template is not None and "{prompt}" not in template:
        raise UserError(f"--prompt_template must have {{prompt}} where the prompt goes, got {template!r}.")
    if template is None and not script.chat:
        return rows
    return rows.map(_as_asked, fn_kwargs={"template": template or "{prompt}", "chat": script.chat})


def _as_asked(row: dict, template: str, chat: bool) -> dict:
    text = template.replace("{prompt}", row["prompt"])
    return {"prompt": [{"role": "user", "content": text}] if chat else text}


def _load(script: GRPOScriptArguments, split: str):
    from datasets import DatasetDict, load_dataset, load_from_disk

    if not script.dataset_name:
        raise UserError("no --dataset_name: name a .jsonl, .json or .parquet file, a folder, or a dataset of the Hub.")
    name, path = script.dataset_name, Path(script.dataset_name).expanduser()
    try:
        if path.is_file():
            kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
            suffix = Path(path.name.removesuffix(".gz")).suffix
            if suffix not in kinds:
                raise UserError(f"{name} must be a .jsonl, .jsonl.gz, .json or .parquet file.")
            if not path.stat().st_size:
                raise UserError(f"{name} is empty.")
            if split != "train":
                raise UserError(
                    f"{name} is one file and has only the split 'train', not {split!r}: name a folder with "
                    f"train{suffix} and {split}{suffix}."
                )
            return load_dataset(kinds[suffix], data_files=str(path), split="train")
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            found = load_from_disk(path)
            if not isinstance(found, DatasetDict):
                return found
            if split not in found:
                raise UserError(f"{name} has no split {split!r}; its splits are {', '.join(found)}.")
            return found[split]
        if not path.exists() and (path.suffix in (".jsonl", ".json", ".parquet", ".gz") or name.count("/") > 1):
            raise UserError(f"no such file or folder: {name}")
        return load_dataset(str(path) if path.exists() else name, script.dataset_config, split=split)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be loaded: {one_line(error.__cause__ or error)}") from error


# --- Training ----------------------------------------------------------------------------------------------------


def train(script: GRPOScriptArguments, config, model) -> None:
    rewards = find_rewards(script.reward_funcs, config.max_completion_length)
    if not model.model_name_or_path:
        raise UserError("no --model_name_or_path: name a checkpoint's folder, or an id of the Hub.")
    refuse_missing(model.model_name_or_path)
    resume = config.resume_from_checkpoint
    if resume in ("last", "true", "True", True):
        resume = True
    elif resume and not Path(resume).is_dir():
        raise UserError(
            f"there is no checkpoint {resume}; without a value, --resume_from_checkpoint goes on from the last "
            f"complete one in {config.output_dir}."
        )
    with config.main_process_first(desc="loading the data"):
        rows = load_rows(script, script.dataset_train_split, rewards)
        held_out = None
        if config.eval_strategy != "no":
            held_out = load_rows(script, script.dataset_test_split, rewards)

    from transformers import TrainerCallback
    from trl import get_peft_config, get_quantization_config

    from transformers_minicpm4.rl import ChunkwiseGRPOTrainer

    class Began(TrainerCallback):
        """Whether training is under way: what is wrong from there on is shown with its traceback."""

        began = False

        def on_train_begin(self, *args, **kwargs):
            self.began = True

    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    given = {name: value for name, value in options.items() if value is not None}
    config.model_init_kwargs = {**given, **(config.model_init_kwargs or {})}
    progress = Began()
    try:
        trainer = ChunkwiseGRPOTrainer(
            model=model.model_name_or_path,
            reward_funcs=gated(rewards, script.format_gate),
            args=config,
            train_dataset=rows,
            eval_dataset=held_out,
            callbacks=[progress],
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
        trainer.accelerator.print(_plan(config, trainer.accelerator.num_processes, len(rows)))
        trainer.train(resume_from_checkpoint=resume or None)
    except Exception as error:
        if progress.began:
            # Hours may have passed: nobody should have to repeat them with --debug.
            traceback.print_exception(error)
        elif isinstance(error, (ValueError, TypeError, OSError, ImportError, NotImplementedError)):
            raise UserError(one_line(error)) from error
        raise
    trainer.save_model(config.output_dir)
    # A path of this machine is no name that a reader of the card could use.
    name = None if Path(script.dataset_name).expanduser().exists() else script.dataset_name
    trainer.create_model_card(model_name=Path(config.output_dir).resolve().name, dataset_name=name)
    trainer.accelerator.print(f"trained {trainer.state.global_step} steps; the model is in {config.output_dir}")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=name)
        trainer.accelerator.print(f"pushed to https://huggingface.co/{trainer.hub_model_id}")
    trainer.end()


def _plan(config, processes: int, prompts: int) -> str:
    batch, updates = config.generation_batch_size, config.steps_per_generation / config.gradient_accumulation_steps
    return (
        f"{prompts:,} prompts; a batch is {batch // config.num_generations:,} of them x {config.num_generations} "
        f"completions = {batch:,} on {processes} process(es), for {updates * config.num_iterations:g} optimizer "
        f"step(s); up to {config.max_completion_length:,} tokens in chunks of {config.chunk_length:,}"
    )


if __name__ == "__main__":
    sys.exit(import_module(".main", __package__).main(["grpo", *sys.argv[1:]]))
