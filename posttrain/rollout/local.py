"""Sampling with the training process's own weights: prompts in, responses and the log-probabilities they were drawn with out.

Every response has its own random numbers, keyed by (seed, iteration, prompt index, sample index). What a response is
doesn't depend on the ranks, the waves or the neighbours it is sampled with; only the rounding of its logits does, in the
last digits. There is no top-k and no top-p, so that sampler and trainer describe one distribution; only a `Generator`, from whose
texts nobody takes log-probabilities, draws by a `Drawing`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.config import SamplingConfig
from posttrain.models.attention import structure_for
from posttrain.models.model import PackedModel
from posttrain.models.prepacked import prepacked
from posttrain.packing import Tree, forest, segment
from posttrain.rollout.cache import DecodeCache, Prefill

PREFILL_TOKENS = 8192  # per forward; prompts need no gradient, so only the MLP's activations have to fit
LOGIT_BYTES = 64 * 1024**2
REPORT_SECONDS = 0.25
LIKELY_TOKENS = 256  # that are looked at before the whole vocabulary is, for top-p

Unit = tuple[int, int]  # (prompt, sample): one response to come


@dataclass(frozen=True, eq=False)
class Rollout:
    """Responses to P prompts, G samples each, prompt-major: response b belongs to prompt `prompt_of[b]` = b // G.

    `responses` are the tokens as sampled, ending in one of the stop ids where that ended them; `logprobs` (L,) fp32 per
    response, at the sampling temperature; `finished` is False for a response that `max_new_tokens` cut off. A response
    that a stop string ended is finished and has no stop id: nothing is appended that was not sampled.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    prompt_of: Tensor  # (B,)
    logprobs: list[Tensor]
    finished: list[bool]

    @property
    def num_tokens(self) -> int:
        """Sampled tokens over all responses."""
        return sum(map(len, self.responses))


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn where no trainer has to describe it: the log-probabilities are then those of the changed distribution."""

    top_p: float = 1.0
    """Only from the likeliest tokens that together have this probability, at the sampling temperature."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the response already has."""


PLAIN = Drawing()


@dataclass(frozen=True)
class SamplingProgress:
    """How far this rank's share is: responses ended, tokens sampled, and a guess of the seconds left that errs upwards."""

    responses_done: int
    responses: int
    tokens: int
    tokens_per_second: float
    seconds_left: float

    def __str__(self) -> str:
        done = f"{self.responses_done:,} of {self.responses:,} responses"
        return f"{done}, {self.tokens_per_second:,.0f} tokens/s, at most {self.seconds_left:.0f} s left"


class SamplingInterrupted(Exception):  # noqa: N818  it is no error
    """Raised on every rank when `interrupted()` was true on any of them: the rollout was given up."""


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    world: Any,
    seed: int,
    stop_ids: Sequence[int],
    samples_per_prompt: int = 1,
    iteration: int = 0,
    first_prompt: int = 0,
    decode: Callable[[list[int]], str] | None = None,
    progress: Callable[[SamplingProgress], None] | None = None,
    interrupted: Callable[[], bool] | None = None,
    on_response: Callable[[int, list[int]], None] | None = None,
    seeds: Sequence[int] | None = None,
    drawing: Drawing = PLAIN,
) -> Rollout:
    """Sample `samples_per_prompt` responses to each of the GLOBAL `prompts` with an engine's model; every rank gets all of them.

    A response ends at any of `stop_ids`, or where its text (`decode` of its last tokens) contains one of `config.stop`.
    The random key of prompt p is (seed, iteration, first_prompt + p, sample): sampling a list in chunks changes nothing. With
    `seeds` (P,) it is (seeds[p], sample).
    At temperature 0 the likeliest token is taken and log-probabilities are those at temperature 1.
    `on_response(b, tokens)` is called on the rank that samples response b (its place in the rollout), as soon as it has ended,
    so that scoring it goes on beside the sampling of the others.
    Every rank must call it. Raises ValueError on prompts that are empty or don't fit, alike on every rank.
    """
    asked = [list(prompt) for prompt in prompts]
    check_prompts(asked, config, model.module.longest_row)
    lengths = [len(prompt) for prompt in asked]
    ends = Ending(stop_ids, config.stop, decode)
    mine = share(lengths, samples_per_prompt, world.size)[world.rank]
    meter = Meter(len(mine), config.max_new_tokens, progress)
    sampled: list[Response] = []
    stopped = False
    with model.gathered(), torch.inference_mode(), prepacked(model.module):
        for wave in waves(mine, lengths, config):
            keys = [(seeds[p], number) if seeds is not None else (seed, iteration, first_prompt + p, number) for p, number in wave]
            decoder = Decoder(model.module, [asked[p] for p, _ in wave], [p for p, _ in wave], keys, config, world.device, drawing)
            if on_response is not None:
                decoder.tell = partial(_tell, on_response, [prompt * samples_per_prompt + number for prompt, number in wave])
            stopped = not decoder.run(ends, meter, interrupted)
            sampled += decoder.responses
            if stopped:
                break
    places = [prompt * samples_per_prompt + number for prompt, number in mine]
    share_of_it = [(place, r.tokens, np.asarray(r.logprobs, dtype=np.float32), r.finished) for place, r in zip(places, sampled)]
    # one collective whatever happened, so that a rank that was interrupted doesn't leave the others waiting
    gathered = world.gather((stopped, share_of_it), "gathering responses")
    if any(flag for flag, _ in gathered):
        raise SamplingInterrupted("sampling was interrupted; nothing of this rollout is kept")
    everything = sorted((item for _, part in gathered for item in part), key=lambda item: item[0])
    return Rollout(
        prompts=asked,
        responses=[tokens for _, tokens, _, _ in everything],
        prompt_of=torch.arange(len(asked)).repeat_interleave(samples_per_prompt),
        logprobs=[torch.from_numpy(logprobs) for _, _, logprobs, _ in everything],
        finished=[finished for *_, finished in everything],
    )


