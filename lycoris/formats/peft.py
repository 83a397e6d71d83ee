"""PEFT's adapter configuration: ranks, alphas, and the options that change the maths.

It is an `adapter_config.json` beside the adapter, or, in files of diffusers, JSON in the header's metadata under
`lora_adapter_metadata`, where keys carry the component's name. Source: PEFT 0.21.2, `LoraConfig.update_layer` and
`peft.utils.other.get_pattern_key`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lycoris.checkpoint.header import parse_json
from lycoris.errors import RefusedInput, os_reason, shown

CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"

PEFT_TYPES: dict[str, tuple[str, str]] = {
    "LORA": ("locon", "lora_alpha"),
    "LOHA": ("loha", "alpha"),
    "LOKR": ("lokr", "alpha"),
}
"""peft_type -> (algorithm, the option that holds its alpha)."""

REFUSED_OPTIONS: dict[str, str] = {
    "modules_to_save": "whole modules that replace the base's",
    "trainable_token_indices": "embedding rows that replace the base's",
    "target_parameters": "factors for parameters that are not layers",
    "layer_replication": "layers that the base does not have",
    "lora_bias": "a bias in the factors",
    "use_qalora": "pooled inputs, which no weight can hold",
    "alora_invocation_tokens": "changes that begin at a token, which no weight can hold",
    "arrow_config": "routing between adapters, which no weight can hold",
    "use_bdlora": "block-diagonal factors",
    "kasa_config": "factors in the space of the base's singular values",
    "monteclora_config": "factors drawn at random",
    "megatron_config": "factors of Megatron's parallel layers",
}
"""Option -> what an adapter with it holds; set (not false, null or empty), it refuses the file."""

BASE_CHANGING_INITIALISERS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` by which training starts from another base than the published one."""

_MAX_RANK = 2**31
_SAVE_AGAIN = "save the adapter again"
_Value = TypeVar("_Value", int, float)


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What a PEFT configuration says about scales.

    Attributes:
        source: Where it stands, for messages.
        algorithm: Name in `lycoris.formats.keys.ALGORITHMS`.
        rank, alpha: For modules that no pattern matches.
        rank_patterns, alpha_patterns: (regular expression, value); the first that matches a module's path counts.
        rank_stabilised: Divide alpha by the root of the rank (rsLoRA).
        dora: Whether modules carry a magnitude vector.
        fan_in_fan_out: Whether the base stores its weights as [in, out] (GPT-2's Conv1D).
    """

    source: str
    algorithm: str
    rank: int
    alpha: float
    rank_patterns: tuple[tuple[re.Pattern[str], int], ...]
    alpha_patterns: tuple[tuple[re.Pattern[str], float], ...]
    rank_stabilised: bool
    dora: bool
    fan_in_fan_out: bool

    def rank_of(self, path: str) -> int:
        """Rank of the module at `path`."""
        return next((rank for pattern, rank in self.rank_patterns if pattern.match(path)), self.rank)

    def alpha_of(self, path: str) -> float:
        """Alpha of the module at `path`."""
        return next((alpha for pattern, alpha in self.alpha_patterns if pattern.match(path)), self.alpha)

    def scale_of(self, path: str) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA; LoKr with both factors full included."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_config(path: Path) -> PeftConfig:
    """Read an adapter_config.json.

    Raises:
        RefusedInput: it cannot be read, or what it says is not supported.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RefusedInput(
            f"{path}: cannot be read ({os_reason(error)}); mend that or save the adapter again"
        ) from error
    return parse_config(parse_json(raw, path, "configuration"), str(path))


def read_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, PeftConfig]:
    """The configurations in a header's metadata, by the prefix of the modules they hold for ("" for all).

    Raises:
        RefusedInput: it is not JSON, or what it says is not supported.
    """
    if METADATA_KEY not in metadata:
        return {}
    options = parse_json(metadata[METADATA_KEY].encode(), path, METADATA_KEY)
    split: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        component, dot, option = key.rpartition(".")
        split.setdefault(component + dot, {})[option] = value
    return {prefix: parse_config(part, f"{path}: {METADATA_KEY}") for prefix, part in split.items()}


def parse_config(options: Mapping[str, Any], source: str) -> PeftConfig:
    """Check `options` and take out what a merge needs.

    Args:
        options: A PEFT configuration as JSON has it.
        source: Where it stands, for messages.

    Raises:
        RefusedInput: a peft_type or an option that is not supported, or a rank or alpha that is no such thing.
    """
    peft_type = options.get("peft_type", "LORA")
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPES:
        raise RefusedInput(
            f"{source}: peft_type {shown(peft_type)} is not supported; give one of {', '.join(PEFT_TYPES)}"
        )
    algorithm, alpha_option = PEFT_TYPES[peft_type]
    for option, what in REFUSED_OPTIONS.items():
        if options.get(option):
            raise RefusedInput(
                f"{source}: {option} is set: the adapter holds {what}, which is not supported; merge it with PEFT"
            )
    initialiser = options.get("init_lora_weights")
    if isinstance(initialiser, str) and initialiser.lower().startswith(BASE_CHANGING_INITIALISERS):
        raise RefusedInput(
            f"{source}: init_lora_weights is {shown(initialiser)}: the adapter belongs to a base that its initialiser "
            "changed; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    return PeftConfig(
        source=source,
        algorithm=algorithm,
        rank=_rank(options.get("r"), "r", source),
        alpha=_alpha(options.get(alpha_option), alpha_option, source),
        rank_patterns=_patterns(options, "rank_pattern", _rank, source),
        alpha_patterns=_patterns(options, "alpha_pattern", _alpha, source),
        rank_stabilised=bool(options.get("use_rslora")),
        dora=bool(options.get("use_dora")),
        fan_in_fan_out=bool(options.get("fan_in_fan_out")),
    )


def _rank(value: Any, option: str, source: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise RefusedInput(f"{source}: {option} is {shown(value)}, wanted a rank of at least 1; {_SAVE_AGAIN}")
    return value


def _alpha(value: Any, option: str, source: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise RefusedInput(f"{source}: {option} is {shown(value)}, wanted a finite number; {_SAVE_AGAIN}")
    return float(value)


def _patterns(
    options: Mapping[str, Any], option: str, convert: Callable[[Any, str, str], _Value], source: str
) -> tuple[tuple[re.Pattern[str], _Value], ...]:
    """A pattern is a regular expression for a module's path or for its last dotted parts."""
    patterns = options.get(option) or {}
    if not isinstance(patterns, dict):
        raise RefusedInput(f"{source}: {option} is {shown(patterns)}, wanted an object of patterns; {_SAVE_AGAIN}")
    compiled = []
    for text, value in patterns.items():
        try:
            pattern = re.compile(rf"(.*\.)?({text})$")
        except re.error as error:
            raise RefusedInput(
                f"{source}: {option} {text!r} is no regular expression ({error}); {_SAVE_AGAIN}"
            ) from None
        compiled.append((pattern, convert(value, f"{option}[{text!r}]", source)))
    return tuple(compiled)
