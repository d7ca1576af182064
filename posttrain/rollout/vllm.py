"""vLLM as the sampler: prompts in, the same `Rollout` out as from `posttrain.rollout.local.sample`.

It draws from the policy's own distribution, no top-k, no top-p, no penalties, and returns the log-probabilities at the sampling
temperature; what its other kernels round otherwise is corrected by truncated importance sampling (`importance_weights` of
`posttrain.rollout.experience`). Where a response ends is decided here, by the local sampler's own rule. Each prompt has its own
seed, from (seed, iteration, prompt index), but how vLLM batches requests changes its rounding: runs repeat only nearly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from posttrain.config import SamplingConfig
from posttrain.rollout.local import Ending, Meter, Rollout, SamplingInterrupted, SamplingProgress, check_prompts
from posttrain.rollout.vllm_colocated import Colocated, colocation_problems, open_colocated
from posttrain.rollout.vllm_server import Request, Sampled, Server, VLLMError, open_server, server_problems

if TYPE_CHECKING:
    from posttrain.engine.model import FrozenModel
    from posttrain.engine.world import World


def sampling_problems(sampling: SamplingConfig, max_prompt_length: int) -> list[str]:
    """What keeps vLLM from sampling, where it is asked to: asked before any model is loaded."""
    if not sampling.vllm.mode:
        return []
    ask = server_problems if sampling.vllm.mode == "server" else colocation_problems
    found = ask(sampling.vllm, max_prompt_length + sampling.max_new_tokens)
    return [f"sampling.vllm.{text}" for text in found]


def sample(
    model: FrozenModel,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    world: World,
    seed: int,
    stop_ids: Sequence[int],
    samples_per_prompt: int = 1,
    iteration: int = 0,
    first_prompt: int = 0,
    decode: Callable[[list[int]], str] | None = None,
    progress: Callable[[SamplingProgress], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
    on_response: Callable[[int, list[int]], None] | None = None,
) -> Rollout:
    """As `posttrain.rollout.local.sample`, by vLLM, which is first given the weights that `model` has now.

    Raises ValueError on prompts that don't fit, VLLMError when vLLM can't answer, SamplingInterrupted; each on every rank.
    """
    asked = [list(prompt) for prompt in prompts]
    check_prompts(asked, config, model.module.longest_row)
    ends = Ending(stop_ids, config.stop, decode)
    sampler = connect(model, config, world)
    sampler.load(model)
    mine = sampler.share(len(asked), world)
    keys = [(seed, iteration, first_prompt + p) for p in mine]
    count = samples_per_prompt if config.temperature else 1  # greedy responses are all alike: vLLM refuses to give several
    requests = [Request(asked[p], count, seed_of(key)) for p, key in zip(mine, keys)]
    meter = Meter(len(mine) * samples_per_prompt, config.max_new_tokens, progress)
    share: dict[int, tuple[list[int], np.ndarray, bool]] = {}
    stopped, failure = False, ""
    try:
        for answer in sampler.answers(requests, config, stop_ids):
            stopped = interrupted is not None and sampler.heeds_stops and interrupted()
            if stopped:
                break
            n, responses = answer or (0, [])  # nothing new
            for b, response in enumerate(responses * (samples_per_prompt // count), mine[n] * samples_per_prompt):
                share[b] = cut(response, ends, config)
                meter.count(len(share[b][0]), [len(share[b][0])])
                if on_response is not None and sampler.speaks:
                    on_response(b, share[b][0])
    except VLLMError as error:
        failure = str(error)  # told to the others, who would wait for this rank
    gathered = world.gather((stopped, failure, share), "gathering responses")
    if failures := [text for _, text, _ in gathered if text]:
        raise VLLMError(failures[0])
    if any(flag for flag, _, _ in gathered):
        raise SamplingInterrupted("sampling was interrupted; nothing of this rollout is kept")
    everything = {b: response for _, _, part in gathered for b, response in part.items()}
    ordered = [everything[b] for b in range(len(asked) * samples_per_prompt)]
    return Rollout(
        prompts=asked,
        responses=[tokens for tokens, _, _ in ordered],
        prompt_of=torch.arange(len(asked)).repeat_interleave(samples_per_prompt),
        logprobs=[torch.from_numpy(logprobs) for _, logprobs, _ in ordered],
        finished=[finished for *_, finished in ordered],
    )


def connect(model: FrozenModel, config: SamplingConfig, world: World) -> Server | Colocated:
    """Whatever of vLLM samples for `model`. Collective: what fails on rank 0 fails on every rank."""
    if config.vllm.mode == "colocate":
        return open_colocated(model, config.vllm)
    world.first_says(lambda: bool(open_server(config.vllm)), "connecting to vLLM")
    return open_server(config.vllm)


def seed_of(key: tuple[int, ...]) -> int:
    """A seed of 62 bits that depends on the key only. vLLM adds the sample's number to it: the next prompt's must not be near."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(2))


def cut(response: Sampled, ends: Ending, config: SamplingConfig) -> tuple[list[int], np.ndarray, bool]:
    """(tokens, log-probabilities (L,) fp32, finished) of a response up to where the local sampler would have ended it.

    Raises VLLMError when vLLM ended it before, for a limit of its own.
    """
    tokens, logprobs = response
    for length in range(1, min(len(tokens), config.max_new_tokens) + 1):
        if ends(tokens[max(0, length - ends.tail) : length]):
            return tokens[:length], np.asarray(logprobs[:length], dtype=np.float32), True
    # vLLM's incremental decoding may see a stop string where the last tokens alone don't show it
    finished = bool(config.stop) and 0 < len(tokens) < config.max_new_tokens
    if not finished and len(tokens) != config.max_new_tokens:
        raise VLLMError(
            f"vLLM ended a response after {len(tokens)} of max_new_tokens={config.max_new_tokens} tokens although nothing says that it is "
            "over; --generation-config vllm leaves the model's own limits out"
        )
    return tokens, np.asarray(logprobs, dtype=np.float32), finished
