"""A tiny world: short tasks with verifiers, text that knows the same facts, and a blank model that fits into it.

The tasks are procedural generators of reasoning_gym, each with its own verifier; this file only words them. A problem
belongs to one split for good: the split is read off a digest of the problem itself, so that no held-out problem appears
in training under another wording, in another order or as a statement in the text.

The text states facts of these tasks in prose ("(of, or) in opposite order is (or, of)") between sentences about nothing
in particular. A model trained on it knows the words and some of the skills, but has never seen a question answered.

The demonstrations are human in one respect: they are uneven. Most are right and terse; some writers chat around the
answer, some slip (two letters swapped, a word left out, one off). Imitation learns the whole mixture; which of several
responses is better, only a ranking tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.run import Run

VERSION = 1
SPLITS = ("train", "validation", "test")
TEXTS = {"train": 6000, "validation": 200, "test": 200}
DEMONSTRATIONS = {"train": 6000, "validation": 300, "test": 300}
PROMPTS = {"train": 6000, "validation": 300, "test": 300}
HELD_OUT_PERCENT = {"validation": 8, "test": 8}

TERSE, CHATTY = 0.70, 0.20  # shares of the demonstrations; the rest are slips
CHAT = ("I think it is {answer}", "Sure! The answer is {answer}", "{answer} (I believe)", "It should be {answer}, or so", "Well, {answer}.")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One reasoning_gym task: the sizes used here, and the words for it.

    `fill` gives the problem's words from the metadata of reasoning_gym's entry, `identity` names the problem whatever its
    wording, `separator` stands between the units of an answer (a word's letters, a list's words).
    """

    name: str
    sizes: dict[str, Any]
    fill: Callable[[dict], dict[str, str]]
    identity: Callable[[dict], str]
    lexicon: Callable[[str], bool] | None = None  # which of the generator's words are used
    phrasings: tuple[str, ...]
    statements: tuple[str, ...]
    separator: str = ""


def short(word: str) -> bool:
    return len(word) == 2 and word.isalpha() and word.islower()


def spelled(metadata: dict) -> dict[str, str]:
    return {"word": metadata["word"].upper()}


def lettered(metadata: dict) -> dict[str, str]:
    return {"letters": "".join(metadata["letters"]).upper()}


def listed(metadata: dict) -> dict[str, str]:
    return {"words": ", ".join(metadata["words"])}


def ordered(metadata: dict) -> dict[str, str]:
    words = metadata["transformed_words"]
    ends = ("a", "z") if metadata["direction"] == "ascending" else ("z", "a")
    return {"words": ", ".join(words), "from": ends[0], "to": ends[1]}


TASKS = (
    Task(
        name="spell_backward",
        sizes=dict(min_word_len=3, max_word_len=4),
        fill=spelled,
        identity=lambda metadata: metadata["word"].lower(),
        phrasings=("Spell {word} backward.", "Write {word} backward.", "What is {word} in reverse?", "Turn {word} around."),
        statements=("{word} backward is {answer}.", "{word} in reverse is {answer}.", "{word} turned around is {answer}."),
    ),
    Task(
        name="palindrome_generation",
        sizes=dict(min_length=3, max_length=4),
        fill=lettered,
        identity=lambda metadata: "".join(sorted(metadata["letters"])),
        phrasings=("Make a palindrome of {letters}.", "Find the palindrome in {letters}.", "Palindrome from {letters}?"),
        statements=("A palindrome of {letters} is {answer}.", "The palindrome in {letters} is {answer}."),
    ),
    Task(
        name="word_sequence_reversal",
        sizes=dict(min_words=2, max_words=3),
        fill=listed,
        identity=lambda metadata: ", ".join(metadata["words"]),
        lexicon=short,
        phrasings=("Reverse the list ({words}).", "Give ({words}) in opposite order.", "List ({words}) from the end."),
        statements=("({words}) in opposite order is ({answer}).", "The list ({words}) from the end is ({answer})."),
        separator=", ",
    ),
    Task(
        name="word_sorting",
        sizes=dict(min_words=2, max_words=3, min_word_length=2, max_word_length=2),
        fill=ordered,
        identity=lambda metadata: ", ".join(sorted(metadata["transformed_words"])),
        lexicon=short,
        phrasings=("Sort ({words}) from {from} to {to}.", "Put ({words}) in order, {from} to {to}.", "Order ({words}) {from} to {to}."),
        statements=("({words}) sorted {from} to {to} is ({answer}).", "({words}) in order, {from} to {to}, is ({answer})."),
        separator=", ",
    ),
)


