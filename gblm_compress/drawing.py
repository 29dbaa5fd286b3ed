"""What the pictures share."""


def literal(text: str) -> str:
    """A text as matplotlib draws it literally: `$` begins no formula, and what is not printable is replaced."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text).replace("$", r"\$")
