"""Settings of `ChunkwiseGRPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import GRPOConfig


# Rules of `generate` that count from the beginning or to the end of a call, which is a chunk here.
PER_CALL_RULES = (
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
)


@dataclass
class ChunkwiseGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`ChunkwiseGRPOTrainer`]: everything of TRL's [`~trl.GRPOConfig`], chunk-wise rollouts, and the
    stabilisers of MiniCPM4 (arXiv 2506.07900, 3.2) as defaults. Equations are the paper's.

    Parameters:
        > Parameters that control chunk-wise rollouts

        chunk_length (`int`, *optional*):
            Tokens a rollout may gain in one iteration. `None` is a quarter of `max_completion_length`;
            `max_completion_length` or more is ordinary GRPO.
        sampling_streams (`str`, *optional*, defaults to `"trajectory"`):
            `"trajectory"`: each rollout has a random stream of its own, so that chunk length, resuming and the number
            of processes do not change what is sampled under the same weights. `"global"`: the process's stream, as
            `GRPOTrainer` samples.
        behavior_logprobs (`str`, *optional*, defaults to `"recompute"`):
            Where the log-probabilities of the sampling policy come from. `"recompute"`: a forward pass over each new
            chunk with the training's own numerics (Algorithm 1, lines 15-17). `"generation"`: noted while sampling,
            without another pass; in half precision they differ slightly from training's.
        max_live_rows (`int`, *optional*):
            Unfinished rollouts there may be at once, over all processes; fewer prompts are admitted when it is
            reached. `None` for no limit.
        max_staleness (`int`, *optional*):
            Batches that may be trained between a prompt's admission and its own batch. Kept by admitting less and by
            sampling on before training; nothing is thrown away. `None` for no limit.
        rollout_batch_size (`int`, *optional*):
            Rows of one `generate` call of a process. `None` puts all of its rollouts into one call.

        > Parameters that control the training batch

        dynamic_sampling (`bool`, *optional*, defaults to `True`):
            Drop groups whose rewards are all equal, and sample on until the batch is full.
        max_resampled_batches (`int`, *optional*, defaults to `10`):
            Batches' worth of groups that may be dropped in a row before training stops with an error.
        garble_filter (`bool`, *optional*, defaults to `True`):
            Leave completions that are garbled (loops, invalid text, runs of one token) out of the loss. They keep
            their place in the group's baseline.
        reward_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds one call of a reward function may take before training stops with an error. `None` for no limit.

        > Parameters that control the loss

        chunk_importance_ratio (`bool`, *optional*, defaults to `True`):
            Importance ratios against the policy that sampled each chunk (equations 7 and 8). `False` treats every
            token as sampled by the current policy.
        epsilon_high (`float`, *optional*, defaults to `0.28`):
            Upper clipping value (clip-higher, equation 7). The paper names no number; 0.28 is DAPO's.
        delta (`float`, *optional*, defaults to `3.0`):
            Largest ratio where the advantage is negative (dual clip, `c` of equation 7). The paper names no number;
            3 is common. `None` switches it off.
        use_bias_correction_kl (`bool`, *optional*, defaults to `False`):
            As in `GRPOConfig`, but off: with stale chunks the factor is off-policy and not clipped, and the paper has
            the plain KL term.
        mask_truncated_completions (`bool`, *optional*, defaults to `True`):
            As in `GRPOConfig`, but on: completions that reach the length limit leave the loss (overlong filtering).
        ref_model_mixup_alpha (`float`, *optional*, defaults to `1.0`):
            As in `GRPOConfig`, but 1: with `sync_ref_model` the reference is replaced, not mixed.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            As in `GRPOConfig`, but on, and for attention's and adapters' dropout too: the importance ratio compares
            two passes, and with other units dropped in each it would be noise. `False` is refused where there is
            dropout.
    """

    chunk_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens a rollout may gain in one iteration. None is a quarter of max_completion_length; "
            "max_completion_length or more is ordinary GRPO."
        },
    )
    sampling_streams: str = field(
        default="trajectory",
        metadata={
            "help": "'trajectory': a random stream for each rollout, so that chunk length, resuming and the number of "
            "processes do not change what is sampled under the same weights. 'global': the process's stream.",
            "choices": ["trajectory", "global"],
        },
    )
    behavior_logprobs: str = field(
        default="recompute",
        metadata={
            "help": "Log-probabilities of the sampling policy: 'recompute' by a forward pass over each new chunk, or "
            "'generation', noted while sampling.",
            "choices": ["recompute", "generation"],
        },
    )
    max_live_rows: int | None = field(
        default=None,
        metadata={"help": "Unfinished rollouts there may be at once, over all processes. None for no limit."},
    )
    max_staleness: int | None = field(
        default=None,
        metadata={
            "help": "Batches that may be trained between a prompt's admission and its own batch. Kept by admitting "
            "less and sampling on, not by dropping. None for no limit."
        },
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of one generate call of a process. None for all in one call."}
    )
    dynamic_sampling: bool = field(
        default=True,
        metadata={"help": "Drop groups whose rewards are all equal, and sample on until the batch is full."},
    )
    max_resampled_batches: int = field(
        default=10,
        metadata={"help": "Batches' worth of groups that may be dropped in a row before training stops."},
    )
    garble_filter: bool = field(
        default=True, metadata={"help": "Leave garbled completions (loops, invalid text) out of the loss."}
    )
    reward_timeout: float | None = field(
        default=600.0,
        metadata={"help": "Seconds one call of a reward function may take. None for no limit."},
    )
    chunk_importance_ratio: bool = field(
        default=True,
        metadata={
            "help": "Importance ratios against the policy that sampled each chunk. False treats every token as "
            "sampled by the current policy."
        },
    )
    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "Upper clipping value (clip-higher). None for the value of epsilon."}
    )
    delta: float | None = field(
        default=3.0,
        metadata={"help": "Largest ratio where the advantage is negative (dual clip). None switches it off."},
    )
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Multiply the KL term by the importance ratio. Off: chunks are stale."}
    )
    mask_truncated_completions: bool = field(
        default=True, metadata={"help": "Leave completions that reach the length limit out of the loss."}
    )
    ref_model_mixup_alpha: float = field(
        default=1.0, metadata={"help": "Share of the policy in the new reference; 1 replaces it."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Sample and train without dropout, LoRA's too. False is refused where there is dropout."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.chunk_length is None:
            self.chunk_length = -(-self.max_completion_length // 4)
        for name, least in (
            ("chunk_length", 1),
            ("max_live_rows", self.num_generations),
            ("max_staleness", 0),
            ("rollout_batch_size", 1),
            ("max_resampled_batches", 1),
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be an integer of {least} or more, got {value!r}.")
        if self.reward_timeout is not None and not self.reward_timeout > 0:
            raise ValueError(
                f"reward_timeout must be a positive number of seconds or None, got {self.reward_timeout}."
            )
        for name, allowed in (
            ("sampling_streams", ("trajectory", "global")),
            ("behavior_logprobs", ("recompute", "generation")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + high:
            raise ValueError(
                f"delta={self.delta} must be larger than 1 + epsilon_high = {1 + high}: a smaller one cuts inside the "
                "clipping range. Raise delta, or set it to None."
            )
        self._refuse()

    def _refuse(self) -> None:
        """What partial rollouts cannot be combined with."""
        if self.use_vllm:
            raise ValueError(
                "use_vllm=True: chunk-wise rollouts are generated by Transformers; their log-probabilities and random "
                "streams are not available through vLLM. Set use_vllm=False, or train with trl.GRPOTrainer."
            )
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching=True is not supported: a chunk is one generate call. Set it to "
                "False."
            )
        kwargs = dict(self.generation_kwargs or {})
        lengths = {"max_new_tokens", "max_length", *PER_CALL_RULES}
        owned = {*lengths, "num_beams", "num_return_sequences", "stop_strings", "eos_token_id"} & kwargs.keys()
        if owned:
            raise ValueError(
                f"generation_kwargs has {', '.join(sorted(owned))}, which chunk-wise rollouts set or cannot continue "
                "across chunks; remove it (lengths are max_completion_length and chunk_length, ends are the model's)."
            )
        warpers = {"typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "watermarking_config"} & kwargs.keys()
        if warpers and self.sampling_streams == "trajectory":
            raise ValueError(
                f"generation_kwargs has {', '.join(sorted(warpers))}, which sampling_streams='trajectory' does not "
                "know (it knows temperature, top_k, top_p and min_p); remove it, or set sampling_streams='global'."
            )
        if self.behavior_logprobs == "generation" and (self.repetition_penalty != 1.0 or kwargs):
            changed = [*(["repetition_penalty"] if self.repetition_penalty != 1.0 else []), *sorted(kwargs)]
            raise ValueError(
                f"behavior_logprobs='generation' would note probabilities after {', '.join(changed)}, which training "
                "does not see; set behavior_logprobs='recompute'."
            )
