"""In which order the channels of a dense model are to lie before N:M prunes it."""

from typing import Annotated

from pydantic import Field, field_validator

from gblm_compress.errors import UsageError
from gblm_compress.methods.patterns import Pattern
from gblm_compress.settings.fields import MANY, Panel, PatternName, Settings


class ReorderSettings(Settings):
    """What the channels are reordered for."""

    pattern: PatternName = Field("2:4", description="The N:M pattern that the model is to be pruned to.")
    rounds: Annotated[int, Panel.METHOD] = Field(
        24, ge=1, le=MANY, description="How often every group of M channels may change one with the others."
    )

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str) -> str:
        try:
            pattern = Pattern(value)
        except UsageError as error:
            raise ValueError(str(error)) from error
        if pattern.n_m is None:
            raise ValueError(f"pattern {value!r} does not depend on the order of channels; give N:M, for example 2:4")
        return pattern.name

    @property
    def n_m(self) -> tuple[int, int]:
        """N and M of the pattern."""
        n, m = self.pattern.split(":")
        return int(n), int(m)
