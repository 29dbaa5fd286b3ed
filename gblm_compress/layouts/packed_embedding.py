"""`PackedEmbedding`: an embedding that looks up rows of a packed layer, of the head itself where the two are tied."""

from torch import Tensor, nn

from gblm_compress.layouts.packed_linear import PackedLinear

OWN = "rows"
"""The name of the layer in an embedding that has one of its own."""


class PackedEmbedding(nn.Module):
    """Rows of a packed layer by their numbers. Inference only.

    Args:
        layer: of a layout with `look_up`.
        own: whether the layer is part of this module, and saved with it; otherwise the model holds it elsewhere.
    """

    rows: PackedLinear

    def __init__(self, layer: PackedLinear, own: bool) -> None:
        super().__init__()
        if own:
            self.rows = layer
        else:
            self.__dict__[OWN] = layer  # past torch, which would save it twice
        self.num_embeddings, self.embedding_dim = layer.out_features, layer.in_features

    def forward(self, numbers: Tensor) -> Tensor:
        """Rows [..., embedding_dim] for numbers [...]."""
        return self.rows.look_up(numbers)

    @property
    def weight(self) -> Tensor:
        """All rows, unpacked for the call; see `PackedLinear.weight`."""
        return self.rows.weight

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
