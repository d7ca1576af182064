"""What is said about an iteration: means of its rollout and its updates, a few responses for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from posttrain.ops import kl_k1, kl_k3, sum_by_length

if TYPE_CHECKING:
    from posttrain.data.chat import Chat
    from posttrain.engine.tally import Tally, UpdateLog
    from posttrain.rollout.experience import Experience
    from posttrain.run import Run

IMBALANCE = 10


def rollout_summary(experience: Experience) -> dict[str, float]:
    """Means over responses (kl in nats, length, share that ended by itself) or over tokens (entropy)."""
    lengths = experience.lengths
    summary = {
        "entropy": float(experience.entropy.mean()),
        "response_length": sum(lengths) / len(lengths),
        "share_finished": float(experience.finished.float().mean()),
    }
    if len(experience.ref_logprobs):
        pair = experience.logprobs, experience.ref_logprobs
        summary["kl"] = float(sum_by_length(kl_k1(*pair), lengths).mean())
        summary["kl_k3"] = float(sum_by_length(kl_k3(*pair), lengths).mean())
    return summary


def update_summary(log: UpdateLog, tally: Tally, ptx_coef: float, run: Run) -> dict[str, float]:
    """Means over the updates that were made and over their tokens; `ptx_loss` without its weight. Warns of refused updates and of
    gradients that are far apart, as clipping acts on their sum: the larger one silences the other."""
    totals = tally.total(run.engine.world)
    tokens = totals.pop("tokens", 0.0)
    metrics = log.means() | {name: total / tokens for name, total in totals.items()}
    if "ptx_loss" in metrics:
        metrics["ptx_loss"] /= ptx_coef
    for text in log.warnings():
        run.warn(text)
    norms = metrics.get("policy_grad_norm", 0.0), metrics.get("ptx_grad_norm", 0.0)
    if min(norms) > 0 and max(norms) > IMBALANCE * min(norms):
        larger, smaller = ("policy", "ptx") if norms[0] > norms[1] else ("ptx", "policy")
        run.warn(
            f"the {larger} gradient was more than {IMBALANCE} times the {smaller} gradient, which then hardly counts; "
            "ptx_coef balances them"
        )
    return metrics


def sample_rows(
    experience: Experience, chat: Chat, numbers: Mapping[str, Tensor], chosen: Sequence[int] = (0, 1, 2, 3)
) -> list[dict[str, Any]]:
    """The `chosen` responses of an iteration for people to read, with `numbers` (B,) about each."""
    rollout = experience.rollout
    if len(experience.ref_logprobs):
        numbers = {**numbers, "kl": sum_by_length(kl_k1(experience.logprobs, experience.ref_logprobs), experience.lengths)}
    return [
        {
            "prompt": chat.decode(rollout.prompts[int(rollout.prompt_of[i])]),
            "response": chat.decode_response(rollout.responses[i]),
            **{name: float(values[i]) for name, values in numbers.items()},
            "finished": rollout.finished[i],
        }
        for i in chosen
        if i < len(rollout.responses)
    ]
