"""YAML as JSON has it: plain data, no key twice, no merge keys, every number finite."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from htsr_alloc import files
from htsr_alloc.errors import HtsrError

LIMIT = 1 << 20  # bytes
FLOAT, MERGE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:merge"


def _error(said: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(problem=said, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag == MERGE:  # a few of them can stand for millions of keys
                raise _error("the merge key << is not allowed", key)
            if key.value in seen:
                raise _error(f"duplicate key {key.value!r}", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: Any) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise _error(f"{node.value} is not a finite number", node)
        return value


_Loader.add_constructor(FLOAT, _Loader.construct_yaml_float)
# 3e-4 is a number in YAML 1.2 and in JSON; PyYAML follows YAML 1.1, where it is text.
_Loader.add_implicit_resolver(
    FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> Any:
    """The data of a YAML file of at most 1 MiB.

    Raises:
        HtsrError: it cannot be read, is not YAML, or has a merge key, a duplicate key or a
            number that is not finite; the sentence names the line.
    """
    try:
        return yaml.load(files.read_bytes(path, LIMIT).decode("utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise HtsrError(f"{path.name}{where}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        # the last ones: a wrong value under an explicit tag, such as !!int ""
        raise HtsrError(f"{path.name} is not YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise HtsrError(f"{path.name} is nested too deeply.") from None