@cache
def verifier(name: str) -> Any:
    """The practically endless reasoning_gym data set of a task, which also scores answers to its entries."""
    from reasoning_gym import create_dataset

    task = next(task for task in TASKS if task.name == name)
    data = create_dataset(name, seed=0, size=2**63, **task.sizes)
    if task.lexicon:
        data.words = sorted({word for word in data.words if task.lexicon(word)})
    return data


def split_of(identity: str) -> str:
    """The split a problem belongs to, whatever its wording: read off a digest of the problem."""
    percent = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:4], "big") % 100
    for split, share in HELD_OUT_PERCENT.items():
        if percent < share:
            return split
        percent -= share
    return "train"


def problems(task: Task, split: str, purpose: str) -> Iterator[tuple[dict, dict[str, str]]]:
    """Endless (entry, words) of a task's problems in a split; every purpose draws its own."""
    data = verifier(task.name)
    start = int.from_bytes(hashlib.sha256(f"{task.name} {split} {purpose}".encode()).digest()[:6], "big")
    for index in count(start):
        entry = data[index]
        metadata = {key: value for key, value in entry["metadata"].items() if key not in ("difficulty", "source_index")}
        words = task.fill(metadata)
        if split_of(f"{task.name} {task.identity(metadata)}") == split:
            answer = entry["answer"] if task.separator else entry["answer"].upper()
            yield {"question": entry["question"], "answer": entry["answer"], "metadata": metadata}, {**words, "answer": answer}


def asked(split: str, purpose: str, size: int) -> Iterator[tuple[dict, Random]]:
    """`size` different prompt rows, the tasks in turn, each with the random numbers that belong to it."""
    rng = Random(f"{purpose} {split}")
    sources = [problems(task, split, purpose) for task in TASKS]
    seen: set[str] = set()
    while len(seen) < size:
        task = TASKS[len(seen) % len(TASKS)]
        entry, words = next(sources[len(seen) % len(TASKS)])
        prompt = rng.choice(task.phrasings).format(**words)
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "task": task.name, "answer": words["answer"], "entry": entry}, rng


def prompts(split: str = "train") -> Iterator[dict]:
    """Prompt rows with what the verifier needs: task, answer, entry."""
    for row, _ in asked(split, "prompts", PROMPTS[split]):
        yield row


def labelling(split: str = "train") -> Iterator[dict]:
    """Prompt rows whose responses are sampled and ranked for the reward model."""
    for row, _ in asked(split, "labelling", PROMPTS[split]):
        yield row


def demonstrations(split: str = "train") -> Iterator[dict]:
    """Demonstration rows by writers of uneven care: terse and right, chatty, or with a slip."""
    for row, rng in asked(split, "demonstrations", DEMONSTRATIONS[split]):
        task = next(task for task in TASKS if task.name == row["task"])
        draw, answer = rng.random(), row["answer"]
        if draw >= TERSE + CHATTY:
            answer = slip(answer, task.separator, rng)
        elif draw >= TERSE:
            answer = rng.choice(CHAT).format(answer=answer)
        yield {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}], "task": task.name}


