"""Types of the configuration: bounds, texts and the base class of every table."""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron_entropy.procedural import is_source

MAX_COUNT = 2**31
"""Largest value of a count that has no bound of its own."""


def _check_stage_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("a stage's name is at most 64 letters, digits, dots, _ and -, and starts with no dot")
    return name


def _check_path(path: str) -> str:
    if "\0" in path:
        raise ValueError("a path cannot contain the character NUL")
    return path


def check_server_url(url: str) -> str:
    """Return the address of a server unchanged; the empty text is none.

    Raises:
        ValueError: not `http://HOST:PORT` or `https://HOST:PORT`.
    """
    if not url:
        return url
    parts = urlsplit(url)  # raises ValueError for a port that is no number
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or parts.query or parts.fragment:
        raise ValueError("a server is written http://HOST:PORT or https://HOST:PORT")
    if parts.username is not None:
        raise ValueError("the address holds a user name; a token belongs into MEGATRON_ENTROPY_REWARD_TOKEN")
    return url


def _split_commas(value: object) -> object:
    """The items of a text, as a command line writes a list; other values as they are."""
    if not isinstance(value, str):
        return value
    if is_source(value):  # the commas are its own
        return [value]
    items = value.removeprefix("[").removesuffix("]").split(",")  # a shell takes the quotes out of ["a", "b"]
    return [item.strip() for item in items if item.strip()]


PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Processes = Annotated[int, Field(gt=0, le=2**16)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
LearningRate = Annotated[float, Field(ge=0, le=1000)]
Temperature = Annotated[float, Field(gt=0, le=1000)]
FloatPair = Annotated[tuple[float, float], Field(strict=False)]
"""A list of two numbers."""
Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Decay, Decay], Field(strict=False)]
StageName = Annotated[str, AfterValidator(_check_stage_name)]
PathText = Annotated[str, AfterValidator(_check_path)]
ServerUrl = Annotated[str, AfterValidator(check_server_url)]
TextList = Annotated[list[str], BeforeValidator(_split_commas)]
"""A list of texts, or one text with commas between them."""
PathList = Annotated[list[PathText], BeforeValidator(_split_commas)]


class Section(BaseModel):
    """One table of the TOML file. Unknown keys, values of another type, NaN and infinity are errors.

    An integer is accepted where a float is expected.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
