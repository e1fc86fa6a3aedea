"""
GRPO with chunk-wise rollouts (MiniCPM4, arXiv 2506.07900, 3.2.3) on top of TRL's `GRPOTrainer`.

Every training step samples at most one chunk for each unfinished completion, so that a few long ones no longer hold up
the batch. TRL's own code pads, normalizes rewards, computes the loss and logs; this class decides which completions it
gets, and hands it the log-probabilities of the policies that sampled them. Shape letters: B rows of this process, T
tokens of a completion, F reward functions.
"""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import load_file
from transformers import GenerationConfig, LogitsProcessorList, ProcessorMixin, StoppingCriteriaList
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOTrainer
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import RepeatSampler

from .checkpoints import REFERENCE, STORE, damage_of, digest_of, packed, unpacked
from .chunkwise_grpo_config import PER_CALL_RULES, ChunkwiseGRPOConfig
from .dropout import dropout_places, switch_off_dropout
from .garble import REASONS, GarbleFilter
from .reward_guard import RewardError, guarded
from .rollout_store import Group, RolloutStore, Trajectory, save_atomically
from .sampling import Budgets, LogprobRecorder, TrajectorySampler, prefill


logger = logging.get_logger(__name__)


class ChunkwiseGRPOTrainer(GRPOTrainer):
    """
    Trainer for GRPO with chunk-wise rollouts. Called like [`~trl.GRPOTrainer`]; `args` is a [`ChunkwiseGRPOConfig`].

    Example:

    ```python
    from datasets import load_dataset
    from transformers_minicpm4.rl import ChunkwiseGRPOConfig, ChunkwiseGRPOTrainer
    from transformers_minicpm4.rl.rewards import math_reward

    trainer = ChunkwiseGRPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward_funcs=math_reward,
        args=ChunkwiseGRPOConfig("out", max_completion_length=8192, chunk_length=2048),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```

    Raises:
        ValueError: tools, environments, `rollout_func`, or images. `TypeError`: a streaming dataset.
        RewardError: in training; a reward function raised or took too long, or rewards were equal for too long.
    """

    _tag_names = ["trl", "grpo", "chunkwise-grpo"]
    _name = "Chunk-wise GRPO"
    _paper = {
        "title": "MiniCPM4: Ultra-Efficient LLMs on End Devices",
        "id": "2506.07900",
        "citation": textwrap.dedent("""\
            @article{minicpm4,
                title  = {{MiniCPM4: Ultra-Efficient LLMs on End Devices}},
                author = {{MiniCPM Team}},
                year   = 2025,
                eprint = {arXiv:2506.07900},
            }"""),
    }

    def __init__(
        self,
        model,
        reward_funcs,
        args: ChunkwiseGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        **refused,
    ):
        given = [name for name, value in refused.items() if value is not None]
        if given:
            raise ValueError(
                f"ChunkwiseGRPOTrainer does not take {', '.join(given)}: a chunk continues plain text, not a "
                "conversation with tools or an environment. Use trl.GRPOTrainer for those."
            )
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ChunkwiseGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-ChunkwiseGRPO")
        elif not isinstance(args, ChunkwiseGRPOConfig):
            raise TypeError(f"args must be a ChunkwiseGRPOConfig, got {type(args).__name__}.")
        if train_dataset is not None and not isinstance(train_dataset, Dataset):
            raise TypeError(
                f"train_dataset must be a datasets.Dataset, got {type(train_dataset).__name__}: prompts are looked up "
                "again by their index. For a stream, Dataset.from_list(list(stream.take(n))) makes one."
            )
        if train_dataset is not None and {"image", "images"} & set(train_dataset.column_names):
            raise ValueError("ChunkwiseGRPOTrainer trains on text; the dataset has images. Use trl.GRPOTrainer.")
        if isinstance(processing_class, ProcessorMixin):
            raise ValueError("ChunkwiseGRPOTrainer takes a tokenizer, not a multimodal processor.")
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if self._is_vlm:
            raise ValueError("ChunkwiseGRPOTrainer trains text models; this one comes with a multimodal processor.")
        if args.sync_ref_model and args.save_strategy != "no":
            self._refuse_sharded_reference()
        left = self.model.generation_config
        rules = [name for name in PER_CALL_RULES if getattr(left, name, None) not in (None, 0)]
        if rules:
            raise ValueError(
                f"the model's generation_config has {', '.join(rules)}, which generate would apply to each chunk as "
                f"if it were a whole completion. Set model.generation_config.{rules[0]} = None."
            )
        if args.disable_dropout:
            switch_off_dropout(self.model)  # TRL's own way leaves attention's and adapters'
        elif (most := max((probability for *_, probability in dropout_places(self.model)), default=0)) > 0:
            raise ValueError(
                f"disable_dropout=False, and the model, or its adapter, has dropout of {most}: log-probabilities of "
                "two passes would differ by what each drops, and the importance ratio compares two. Leave "
                "disable_dropout=True."
            )
        groups_per_batch = args.generation_batch_size // args.num_generations
        if len(self.train_dataset) < groups_per_batch:
            raise ValueError(
                f"the dataset has {len(self.train_dataset)} prompts, fewer than the {groups_per_batch} of one batch "
                f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations})."
            )
        self.rollouts = RolloutStore(
            args.num_generations,
            args.max_completion_length,
            groups_per_batch,
            args.max_live_rows,
            args.max_staleness,
        )
        self._prompts = _PromptOrder(self)
        self._prompts_digest: str | None = None
        self._reward_errors: list[str] = []
        self.reward_funcs = [
            guarded(function, name, args.reward_timeout, self._reward_errors)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        # `(token_ids, text) -> reason or None`; may be replaced by one with other thresholds.
        self.garble_filter = GarbleFilter() if args.garble_filter else None
        # The completions TRL's code is working on, with their groups; None while it samples for itself (evaluation).
        self._served: list[tuple[Group, Trajectory]] | None = None
        self._served_rewards: torch.Tensor | None = None
        self._dropped_in_a_row = 0
        self._seconds = Counter()

    # --- The batch -----------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        began = time.perf_counter()
        batch = self._next_batch()
        rows = [(group, row) for group in batch for row in group.trajectories]
        self._served = _share(rows, self.accelerator)
        self._served_rewards = torch.tensor([row.rewards for _, row in rows], device=self.accelerator.device)
        for column in sorted({column for _, row in self._served for column in row.extra}):
            self._pending_extra_logs[column] = [row.extra.get(column) for _, row in self._served]
        served = self._served
        try:
            output = super()._generate_and_score_completions([self._example(group) for group, _ in served])
        finally:
            self._served = self._served_rewards = None
        # Equation 8: the ratio of each token is against the policy of its own chunk. Where it is not wanted, TRL's own
        # value stays: the current policy.
        behavior = output.pop("sampling_per_token_logps")
        if self.args.chunk_importance_ratio:
            output["old_per_token_logps"] = behavior
        if any(row.garbled for _, row in rows):
            kept = torch.tensor([not row.garbled for _, row in served], device=self.accelerator.device)
            # TRL multiplies the loss by `tool_mask`; attention still sees the tokens.
            output["tool_mask"] = kept[:, None].expand_as(output["completion_mask"]).long()
            counted = (output["completion_mask"] * output["tool_mask"]).sum()
            output["num_items_in_batch"] = self.accelerator.gather(counted).sum()
        self._report(rows)
        self._seconds["batch"] = time.perf_counter() - began
        return output

    def _next_batch(self) -> list[Group]:
        """Iterations of Algorithm 1 until a batch is full. Decided by state that all processes share."""
        store = self.rollouts
        self._counted = Counter()
        while True:
            self._counted["iterations"] += 1
            rows = [self._prompts.next() for _ in range(store.admission())]
            if rows:
                prompts = [self.train_dataset[row]["prompt"] for row in rows]
                for row, prompt_ids in zip(rows, super()._tokenize_prompts(prompts)[0], strict=True):
                    store.admit(row, prompt_ids)
            self._sample_chunks()
            self._score_finished()
            batch = store.take()
            if batch is not None:
                return batch

    def _example(self, group: Group) -> dict:
        return dict(self._prompts.rows[group.row])

    # --- Sampling ------------------------------------------------------------------------------------------------

    def _sample_chunks(self) -> None:
        """One chunk for every unfinished completion, shared out over the processes."""
        rows = self.rollouts.unfinished()
        if not rows:
            return
        processes = self.accelerator.num_processes
        width = -(-len(rows) // processes)
        if self.args.sampling_streams == "trajectory":
            # Rows of like length side by side waste less padding; with streams of their own the order is free. Dealt
            # out like cards, so that no process has all the long ones.
            rows.sort(key=lambda item: len(item[0].prompt_ids) + len(item[1].token_ids))
            places = [place for first in range(processes) for place in range(first, width * processes, processes)]
        else:
            places = list(range(width * processes))
        mine = _share([rows[min(place, len(rows) - 1)] for place in places], self.accelerator)
        size = self.args.rollout_batch_size or width
        sampled = []
        # Every process makes the same number of calls: sharded weights are gathered in each.
        for start in range(0, width, size):
            part = mine[start : start + size]
            sampled += zip(*self._sample(part), strict=True)
        version = self.state.global_step
        for place, (token_ids, logprobs, ended) in zip(places, gather_object(sampled), strict=True):
            if place >= len(rows):
                continue  # sampled twice to fill up a process
            row = rows[place][1]
            self.rollouts.extend(row, token_ids, logprobs, version, ended)
            self._counted["generated_tokens"] += len(token_ids)

    def _sample(self, rows: list[tuple[Group, Trajectory]]) -> tuple[list, list, list]:
        """A chunk for each row: token ids, log-probabilities, and whether it ended."""
        began = time.perf_counter()
        device = self.accelerator.device
        prefixes = [group.prompt_ids + row.token_ids.tolist() for group, row in rows]
        budgets = [self.rollouts.budget(row, self.args.chunk_length) for _, row in rows]
        input_ids, attention_mask = _left_padded(prefixes, self._tokenizer.pad_token_id, device)
        width = input_ids.shape[1]
        kwargs = {**self.generation_kwargs, "max_new_tokens": max(budgets)}
        if self.args.sampling_streams == "trajectory":
            sampler = TrajectorySampler(
                self.args.seed,
                [group.number for group, _ in rows],
                [row.sample for _, row in rows],
                [len(row.token_ids) for _, row in rows],
                self.temperature,
                self.top_k,
                self.top_p,
                self.min_p,
            )
            kwargs = {
                name: value for name, value in kwargs.items() if name not in ("temperature", "top_p", "top_k", "min_p")
            }
            kwargs["do_sample"] = False
        else:
            sampler = LogprobRecorder(self.temperature) if self.args.behavior_logprobs == "generation" else None
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            # Sharded weights are gathered in every pass, so all processes must make the same number of them.
            apart = self.args.sampling_streams == "trajectory" and not (self._dist.is_zero3 or self._dist.is_fsdp)
            apart = apart and getattr(model.generation_config, "cache_implementation", None) is None
            cache = prefill(model, input_ids, attention_mask, max(budgets)) if apart else None
            sequences = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                generation_config=GenerationConfig(**kwargs, disable_compile=True),
                logits_processor=LogitsProcessorList([sampler] if sampler else []),
                stopping_criteria=StoppingCriteriaList([Budgets(budgets, width, device)]),
            )
        chunks, ended = [], []
        for tokens, budget in zip(sequences[:, width:].tolist(), budgets, strict=True):
            end = next((place for place, token in enumerate(tokens[:budget], 1) if token in self.eos_token_ids), None)
            chunks.append(tokens[: end or budget])
            ended.append(end is not None)
        self._counted["slots"] += (sequences.shape[1] - width) * len(rows)
        self._seconds["sampling"] += time.perf_counter() - began
        if self.args.behavior_logprobs == "generation":
            values = sampler.logprobs(sequences)
        else:
            values = self._recompute(prefixes, chunks)
        logprobs = [line[: len(chunk)] for line, chunk in zip(values.tolist(), chunks, strict=True)]
        return chunks, logprobs, ended

    def _recompute(self, prefixes: list[list[int]], chunks: list[list[int]]) -> torch.Tensor:
        """Log-probabilities [B, T] of new chunks under the weights that sampled them, by training's own forward."""
        began = time.perf_counter()
        device, pad = self.accelerator.device, self._tokenizer.pad_token_id
        left, left_mask = _left_padded(prefixes, pad, device)
        longest = max(len(chunk) for chunk in chunks)
        right = torch.tensor([chunk + [pad] * (longest - len(chunk)) for chunk in chunks], device=device)
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=device)
        right_mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            values, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([left, right], dim=1),
                torch.cat([left_mask, right_mask], dim=1),
                longest,
                # A quarter of the rows at a time: their activations then take about what their caches took.
                batch_size=max(self.args.per_device_train_batch_size, -(-len(chunks) // 4)),
            )
        self._seconds["logprobs"] += time.perf_counter() - began
        return values.float()

    # --- Rewards -------------------------------------------------------------------------------------------------

    def _score_finished(self) -> None:
        """Rewards of newly finished groups; those without spread are dropped, garbled rows marked."""
        groups = [group for group in self.rollouts.waiting() if not group.scored]
        if not groups:
            return
        began = time.perf_counter()
        rows = [(group, row) for group in groups for row in group.trajectories]
        width = -(-len(rows) // self.accelerator.num_processes)
        filled = rows + [rows[-1]] * (width * self.accelerator.num_processes - len(rows))
        mine = _share(filled, self.accelerator)
        examples = [self._example(group) for group, _ in mine]
        ids = [row.token_ids.tolist() for _, row in mine]
        completions = self._decoded([example["prompt"] for example in examples], [group for group, _ in mine], ids)
        rewards = self._calculate_rewards(examples, [example["prompt"] for example in examples], completions, ids)
        extra = {column: list(values) for column, values in self._pending_extra_logs.items()}
        self._pending_extra_logs.clear()
        noted = [
            ({column: values[place] for column, values in extra.items() if place < len(values)}, self._garbled(row))
            for place, (_, row) in enumerate(mine)
        ]
        noted = gather_object(noted)
        for place, (_, row) in enumerate(rows):
            row.rewards = rewards[place].tolist()
            row.extra, row.garbled = noted[place]
        if self.args.dynamic_sampling:
            self._drop_without_spread(groups)
        self._seconds["rewards"] += time.perf_counter() - began

    def _garbled(self, row: Trajectory) -> str | None:
        if self.garble_filter is None:
            return None
        token_ids = row.token_ids.tolist()
        return self.garble_filter(token_ids, self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _decoded(self, prompts: list, groups: list[Group], ids: list[list[int]]) -> list:
        """Completions as reward functions get them: text, or a message where the prompt is a conversation."""
        if not is_conversational({"prompt": prompts[0]}):
            return self.processing_class.batch_decode(ids, skip_special_tokens=True)
        tokenizer = self._tokenizer
        if getattr(tokenizer, "response_template", None) or getattr(tokenizer, "response_schema", None):
            return [
                [parse_response(tokenizer, tokens, prefix=group.prompt_ids, tools=None)]
                for tokens, group in zip(ids, groups, strict=True)
            ]
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _drop_without_spread(self, groups: list[Group]) -> None:
        limit = self.args.max_resampled_batches * self.rollouts.groups_per_batch
        for group in groups:
            rewards = torch.tensor([row.rewards for row in group.trajectories])
            # Unscorable rows have no part in the spread, as they have none in TRL's baseline.
            rewards = rewards[~rewards.isnan().all(dim=1)]
            values = (rewards * self.reward_weights.cpu()).nansum(dim=1, keepdim=True)
            if self.multi_objective_aggregation == "normalize_then_sum":
                values = rewards[:, self.reward_weights.cpu() != 0]  # each has a baseline of its own
            if any(_spread(column[~column.isnan()]) for column in values.T):
                self._dropped_in_a_row = 0
                continue
            self.rollouts.drop(group)
            self._counted["groups_dropped"] += 1
            self._dropped_in_a_row += 1
            if self._dropped_in_a_row > limit:
                last = [row.rewards for row in group.trajectories]
                raise RewardError(
                    f"{self._dropped_in_a_row} groups in a row had equal rewards for all {self.num_generations} "
                    f"completions (the last: {last}), more than max_resampled_batches="
                    f"{self.args.max_resampled_batches} batches. Nothing can be learned from them: look at the "
                    "rewards (too easy, too hard, or a fault), or set dynamic_sampling=False."
                )

    # --- What TRL's code asks for while it works on served rows ----------------------------------------------------

    def _tokenize_prompts(self, prompts):
        if self._served is None:
            return super()._tokenize_prompts(prompts)
        return [group.prompt_ids for group, _ in self._served], None, {}

    def _generate_single_turn(self, *args, **kwargs):
        if self._served is None:
            return super()._generate_single_turn(*args, **kwargs)
        rows = [row for _, row in self._served]
        return [row.token_ids.tolist() for row in rows], [row.logprobs.tolist() for row in rows]

    def _calculate_rewards(self, *args, **kwargs):
        if self._served is not None:
            return self._served_rewards
        rewards = super()._calculate_rewards(*args, **kwargs)
        errors = gather_object(list(self._reward_errors))
        self._reward_errors.clear()
        if errors:
            raise RewardError(f"{errors[0]}. Training has stopped; the last checkpoint is as it was.")
        return rewards

    # --- Metrics -------------------------------------------------------------------------------------------------

    def _report(self, rows: list[tuple[Group, Trajectory]]) -> None:
        """`rows`: the batch that is trained next."""
        metrics, counted, version = self._metrics["train"], self._counted, self.state.global_step
        tokens = Counter()
        for _, row in rows:
            for made, length in row.chunks:
                tokens[version - made] += length
        trained = sum(tokens.values())
        overlong = self.args.mask_truncated_completions
        masked = sum(row.garbled is not None or (overlong and not row.ended) for _, row in rows)
        if masked == len(rows):
            logger.warning(
                f"step {version}: every completion of the batch is overlong or garbled and has left the loss, so that "
                f"nothing is learned from it. Raise max_completion_length={self.max_completion_length}, or set "
                "mask_truncated_completions=False."
            )
        slots = sum(gather_object([counted["slots"]]))
        values = {
            "live_rows": len(self.rollouts.unfinished()),
            "waiting_rows": len(self.rollouts.waiting()) * self.num_generations,
            "iterations": counted["iterations"],
            "slot_utilization": counted["generated_tokens"] / slots if slots else float("nan"),
            "tokens_generated": counted["generated_tokens"],
            "tokens_generated_per_trained": counted["generated_tokens"] / trained,
            "groups_dropped": counted["groups_dropped"],
            "garbled_rows": sum(row.garbled is not None for _, row in rows),
            "masked_rows": masked,
            "staleness/mean": sum(age * length for age, length in tokens.items()) / trained,
            "staleness/max": max(tokens),
        }
        # Share of the trained tokens that were sampled so many optimizer steps ago.
        for age in range(8):
            values[f"staleness/{age}"] = tokens[age] / trained
        values["staleness/8_or_more"] = sum(length for age, length in tokens.items() if age >= 8) / trained
        if self.garble_filter is not None:
            reasons = Counter(row.garbled for _, row in rows)
            values |= {f"garbled/{reason}": reasons[reason] for reason in REASONS}
        for name, value in values.items():
            metrics[f"rollout/{name}"].append(value)

    def training_step(self, model, inputs, num_items_in_batch):
        self._seconds.clear()
        began = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        seconds = self._seconds
        metrics = self._metrics["train"]
        metrics["time/train"].append(time.perf_counter() - began - seconds["batch"])
        if seconds["batch"]:
            for name in ("sampling", "logprobs", "rewards"):
                metrics[f"time/{name}"].append(seconds[name])
        return loss

    # --- Checkpoints ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_complete_checkpoint()
        elif resume_from_checkpoint:
            damage = damage_of(Path(resume_from_checkpoint))
            if damage is not None:
                raise ValueError(f"{resume_from_checkpoint} cannot be resumed: {damage}")
        elif (
            self.state.global_step == 0
            and self.args.save_strategy != "no"
            and (
                # Of all processes: machines may have disks of their own.
                there := gather_object([path.name for path in self._checkpoints()[-1:]])
            )
        ):
            raise ValueError(
                f"{self.args.output_dir} has checkpoints of an earlier run (the last is {there[0]}). To go "
                "on from there, train(resume_from_checkpoint=True), which is "
                "--resume_from_checkpoint on the command line; to start anew, give another output_dir or remove them: "
                "those of both runs would be mixed, and save_total_limit would delete the new ones first."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _checkpoints(self) -> list[Path]:
        """Folders in `output_dir`, by their step."""
        numbered = [
            (int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")), path)
            for path in Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
            if path.is_dir() and path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit()
        ]
        return [path for _, path in sorted(numbered)]

    def _last_complete_checkpoint(self) -> str | bool:
        """A process that was killed while it saved leaves a checkpoint that lacks its last file, or the end of it."""
        folders = self._checkpoints()
        for folder in reversed(folders):
            damage = damage_of(folder)
            if damage is None:
                return str(folder)
            logger.warning(f"{folder} is passed over: {damage}")
        if folders:
            raise ValueError(
                f"none of the {len(folders)} checkpoint(s) in {self.args.output_dir} can be resumed. "
                f"{folders[-1].name}: {damage_of(folders[-1])} Begin without resuming, in another output_dir or after "
                "removing them."
            )
        # Let Trainer say that there is none.
        return True

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        begun = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        # Trainer looks whether it is done after a step only, and would make one too many.
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        # Ours first: Trainer deletes old checkpoints at the end of its own saving.
        between = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        if between:
            save_atomically(packed(self._buffered_inputs), folder / self._buffer_name())
        if self.args.sync_ref_model:
            state = self.accelerator.get_state_dict(self.ref_model)
            if self.args.should_save:
                # Clones: tied weights share memory, which the file format refuses.
                save_atomically({name: tensor.clone() for name, tensor in state.items()}, folder / REFERENCE)
        if self.args.should_save:
            self.rollouts.save(
                folder / STORE,
                prompts=self._prompts.state(),
                seed=self.args.seed,
                **self._data(),
                **self._phases(),
                micro_steps=self._step,
                between_batches=not between,
                dropped_in_a_row=self._dropped_in_a_row,
            )
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STORE
        facts = self.rollouts.load(path)
        for name, now in (("seed", self.args.seed), *self._data().items()):
            if facts[name] != now:
                raise ValueError(
                    f"{path} was written with {name}={facts[name]}, now it is {now}: the unfinished rollouts would "
                    "not fit. Resume with the same data, seed and reward functions, or start a new run, in another "
                    f"output_dir, from its weights: ChunkwiseGRPOTrainer(model={str(checkpoint)!r}, ...)."
                )
        if not facts["between_batches"]:
            for name, now in self._phases().items():
                if facts[name] != now:
                    raise ValueError(
                        f"{checkpoint} was saved in the middle of a batch with {name}={facts[name]}, and now it is "
                        f"{now}. Resume with {facts[name]}, or from a checkpoint at the end of a batch (save_steps a "
                        f"multiple of {self._optimizer_steps_per_batch()})."
                    )
        self._prompts.go_to(facts["prompts"])
        self._dropped_in_a_row = facts["dropped_in_a_row"]
        self._step = 0 if facts["between_batches"] else facts["micro_steps"]
        if not facts["between_batches"]:
            self._buffered_inputs = unpacked(
                load_file(Path(checkpoint) / self._buffer_name()), self.args.steps_per_generation, self.args.device
            )
        reference = Path(checkpoint) / REFERENCE
        if self.args.sync_ref_model:
            if not reference.is_file():
                raise ValueError(f"{checkpoint} has no {REFERENCE}, which sync_ref_model=True needs to go on.")
            self._refuse_sharded_reference()
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(load_file(reference), strict=False)

    def _refuse_sharded_reference(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "sync_ref_model=True with FSDP or DeepSpeed: the reference is sharded, and no run can be resumed with "
                "it. Set sync_ref_model=False, or train without checkpoints: save_strategy='no'."
            )

    def _data(self) -> dict:
        """What rollouts in the store refer to: rows of the dataset, and columns of their rewards."""
        if self._prompts_digest is None:
            self._prompts_digest = digest_of(self.train_dataset)
        return {
            "prompts_in_dataset": len(self.train_dataset),
            "prompts_digest": self._prompts_digest,
            "reward_functions": list(self.reward_func_names),
        }

    def _phases(self) -> dict[str, int]:
        """How a batch is cut into steps."""
        return {
            "processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
        }

    def _optimizer_steps_per_batch(self) -> int:
        micro = self.args.steps_per_generation * self.num_iterations
        return max(1, micro // self.args.gradient_accumulation_steps)

    def _buffer_name(self) -> str:
        return f"batch_in_training_{self.accelerator.process_index}.safetensors"


class _PromptOrder:
    """The dataset's rows in the order in which `GRPOTrainer` would draw them, epoch after epoch, with a cursor."""

    def __init__(self, trainer: ChunkwiseGRPOTrainer):
        self.rows = trainer._remove_unused_columns(trainer.train_dataset, description="training")
        self.trainer = trainer
        self.go_to({"epoch": 0, "place": 0})

    def go_to(self, state: dict) -> None:
        self.sampler = RepeatSampler(
            self.rows,
            mini_repeat_count=1,
            batch_size=self.trainer.rollouts.groups_per_batch,
            shuffle=self.trainer.shuffle_dataset,
            seed=self.trainer.args.seed,
        )
        for _ in range(state["epoch"] + 1):
            self.order = list(self.sampler)
        self.epoch, self.place = state["epoch"], state["place"]

    def state(self) -> dict:
        return {"epoch": self.epoch, "place": self.place}

    def next(self) -> int:
        if self.place >= len(self.order):
            self.order = list(self.sampler)
            self.epoch, self.place = self.epoch + 1, 0
        self.place += 1
        return self.order[self.place - 1]


def _spread(values: torch.Tensor) -> bool:
    """Whether rewards differ by more than the rounding of float32 sums. (Equal ones have no mean that equals them.)"""
    if len(values) < 2:
        return False
    return bool(values.max() - values.min() > 1e-6 * values.abs().max() + 1e-8)


def _share(rows: list, accelerator) -> list:
    """This process's stretch of `rows`, which divide evenly: all take part in every call."""
    width = len(rows) // accelerator.num_processes
    return rows[accelerator.process_index * width : (accelerator.process_index + 1) * width]


def _left_padded(rows: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(width, device=device) >= width - lengths[:, None]).long()
