from __future__ import annotations

import json

import pytest

from posttrain.data.sampler import Sampler


def taken(sampler: Sampler, batches: int) -> list[int]:
    return [i for _ in range(batches) for i in sampler.take()]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 23])
def test_every_epoch_is_its_own_permutation(batch_size):
    rows = taken(Sampler(10, batch_size, seed=5), 40)
    epochs = [rows[i : i + 10] for i in range(0, len(rows) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_does_not_depend_on_the_batch_size_but_on_the_seed():
    assert taken(Sampler(10, 3), 10) == taken(Sampler(10, 5), 6)
    assert taken(Sampler(10, 3), 10) != taken(Sampler(10, 3, seed=1), 10)


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 10, 11])
def test_rule_08_a_resumed_sampler_goes_on_with_the_same_rows(stop):
    whole, first, second = Sampler(10, 4, 2), Sampler(10, 4, 2), Sampler(10, 4, 2)
    taken(second, 3)  # what it was before does not matter
    begun = taken(first, stop)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + taken(second, 8) == taken(whole, stop + 8)


def test_epoch_counts_passes():
    sampler = Sampler(8, 6)
    assert sampler.epoch == 0
    sampler.take()
    assert sampler.epoch == 0.75
    sampler.take()
    assert sampler.epoch == 1.5


def test_a_state_of_other_rows_is_refused():
    state = Sampler(10, 4).state_dict()
    with pytest.raises(ValueError, match="size=10, this run has size=11"):
        Sampler(11, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=0, this run has seed=3"):
        Sampler(10, 4, seed=3).load_state_dict(state)


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(ValueError, match="size=0"):
        Sampler(0, 4)
    with pytest.raises(ValueError, match="batch_size=0"):
        Sampler(4, 0)
