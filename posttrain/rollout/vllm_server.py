"""A running vLLM server as the sampler: requests, and the policy's weights on their way to it, through TRL's client.

The server is vLLM's own, in an environment of its own, as vLLM asks for an older transformers than posttrain does:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm

Weights go by files that both sides see (`transfer="folder"`: any device; the server reads them with its `reload_weights`), or
from GPU to GPU by TRL's client (`transfer="nccl"`: needs vLLM beside the trainer; it has not been run on CUDA).
One server serves one run at a time: it holds one set of weights.

On a CPU vLLM (0.32) packs an LM head that is tied to the embeddings when it starts and never again, so that a tied policy's head
stays as it was: `sampler_gap` grows, and importance weights make up for it only while it is small. Untied heads arrive whole.
"""

from __future__ import annotations

import queue
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from posttrain.config import SamplingConfig, VLLMConfig

if TYPE_CHECKING:
    from posttrain.engine.model import FrozenModel
    from posttrain.engine.world import World

HEALTH_SECONDS = 5.0  # for an answer whether the server is up
ABOUT_SECONDS = 60.0  # for one about itself: /server_info first looks over its whole machine
POLL_SECONDS = 1.0  # how often it is looked whether the run was asked to stop
RETRIES = 3
COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm"

T = TypeVar("T")
Sampled = tuple[list[int], list[float]]  # tokens and their log-probabilities


class VLLMError(RuntimeError):
    """vLLM can't answer, or answers something else than it was asked."""


@dataclass(frozen=True)
class Request:
    """`count` responses to one prompt; equal seeds draw equal random numbers."""

    prompt: list[int]
    count: int
    seed: int


def server_problems(config: VLLMConfig, longest: int) -> list[str]:
    """What is wrong with the server, or with asking it, for rows of up to `longest` tokens. Waits `connection_timeout` for it."""
    if find_spec("requests") is None:
        return ["mode='server' needs the package requests; pip install 'posttrain[vllm]' works"]
    beside = beside_the_trainer("transfer='nccl'", "transfer='folder' works without") if config.transfer == "nccl" else []
    if beside:
        return beside
    if not _is_up(config):
        return [f"url={config.url!r}: no vLLM server answers there after {config.connection_timeout:g} s; this starts one:\n{COMMAND}"]
    context = _get(config, "/v1/models")["data"][0].get("max_model_len") or longest
    found = [f"url={config.url!r}: the server takes {context} tokens, a row has up to {longest}; start it with --max-model-len {longest}"]
    return (found if context < longest else []) + _settings_problems(config)


def beside_the_trainer(what: str, otherwise: str) -> list[str]:
    """What is missing in this process's own environment for `what`: vLLM, a GPU."""
    if find_spec("vllm") is None:
        return [
            f"{what} needs vLLM in the trainer's own environment, where pip refuses it as long as vLLM asks for an older transformers "
            f"than posttrain; {otherwise}, with vLLM in an environment of its own: python -m venv vllm && vllm/bin/pip install vllm"
        ]
    return [] if torch.cuda.is_available() else [f"{what} needs a CUDA device; {otherwise}"]


def _is_up(config: VLLMConfig) -> bool:
    """Whether the server answers, asked again until `connection_timeout` is over."""
    import requests

    deadline = time.monotonic() + config.connection_timeout
    while True:
        try:
            if requests.get(f"{config.url.rstrip('/')}/health", timeout=HEALTH_SECONDS).status_code == 200:
                return True
        except requests.RequestException:
            pass  # it may still be starting
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def _get(config: VLLMConfig, path: str) -> Any:
    """What the server says there, {} where it has nothing. Raises ValueError when it doesn't answer."""
    import requests

    try:
        answer = requests.get(f"{config.url.rstrip('/')}{path}", timeout=ABOUT_SECONDS)
    except requests.RequestException as error:
        raise ValueError(f"sampling.vllm.url={config.url!r}: the server is up but gives no answer to {path}: {error}") from None
    return answer.json() if answer.status_code == 200 else {}


