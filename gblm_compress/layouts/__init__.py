"""How zeros are packed, the linear layer that multiplies packed weights, and loading it through transformers."""
