"""What is rewarded: functions `(row, response, **options) -> float`, their options and weights, checked before anything runs.

`row` is the prompt row with all its columns. A function may say what it stands on (`@requires`), so that a missing
package or protection is known when a pipeline is planned. Imports no torch: worker processes start with this file.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.config import did_you_mean, resolve, runtime, when

Reward = Callable[..., float]
OPTION_TYPES = (bool, int, float, str)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One part of the reward."""

    function: str
    """"package.module:function", called as function(row, response, **options) -> float."""
    weight: float = 1.0
    """Its share of the sum; 0 only logs it."""
    options: tuple[str, ...] = ()
    """Keyword arguments as "name=value", read by the type that the function declares for them."""
    name: str = ""
    """What the part is called in the metrics; "" takes the function's own name."""

    @property
    def part(self) -> str:
        """The name under which values and metrics appear."""
        return self.name or self.function.rpartition(":")[2]

    def problems(self) -> list[str]:
        found = when((math.isinf(self.weight), f"weight={self.weight} must be finite; 1 works, 0 only logs the part"))
        try:
            function = resolve(self.function)
        except ValueError as error:
            return [*found, f"function: {error}"]
        except Exception as error:  # whatever the user's module does while it is imported
            return [*found, f"function={self.function!r} cannot be imported: {type(error).__name__}: {error}"]
        options, wrong = read_options(function, self.options)
        return [*found, *(wrong or call_problems(function, options))]


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """The reward of a response: a weighted sum of functions, run in worker processes."""

    functions: tuple[RewardConfig, ...] = ()
    """The parts of the sum."""
    seconds_per_response: float = 10.0
    """Wall time that one function may take for one response; then its process is killed and the response stays unscored."""
    max_failed_fraction: float = runtime(0.05)
    """The run stops when a larger share of a rollout's responses could not be scored."""
    workers: int = runtime(4)
    """Worker processes per rank."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts, in order."""
        return tuple(function.part for function in self.functions)

    @property
    def weights(self) -> dict[str, float]:
        """Part name -> weight."""
        return {function.part: float(function.weight) for function in self.functions}

    def problems(self) -> list[str]:
        twice = sorted({part for part in self.parts if self.parts.count(part) > 1})
        return when(
            (bool(twice), f"functions: {', '.join(twice)} is the name of several parts; give each its own `name`"),
            (
                bool(self.functions) and not any(function.weight for function in self.functions),
                "functions: every weight is 0, so that nothing is rewarded; weight=1 works",
            ),
            (
                not 0 < self.seconds_per_response < math.inf,
                f"seconds_per_response={self.seconds_per_response} must be positive and finite; 10 works",
            ),
            (
                not 0 <= self.max_failed_fraction <= 1,
                f"max_failed_fraction={self.max_failed_fraction} must lie in [0, 1]; 0.05 works",
            ),
            (self.workers < 1, f"workers={self.workers} must be at least 1; 4 works"),
        )


# --- what a function stands on


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """Modules that a reward function imports when it is called, and a check of its options and of the machine."""

    modules: tuple[str, ...] = ()
    check: Callable[..., list[str]] | None = None


def requires(*modules: str, check: Callable[..., list[str]] | None = None) -> Callable[[Reward], Reward]:
    """Says what a reward function stands on.

    `modules` are looked for when a run is planned and imported by each worker before its first response, so that no
    response's time limit pays for a slow import. `check(**options)` returns texts of what keeps the function from
    working, quickly and without side effects.
    """

    def mark(function: Reward) -> Reward:
        vars(function)["requirements"] = Requirements(modules=modules, check=check)
        return function

    return mark


def requirements(function: Reward) -> Requirements:
    """What `requires` said about a function, or nothing."""
    return getattr(function, "requirements", Requirements())


# --- options and calls


def read_options(function: Reward, texts: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments from "name=value" texts by the function's declared types, and what is wrong with them."""
    known = option_types(function)
    options: dict[str, Any] = {}
    found: list[str] = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            found.append(f"options: {text!r} has no '='; 'name=value' works")
        elif name not in known:
            found.append(f"options: {function.__name__} has no option {name!r}{did_you_mean(name, known)}")
        elif name in options:
            found.append(f"options: {name!r} is given twice")
        else:
            options[name] = read_value(known[name], value)
            if options[name] is None:
                found.append(f"options: {name}={value!r} must be of type {known[name].__name__}")
    return options, found


def option_types(function: Reward) -> dict[str, type]:
    """Keyword parameters of a reward function and their types: declared, else the default's, else str."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[2:]
        declared = typing.get_type_hints(function)
    except (ValueError, TypeError, NameError):
        return {}
    types = {}
    for parameter in parameters:
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            plain = str if parameter.default in (parameter.empty, None) else type(parameter.default)
            hint = declared.get(parameter.name, plain)
            types[parameter.name] = hint if hint in OPTION_TYPES else str
    return types


def read_value(kind: type, text: str) -> bool | int | float | str | None:
    """A value of one of OPTION_TYPES from its text; None when the text is of another type."""
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower())
    try:
        return kind(text)
    except ValueError:
        return None


def call_problems(function: Reward, options: dict[str, Any]) -> list[str]:
    """Why function(row, response, **options) could not work, as far as can be known without calling it."""
    name = getattr(function, "__name__", repr(function))
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function) or inspect.isclass(function):
        return [f"function: {name} must be a plain function that returns a float; `def {name}(row, response): return 1.0` works"]
    try:
        inspect.signature(function).bind({}, "", **options)
    except TypeError as error:
        return [f"function: {name} cannot be called as {call_text(name, options)}: {error}; `def {name}(row, response)` works"]
    except ValueError:  # written in C, without a signature
        pass
    needs = requirements(function)
    missing = [module for module in needs.modules if importlib.util.find_spec(module) is None]
    found = [f"function: {name} needs the package {module}, which is not installed; `pip install {module}`" for module in missing]
    return found + [f"function: {name}: {text}" for text in (needs.check(**options) if needs.check else [])]


def call_text(name: str, options: dict[str, Any]) -> str:
    return f"{name}({', '.join(['row', 'response', *(f'{key}={value!r}' for key, value in options.items())])})"