def _settings_problems(config: VLLMConfig) -> list[str]:
    settings = _get(config, "/server_info?config_format=json").get("vllm_config")
    if settings is None:
        return [f"url={config.url!r}: the server doesn't let its weights be changed; start it with VLLM_SERVER_DEV_MODE=1:\n{COMMAND}"]
    mode = str(settings["model_config"].get("logprobs_mode"))
    if mode.rsplit(".", 1)[-1].lower() != "processed_logprobs":
        return [
            f"url={config.url!r}: the server's log-probabilities ({mode}) are not those of the sampling temperature; start it with "
            f"--logprobs-mode processed_logprobs:\n{COMMAND}"
        ]
    if config.transfer == "nccl" and settings.get("weight_transfer_config") is None:
        return [f"""url={config.url!r}: transfer='nccl' needs a server started with --weight-transfer-config '{{"backend": "nccl"}}'"""]
    return []


class Server:
    """The connection of this process to a server, and which weights that holds."""

    def __init__(self, config: VLLMConfig) -> None:
        if not _is_up(config):
            raise VLLMError(f"no vLLM server answers at {config.url} after {config.connection_timeout:g} s; this starts one:\n{COMMAND}")
        self.config = config
        self.client = trl_client(config, _get(config, "/v1/models")["data"][0]["id"])
        self.holds: tuple[Any, int] = (None, 0)
        self.speaks = self.heeds_stops = True  # each rank has its own answers, and may stop listening

    def share(self, prompts: int, world: World) -> list[int]:
        """The prompts that this rank asks about."""
        return list(range(world.rank, prompts, world.size))

    def load(self, model: FrozenModel) -> None:
        """Give the server the weights that `model` has now: whole, an adapter merged into them. Collective. Raises VLLMError."""
        now = (weakref.ref(model), steps_of(model))
        if self.holds == now:
            return
        state = model.state_dict_full()
        send = self._by_nccl if self.config.transfer == "nccl" else self._by_folder
        model.world.first_says(lambda: _saying("loading weights", self.config, lambda: send(model, state)), "sending weights to vLLM")
        self.holds = now

    def _by_folder(self, model: FrozenModel, state: dict[str, Tensor]) -> None:
        from posttrain.models.export import quiet

        with tempfile.TemporaryDirectory(prefix="posttrain-weights-", dir=self.config.folder or None) as folder:
            with quiet():
                model.module.hf.save_pretrained(folder, state_dict=state)
            body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
            answer = self.client.session.post(f"{self.client.base_url}/collective_rpc", json=body)
        if answer.status_code != 200:
            raise VLLMError(f"the vLLM server at {self.config.url} could not read the weights in {folder}: {answer.text}")
        self.client.reset_prefix_cache()  # it was computed by the weights before

    def _by_nccl(self, model: FrozenModel, state: dict[str, Tensor]) -> None:
        if self.client.communicator is None:
            self.client.init_communicator(device=model.world.device)
        named = untied(state)
        about = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in named]
        self.client.update_named_params(about, ((name, tensor.to(model.world.device)) for name, tensor in named))
        self.client.reset_prefix_cache()

    def answers(
        self, requests: Sequence[Request], sampling: SamplingConfig, stop_ids: Sequence[int]
    ) -> Iterator[tuple[int, list[Sampled]] | None]:
        """(n, the responses to the n-th request) as they come, None whenever a second has passed. Raises VLLMError."""
        more: dict[str, Any] = {"stop_token_ids": list(stop_ids), "ignore_eos": True, "skip_special_tokens": False}
        if sampling.stop:
            more["stop"] = list(sampling.stop)

        def ask(request: Request) -> list[Sampled]:
            said = self.client.generate(
                [request.prompt],
                n=request.count,
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                generation_kwargs={**more, "seed": request.seed},
            )
            return sampled_of(said, request)

        return in_parallel(lambda request: _saying("sampling", self.config, lambda: ask(request)), requests, self.config.concurrency)


