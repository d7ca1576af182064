"""A conversation in the terminal with any model that a stage made; a reward model scores instead of answering.

Answers come from the sampler that PPO uses, through the chat template that the model was trained with: what is seen here
is what training saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.engine import Engine
    from posttrain.engine.model import FrozenModel

COMMANDS = """/reset               forget the conversation
/system TEXT         begin anew with this system message; no text removes it
/temperature NUMBER  0 takes the likeliest token
/quit                leave (also Ctrl-D)"""
SCORE_COMMANDS = """/quit                leave (also Ctrl-D)"""


@dataclass
class Talker:
    """A causal LM and the conversation so far."""

    chat: Chat
    model: FrozenModel
    engine: Engine
    temperature: float = 0.7
    max_new_tokens: int = 256
    seed: int = 0
    system: str = ""
    messages: list[Mapping[str, str]] = field(default_factory=list)
    turns: int = 0

    def reset(self) -> None:
        self.messages = []

    def answer(self, text: str) -> str:
        """The model's answer to `text`, which the conversation then contains. Raises ValueError when it no longer fits."""
        from posttrain.config import SamplingConfig
        from posttrain.rollout.local import sample

        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.chat.prompt(asked, self.system)
        limit = self.model.module.longest_row
        room = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - len(prompt))
        if room < 1:
            raise ValueError(f"the conversation has {len(prompt)} tokens and the model takes {limit}; /reset begins anew")
        config = SamplingConfig(max_new_tokens=room, temperature=self.temperature)
        rollout = sample(
            self.model,
            [prompt],
            config,
            world=self.engine.world,
            seed=self.seed,
            iteration=self.turns,
            stop_ids=self.chat.end_of_turn_ids,
        )
        answer = self.chat.decode_response(rollout.responses[0])
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        self.turns += 1
        return answer if rollout.finished[0] else f"{answer} [...]"


@dataclass
class Scorer:
    """A reward model; `mean` and `std` are those of its held-out scores."""

    chat: Chat
    model: FrozenModel
    engine: Engine
    mean: float = 0.0
    std: float = 1.0

    def score(self, prompt: str, response: str) -> float:
        """The score that training with this reward model would see, before normalisation."""
        from posttrain.engine.inference import infer
        from posttrain.packing import Tree, segment

        tree = Tree(segment(self.chat.prompt(prompt)), (segment(self.chat.response(response), True),))
        return float(infer(self.engine, self.model, [tree], ("scores",), tree.num_tokens)["scores"][0])


def find_model(folder: Path) -> Path:
    """The model folder that is meant: itself, or `model` in a stage's folder. Raises ValueError saying what is there instead."""
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file() and any(place.glob("*.safetensors")):
            return place
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; a stage's folder, such as runs/instructgpt/ppo, works")
    models = sorted(str(path.parent) for path in folder.glob("*/model/config.json"))
    if models:
        raise ValueError(f"{folder} is a pipeline of several models; one of these works: {', '.join(models)}")
    raise ValueError(f"{folder} has no model (config.json and *.safetensors), nor has its folder model/; did its stage finish?")


def open_model(folder: Path | str) -> Talker | Scorer:
    """Load what a folder holds, on a GPU if there is one. Raises ValueError when it holds no model."""
    import torch

    from posttrain.config import ModelConfig
    from posttrain.data.chat import Chat
    from posttrain.engine import Engine, World
    from posttrain.models.loading import load_causal_lm, load_scalar_model, read_calibration

    place = find_model(Path(folder))
    config = ModelConfig(path=str(place))
    chat = Chat.load(place)
    engine = Engine(World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    kinds = json.loads((place / "config.json").read_text()).get("architectures") or []
    if any(name.endswith("ForSequenceClassification") for name in kinds):
        judge = load_scalar_model(config, fresh_head=False, tokenizer=chat.tokenizer)
        calibration = read_calibration(place)
        return Scorer(chat, engine.freeze(judge, name="reward model"), engine, calibration.mean, calibration.std)
    return Talker(chat, engine.freeze(load_causal_lm(config, chat.tokenizer), name="model"), engine)


def run(
    folder: Path | str,
    *,
    system: str = "",
    temperature: float = 0.7,
    max_new_tokens: int = 256,
    seed: int = 0,
    console: Console | None = None,
    ask: Callable[[str], str] | None = None,
) -> None:
    """Talk until the user leaves. `ask(label)` reads a line and raises EOFError at the end (default: the terminal)."""
    console = console or Console(highlight=False)
    ask = ask or (lambda label: console.input(f"[bold]{label}[/bold] "))
    opened = open_model(folder)
    try:
        if isinstance(opened, Scorer):
            console.print(f"{folder} is a reward model: it scores a response to a prompt.\n{SCORE_COMMANDS}\n", markup=False)
            _score(opened, console, ask)
        else:
            console.print(f"{folder}\n{COMMANDS}\n", markup=False)
            talker = replace(opened, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, system=system)
            _talk(talker, console, ask)
    except (EOFError, KeyboardInterrupt):
        console.print()
    finally:
        opened.engine.close()
        opened.engine.world.close()


def _talk(talker: Talker, console: Console, ask: Callable[[str], str]) -> None:
    while (line := ask("you>").strip()) != "/quit":
        if line.startswith("/"):
            console.print(_command(talker, line), style="dim", markup=False)
        elif line:
            try:
                with console.status("..."):
                    answer = talker.answer(line)
                console.print(f"model> {answer}\n", markup=False)
            except ValueError as problem:
                console.print(str(problem), style="red", markup=False)


def _command(talker: Talker, line: str) -> str:
    """Carry out a /command; returns what to say."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        talker.reset()
        return "the conversation is forgotten"
    if name == "/system":
        talker.system = rest.strip()
        talker.reset()
        return f"system: {talker.system}" if talker.system else "no system message"
    if name == "/temperature":
        try:
            value = float(rest)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            return f"/temperature {rest.strip()!r} must be a number of at least 0; 0.7 works"
        talker.temperature = value
        return f"temperature {value:g}"
    return f"{name} is no command\n{COMMANDS}"


def _score(scorer: Scorer, console: Console, ask: Callable[[str], str]) -> None:
    while (prompt := ask("prompt>").strip()) != "/quit":
        if (response := ask("response>").strip()) == "/quit":
            return
        value = scorer.score(prompt, response)
        spread = (value - scorer.mean) / scorer.std if scorer.std else 0.0
        console.print(f"score {value:.4f}, {spread:+.2f} standard deviations from the mean of held-out scores\n", markup=False)
