"""The sampler agrees with transformers' generate, with the trainer's log-probabilities and with exact probabilities."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch

from posttrain.config import SamplingConfig
from posttrain.engine import Engine, World
from posttrain.engine.model import FrozenModel
from posttrain.models import prepacked
from posttrain.models.model import PackedModel
from posttrain.packing import forest
from posttrain.rollout import local
from posttrain.rollout.local import Rollout, SamplingInterrupted, SamplingProgress, draw, sample, share, uniforms, waves
from posttrain.rollout.trees import response_trees
from tests.pairs import run_pair
from tests.tiny import SHAPES, VOCABULARY, tiny_model

FAMILIES = list(SHAPES)
STOP_IDS = tuple(range(5, 25))  # many, so that responses end at all lengths
WORLD = World()


@pytest.fixture(scope="module", autouse=True)
def world_ends_with_the_module():
    yield
    WORLD.close()


def packed(family: str = "llama", **shape: int) -> PackedModel:
    model = tiny_model(family, **shape)
    return PackedModel(model)


def frozen(family: str = "llama", **shape: int) -> FrozenModel:
    return Engine(WORLD).freeze(packed(family, **shape), name="policy")


def some_prompts(count: int = 6, longest: int = 20, seed: int = 0) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=random).tolist()
    return [torch.randint(5, VOCABULARY, (length,), generator=random).tolist() for length in lengths]


def run(model: FrozenModel, prompts: list[list[int]], config: SamplingConfig, **options) -> Rollout:
    return sample(model, prompts, config, **{"world": WORLD, "seed": 1, "stop_ids": STOP_IDS, **options})


def trainer_logprobs(model: FrozenModel, rollout: Rollout, temperature: float) -> list[torch.Tensor]:
    """What the packed forward, prompts shared, says about the sampled tokens."""
    result = []
    for tree in response_trees(rollout):
        row = forest([tree])
        logprobs = model.logprobs(row, temperature)
        result += [logprobs[row.response_of == b] for b in range(row.num_responses)]
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_transformers_generate(family):
    model, reference, prompts = frozen(family), tiny_model(family), some_prompts()
    rollout = run(model, prompts, SamplingConfig(max_new_tokens=12, temperature=0), samples_per_prompt=2, stop_ids=(7, 11))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        generated = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=[7, 11])
        assert rollout.responses[2 * i] == rollout.responses[2 * i + 1] == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rule_20_sampler_and_trainer_describe_the_same_distribution(family, temperature):
    model = frozen(family)
    config = SamplingConfig(max_new_tokens=30, temperature=temperature)
    rollout = run(model, some_prompts(), config, samples_per_prompt=3)
    assert len({len(response) for response in rollout.responses}) > 5, "rows should have left the batch at different times"
    for sampled, trained in zip(rollout.logprobs, trainer_logprobs(model, rollout, temperature)):
        torch.testing.assert_close(sampled, trained, atol=1e-4, rtol=0)


def test_rule_20_no_token_is_cut_off():
    """Chi-square of 20,000 first tokens against the exact probabilities, at a temperature, over the whole vocabulary."""
    model, prompt, temperature, count = frozen("llama", vocabulary=40), [5, 6, 7], 1.5, 20_000
    rollout = run(model, [prompt], SamplingConfig(max_new_tokens=1, temperature=temperature), samples_per_prompt=count)
    with torch.no_grad():
        logits = tiny_model("llama", vocabulary=40)(torch.tensor([prompt])).logits[0, -1]
    expected = (logits.double() / temperature).softmax(-1) * count
    seen = Counter(response[0] for response in rollout.responses)
    observed = torch.tensor([float(seen[token]) for token in range(40)], dtype=torch.float64)
    assert expected.min() > 5, "the test needs all tokens"
    statistic = float(((observed - expected) ** 2 / expected).sum())
    # 39 degrees of freedom: mean 39, standard deviation 8.8; the 0.1 % quantile is 72
    assert 15 < statistic < 72


def test_drawing_inverts_the_cumulative_distribution():
    logits = torch.randn(50, 17, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 5, 16]] = -torch.inf  # at the borders too
    for uniform in (0.0, 0.3, 1 - 2.0**-23):
        tokens, logprobs = draw(logits.clone(), torch.full((50,), uniform), 0.7)
        exact = (logits.double() / 0.7).log_softmax(-1)
        for row, token, logprob in zip(exact, tokens.tolist(), logprobs.tolist()):
            below, above = float(row[:token].exp().sum()), float(row[: token + 1].exp().sum())
            assert below - 1e-6 <= uniform <= above + 1e-6
            assert logprob == pytest.approx(float(row[token]), abs=1e-5)
            assert logprob > -30


def test_rule_03_a_finished_response_has_one_end_and_a_truncated_one_has_none():
    rollout = run(frozen(), some_prompts(20), SamplingConfig(max_new_tokens=12), samples_per_prompt=2)
    assert any(rollout.finished) and not all(rollout.finished)
    for response, logprobs, finished in zip(rollout.responses, rollout.logprobs, rollout.finished):
        assert len(response) == len(logprobs) <= 12
        assert sum(token in STOP_IDS for token in response) == (1 if finished else 0)
        assert (response[-1] in STOP_IDS) == finished
        assert finished or len(response) == 12


def test_every_response_is_told_once_as_soon_as_it_has_ended():
    told: dict[int, list[int]] = {}
    order = []

    def hear(b: int, tokens: list[int]) -> None:
        assert b not in told
        told[b] = list(tokens)
        order.append(len(tokens))

    config = SamplingConfig(max_new_tokens=12, max_cached_tokens=100)  # several waves
    rollout = run(frozen(), some_prompts(10), config, samples_per_prompt=3, on_response=hear)
    assert [told[b] for b in range(30)] == rollout.responses
    assert any(a > b for a, b in pairwise(order)) and any(a < b for a, b in pairwise(order))


def test_a_response_does_not_depend_on_its_neighbours_or_its_wave():
    model, prompts = frozen(), some_prompts(12)
    config = SamplingConfig(max_new_tokens=25)
    together = run(model, prompts, config, samples_per_prompt=2)
    for budget in (45, 100, 333):  # one row per wave, two, a few
        small = run(model, prompts, replace(config, max_cached_tokens=budget), samples_per_prompt=2)
        assert small.responses == together.responses and small.finished == together.finished
        for a, b in zip(small.logprobs, together.logprobs):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    chunks = [run(model, prompts[i : i + 5], config, samples_per_prompt=2, first_prompt=i).responses for i in (0, 5, 10)]
    assert list(chain(*chunks)) == together.responses


def test_prefill_and_logits_may_be_cut_anywhere(monkeypatch):
    model, prompts, config = frozen("gpt2"), some_prompts(12), SamplingConfig(max_new_tokens=10)
    whole = run(model, prompts, config, samples_per_prompt=2).responses
    monkeypatch.setattr(local, "PREFILL_TOKENS", 25)
    monkeypatch.setattr(local, "LOGIT_BYTES", 4 * VOCABULARY * 5)
    assert run(model, prompts, config, samples_per_prompt=2).responses == whole


def test_long_prompts_beside_short_ones():
    """The first block of attention is masked out entirely for the short rows."""
    model = frozen(max_position_embeddings=2048)
    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, VOCABULARY, (length,), generator=random).tolist() for length in (3, 1400, 700)]
    rollout = run(model, prompts, SamplingConfig(max_new_tokens=6), samples_per_prompt=2, stop_ids=())
    for sampled, trained in zip(rollout.logprobs, trainer_logprobs(model, rollout, 1.0)):
        torch.testing.assert_close(sampled, trained, atol=1e-4, rtol=0)


def test_keys_give_different_random_numbers_and_the_same_key_the_same():
    model, prompts, config = frozen(), [[5, 6, 7]] * 3, SamplingConfig(max_new_tokens=16)
    first = run(model, prompts, config, samples_per_prompt=2, stop_ids=())
    assert len({tuple(response) for response in first.responses}) == 6, "equal prompts are sampled independently"
    assert run(model, prompts, config, samples_per_prompt=2, stop_ids=()).responses == first.responses
    for change in ({"seed": 2}, {"iteration": 1}, {"first_prompt": 10}):
        assert run(model, prompts, config, samples_per_prompt=2, stop_ids=(), **change).responses != first.responses


def test_uniforms_fill_the_unit_interval():
    numbers = torch.from_numpy(uniforms((3, 1, 4, 1), 100_000))
    assert 0 <= float(numbers.min()) < 1e-4 and 1 - 1e-4 < float(numbers.max()) <= 1 - 2.0**-23
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 44  # chi-square, 19 degrees of freedom, 0.1 %


def letters(ids: list[int]) -> str:
    return "".join(chr(ord("a") + i % 26) for i in ids)


def test_a_stop_string_ends_a_response_and_nothing_is_appended():
    model, prompts = frozen(), some_prompts(30)
    free = run(model, prompts, SamplingConfig(max_new_tokens=40), stop_ids=())
    stopped = run(model, prompts, SamplingConfig(max_new_tokens=40, stop=("c", "xy")), stop_ids=(), decode=letters)
    assert any(stopped.finished)
    for long, short, finished in zip(free.responses, stopped.responses, stopped.finished):
        ends = [n for n in range(1, 41) if letters(long[:n]).endswith(("c", "xy"))]
        assert short == long[: ends[0] if ends else 40]
        assert finished == bool(ends)


def test_a_stop_string_is_found_inside_a_token_and_over_several():
    pieces = {5: "one", 6: " t", 7: "wo.\n\nQ", 8: "é", 9: "\n"}
    ends = local.Ending((), ("two.", "\n\n", "é"), lambda ids: "".join(pieces[i] for i in ids).lstrip(" "))
    assert not ends([5]) and not ends([5, 6]) and not ends([9])
    assert ends([5, 6, 7]) and ends([9, 9]) and ends([5, 8])


def test_shares_are_balanced_and_complete():
    lengths = [int(n) for n in torch.randint(1, 50, (13,), generator=torch.Generator().manual_seed(0))]
    for size in (1, 2, 3, 8, 64):
        shares = share(lengths, 3, size)
        assert sorted(unit for part in shares for unit in part) == [(p, g) for p in range(13) for g in range(3)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    config = SamplingConfig(max_new_tokens=10, max_cached_tokens=150)
    units = share(lengths, 3, 1)[0]
    cut = waves(units, lengths, config)
    assert list(chain(*cut)) == units
    assert all(len(wave) * (max(lengths[p] for p, _ in wave) + 10) <= 150 for wave in cut)


def test_progress_ends_at_all_and_counts_the_tokens(monkeypatch):
    monkeypatch.setattr(local, "REPORT_SECONDS", 0.0)
    seen: list[SamplingProgress] = []
    rollout = run(frozen(), some_prompts(8), SamplingConfig(max_new_tokens=12), progress=seen.append)
    assert seen[-1].responses_done == seen[-1].responses == 8
    assert seen[-1].tokens == rollout.num_tokens and seen[-1].seconds_left == 0
    assert all(a.tokens < b.tokens and a.seconds_left >= 0 for a, b in pairwise(seen))


def test_an_interrupted_rollout_is_given_up():
    calls = iter([False, False, True])
    with pytest.raises(SamplingInterrupted):
        run(frozen(), some_prompts(8), SamplingConfig(max_new_tokens=12), stop_ids=(), interrupted=lambda: next(calls))


def test_prompts_that_cannot_be_continued_are_named():
    model = frozen("gpt2")
    model.module.longest_row = 256
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        run(model, [[5], []], SamplingConfig(max_new_tokens=4))
    with pytest.raises(ValueError, match=r"prompt 1 has 250 tokens.*max_new_tokens=6 works"):
        run(model, [[5], [5] * 250], SamplingConfig(max_new_tokens=40))
    with pytest.raises(ValueError, match=r"max_cached_tokens=64 .*; 70 works"):
        run(model, [[5] * 30], SamplingConfig(max_new_tokens=40, max_cached_tokens=64))
    with pytest.raises(ValueError, match="needs decode="):
        run(model, [[5]], SamplingConfig(stop=("x",)))


def pair_job(engine: Engine, family: str, count: int) -> tuple[list[list[int]], list[list[float]], bool]:
    """Sample in this world, then check that the model is as it was; also with fewer responses than ranks."""
    model = engine.freeze(packed(family), name="policy")
    config = SamplingConfig(max_new_tokens=25)
    rollout = sample(model, some_prompts(count), config, world=engine.world, seed=1, stop_ids=STOP_IDS, samples_per_prompt=3)
    alone = sample(model, [[5, 6]], config, world=engine.world, seed=1, stop_ids=STOP_IDS)
    return rollout.responses, [x.tolist() for x in rollout.logprobs], len(alone.responses) == 1


@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_rule_19_ranks_share_the_work_and_all_have_the_same_rollout(backend):
    expected = run(frozen("llama_tied"), some_prompts(7), SamplingConfig(max_new_tokens=25), samples_per_prompt=3)
    for responses, logprobs, alone in run_pair(backend, "tests.rollout.test_local:pair_job", family="llama_tied", count=7):
        assert alone and responses == expected.responses
        for ours, theirs in zip(logprobs, expected.logprobs):
            torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-5, rtol=0)


def test_prepacked_weights_sample_the_same_responses(monkeypatch) -> None:
    model, prompts, config = frozen(), some_prompts(), SamplingConfig(max_new_tokens=24)
    plain = run(model, prompts, config, samples_per_prompt=3)
    monkeypatch.setattr(prepacked, "SMALLEST", 1)
    laid_out = run(model, prompts, config, samples_per_prompt=3)
    assert laid_out.responses == plain.responses
    for one, other in zip(laid_out.logprobs, plain.logprobs):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert not [name for name, part in model.module.named_modules() if "forward" in vars(part)]
