"""Jobs that a pair of ranks runs, and that one process runs as well, to compare with."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.config import OptimizerConfig
from posttrain.engine import Engine, TrainedModel
from posttrain.models.model import PackedModel, set_dropout
from posttrain.packing import PackedBatch, Tree, forest, segment
from tests.pairs import run_pair
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

# With eps far above any gradient AdamW is linear: a step moves weights by STEP times the gradient, so that weights tell gradients.
STEP = 0.1
LINEAR = OptimizerConfig(lr=STEP * 1e8, eps=1e8, max_grad_norm=0.0, schedule="constant")


def packed(family: str = "llama", dtype: torch.dtype = torch.float32, **shape: Any) -> PackedModel:
    return PackedModel(tiny_model(family, **shape).to(dtype))


def scalar(seed: int = 0) -> PackedModel:
    """A random model with a scalar head."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = tiny_config("llama", num_labels=1)
    return PackedModel(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))


def rows(count: int = 5, seed: int = 0) -> list[Tree]:
    """Ragged conversations of 4 to 20 tokens, half of each trained."""
    draw = torch.Generator().manual_seed(seed)
    trees = []
    for i in range(count):
        length = int(torch.randint(4, 21, (1,), generator=draw))
        ids = torch.randint(5, 300, (length,), generator=draw).tolist()
        trees.append(Tree(segment(ids, [False] * (length // 2) + [True] * (length - length // 2)), index=i))
    return trees


def nll(engine: Engine, model: TrainedModel, trees: list[Tree], max_tokens: int = 24, spoil: int = -1, **step: Any) -> Any:
    """One update on the mean NLL of the trained tokens; `spoil` multiplies one rank's loss with infinity."""
    batch = engine.pack(trees, max_tokens)
    with engine.update(model) as update:
        for micro in batch.micro_batches():
            factor = float("inf") if engine.world.rank == spoil else 1.0
            update.backward(-model.logprobs(micro).sum() * factor, over=batch.num_tokens, **step)
    return update


def gradient(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (before[name] - after[name]) / STEP for name in before}


def alone(job: Callable[..., Any], **kwargs: Any) -> Any:
    """The job's result with an engine of one process."""
    engine = Engine()
    result = job(engine, **kwargs)
    engine.close()
    return result


def on(backend: str, job: str, **kwargs: Any) -> list[Any]:
    """Every rank's result of a job of this file, on "plain" (one process) or a pair of ranks."""
    return [alone(globals()[job], **kwargs)] if backend == "plain" else run_pair(backend, f"tests.engine.jobs:{job}", **kwargs)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5, atol: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# --- updates


def train(
    engine: Engine, *, family: str = "llama", steps: int = 3, count: int = 5, max_tokens: int = 24, ptx_coef: float = 0.0, **optimizer: Any
) -> dict[str, Any]:
    """A few steps of NLL, plus `ptx_coef` times another NLL: what every backend must do alike."""
    config = OptimizerConfig(**{"lr": 1e-2, "weight_decay": 0.1, **optimizer})
    model = engine.train(packed(family), config, steps, name="policy")
    history = []
    for step in range(steps):
        main, text = engine.pack(rows(count, seed=step), max_tokens), engine.pack(rows(3, seed=100 + step), max_tokens)
        with engine.update(model) as update:
            two_terms(update, model, main, text, ptx_coef)
        history.append(dict(terms=update.terms, norm=update.grad_norm, lr=update.lr, term_norms=update.term_norms, stepped=update.stepped))
    return {"history": history, "steps": model.steps, "weights": model.state_dict_full()}


def two_terms(update: Any, model: TrainedModel, main: PackedBatch, text: PackedBatch, ptx_coef: float) -> None:
    for micro in main.micro_batches():
        update.backward(-model.logprobs(micro).sum(), over=main.num_tokens)
    if ptx_coef:
        for micro in text.micro_batches():
            update.backward(-model.logprobs(micro).sum(), over=text.num_tokens, weight=ptx_coef, label="ptx")


def gradients(engine: Engine, *, family: str = "llama", max_tokens: int = 24, ptx_coef: float = 0.0, count: int = 5) -> dict[str, Any]:
    """The gradient of one update, told from the weights that a linear step moved."""
    model = engine.train(packed(family), LINEAR, 1, name="policy")
    before = model.state_dict_full()
    main, text = engine.pack(rows(count), max_tokens), engine.pack(rows(3, seed=100), max_tokens)
    with engine.update(model) as update:
        two_terms(update, model, main, text, ptx_coef)
    return {
        "gradient": gradient(before, model.state_dict_full()),
        "terms": update.terms,
        "norm": update.grad_norm,
        "norms": update.term_norms,
    }


def interleaved(engine: Engine) -> dict[str, Any]:
    """Two terms whose backwards alternate."""
    model = engine.train(packed(), LINEAR, 1, name="policy")
    main, text = engine.pack(rows(6), 24), engine.pack(rows(6, seed=100), 24)
    with engine.update(model) as update:
        for one, other in zip(main.micro_batches(), text.micro_batches(), strict=False):
            update.backward(-model.logprobs(one).sum(), over=main.num_tokens, label="one")
            update.backward(-model.logprobs(other).sum(), over=text.num_tokens, label="other")
    return {"norm": update.grad_norm, "norms": update.term_norms}


def refusals(engine: Engine, *, spoil: int) -> dict[str, Any]:
    """A good update, one with an infinite loss on one rank, one with a gradient of NaN under a finite loss, a good one."""
    model = engine.train(packed(), OptimizerConfig(lr=1e-2), 10, name="policy", ema_decay=0.5)
    seen = [nll(engine, model, rows(seed=0))]
    before = model.state_dict_full()
    seen.append(nll(engine, model, rows(seed=1), spoil=spoil))
    batch = engine.pack(rows(seed=1), 24)
    with engine.update(model) as update:
        for micro in batch.micro_batches():
            update.backward((model.logprobs(micro).sum() * 0).sqrt(), over=1)
    seen.append(update)
    unmoved = all(torch.equal(before[name], value) for name, value in model.state_dict_full().items())
    seen.append(nll(engine, model, rows(seed=2)))
    return {
        "stepped": [update.stepped for update in seen],
        "norms": [update.grad_norm for update in seen],
        "terms": [update.terms for update in seen],
        "unmoved": unmoved,
        "counts": (model.steps, model.skipped_steps, model.skipped_in_a_row),
        "weights": model.state_dict_full(),
    }


def always_infinite(engine: Engine) -> str:
    model = engine.train(packed(), OptimizerConfig(lr=1e-2), 10, name="policy", max_skipped=3)
    for attempt in range(10):
        try:
            nll(engine, model, rows(), spoil=1)
        except FloatingPointError as error:
            return f"{attempt} {error}"
    return "never"


class TwoHeads(nn.Module):
    """A trunk with two heads, of which an update may leave one alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, head: str) -> Tensor:
        return getattr(self, head)(torch.tanh(self.trunk(x)))


def idle_head(engine: Engine) -> dict[str, Tensor]:
    """Heads a and b, then b alone, then b first and a after it."""
    model = engine.train(TwoHeads(), LINEAR, 3, name="heads")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) + engine.world.rank
    for heads in ("ab", "b", "ba"):
        with engine.update(model) as update:
            for head in heads:
                update.backward(model(x, head).square().sum(), over=4 * engine.world.size)
    return model.state_dict_full()


def every_update_kind(engine: Engine, *, dtype: str = "float32", offload: bool = False) -> dict[str, Any]:
    """Four updates in a lower precision or with offload to the host; what the weights and masters are."""
    if offload:
        engine.world.launch = replace(engine.world.launch, offload_optimizer="cpu", offload_param="cpu" if is_zero3(engine) else "none")
    model = engine.train(packed(dtype=getattr(torch, dtype)), OptimizerConfig(lr=1e-2), 4, name="policy", ema_decay=0.9)
    updates = [nll(engine, model, rows(seed=seed), spoil=1 if seed == 1 else -1) for seed in range(4)]
    engine.world.launch = replace(engine.world.launch, offload_optimizer="none", offload_param="none")
    masters = model.backend.masters()
    return {
        "losses": [update.terms.get("loss") for update in updates],
        "norms": [update.grad_norm for update in updates],
        "masters": {m.dtype for m in masters},
        "beyond_bf16": any(not torch.equal(m, m.bfloat16().float()) for m in masters),
        "weights": model.state_dict_full(),
    }


def is_zero3(engine: Engine) -> bool:
    return engine.world.zero_stage == 3


def held(engine: Engine) -> float:
    """Bytes that training keeps between two steps, for each number in the model."""
    before = alive()
    module = packed(hidden=128)
    parameters = sum(p.numel() for p in module.parameters())
    model = engine.train(module, LINEAR, 4, name="policy")
    for _ in range(2):
        nll(engine, model, rows())
    return (alive() - before) / parameters


def alive() -> int:
    """Bytes of all tensors in the process."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def uneven(engine: Engine) -> dict[str, Any]:
    """One short row for two ranks: one of them runs a dummy; then metrics on one rank only, saves by rank 0 only."""
    model = engine.train(packed(), LINEAR, 2, name="policy")
    before = model.state_dict_full()
    update = nll(engine, model, rows(count=1))
    return {"gradient": gradient(before, model.state_dict_full()), "norm": update.grad_norm, "loss": update.terms["loss"]}


def different_starts(engine: Engine) -> dict[str, Tensor]:
    """Ranks that come with different weights; a frozen model and a trained one."""
    model = engine.train(packed(seed=engine.world.rank), LINEAR, 1, name="policy")
    return model.state_dict_full()


# --- four models, sampling, export


def four_models(engine: Engine) -> dict[str, Any]:
    """Policy, critic, reference and reward model in one engine; then the engine is closed and made anew in the same process."""
    result: dict[str, Any] = {}
    for round_number in range(2):
        policy = engine.train(packed(seed=1), OptimizerConfig(lr=1e-2), 4, name="policy")
        critic = engine.train(scalar(seed=2), OptimizerConfig(lr=2e-2), 4, name="critic")
        reference = engine.freeze(packed(seed=1), name="reference")
        judge = engine.freeze(scalar(seed=3), name="reward_model")
        for step in range(2):
            batch = engine.pack(rows(seed=step), 24)
            for model, kind in ((policy, "logprobs"), (critic, "values")):
                with engine.update(model) as update:
                    for micro in batch.micro_batches():
                        target = judge.scores(micro)[micro.response_of] + reference.logprobs(micro)
                        error = (getattr(model, kind)(micro) - target) * micro.trainable
                        update.backward(error.square().sum(), over=batch.num_tokens)
        micro = forest(rows())
        with policy.evaluating():
            logprobs = policy.logprobs(micro)
        result[f"round{round_number}"] = {
            "policy": policy.state_dict_full(),
            "critic": critic.state_dict_full(),
            "reference": reference.state_dict_full(),
            "logprobs": logprobs.cpu(),
            "reference_logprobs": reference.logprobs(micro).cpu(),
            "frozen": all(not p.requires_grad for p in reference.module.parameters()),
        }
        engine.close()
    return result


def sampling(engine: Engine, *, gather: bool, checkpointing: bool = False) -> dict[str, Any]:
    """Updates with a sampling phase between them, in which ranks call the module differently often."""
    module = packed()
    if checkpointing:
        module.set_gradient_checkpointing(True)
    model = engine.train(module, OptimizerConfig(lr=1e-2), 4, name="policy", ema_decay=0.9)
    reference = engine.freeze(packed(seed=1), name="reference")
    found: list[Tensor] = []
    for step in range(3):
        nll(engine, model, rows(seed=step))
        if gather:
            with model.gathered(), reference.gathered():
                for _ in range(1 + 2 * engine.world.rank):
                    found.append(model.module(forest(rows(seed=50)), ("logprobs",))["logprobs"].cpu())
                assert not model.module.training and not found[-1].requires_grad
                reference.module(forest(rows()), ("logprobs",))
            assert model.module.training and not reference.module.training
    layers = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False)]
    return {"weights": model.state_dict_full(), "found": found, "checkpointing": len(layers)}


def average(engine: Engine, *, decay: float = 0.5) -> dict[str, Any]:
    """The weights after each of three updates, and their average as the engine keeps it."""
    model = engine.train(packed(), OptimizerConfig(lr=1e-2), 3, name="policy", ema_decay=decay)
    trail = [model.state_dict_full()]
    for step in range(3):
        nll(engine, model, rows(seed=step))
        trail.append(model.state_dict_full())
    averaged = model.state_dict_full(ema=True)
    return {"trail": trail, "averaged": averaged, "after": model.state_dict_full()}


def export(engine: Engine, *, folder: str, family: str, dtype: str = "float32") -> dict[str, Any]:
    """Train two steps, export weights and average; the policy's own log-probabilities to compare with."""
    model = engine.train(packed(family, dtype=getattr(torch, dtype)), OptimizerConfig(lr=1e-2), 2, name="policy", ema_decay=0.5)
    for step in range(2):
        nll(engine, model, rows(seed=step))
    engine.export(model, Path(folder) / "model", tiny_tokenizer())
    engine.export(model, Path(folder) / "ema", tiny_tokenizer(), ema=True, extra_files={"note.txt": "averaged"})
    with model.evaluating():
        trained = model.logprobs(forest(rows()))
        with model.averaged():
            averaged = model.logprobs(forest(rows()))
    return {"trained": trained.cpu(), "averaged": averaged.cpu()}


def reward_export(engine: Engine, *, folder: str) -> tuple[Tensor, dict[str, Tensor]]:
    model = engine.train(scalar(), OptimizerConfig(lr=1e-2), 1, name="reward_model")
    batch = engine.pack(rows(), 24)
    with engine.update(model) as update:
        for micro in batch.micro_batches():
            real = 1.0 if micro.groups else 0.0
            update.backward(model.scores(micro).square().sum() * real, over=batch.num_trees)
    engine.export(model, Path(folder), tiny_tokenizer())
    with model.evaluating():
        return model.scores(forest(rows())).cpu(), model.state_dict_full()


# --- checkpoints


def trainees(engine: Engine) -> dict[str, TrainedModel]:
    """Two models, one of them with dropout and an average."""
    module = packed("gpt2")
    set_dropout(module, 0.1)
    optimizer = OptimizerConfig(lr=1e-2, weight_decay=0.1, warmup_steps=2)
    return {
        "policy": engine.train(module, optimizer, 6, name="policy", ema_decay=0.9),
        "critic": engine.train(scalar(), OptimizerConfig(lr=3e-2), 6, name="critic"),
    }


def leg(engine: Engine, folder: Path, start: int, stop: int, save_at: int = -1) -> dict[str, Any]:
    """Updates `start` to `stop` of a run of 6, from the checkpoint at `start`, with all three sources of random numbers in the losses."""
    models = trainees(engine)
    policy, critic = models["policy"], models["critic"]
    engine.seed(7)
    if start:
        state = engine.load(folder / f"step_{start:06d}", models)
        assert state["step"] == start and torch.equal(state["cursor"], torch.arange(start)), state
    losses = []
    for step in range(start, stop):
        batch = engine.pack(rows(seed=step), 24)
        update = nll(engine, policy, rows(seed=step))
        with engine.update(critic) as other:
            for micro in batch.micro_batches():
                noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
                other.backward((critic.values(micro) - noise).square().sum(), over=batch.num_tokens)
        losses.append((update.terms, update.lr, update.grad_norm, other.terms, other.grad_norm))
        if step + 1 == save_at:
            engine.save(folder / f"step_{save_at:06d}", models, {"step": save_at, "cursor": torch.arange(save_at)}, {"stage": "test"})
    found = {
        "losses": losses,
        "policy": policy.state_dict_full(),
        "ema": policy.state_dict_full(ema=True),
        "critic": critic.state_dict_full(),
        "draws": [random.random(), float(np.random.rand()), float(torch.rand(()))],
        "steps": policy.steps,
    }
    engine.close()
    return found


def resume(engine: Engine, *, folder: str) -> list[dict[str, Any]]:
    """Six updates in one go; then 3 with a save after 2, 2 more from there with a save, 2 more from there."""
    path = Path(folder)
    return [leg(engine, path, 0, 6), leg(engine, path, 0, 3, save_at=2), leg(engine, path, 2, 4, save_at=4), leg(engine, path, 4, 6)]


def back_to_best(engine: Engine, *, folder: str) -> bool:
    """A checkpoint loaded into the models that went on training since."""
    model = engine.train(packed(), OptimizerConfig(lr=1e-2), 4, name="policy")
    nll(engine, model, rows(seed=0))
    best = model.state_dict_full()
    engine.save(Path(folder) / "step_000001", {"policy": model}, {}, {})
    nll(engine, model, rows(seed=1))
    engine.load(Path(folder) / "step_000001", {"policy": model})
    return all(torch.equal(value, best[name]) for name, value in model.state_dict_full().items())


def try_load(engine: Engine, *, folder: str, restart_optimizer: bool = False) -> dict[str, Any]:
    """Load into a model that started elsewhere, then one update; the error as text when it is refused."""
    model = engine.train(packed(seed=9), LINEAR, 4, name="policy", ema_decay=0.5)
    try:
        state = engine.load(Path(folder), {"policy": model}, restart_optimizer=restart_optimizer)
    except ValueError as error:
        return {"error": str(error)}
    weights = model.state_dict_full()
    update = nll(engine, model, rows())
    return {"state": state, "weights": weights, "ema": model.state_dict_full(ema=True), "steps": model.steps, "norm": update.grad_norm}


def full_disk(engine: Engine, *, folder: str, rank: int, background: bool) -> dict[str, Any]:
    """Save, then save again when one rank can't write more than a few bytes to a file; the run goes on."""
    import resource

    model = engine.train(packed(), OptimizerConfig(lr=1e-2), 4, name="policy")
    path = Path(folder)
    engine.save(path / "step_000001", {"policy": model}, {"step": 1}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.world.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        engine.save(path / "step_000002", {"policy": model}, {"step": 2}, {}, background=background)
        engine.settle()
        error = ""
    except OSError as caught:
        error = str(caught)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    nll(engine, model, rows())
    engine.world.barrier()
    return {"error": error, "left": sorted(p.name for p in path.iterdir()), "good": engine.newest_good(path), "steps": model.steps}


def broken_weights(engine: Engine, *, folder: str) -> str:
    model = engine.train(packed(), OptimizerConfig(lr=1e-2), 4, name="policy")
    if engine.world.rank == engine.world.size - 1:
        model.backend.masters()[0].view(-1)[0] = float("nan")
    try:
        engine.save(Path(folder) / "step_000001", {"policy": model}, {}, {})
    except FloatingPointError as error:
        return str(error)
    return ""


# --- the world


def collectives(engine: Engine) -> list[Any]:
    world = engine.world
    told = world.first_says(lambda: {"rank": world.rank})
    try:
        world.first_says(lambda: int("none"))
        raised = ""
    except ValueError as error:
        raised = str(error)
    numbers = world.sum(torch.full((3,), float(world.rank + 1))).tolist()
    return [told, raised, world.gather(f"r{world.rank}"), world.any(world.rank == 1), world.any(False), world.sum(0.1), numbers]


def stuck(engine: Engine) -> None:
    """Rank 1 never comes."""
    if engine.world.rank == 1:
        time.sleep(60)
