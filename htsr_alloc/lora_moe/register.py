"""Registers the method with PEFT, here and nowhere else.

PEFT keeps its methods in an enum, ``PeftType``, and ``register_peft_method`` takes only names
that are in it. Enums cannot be extended by inheritance once they have members, so the member is
added to the enum's own tables, which Python has kept under these names from 3.4 to 3.14. Nothing
else of PEFT is touched. Known to work with peft 0.20 to 0.21; the extra ``train`` says so, and
``tests/lora_moe/test_register.py`` runs against whichever is installed.
"""

from __future__ import annotations

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType, register_peft_method

NAME = "lora_moe"


def _member(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


LORA_MOE = _member(NAME.upper())


def register(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Make PEFT know the config and the tuner; a second call changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if LORA_MOE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME, config_cls=config, model_cls=model, prefix=NAME + "_")
