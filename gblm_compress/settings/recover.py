"""What the training of a pruned model is: its text, length, loss and mask."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from gblm_compress.methods.choices import describe
from gblm_compress.methods.mask_rules import LAST_EXCHANGE, MASK_RULES
from gblm_compress.methods.optimisers import OPTIMISERS
from gblm_compress.settings.fields import MANY, FitDtype, Panel, Settings, Tokens, TokensOrNone

if TYPE_CHECKING:  # a type checker cannot read a registry, nor a type that is made
    MaskName: TypeAlias = str
    OptimiserName: TypeAlias = str
else:
    MaskName = Literal[*MASK_RULES]
    OptimiserName = Literal[*OPTIMISERS]


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
        """`SRC` or `SRC=WEIGHT`, as recipes and the command line may write it."""
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
        description="Texts to train on, and their weights; as calibration.dataset.",
    )
    tokens: Tokens = Field(
        2_000_000, description="Tokens to train on: 500k, 2M, …; texts that are shorter are read again."
    )
    sequence_length: int = Field(512, ge=2, le=MANY, description="Tokens in a window.")
    batch: int = Field(8, ge=1, le=MANY, description="Windows in a step.")
    rate: float = Field(
        0.002, gt=0, description="Adam's step at its largest, in shares of a tensor's root mean square weight."
    )
    text_weight: float = Field(
        0.0, ge=0, le=1, description="Share of the loss that is the cross-entropy of the text; the rest is from dense."
    )
    hidden_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the hidden states' relative squared error, added to the loss (SquareHead, arXiv "
        "2310.06927); takes another forward pass of the dense model where texts are read again.",
    )
    mask: MaskName = Field("fixed", description=f"Whether the mask is learned. {describe(MASK_RULES)}.")
    mask_every: int = Field(
        10, ge=1, le=MANY, description="Steps between two changes of the mask, read with masks sr-ste and exchange."
    )
    mask_decay: float = Field(
        0.0002, ge=0, description="Decay of pruned weights, added to their gradients, read with mask sr-ste."
    )
    mask_pull: float = Field(
        0.2,
        ge=0,
        allow_inf_nan=False,
        description="How strongly groups are drawn to the pattern, beside a step of training; read with mask proximal.",
    )
    evaluate_every: TokensOrNone = Field(
        0, description="Tokens between two looks at held-out text; a tenth of all if 0."
    )
    patience: int = Field(3, ge=1, le=MANY, description="Looks without a new best that end the training.")
    checkpoint_minutes: Annotated[float, Panel.RESOURCES] = Field(
        10.0, gt=0, description="Minutes between two checkpoints, from which --resume goes on."
    )
    fit_dtype: Annotated[FitDtype, Panel.RESOURCES] = Field(
        "auto",
        description="Dtype of products; what is trained is always float32. auto: the one that the machine "
        "multiplies faster in.",
    )
    optimiser: Annotated[OptimiserName, Panel.RESOURCES] = Field(
        "adam", description=f"What moves the weights. {describe(OPTIMISERS)}."
    )
    gradient_checkpointing: Annotated[bool, Panel.RESOURCES] = Field(
        False,
        description="Keep only the inputs of blocks, and run each again for its gradients: long windows take less "
        "memory and a third more time, and the result is the same.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Random seed for the order of the windows.")
    disjoint_from: tuple[str, ...] = Field(
        (),
        max_length=100,
        description="Texts that the data must not hold, such as those of evaluations: training is refused where more "
        "than 2 % of their runs of 13 words are in it. Of a hub dataset the first ten million tokens count.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        read, fields = MASK_RULES[self.mask].reads, type(self).model_fields
        for key in sorted({key for rule in MASK_RULES.values() for key in rule.reads}.difference(read)):
            if getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} would do nothing with mask {self.mask}")
        if "mask_every" in read and self.steps and self.mask_every > LAST_EXCHANGE * self.steps:
            raise ValueError(
                f"mask {self.mask} changes every {self.mask_every} steps, and no more in the last quarter of "
                f"{self.steps} steps, which is never; give more tokens, or a smaller mask_every"
            )
        if self.tokens < self.batch * self.sequence_length:
            raise ValueError(
                f"tokens is {self.tokens:,}, and one step takes {self.batch * self.sequence_length:,}: {self.batch} "
                f"windows of {self.sequence_length}; give more tokens, or smaller steps"
            )
        return self

    @property
    def datasets(self) -> tuple[str, ...]:
        """All texts that are read."""
        return (*(source.dataset for source in self.data), *self.disjoint_from)

    @property
    def steps(self) -> int:
        """How many steps the tokens make."""
        return self.tokens // (self.batch * self.sequence_length)

    @property
    def look_every(self) -> int:
        """Steps between two looks at held-out text."""
        tokens = self.evaluate_every or self.tokens / 10
        return max(1, round(tokens / (self.batch * self.sequence_length)))