def steps_of(model: FrozenModel) -> int:
    """Optimizer steps that a model has made: as long as they stay the same, so do its weights."""
    return getattr(model, "steps", 0)


def untied(state: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Names and tensors of a state dict, tied weights once, under their first name."""
    first: dict[int, str] = {}
    return [(name, tensor) for name, tensor in state.items() if first.setdefault(id(tensor), name) == name]


@cache
def open_server(config: VLLMConfig) -> Server:
    """The connection to a server, one for the whole process: weights go to it through one group."""
    return Server(config)


def trl_client(config: VLLMConfig, model: str) -> Any:
    """TRL's client, without its constructor: that wants vLLM installed here, which only transfer by NCCL needs, and tries for minutes."""
    import requests
    from requests.adapters import HTTPAdapter
    from trl.generation.vllm_client import VLLMClient
    from urllib3.util.retry import Retry

    client = VLLMClient.__new__(VLLMClient)
    client.session = requests.Session()
    again = Retry(total=RETRIES, backoff_factor=0.5, status_forcelist=(502, 503), allowed_methods=("GET", "POST"))
    for scheme in ("http://", "https://"):
        client.session.mount(scheme, HTTPAdapter(max_retries=again, pool_maxsize=config.concurrency))
    client.base_url = config.url.rstrip("/")
    client.group_port = config.group_port
    client.communicator = None
    client._updating_weights = False
    client.model = model
    return client


def _saying(what: str, config: VLLMConfig, act: Callable[[], T]) -> T:
    """`act()`, whose failures say who failed: TRL raises what requests raises, or a plain Exception with the server's words."""
    try:
        return act()
    except VLLMError:
        raise
    except Exception as error:
        raise VLLMError(f"the vLLM server at {config.url} failed at {what}: {type(error).__name__}: {error}") from error


def sampled_of(said: dict[str, Any], request: Request) -> list[Sampled]:
    """Tokens and their log-probabilities as TRL's client returns them. Raises VLLMError when they aren't what was asked for."""
    responses, logprobs, chosen = said["completion_ids"], said["logprobs"], said["logprob_token_ids"]
    if len(responses) != request.count:
        raise VLLMError(f"vLLM gave {len(responses)} responses to a prompt, not the {request.count} that were asked for")
    if said["prompt_ids"][0] != request.prompt:
        raise VLLMError(f"vLLM read a prompt of {len(request.prompt)} tokens as {len(said['prompt_ids'][0])} others")
    if logprobs is None or [len(part) for part in logprobs] != [len(tokens) for tokens in responses]:
        raise VLLMError("vLLM gave no log-probability for some of the tokens that it sampled")
    found = []
    for tokens, numbers, ids in zip(responses, logprobs, chosen):
        own = [dict(zip(some, values))[token] for token, some, values in zip(tokens, ids, numbers)]
        if None in own:
            raise VLLMError("vLLM sampled a token whose log-probability is NaN; the weights that it holds are not finite")
        found.append((tokens, own))
    return found


def in_parallel(work: Callable[[Request], T], items: Sequence[Request], workers: int) -> Iterator[tuple[int, T] | None]:
    """(n, work(items[n])) in the order in which they are done, None whenever a second has passed. Raises what `work` raises.

    The threads are daemons: whoever stops listening, or stops the process, doesn't wait for what the server still has to say.
    """
    results: queue.SimpleQueue[tuple[int, T | None, Exception | None]] = queue.SimpleQueue()
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    over = threading.Event()
    for n in range(len(items)):
        waiting.put(n)

    def serve() -> None:
        while not over.is_set():
            try:
                n = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((n, work(items[n]), None))
            except Exception as error:
                results.put((n, None, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=serve, daemon=True).start()
    try:
        done = 0
        while done < len(items):
            try:
                n, result, error = results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                yield None
                continue
            if error is not None:
                raise error
            done += 1
            yield n, result  # type: ignore[misc]  # without an error there is a result
    finally:
        over.set()
