"""A strategy's settings: their names, and their values from texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast, get_type_hints

from htsr_alloc.allocation.strategies import STRATEGIES, Strategy
from htsr_alloc.errors import HtsrError, check_choice
from htsr_alloc.records.convert import convert


def keywords_of(strategy: str) -> set[str]:
    """The keywords of ``Request.of`` that mean something to this strategy, besides the common."""
    check_choice("strategy", strategy, STRATEGIES)
    by_scores = {"metric", "scores", "per_module", "pool", "repair", "score_over"}
    return _settings(strategy) | (by_scores if STRATEGIES[strategy].uses_scores else set())


def read_settings(strategy: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a strategy from texts, each as the type of its field.

    Raises:
        HtsrError: a setting that the strategy does not have, or a text that is not of its type.
    """
    check_choice("strategy", strategy, STRATEGIES)
    kinds: dict[str, Any] = get_type_hints(STRATEGIES[strategy])
    made: dict[str, Any] = {}
    for key, text in texts.items():
        check_choice("setting", key, SETTINGS)
        _check_owner(strategy, key)
        try:
            made[key] = convert(kinds[key], text, key, lax=True)
        except ValueError as error:
            raise HtsrError(f"{error}.") from None
    return made


def _settings(strategy: str) -> set[str]:
    return {each.name for each in fields(STRATEGIES[strategy])}


SETTINGS = sorted({key for name in STRATEGIES for key in _settings(name)})  # of all strategies


def _check_owner(strategy: str, key: str) -> None:
    """Refuse a setting of other strategies."""
    owners = [other for other in STRATEGIES if key in _settings(other)]
    if owners and strategy not in owners:
        raise HtsrError(
            f"`{key}` belongs to the {', '.join(owners)} strategy, not to {strategy}.",
            f"Leave it out, or give `strategy` {owners[0]}.",
        )


def strategy_of(name: str, settings: dict[str, Any]) -> Strategy:
    """The strategy of this name; settings of None or nothing are its defaults.

    Raises:
        HtsrError: a setting that it does not have.
    """
    given = {key: value for key, value in settings.items() if value not in (None, (), [])}
    for key in given:
        _check_owner(name, key)
    return STRATEGIES[name](
        **{
            key: tuple(cast(Sequence[Any], v)) if isinstance(v, Sequence) else v
            for key, v in given.items()
        }
    )
