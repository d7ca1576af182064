"""What can be wrong with the settings that PPO and GRPO share: how much is sampled and how it is cut, and the mixed-in rows."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from posttrain.config import ModelConfig, did_you_mean, when

if TYPE_CHECKING:
    from posttrain.data.chat import Chat


def rollout_problems(config: Any) -> list[str]:
    """Problems of `policy`, `prompts`, `sampling`, of the sizes and of the budget of a stage that samples and learns from it."""
    sampled = config.max_prompt_length + config.sampling.max_new_tokens
    longest = max(sampled, config.ptx_window if config.ptx_coef else 0)
    divisors = [n for n in range(1, max(1, config.rollout_batch_size) + 1) if config.rollout_batch_size % n == 0]
    nearest = min(divisors, key=lambda n: abs(n - config.minibatch_size))
    adapter = config.policy.adapter
    return when(
        (
            adapter.dropout > 0,
            f"policy.adapter.dropout={adapter.dropout}: only SFT trains with dropout, ratios would not start at 1; 0 works",
        ),
        (not config.policy.path, "policy.path is empty; a model folder, a hub id or '@stage' works"),
        (not config.prompts.path, "prompts.path is empty; a file, a hub id, 'package.module:generator' or '@stage' works"),
        (config.num_iterations < 1, f"num_iterations={config.num_iterations} must be at least 1"),
        (config.rollout_batch_size < 1, f"rollout_batch_size={config.rollout_batch_size} must be at least 1; 512 works"),
        (
            config.minibatch_size < 1 or config.rollout_batch_size % config.minibatch_size != 0,
            f"minibatch_size={config.minibatch_size} must divide rollout_batch_size={config.rollout_batch_size}; {nearest} works",
        ),
        (config.num_epochs < 1, f"num_epochs={config.num_epochs} must be at least 1"),
        (not 0 <= config.ema_decay < 1, f"ema_decay={config.ema_decay} must lie in [0, 1); 0 is off, 0.992 is InstructGPT's"),
        (config.max_prompt_length < 1, f"max_prompt_length={config.max_prompt_length} must be at least 1; 1024 works"),
        (
            not 0 <= config.max_dropped_fraction <= 1,
            f"max_dropped_fraction={config.max_dropped_fraction} must lie in [0, 1]; 0.1 works",
        ),
        (
            sampled > config.sampling.max_cached_tokens,
            f"sampling.max_cached_tokens={config.sampling.max_cached_tokens} is below max_prompt_length + sampling.max_new_tokens; "
            f"{sampled} works",
        ),
        (config.sampling.temperature <= 0, "sampling.temperature=0 cannot explore; 1 works"),
        (
            config.max_tokens_per_micro_batch < longest,
            f"max_tokens_per_micro_batch={config.max_tokens_per_micro_batch} is below the longest row, {longest} tokens; {longest} works",
        ),
    )


def mixing_problems(config: Any) -> list[str]:
    """Problems of the rows that are mixed into the same optimizer step: `pretraining`, `ptx_coef` and its sizes."""
    return when(
        (
            config.ptx_coef > 0 and not config.pretraining.path,
            f"ptx_coef={config.ptx_coef} needs rows in pretraining.path; ptx_coef=0 mixes nothing in",
        ),
        (config.ptx_coef < 0, f"ptx_coef={config.ptx_coef} must not be negative; 0 mixes nothing in"),
        (config.ptx_batch_size < 1, f"ptx_batch_size={config.ptx_batch_size} must be at least 1"),
        (config.ptx_window < 2, f"ptx_window={config.ptx_window} must be at least 2; 1024 works"),
    )


def one_of(config: Any, **choices: Collection[str]) -> list[tuple[bool, str]]:
    """Cases for `when`: fields that must be one of a few words."""
    values = {name: getattr(config, name) for name in choices}
    return [
        (value not in choices[name], f"{name}={value!r} is unknown{did_you_mean(value, choices[name])}") for name, value in values.items()
    ]


def require_same_tokens(reward_model: ModelConfig, policy: ModelConfig, chat: Chat, template: str) -> None:
    """Raises ValueError when the reward model reads other tokens than the policy writes."""
    from posttrain.data.chat import Chat

    if Chat.load(reward_model.path, template, revision=reward_model.revision).digest != chat.digest:
        raise ValueError(
            f"reward_model.path={reward_model.path!r} has another tokenizer or template than policy.path={policy.path!r}; "
            "a reward model that started from this policy's SFT model works"
        )
