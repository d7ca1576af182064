"""What --plan says of memory, traffic and time: sums of the formulas for the launch, and settings that would really fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from posttrain import costs, forecast
from posttrain.config import AdapterConfig, ModelConfig, SamplingConfig
from posttrain.costs import Sharding, Tokens
from posttrain.forecast import GIB, Model, Place, Role, Sampled, Work
from tests.tiny import tiny_config, tiny_folder, tiny_model

SHAPE = costs.Shape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, inner=14336, vocabulary=128256)
MODEL = Model(SHAPE, SHAPE.parameters, 2)
EVERYTHING = Place(sharding=Sharding(), device="cuda", memory=1e15, host=1e15)


def ppo(**changes) -> Work:
    model = ModelConfig(path="model", **changes)
    judge = Role(name="reward_model", model=model, is_trained=False, is_scalar=True, shares_base=model.adapter.rank > 0)
    roles = (
        Role(name="policy", model=model, terms=2),
        Role(name="reference", model=model, is_trained=False, shares_base=True),
        replace(judge, name="critic", is_trained=True),
        judge,
    )
    sampling = Sampled(config=SamplingConfig(), responses=64, rollouts=10, prompt=100, longest_prompt=512)
    return Work(roles=roles, row=8192, longest=1024, update=0, sampled=sampling)


def held(work: Work, place: Place) -> forecast.Held:
    return forecast.memory(work, {role.name: MODEL for role in work.roles}, place)


@pytest.mark.parametrize(("level", "bytes_each"), [(0, (12, 12)), (2, (2 + 12 / 8, 2 + 12 / 8)), (3, (18 / 8, 18 / 8))])
def test_four_models_hold_what_each_of_them_does(level, bytes_each):
    """By hand, in bf16 on 8 processes: what stays of policy and critic between updates, and two frozen models."""
    place = replace(EVERYTHING, sharding=Sharding(level=level, ranks=8))
    found, p = held(ppo(), place).updating, MODEL.parameters
    bucket = 4 * costs.REDUCE_BUCKET if level == 3 else 0
    assert found["policy"] == pytest.approx(bytes_each[0] * p + bucket)
    assert found["critic"] == pytest.approx(bytes_each[1] * p + bucket)
    frozen = 2 * p / (8 if level == 3 else 1)
    assert found["reference"] == pytest.approx(frozen) and found["reward_model"] == pytest.approx(frozen)


def test_one_model_is_updated_at_a_time_and_nobody_samples_meanwhile():
    found = held(ppo(), EVERYTHING)
    trained = costs.trained_memory(MODEL.parameters, 2, Sharding(), terms=2)
    passing = sum(trained.values()) - sum(costs.between_updates(trained, 0).values())
    assert found.updating["gradients and buffers"] == pytest.approx(passing)  # the policy's, not the critic's too
    assert found.sampling < sum(found.updating.values())
    assert held(replace(ppo(), sampled=None), EVERYTHING).sampling == 0


def test_adapters_share_one_base():
    full, lora = held(ppo(), EVERYTHING), held(ppo(adapter=AdapterConfig(rank=16)), EVERYTHING)
    own = costs.adapter_parameters(SHAPE, 16)
    assert lora.updating["policy"] == pytest.approx(2 * MODEL.parameters + 12 * own)
    assert lora.updating["reference"] == lora.updating["reward_model"] == 4 * own
    assert lora.updating["critic"] == pytest.approx(12 * own) and lora.peak < 0.5 * full.peak


@pytest.mark.parametrize("gigabytes", [80, 30, 16])
@pytest.mark.parametrize("launch", [Sharding(), Sharding(level=2, ranks=8), Sharding(level=3, ranks=8)])
def test_what_is_said_to_fit_fits(gigabytes, launch):
    place = replace(EVERYTHING, sharding=launch, memory=gigabytes * 1e9)
    work = ppo()
    models = {role.name: MODEL for role in work.roles}
    said = forecast.remedy(work, models, place)
    candidates = list(forecast.remedies(work, place))
    if said == "nothing that was tried would fit":
        assert not any(forecast.fits(held(other, setting), setting) for _, other, setting in candidates)
        return
    names = re.sub(r" would fit$", "", said).split(", ")
    place_of = [changes for changes, _, _ in candidates].index(names)
    assert forecast.fits(held(candidates[place_of][1], candidates[place_of][2]), candidates[place_of][2])
    assert not any(forecast.fits(held(other, setting), setting) for _, other, setting in candidates[:place_of]), "a cheaper one fits too"


def test_a_row_is_no_fuller_than_a_step():
    work = replace(ppo(), update=8192.0)
    assert forecast.fullest_row(work, 1) == 8192 and forecast.fullest_row(work, 4) == 2048
    assert forecast.fullest_row(work, 64) == work.longest
    assert forecast.fullest_row(replace(work, update=3 * 8192.0), 2) == 6144  # two micro-batches each
    assert forecast.fullest_row(replace(work, update=0.0), 64) == 8192  # not known


def test_time_is_arithmetic_over_speed():
    tokens = Tokens(count=1e6, pairs=1e8, summed=1e6)
    work = Work(roles=(Role(name="policy", model=ModelConfig(path="m"), trained=tokens),), row=8192, longest=1, update=8192)
    [one, four] = [forecast.seconds(work, {"policy": MODEL}, ranks, 1e14, 1e12) for ranks in (1, 4)]
    assert one == (0, pytest.approx(costs.training_flops(SHAPE, tokens) / (1e14 * forecast.EFFICIENCY)))
    assert four[1] == pytest.approx(one[1] / 4)
    # decoding 64 rows of 8B reads 15 GB of weights for each of 128 tokens
    sampling = forecast.seconds(ppo(), {role.name: MODEL for role in ppo().roles}, 1, 1e15, 1e12)[0]
    assert sampling == pytest.approx(10 * 128 * 15e9 / 1e12 / forecast.SAMPLING_EFFICIENCY, rel=0.1)


def test_a_plan_reads_config_json_and_says_the_launch(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "model")
    work = Work(roles=(Role(name="policy", model=ModelConfig(path=str(folder))),), row=128, longest=64, update=256)
    said = forecast.forecast(work)
    found = forecast.described_by(ModelConfig(path=str(folder)))
    assert found is not None and found[1] == said["parameters"] and found[0] == costs.shape_of(tiny_config().to_dict())
    assert "in one process" in said["memory"] and "sent" not in said and "time" not in said  # no tokens are known
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    four = forecast.forecast(work)
    assert "each of 4 processes, a copy each" in four["memory"] and "by each process" in four["sent"]
    monkeypatch.setattr(forecast, "here", lambda: Place(sharding=Sharding(), memory=1e6, host=1e6))
    assert forecast.forecast(work)["warning"].startswith("more than there is; ")
    unknown = forecast.forecast(replace(work, roles=(Role(name="policy", model=ModelConfig(path="@base")),)))
    assert unknown == {"memory": "known when @base has run"}


def test_a_hub_models_config_is_enough(monkeypatch):
    """Without its weights: the number of parameters follows from the shape."""
    asked = tiny_config("mistral").to_dict()
    monkeypatch.setattr(forecast, "config_of", lambda model: asked if model.path == "someone/model" else {})
    model = forecast.described_by(ModelConfig(path="someone/model"))
    assert model is not None and model[1] == sum(p.numel() for p in tiny_model("mistral").parameters())
    assert forecast.described_by(ModelConfig(path="nobody/model")) is None


def test_zero3s_launch_is_read(monkeypatch):
    settings = dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3", WORLD_SIZE="8", LOCAL_WORLD_SIZE="8")
    settings |= dict(ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    place = forecast.here()
    assert place.sharding == Sharding(level=3, ranks=8, offload_optimizer=True) and place.beside == 8
    assert place.memory < 24 * GIB
