"""Rows to trees of token segments, with a count of what was cut or dropped and why.

Over-long conversations lose whole turns from their end; over-long comparisons, judgements and prompts are dropped whole; rows with
nothing to train on are dropped. All of it is counted, and too much of it is an error: nothing is cut silently.
Results are kept on disk under a digest of the rows, the chat contract and the limits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from posttrain.data.chat import Chat, flat
from posttrain.data.store import load_trees, save_trees
from posttrain.data.templates import Piece
from posttrain.packing import Tree, segment

Row = Mapping[str, Any]
VERSION = 1  # of what the functions here make of a row: part of every digest
CHUNK = 1000  # rows tokenised at once: enough to keep the tokenizer busy, few enough to stay small
SHOWN = 5


class Ranks(Protocol):
    """What is asked of a world of several processes."""

    def first_says(self, decide: Callable[[], Any], phase: str) -> Any: ...


@dataclass(frozen=True)
class Kept:
    """What became of `total` rows: `indices` are those that were kept, in order; the others are counted by reason.

    `cut` conversations lost turns at their end, `too_long` rows exceed the limit, `untrainable` ones have nothing to
    train on, `tied` comparisons rank all responses alike. `tokens` and `trained_tokens` are of what was kept.
    """

    what: str
    total: int
    indices: tuple[int, ...]
    cut: int = 0
    too_long: int = 0
    untrainable: int = 0
    tied: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    @property
    def kept(self) -> int:
        return len(self.indices)

    @property
    def dropped(self) -> int:
        return self.total - self.kept

    def __str__(self) -> str:
        reasons = (
            (self.cut, "cut at a turn's end"),
            (self.too_long, "dropped as too long"),
            (self.untrainable, "dropped with nothing to train on"),
            (self.tied, "dropped as ties"),
        )
        said = "".join(f", {count:,} {reason}" for count, reason in reasons if count)
        return f"{self.kept:,} of {self.total:,} {self.what} kept ({self.tokens:,} tokens, {self.trained_tokens:,} trained){said}"


@dataclass(frozen=True)
class _Outcome:
    """One row's tree or None, the count of `Kept` that it adds to, and the tokens that would have kept it whole."""

    tree: Tree | None
    reason: str = ""
    needs: int = 0


def demonstration_trees(
    rows: Sequence[Row],
    chat: Chat,
    max_tokens: int,
    *,
    max_dropped_fraction: float = 0.1,
    cache: Path | None = None,
    world: Ranks | None = None,
) -> tuple[list[Tree], Kept]:
    """One root per conversation, trained on the assistant's turns that don't say `train: false`.

    A conversation over `max_tokens` keeps the leading turns that fit and ends with a trained one.
    Raises ValueError naming rows that can't be rendered, and when too many are dropped.
    """

    def make(chunk: Sequence[Row], start: int) -> Iterator[_Outcome]:
        texts = _render(chunk, start, lambda row: chat.pieces(row["messages"], row.get("tools")))
        for n, (pieces, ids) in enumerate(zip(texts, chat.encode(texts))):
            yield _demonstration(pieces, ids, max_tokens, start + n)

    return _build("conversations", rows, chat, make, {"max_tokens": max_tokens}, max_dropped_fraction, cache, world)


def _demonstration(pieces: list[Piece], ids: list[list[int]], max_tokens: int, index: int) -> _Outcome:
    ends = list(itertools.accumulate(map(len, ids)))
    trained = [n for n, piece in enumerate(pieces) if piece.trained and ids[n]]
    if not trained:
        return _Outcome(None, "untrainable")
    fitting = [n for n in trained if ends[n] <= max_tokens]
    if not fitting:
        return _Outcome(None, "too_long", ends[trained[0]])
    # what follows the last trained turn teaches nothing
    tree = _root(pieces[: fitting[-1] + 1], ids)
    if tree is None:
        raise ValueError(
            f"row {index + 1}: the conversation begins with the assistant's words, which nothing leads to; begin with a user message"
        )
    return _Outcome(tree, "cut" if fitting[-1] < trained[-1] else "", ends[trained[-1]])


def _root(pieces: Sequence[Piece], ids: Sequence[Sequence[int]]) -> Tree | None:
    mask = [piece.trained for piece, part in zip(pieces, ids) for _ in part]
    return None if mask[0] else Tree(segment(flat(ids[: len(pieces)]), mask))


def comparison_trees(
    rows: Sequence[Row],
    chat: Chat,
    max_tokens: int,
    *,
    max_dropped_fraction: float = 0.1,
    cache: Path | None = None,
    world: Ranks | None = None,
) -> tuple[list[Tree], Kept]:
    """The prompt as root and its responses as children, in the row's order, with their `ranks`.

    `max_tokens` holds for the prompt with its longest response; a longer comparison is dropped whole.
    Raises ValueError naming rows that can't be rendered, and when too many are dropped.
    """
    return _build("comparisons", rows, chat, _answers(chat, max_tokens), {"max_tokens": max_tokens}, max_dropped_fraction, cache, world)


