"""Pipeline stage: sample K responses to every prompt row of a source, for labelling or for reading.

Writes rows.jsonl, one line per prompt: the prompt row with all its columns, `responses` (K texts) and `finished` (K bools,
False where `max_new_tokens` cut a response off). Rows are kept as soon as their chunk is sampled; an interrupted stage
goes on after the last whole chunk, and what it writes doesn't depend on chunks, interruptions or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import DataConfig, ModelConfig, SamplingConfig, runtime, when
from posttrain.data.jsonl import append_rows, whole_chunks
from posttrain.models.described import ModelUse

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.rollout.local import Rollout
    from posttrain.run import Run

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Whose responses, to which prompts, and how many."""

    model: ModelConfig = ModelConfig()
    """The model that answers."""
    prompts: DataConfig = DataConfig(path="")
    """Prompt rows; their other columns are kept."""
    samples_per_prompt: int = 4
    """Responses to each prompt (InstructGPT ranks 4 to 9)."""
    sampling: SamplingConfig = SamplingConfig()
    """InstructGPT samples at temperature 1."""
    template: str = "auto"
    """Chat template: auto (the model's own, proven), raw (contents only), or a jinja file."""
    max_prompt_length: int = 1024
    """Longer prompts are dropped, counted and said."""
    max_dropped_fraction: float = 0.1
    """Largest share of prompts that may be dropped."""
    chunk_size: int = runtime(512)
    """Prompts between two writes: what an interruption can cost."""

    def problems(self) -> list[str]:
        return when(
            (not self.model.path, "model.path is empty; a model folder, a hub id or '@stage' works"),
            (not self.prompts.path, "prompts.path is empty; a file, a hub id, 'package.module:generator' or '@stage' works"),
            (self.samples_per_prompt < 1, f"samples_per_prompt={self.samples_per_prompt} must be at least 1; 4 works"),
            (self.max_prompt_length < 1, f"max_prompt_length={self.max_prompt_length} must be at least 1; 1024 works"),
            (not 0 <= self.max_dropped_fraction <= 1, f"max_dropped_fraction={self.max_dropped_fraction} must lie in [0, 1]; 0.1 works"),
            (self.chunk_size < 1, f"chunk_size={self.chunk_size} must be at least 1; 512 works"),
            (
                self.max_prompt_length + self.sampling.max_new_tokens > self.sampling.max_cached_tokens,
                f"sampling.max_cached_tokens={self.sampling.max_cached_tokens} is below max_prompt_length + sampling.max_new_tokens; "
                f"{self.max_prompt_length + self.sampling.max_new_tokens} works",
            ),
        )


def generate(config: GenerateConfig, run: Run) -> Path:
    """Sample and write. Returns rows.jsonl."""
    from posttrain.data.chat import Chat
    from posttrain.inputs import load_prompts
    from posttrain.models.loading import load_causal_lm
    from posttrain.rollout.experience import sample_responses

    world = run.engine.world
    chat = Chat.load(config.model.path, config.template, revision=config.model.revision)
    limits = (config.max_prompt_length, config.sampling.system_prompt, config.max_dropped_fraction)
    rows, prompts = load_prompts(run, config.prompts, chat, *limits)
    partial, finished = run.folder / "rows.partial.jsonl", run.folder / "rows.jsonl"
    run.resume_after(world.first_says(lambda: whole_chunks(partial, config.chunk_size, len(rows)), "reading what was written before"))
    model = run.engine.freeze(load_causal_lm(config.model, chat.tokenizer), name="policy")

    for chunk in run.steps(-(-len(rows) // config.chunk_size), unit="chunk"):
        here = slice(chunk * config.chunk_size, (chunk + 1) * config.chunk_size)
        rollout = sample_responses(
            run, model, chat, prompts[here], config.sampling, 0, samples_per_prompt=config.samples_per_prompt, first_prompt=here.start
        )
        answered = answered_rows(rows[here], rollout, chat)
        world.first_says(lambda: append_rows(partial, answered), "writing responses")  # noqa: B023  called at once
        run.log(summary(rollout), tokens=rollout.num_tokens)
        run.checkpoint()
    world.first_says(lambda: partial.replace(finished), "writing responses")
    return finished


def answered_rows(rows: Sequence[dict[str, Any]], rollout: Rollout, chat: Chat) -> list[dict[str, Any]]:
    """The prompt rows with their `responses` as text, and which of them are `finished`."""
    count = len(rollout.responses) // len(rows)
    texts = [chat.decode_response(ids) for ids in rollout.responses]
    parts = [slice(i * count, (i + 1) * count) for i in range(len(rows))]
    return [{**row, "responses": texts[part], "finished": rollout.finished[part]} for row, part in zip(rows, parts)]


def summary(rollout: Rollout) -> dict[str, float]:
    """Mean response length in tokens and the share of responses that ended by themselves."""
    count = len(rollout.responses)
    return {"response_length": rollout.num_tokens / count, "finished": sum(rollout.finished) / count}


def uses(config: GenerateConfig) -> list[ModelUse]:
    """What is asked of the model, for the check before anything is loaded."""
    longest = {"max_prompt_length": config.max_prompt_length, "sampling.max_new_tokens": config.sampling.max_new_tokens}
    return [ModelUse(field="model", model=config.model, template=config.template, rows=(longest,))]


def check(config: GenerateConfig) -> list[str]:
    """Prompts that are too long, more of them than may be dropped; a vLLM that can't be asked."""
    from posttrain.estimates import prompt_problems

    return prompt_problems(config, config.model)


def plan(config: GenerateConfig) -> dict[str, Any]:
    """Prompts, responses and an upper bound on tokens."""
    from posttrain.estimates import rows_and_tokens

    size = rows_and_tokens(config.prompts, "prompt", config.model.path)
    if "tokens" not in size:
        return size
    responses = size["rows"] * config.samples_per_prompt
    return {"prompts": size["rows"], "responses": responses, "tokens at most": size["tokens"] + responses * config.sampling.max_new_tokens}


def smoke(config: GenerateConfig) -> GenerateConfig:
    """The same stage on 64 prompts, in two chunks."""
    return replace(config, prompts=replace(config.prompts, limit=64), chunk_size=32)
