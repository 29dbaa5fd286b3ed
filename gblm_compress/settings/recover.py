"""Settings of the training of a pruned model."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from gblm_compress.settings.fields import MANY, TEXT, GivenText, Panel, Settings, Tokens


class Source(Settings):
    """A text to train on, and its share."""

    dataset: str = Field(description="As calibration.dataset.")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Share of the tokens, beside those of the others."
    )

    def __str__(self) -> str:
        return self.dataset if self.weight == 1 else f"{self.dataset}={self.weight:g}"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Parse `SRC` or `SRC=WEIGHT`."""
        if not isinstance(value, str):
            return value
        dataset, _, weight = value.rpartition("=")
        try:
            return {"dataset": dataset, "weight": float(weight)} if dataset else {"dataset": value}
        except ValueError:  # an equals sign in the name
            return {"dataset": value}


class RecoverSettings(Settings):
    """How a pruned model is trained to predict what the dense one does."""

    data: tuple[Source, ...] = Field(
        (Source(dataset="c4"),),
        min_length=1,
        max_length=100,
        description=f"Texts to train on, each with a weight, for example wiki.txt=0.5,c4=0.5. A text is self (the "
        f"dense model writes it), {TEXT}.",
    )
    tokens: Tokens = Field(2_000_000, description="Tokens to train on: 500k, 2M, … Shorter texts are read again.")
    sequence_length: int = Field(512, ge=2, le=MANY, description="Tokens in a window.")
    batch: Annotated[int, Panel.MORE] = Field(8, ge=1, le=MANY, description="Windows in a step.")
    rate: Annotated[float | None, Panel.MORE] = Field(
        None,
        gt=0,
        description="Peak learning rate, relative to a tensor's root mean square weight. If unset: 0.0007 after the "
        "fits balanced and best, else 0.002.",
    )
    text_weight: Annotated[float, Panel.MORE] = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the text's cross-entropy in the loss; the rest is the divergence from dense.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Random seed for the order of the windows, and for self.")
    disjoint_from: Annotated[tuple[GivenText, ...], Panel.MORE] = Field(
        (),
        max_length=100,
        description="Texts that the data must not hold, such as those of evaluations. Training is refused if the data "
        "has over 2 % of their runs of 13 words. Of a hub dataset the first ten million tokens count.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tokens < self.batch * self.sequence_length:
            raise ValueError(
                f"tokens is {self.tokens:,}, and one step takes {self.batch * self.sequence_length:,}: {self.batch} "
                f"windows of {self.sequence_length}; give more tokens, or smaller steps"
            )
        return self

    @property
    def datasets(self) -> tuple[str, ...]:
        return (*(source.dataset for source in self.data), *self.disjoint_from)

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.sequence_length)