def judgement_trees(
    rows: Sequence[Row],
    chat: Chat,
    max_tokens: int,
    *,
    max_dropped_fraction: float = 0.1,
    cache: Path | None = None,
    world: Ranks | None = None,
) -> tuple[list[Tree], Kept]:
    """The prompt as root and its one response as child, with rank 0 where it is desirable and rank 1 where it is not.

    A row over `max_tokens` is dropped whole. Raises ValueError naming rows that can't be rendered, and when too many are dropped.
    """
    answers = _answers(chat, max_tokens)

    def make(chunk: Sequence[Row], start: int) -> Iterator[_Outcome]:
        return answers([{**row, "responses": [row["response"]], "ranks": [int(not row["desirable"])]} for row in chunk], start)

    return _build("judgements", rows, chat, make, {"max_tokens": max_tokens}, max_dropped_fraction, cache, world)


def _answers(chat: Chat, max_tokens: int) -> Callable[[Sequence[Row], int], Iterator[_Outcome]]:
    """What makes trees of rows with a prompt and its `responses`."""

    def split(row: Row) -> list[list[Piece]]:
        prompt, tools = row["prompt"], row.get("tools")
        responses = [chat.response_pieces(prompt, response, tools=tools) for response in row["responses"]]
        return [chat.prompt_pieces(prompt, tools=tools), *responses]

    def make(chunk: Sequence[Row], start: int) -> Iterator[_Outcome]:
        rendered = _render(chunk, start, split)
        # one text per row: only its first piece stands at the beginning of a text
        encoded = chat.encode([[piece for pieces in groups for piece in pieces] for groups in rendered])
        for row, groups, ids in zip(chunk, rendered, encoded):
            yield _answered(row, groups, ids, max_tokens)

    return make


def _answered(row: Row, groups: list[list[Piece]], ids: list[list[int]], max_tokens: int) -> _Outcome:
    ranks = tuple(row.get("ranks") or range(len(row["responses"])))
    if len(ranks) > 1 and len(set(ranks)) == 1:
        return _Outcome(None, "tied")
    remaining = iter(ids)
    parts = [[next(remaining) for _ in pieces] for pieces in groups]
    root, *responses = (flat(part) for part in parts)
    longest = len(root) + max(map(len, responses))
    if longest > max_tokens:
        return _Outcome(None, "too_long", longest)
    masks = [[piece.trained for piece, part in zip(pieces, group) for _ in part] for pieces, group in zip(groups, parts)]
    children = tuple(segment(response, mask) for response, mask in zip(responses, masks[1:]))
    return _Outcome(Tree(segment(root), children, ranks=ranks), "", longest)


def prompt_ids(
    rows: Sequence[Row],
    chat: Chat,
    max_tokens: int,
    system_prompt: str = "",
    *,
    max_dropped_fraction: float = 0.1,
    cache: Path | None = None,
    world: Ranks | None = None,
) -> tuple[list[list[int]], Kept]:
    """Token ids of each prompt, what asks the assistant to speak included; prompts over `max_tokens` are dropped.

    `Kept.indices` says which rows they are of. Raises ValueError naming rows that can't be rendered, and when too many
    are dropped.
    """

    def make(chunk: Sequence[Row], start: int) -> Iterator[_Outcome]:
        texts = _render(chunk, start, lambda row: chat.prompt_pieces(row["prompt"], system_prompt, row.get("tools")))
        for n, parts in enumerate(chat.encode(texts)):
            ids = flat(parts)
            if not ids:
                raise ValueError(f"row {start + n + 1}: the prompt is rendered as no token at all; give it some text")
            yield _Outcome(Tree(segment(ids)), "", len(ids)) if len(ids) <= max_tokens else _Outcome(None, "too_long", len(ids))

    limits = {"max_tokens": max_tokens, "system_prompt": system_prompt}
    trees, kept = _build("prompts", rows, chat, make, limits, max_dropped_fraction, cache, world)
    return [tree.root.input_ids.tolist() for tree in trees], kept