def _tell(on_response: Callable[[int, list[int]], None], places: list[int], row: int, tokens: list[int]) -> None:
    on_response(places[row], tokens)


def check_prompts(prompts: Sequence[Sequence[int]], config: SamplingConfig, longest_row: int | None) -> None:
    """Raises ValueError naming the first prompt that is empty, or too long for the model or for the cache's budget."""
    for i, prompt in enumerate(prompts):
        size = len(prompt) + config.max_new_tokens
        if not prompt:
            raise ValueError(f"prompt {i} has no tokens; a response continues at least one, such as the BOS token")
        if longest_row is not None and size > longest_row:
            room = f"max_new_tokens={longest_row - len(prompt)} works" if len(prompt) < longest_row else "drop or cut the prompt"
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={config.max_new_tokens} "
                f"it goes beyond the model's {longest_row}; {room}"
            )
        if size > config.max_cached_tokens:
            raise ValueError(
                f"max_cached_tokens={config.max_cached_tokens} is below one response to prompt {i} ({len(prompt)} tokens and "
                f"max_new_tokens={config.max_new_tokens}); {size} works"
            )


def share(lengths: Sequence[int], samples_per_prompt: int, world_size: int) -> list[list[Unit]]:
    """Deal the responses to the ranks: equal numbers, similar prompt lengths, a prompt's samples together except at borders."""
    order = sorted(range(len(lengths)), key=lambda p: (-lengths[p], p))
    dealt = [p for rank in range(world_size) for p in order[rank::world_size]]
    units = [(p, number) for p in dealt for number in range(samples_per_prompt)]
    cuts = [len(units) * rank // world_size for rank in range(world_size + 1)]
    # a border may fall inside a run of similar lengths: sorting again makes the waves of one rank tight
    return [sorted(units[a:b], key=lambda unit: (-lengths[unit[0]], unit)) for a, b in pairwise(cuts)]


def waves(units: Sequence[Unit], lengths: Sequence[int], config: SamplingConfig) -> list[list[Unit]]:
    """Cut units, longest prompt first, into waves whose cache stays within `max_cached_tokens`."""
    result: list[list[Unit]] = []
    room = 0
    for unit in units:
        if room == 0:
            result.append([])
            room = config.max_cached_tokens // (lengths[unit[0]] + config.max_new_tokens)
        result[-1].append(unit)
        room -= 1
    return result


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that depend on the key only; float32, multiples of 2^-23.

    Philox counts from a seed, and its raw output is the same in every version of numpy.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return ((raw >> np.uint64(41)) * 2.0**-23).astype(np.float32)


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens (R,) from `logits (R, V)` fp32, which are overwritten, by inverting the cumulative distribution at `uniform (R,)`.

    Also their log-probabilities (R,) at that temperature. Temperature 0 takes the likeliest token.
    """
    if temperature not in (0, 1):
        logits.div_(temperature)
    likeliest = logits.argmax(-1, keepdim=True) if temperature == 0 else None  # (R, 1)
    shifted = logits.sub_(logits.amax(-1, keepdim=True))
    cumulative = shifted.exp().cumsum_(-1)
    total = cumulative[:, -1:]
    # u <= 1 - 2^-23 keeps u * total strictly below total in fp32, and right=True passes over tokens of probability 0:
    # the place found always exists and can always be drawn
    tokens = torch.searchsorted(cumulative, uniform[:, None] * total, right=True) if likeliest is None else likeliest
    logprobs = shifted.gather(-1, tokens) - total.log()
    return tokens.squeeze(-1), logprobs.squeeze(-1)


def reshape(logits: Tensor, present: Tensor | None, temperature: float, drawing: Drawing) -> None:
    """Change `logits (R, V)` in place so that drawing from them at `temperature` follows `drawing`; `present (R, V)` bool are the
    tokens that each response has, None without a penalty."""
    if present is not None:
        logits.sub_(drawing.presence_penalty * present)
    if drawing.top_p < 1 and temperature > 0:
        logits.masked_fill_(unlikely(logits.div(temperature).softmax(-1), drawing.top_p), -torch.inf)


def unlikely(probabilities: Tensor, top_p: float, among: int = LIKELY_TOKENS) -> Tensor:
    """Which tokens (R, V) bool are not among the likeliest that together have `top_p`; `probabilities (R, V)`.

    The `among` likeliest of each row are looked at; the whole vocabulary is sorted for those rows only where they don't do.
    """
    likely, order = probabilities.topk(min(among, probabilities.shape[-1]))
    together = likely.cumsum(-1)
    before = together - likely  # of all likelier ones: 0 for the likeliest, which always stays
    left_out = torch.ones_like(probabilities, dtype=torch.bool).scatter_(-1, order, before >= top_p)
    if among < probabilities.shape[-1]:
        short = together[:, -1] < top_p
        left_out[short] = unlikely(probabilities[short], top_p, probabilities.shape[-1])
    return left_out


class Ending:
    """Whether a response has ended: at a stop id, or where its text contains a stop string.

    Raises ValueError for stop strings without `decode`.
    """

    def __init__(self, stop_ids: Sequence[int], strings: Sequence[str], decode: Callable[[list[int]], str] | None) -> None:
        if strings and decode is None:
            raise ValueError(f"stop={strings} needs decode=, the function that turns token ids into text; chat.decode works")
        self.stop_ids = frozenset(stop_ids)
        self.strings = tuple(strings)
        self.decode = decode
        # a token holds at least one byte; one more token in front, because tokenizers drop a leading space
        self.tail = 1 + max((len(text.encode()) for text in strings), default=0)
        self.may_end: dict[int, bool] = {}

    def __call__(self, tokens: list[int]) -> bool:
        if tokens[-1] in self.stop_ids:
            return True
        if not self.strings or not self._may_end(tokens[-1]):
            return False
        assert self.decode is not None
        text = self.decode(tokens[-self.tail :])
        return any(stop in text for stop in self.strings)

    def _may_end(self, token: int) -> bool:
        """Whether the token can complete a stop string: it must bring the last character, or a part of it."""
        if token not in self.may_end:
            assert self.decode is not None
            twice = self.decode([token, token])  # twice, so that a leading space shows
            self.may_end[token] = any(not stop[-1].isascii() or stop[-1] in twice for stop in self.strings)
        return self.may_end[token]


@dataclass(eq=False)
class Response:
    """One response being sampled."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class Decoder:
    """One wave: R rows that are decoded together, each prompt computed once for the rows that continue it.

    `prompts` has one entry per row; equal neighbours in `groups` (R,) share their prompt. `keys` (R,) are the random keys.
    """

    def __init__(
        self,
        model: PackedModel,
        prompts: Sequence[list[int]],
        groups: Sequence[int],
        keys: Sequence[tuple[int, ...]],
        config: SamplingConfig,
        device: torch.device | str,
        drawing: Drawing = PLAIN,
    ) -> None:
        self.model, self.prompts, self.groups, self.config, self.drawing = model, prompts, groups, config, drawing
        self.responses = [Response() for _ in prompts]
        self.rows = list(range(len(prompts)))  # which response each row of the cache is
        self.uniforms = torch.from_numpy(np.stack([uniforms(key, config.max_new_tokens) for key in keys])).to(device)
        self.cache = DecodeCache([len(prompt) for prompt in prompts], config.max_new_tokens, device)
        self.device = device
        vocabulary = model.head.weight.shape[0] if drawing.presence_penalty else 0
        self.present = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=device)  # (R, V), or (R, 0) without a penalty
        self.tell: Callable[[int, list[int]], None] | None = None  # called with a row and its tokens when it has ended

    def run(self, ends: Ending, meter: Meter, interrupted: Callable[[], bool] | None = None) -> bool:
        """Sample until every response has ended. False when it was interrupted."""
        hidden = self._prefill()
        for step in range(self.config.max_new_tokens):
            if interrupted is not None and interrupted():
                return False
            tokens, logprobs = self._draw(hidden, step)
            alive = self._record(tokens.tolist(), logprobs.tolist(), ends, meter)
            if step + 1 == self.config.max_new_tokens or not any(alive):
                break
            if not all(alive):
                kept = self.cache.retain(alive)
                tokens, self.uniforms, self.present = tokens[kept], self.uniforms[kept], self.present[kept]
                self.rows = [self.rows[row] for row in kept.tolist()]
            hidden = self.model.run_trunk(tokens, self.cache.positions, self.cache)
            self.cache.advance()
        return True

    def _prefill(self) -> Tensor:
        """The hidden state (R, d) of each row's last prompt token; the cache holds the prompts afterwards."""
        starts = [row for row in self.rows if row == 0 or self.groups[row] != self.groups[row - 1]]
        spans = list(zip(starts, [*starts[1:], len(self.rows)]))  # rows of one prompt
        hidden: list[Tensor] = []
        while spans:
            size, count = len(self.prompts[spans[0][0]]), 1
            while count < len(spans) and size + len(self.prompts[spans[count][0]]) <= PREFILL_TOKENS:
                size += len(self.prompts[spans[count][0]])
                count += 1
            part, spans = spans[:count], spans[count:]
            packed = forest([Tree(segment(self.prompts[row])) for row, _ in part]).to(self.device)
            inner = structure_for(packed, self.model.attention)
            places = [(start, length, row, end) for start, length, (row, end) in zip(packed.starts, packed.lengths, part)]
            states = self.model.run_trunk(packed.input_ids, packed.position_ids, Prefill(self.cache, inner, places))
            copies = torch.tensor([end - row for row, end in part], device=states.device)
            hidden.append(states[packed.last_token].repeat_interleave(copies, dim=0))
        return torch.cat(hidden)

    def _draw(self, hidden: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Next tokens (R,) and their log-probabilities (R,), a bounded piece of the (R, V) logits at a time."""
        size = max(1, LOGIT_BYTES // (4 * self.model.head.weight.shape[0]))
        parts = zip(hidden.split(size), self.uniforms[:, step].split(size), self.present.split(size))
        drawn = [self._draw_part(*part) for part in parts]
        tokens, logprobs = drawn[0] if len(drawn) == 1 else (torch.cat([t for t, _ in drawn]), torch.cat([p for _, p in drawn]))
        if self.drawing.presence_penalty:
            self.present.scatter_(-1, tokens[:, None], True)
        return tokens, logprobs

    def _draw_part(self, hidden: Tensor, uniform: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.logits(hidden)
        if self.drawing != PLAIN:
            reshape(logits, present if self.drawing.presence_penalty else None, self.config.temperature, self.drawing)
        return draw(logits, uniform, self.config.temperature)

    def _record(self, tokens: list[int], logprobs: list[float], ends: Ending, meter: Meter) -> list[bool]:
        """Append to the responses; which rows go on."""
        alive, ended = [], []
        for row, token, logprob in zip(self.rows, tokens, logprobs):
            response = self.responses[row]
            response.tokens.append(token)
            response.logprobs.append(logprob)
            response.finished = ends(response.tokens)
            alive.append(not response.finished)
            if response.finished or len(response.tokens) == self.config.max_new_tokens:
                ended.append(len(response.tokens))
                if self.tell is not None:
                    self.tell(row, response.tokens)
        meter.count(len(tokens), ended)
        return alive


class Meter:
    """Counts tokens and responses and tells the callback a few times a second."""

    def __init__(self, responses: int, max_new_tokens: int, report: Callable[[SamplingProgress], None] | None) -> None:
        self.responses, self.max_new_tokens, self.report = responses, max_new_tokens, report
        self.tokens = self.ended = self.saved = 0
        self.begin = self.reported = time.perf_counter()

    def count(self, tokens: int, ended: Sequence[int]) -> None:
        """So many more tokens were sampled, and responses of these lengths have ended."""
        self.tokens += tokens
        self.ended += len(ended)
        self.saved += sum(self.max_new_tokens - length for length in ended)
        now = time.perf_counter()
        if self.report is None or (now - self.reported < REPORT_SECONDS and self.ended < self.responses):
            return
        self.reported = now
        rate = self.tokens / max(now - self.begin, 1e-9)
        # what is left if no other response ended early
        left = self.responses * self.max_new_tokens - self.tokens - self.saved
        self.report(SamplingProgress(self.ended, self.responses, self.tokens, rate, left / max(rate, 1e-9)))
