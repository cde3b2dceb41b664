"""The base of all options, and the types of their values.

A class of options is a pydantic model: its keys, their defaults and what they mean. Sections of the configuration are
such classes, and so are the options of a method or of a kind of head, which stand in the section that names it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# The text in each type says what would be right; it goes into the message about a wrong value.
Count = Annotated[int, Field(ge=1), "a whole number, 1 or more"]
Whole = Annotated[int, Field(ge=0), "a whole number, 0 or more"]
Positive = Annotated[float, Field(gt=0), "a number above 0"]
NotNegative = Annotated[float, Field(ge=0), "a number, 0 or more"]
Fraction = Annotated[float, Field(ge=0, lt=1), "a number, 0 or more and below 1"]
MaybeFraction = Annotated[Fraction | None, "a number, 0 or more and below 1, or null"]
Share = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
Text = Annotated[str, Field(min_length=1), "text (in quotes when it looks like a number)"]
MaybeCount = Annotated[Count | None, "a whole number, 1 or more, or null"]
MaybeText = Annotated[Text | None, "text (in quotes when it looks like a number) or null"]
Globs = Annotated[list[Text], Field(min_length=1), "a glob or a list of globs"]


class Section(BaseModel):
    """Base of all options: unknown keys, wrong types, nan and inf are refused; a whole number is accepted as a
    float."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
