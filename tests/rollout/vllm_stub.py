"""A server that speaks as vLLM's does, to what posttrain asks: a transformers model samples, one token and one row at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Stub:
    """`change(answer)` edits what `/v1/completions` says; `off` is added to every log-probability that is told."""

    model: Any
    tokenizer: Any
    url: str = ""
    off: float = 0.0
    change: Callable[[dict], Any] | None = None
    settings: dict = field(default_factory=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}})
    context: int = 256
    deaf: bool = False
    asked: list[dict] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    loaded: list[dict[str, Tensor]] = field(default_factory=list)

    def get(self, path: str) -> Any:
        if path == "/health":
            return ""
        if path == "/v1/models":
            return {"data": [{"id": "the-model", "max_model_len": self.context}]}
        if path == "/server_info?config_format=json":
            return {"vllm_config": self.settings} if self.settings else None
        return {"world_size": 1} if path == "/get_world_size" else None

    def post(self, path: str, body: dict) -> Any:
        self.calls.append(path)
        if path == "/v1/completions":
            self.asked.append(body)
            answer = {"choices": [self.choice(prompt, body, n) for prompt in body["prompt"] for n in range(body["n"])]}
            return answer if self.change is None else self.change(answer)
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.loaded.append(load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors"))
            if not self.deaf:
                found = self.model.load_state_dict(self.loaded[-1], strict=False)
                assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
                self.model.tie_weights()
            return {"results": [None]}
        return {"success": True}

    @torch.no_grad()
    def choice(self, prompt: list[int], body: dict, number: int) -> dict:
        assert body["top_p"] == 1 and body["top_k"] == 0 and body["min_p"] == 0 and body["repetition_penalty"] == 1 and body["ignore_eos"]
        assert body["temperature"] > 0 or body["n"] == 1, "as vLLM does"
        random = torch.Generator().manual_seed(body["seed"] + number)
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < body["max_tokens"]:
            logits = self.model(torch.tensor([prompt + tokens])).logits[0, -1]
            distribution = (logits / (body["temperature"] or 1)).log_softmax(-1)
            greedy = body["temperature"] == 0
            token = int(distribution.argmax() if greedy else torch.multinomial(distribution.exp(), 1, generator=random))
            tokens.append(token)
            logprobs.append(float(distribution[token]))
            if token in body["stop_token_ids"] or any(stop in self.tokenizer.decode(tokens) for stop in body.get("stop", ())):
                break
        named = [f"token_id:{token}" for token in tokens]
        told = [logprob + self.off for logprob in logprobs]
        said = {"tokens": named, "token_logprobs": told, "top_logprobs": [{name: value} for name, value in zip(named, told)]}
        return {"index": number, "prompt_token_ids": prompt, "token_ids": tokens, "logprobs": said}


@contextmanager
def serving(folder: str | Path, **settings: Any) -> Iterator[Stub]:
    """A server of the model in `folder`, listening until the block ends."""
    stub = Stub(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), **settings)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(stub.get(self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                self.answer(stub.post(self.path, json.loads(body or "{}")))

        def answer(self, payload: Any) -> None:
            status = 404 if payload is None else payload[0] if isinstance(payload, tuple) else 200
            data = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that has hung up is no news
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    stub.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield stub
    finally:
        http.shutdown()
        http.server_close()
