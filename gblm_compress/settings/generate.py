"""What the text is that a model writes itself."""

from pydantic import Field

from gblm_compress.settings.fields import MANY, Settings, Tokens

WRITTEN = "written"
"""The name that this text has in a recipe, where other texts have theirs."""


class GenerateSettings(Settings):
    """How a model writes text to calibrate and train on."""

    tokens: Tokens = Field(400_000, description="Tokens to write: 400k, 2M, …")
    starts: str | None = Field(
        None,
        description="A text, as calibration.dataset: three quarters of the pieces begin with some of its words, the "
        "others from nothing. All begin from nothing if unset.",
    )
    sequence_length: int = Field(300, ge=1, le=MANY, description="Tokens in a piece, beside those it begins with.")
    batch: int = Field(96, ge=1, le=MANY, description="Pieces that are written at once.")
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Divides the logits: below 1 likely tokens are drawn more often."
    )
    top_k: int = Field(100, ge=1, le=MANY, description="Tokens are drawn from so many that are likeliest.")
    start_token: str | None = Field(
        None,
        description="The token that stood between texts when the model was trained; <|endoftext|>, or the tokenizer's "
        "first token, if unset.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Random seed for starts and tokens.")