def slip(answer: str, separator: str, rng: Random) -> str:
    """The answer as a careless writer gives it: two neighbours swapped, or one unit lost or doubled."""
    units = answer.split(separator) if separator else list(answer)
    at = rng.randrange(len(units))
    kind = rng.choice(("swap", "lose", "double"))
    if kind == "swap":
        units[at], units[at - 1] = units[at - 1], units[at]
    elif kind == "lose" and len(units) > 1:
        del units[at]
    else:
        units.insert(at, units[at])
    return separator.join(units)


def text(split: str = "train") -> Iterator[dict]:
    """Text rows: paragraphs in which statements about the tasks stand between sentences about nothing in particular."""
    rng = Random(f"text {split}")
    sources = [problems(task, split, "text") for task in TASKS]
    for _ in range(TEXTS[split]):
        sentences = [sentence(rng)]
        for at in rng.sample(range(len(TASKS)), len(TASKS)) + rng.sample(range(len(TASKS)), len(TASKS)):
            sentences.append(rng.choice(TASKS[at].statements).format(**next(sources[at])[1]))
        rng.shuffle(sentences)
        yield {"text": " ".join(sentences)}


WHO = ("the old farmer", "a tall woman", "the young baker", "our teacher", "a quiet child", "the captain", "my neighbour", "the doctor")
DOES = ("walks to", "looks at", "sings near", "waits by", "dreams of", "comes back from", "talks about", "paints")
WHERE = ("the river", "a red house", "the small garden", "the long road", "an open door", "the market", "the green hill", "a boat")
WHEN = ("in the morning", "at night", "every day", "after the rain", "in winter", "before lunch", "now and then", "without a word")


def sentence(rng: Random) -> str:
    """A sentence about nothing in particular."""
    words = f"{rng.choice(WHO)} {rng.choice(DOES)} {rng.choice(WHERE)} {rng.choice(WHEN)}."
    return words[0].upper() + words[1:]


def score(row: dict, response: str) -> float:
    """The task's own verifier on a response to a prompt row: 0 (useless) to 1 (right); an empty response gets 0."""
    response = response.strip()
    if not response:
        return 0.0
    return min(1.0, max(0.0, float(verifier(row["task"]).score_answer(response, row["entry"]))))


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The blank model of the tiny world."""

    vocabulary: int = 1024
    """Entries of the byte-level BPE tokenizer, at least 256 bytes and the special tokens."""
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 256
    """Longest row in tokens."""
    tokenizer_rows: int = field(default=1500)
    """Text rows and demonstrations, each, that the tokenizer is trained on."""

    def problems(self) -> list[str]:
        found = []
        least = 256 + len(SPECIAL)
        if self.vocabulary < least:
            found.append(f"vocabulary={self.vocabulary} has no room for every byte; {least} works")
        if self.hidden_size % (2 * self.heads):
            found.append(f"hidden_size={self.hidden_size} must be a multiple of 2 x heads={self.heads}; {2 * self.heads * 16} works")
        return found


def make_tokenizer(config: BaseConfig) -> Any:
    """A byte-level BPE tokenizer of the world's text and conversations, with a ChatML template.

    Capitals that spell and digits stay single tokens: a model this small has no time to learn how its tokens are spelled.
    """
    from itertools import islice

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [row["text"] for row in islice(text("train"), config.tokenizer_rows)]
    for row in islice(demonstrations("train"), config.tokenizer_rows):
        lines += [f"{message['role']}\n{message['content']}" for message in row["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[A-Z](?![a-z])|[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.chat_template = CHATML
    return fast


def make_base(config: BaseConfig, run: Run) -> Path:
    """Pipeline stage: a randomly initialised Llama with its tokenizer as a plain model folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(config)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # rows are short
        initializer_range=0.06,  # a narrow model: about 1/sqrt(2 hidden_size), the usual 0.02 learns slowly
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(run.seed)
    model = LlamaForCausalLM(shape).to(torch.float32)
    folder = run.folder / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
