"""vLLM inside the training processes, on the GPUs that train, through TRL's `VLLMGeneration`: one engine per `tensor_parallel_size` ranks.

It needs vLLM in the trainer's own environment and CUDA, and has been run with a stand-in for vLLM only, never on a GPU. Weights
and cache of the engine stay on the GPUs while the policy trains: `gpu_memory_utilization` is what they may take.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from posttrain.config import SamplingConfig, VLLMConfig
from posttrain.rollout.vllm_server import Request, Sampled, beside_the_trainer, sampled_of, steps_of, untied

if TYPE_CHECKING:
    from posttrain.engine.model import FrozenModel
    from posttrain.engine.world import World


def colocation_problems(config: VLLMConfig, longest: int) -> list[str]:
    """What keeps vLLM from running beside the trainer, for rows of up to `longest` tokens."""
    if 0 < config.max_model_len < longest:
        return [f"max_model_len={config.max_model_len} is below the longest row, {longest} tokens; {longest} works"]
    return beside_the_trainer("mode='colocate'", "mode='server' works without")


class Colocated:
    """This rank's part of an engine that samples for one model, and at which step of it the engine's weights were taken."""

    def __init__(self, model: FrozenModel, config: VLLMConfig) -> None:
        world, size = model.world, config.tensor_parallel_size
        if world.size % size:
            raise ValueError(f"sampling.vllm.tensor_parallel_size={size} must divide the number of ranks, {world.size}; 1 works")
        self.config = config
        self.speaks = world.rank % size == 0  # the ranks of one engine all have its answers
        self.heeds_stops = size == 1  # one of them can't leave the others alone in a forward pass
        self.generation = trl_generation(model, config)
        self.holds = -1

    def share(self, prompts: int, world: World) -> list[int]:
        """The prompts of this rank's engine."""
        size = self.config.tensor_parallel_size
        return list(range(world.rank // size, prompts, world.size // size))

    def load(self, model: FrozenModel) -> None:
        """Give the engine the weights that `model` has now: whole, an adapter merged into them. Collective."""
        from posttrain.models.adapters import merged

        if self.holds == steps_of(model):
            return
        with model.gathered():
            hf, adapter = model.module.hf, model.module.adapter
            state = hf.state_dict(keep_vars=True)
            self.generation.given = untied(merged(state, hf, adapter.name) if adapter else state)
            self.generation.sync_weights()
            self.generation.given = []
        self.holds = steps_of(model)

    def answers(
        self, requests: Sequence[Request], sampling: SamplingConfig, stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[Sampled]] | None]:
        """(n, the responses to the n-th request), `concurrency` of them at a time."""
        from trl.generation.vllm_generation import extract_logprobs
        from vllm import SamplingParams  # type: ignore[import-not-found]

        settings: dict[str, Any] = {
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
            "logprobs": 0,  # of the sampled token alone
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,
            "skip_special_tokens": False,
        }
        for start in range(0, len(requests), self.config.concurrency):
            part = requests[start : start + self.config.concurrency]
            prompts = [{"prompt_token_ids": request.prompt} for request in part]
            how = [SamplingParams(n=request.count, seed=request.seed, **settings) for request in part]
            outputs = self.generation.llm.generate(prompts, sampling_params=how, use_tqdm=False)
            for n, (request, output) in enumerate(zip(part, outputs), start):
                logprobs, chosen = extract_logprobs([output])
                tokens = [list(one.token_ids) for one in output.outputs]
                said = {"prompt_ids": [list(output.prompt_token_ids)], "completion_ids": tokens}
                yield n, sampled_of({**said, "logprobs": logprobs, "logprob_token_ids": chosen}, request)


ENGINES: WeakKeyDictionary[FrozenModel, Colocated] = WeakKeyDictionary()


def open_colocated(model: FrozenModel, config: VLLMConfig) -> Colocated:
    """The engine that samples for `model`, until that is let go of. Collective."""
    if model not in ENGINES:
        ENGINES[model] = Colocated(model, config)
    return ENGINES[model]


def trl_generation(model: FrozenModel, config: VLLMConfig) -> Any:
    """TRL's engine, which takes the weights that it is `given` instead of looking for them in a trainer's model."""
    from trl.generation.vllm_generation import VLLMGeneration

    class Generation(VLLMGeneration):
        given: Sequence[tuple[str, Tensor]] = ()

        def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
            yield from self.given

    world = model.world
    processes: Any = SimpleNamespace(  # what is asked of an Accelerator
        num_processes=world.size,
        process_index=world.rank,
        local_process_index=int(os.environ.get("LOCAL_RANK", "0")),
        is_main_process=world.is_main,
        device=world.device,
        wait_for_everyone=world.barrier,
        state=SimpleNamespace(deepspeed_plugin=None),
    )
    unused: Any = None
    generation = Generation(
        model=model.module.hf,
        accelerator=processes,
        processing_class=unused,
        mode="colocate",
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_model_length=config.max_model_len or None,
    )
    generation.model = unused  # the engine doesn't keep a policy alive that the stage has let go of
    return generation
