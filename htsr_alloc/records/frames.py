"""Records as pandas tables, where pandas is installed."""

# pyright: reportMissingTypeStubs=false
# (of pandas)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: Sequence[Any], kind: type) -> DataFrame:
    """One row a record of the dataclass ``kind``, one column a field, null as missing.

    Raises:
        HtsrError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise HtsrError(
            f"A table needs pandas, which cannot be imported ({error}).", "pip install pandas"
        ) from None
    names = [field.name for field in fields(kind)]
    return pandas.DataFrame([[getattr(row, name) for name in names] for row in rows], columns=names)