def text_windows(
    rows: Sequence[Row], chat: Chat, window: int, *, cache: Path | None = None, world: Ranks | None = None
) -> tuple[list[Tree], Kept]:
    """Documents laid end to end, each followed by its end, cut into roots of `window` tokens; the last may be shorter.

    A window begins with BOS where the tokenizer wants one (and has no other); its first token is not trained.
    Raises ValueError for a window below 2 tokens and a tokenizer without EOS.
    """
    if window < 2:
        raise ValueError(f"window={window}: a window needs a token to predict from and one to predict; 2 works, 1024 is usual")
    begin = [] if chat.bos_id is None else [chat.bos_id]

    def build() -> tuple[list[Tree], Kept]:
        trees: list[Tree] = []
        rest: list[int] = []
        for start in range(0, len(rows), CHUNK):
            documents = chat.texts([row["text"] for row in rows[start : start + CHUNK]])
            stream = rest + flat(document[len(begin) :] for document in documents)
            step = window - len(begin)
            whole = len(stream) - len(stream) % step
            trees += [_window(begin + stream[i : i + step], len(trees) + i // step) for i in range(0, whole, step)]
            rest = stream[whole:]
        if len(begin) + len(rest) >= 2 and rest:
            trees.append(_window(begin + rest, len(trees)))
        return trees, _count("documents", [_Outcome(tree) for tree in trees], len(rows), tuple(range(len(rows))))

    return _cached("documents", rows, chat, build, {"window": window}, cache, world)


def _window(ids: list[int], index: int) -> Tree:
    return Tree(segment(ids, [False] + [True] * (len(ids) - 1)), index=index)


# --- what they have in common


def _render(chunk: Sequence[Row], start: int, render: Callable[[Row], Any]) -> list[Any]:
    """Render each row; all of a chunk's problems in one error."""
    rendered, problems = [], []
    for n, row in enumerate(chunk):
        try:
            rendered.append(render(row))
        except ValueError as problem:
            problems.append(f"row {start + n + 1}: {problem}")
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError("\n".join(problems[:SHOWN]) + more)
    return rendered


def _build(
    what: str,
    rows: Sequence[Row],
    chat: Chat,
    make: Callable[[Sequence[Row], int], Iterable[_Outcome]],
    limits: Mapping[str, Any],
    max_dropped_fraction: float,
    cache: Path | None,
    world: Ranks | None,
) -> tuple[list[Tree], Kept]:
    def build() -> tuple[list[Tree], Kept]:
        outcomes = [outcome for start in range(0, len(rows), CHUNK) for outcome in make(rows[start : start + CHUNK], start)]
        indices = tuple(i for i, outcome in enumerate(outcomes) if outcome.tree is not None)
        kept = _count(what, outcomes, len(rows), indices)
        _check_dropped(kept, outcomes, max_dropped_fraction)
        trees = [Tree(t.root, t.children, index=n, ranks=t.ranks) for n, t in enumerate(o.tree for o in outcomes if o.tree is not None)]
        return trees, kept

    # a result on disk has passed the check, so the fraction it passed belongs to its name
    return _cached(what, rows, chat, build, {**limits, "max_dropped_fraction": max_dropped_fraction}, cache, world)


def _count(what: str, outcomes: Sequence[_Outcome], total: int, indices: tuple[int, ...]) -> Kept:
    reasons = {name: sum(outcome.reason == name for outcome in outcomes) for name in ("cut", "too_long", "untrainable", "tied")}
    trees = [outcome.tree for outcome in outcomes if outcome.tree is not None]
    tokens, trained = sum(tree.num_tokens for tree in trees), sum(tree.num_trainable for tree in trees)
    return Kept(what, total, indices, **reasons, tokens=tokens, trained_tokens=trained)


def _check_dropped(kept: Kept, outcomes: Sequence[_Outcome], max_dropped_fraction: float) -> None:
    if kept.total and kept.kept and kept.dropped <= max_dropped_fraction * kept.total:
        return
    if not kept.total:
        raise ValueError(f"there are no {kept.what} to tokenise")
    lost = [i + 1 for i, outcome in enumerate(outcomes) if outcome.tree is None]
    shown = ", ".join(map(str, lost[:SHOWN])) + (", ..." if len(lost) > SHOWN else "")
    needs = max((outcome.needs for outcome in outcomes if outcome.reason == "too_long"), default=0)
    advice = f"; the longest needs max_tokens={needs}" if needs else ""
    share = kept.dropped / kept.total
    raise ValueError(f"{kept}: rows {shown} are lost, {share:.0%} of all, above max_dropped_fraction={max_dropped_fraction}{advice}")


def _cached(
    what: str,
    rows: Sequence[Row],
    chat: Chat,
    build: Callable[[], tuple[list[Tree], Kept]],
    limits: Mapping[str, Any],
    cache: Path | None,
    world: Ranks | None,
) -> tuple[list[Tree], Kept]:
    """The result from the cache folder, or made and put there: by the main rank, while the others wait."""
    if cache is None:
        return build()
    identity = [VERSION, what, chat.digest, chat.system_prompt, dict(limits), rows_digest(rows)]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(cache) / f"{what}-{name}.safetensors"

    def make() -> None:
        if not path.exists():
            trees, kept = build()
            save_trees(path, trees, {**vars(kept), "indices": list(kept.indices)})

    # what the main rank raises, every rank raises
    make() if world is None else world.first_says(make, "tokenising")
    if not path.exists():  # a folder that the main rank's machine doesn't share
        return build()
    trees, counts = load_trees(path)
    return trees, Kept(**{**counts, "indices": tuple(counts["indices"])})


def rows_digest(rows: Iterable[Row]) -> str:
    """sha256 of the rows' content."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
