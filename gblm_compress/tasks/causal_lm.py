"""Causal language modelling: every token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gblm_compress.settings.fields import SELF
from gblm_compress.tasks.metrics import Metric, mean_metric, perplexity
from gblm_compress.tasks.task import Sample, Samples, Task
from gblm_compress.tasks.text import consecutive_windows, drawn_windows, load_text, padded_ids, tokenize, vocabulary_of

if TYPE_CHECKING:
    from torch import Tensor

LOSS_TOKENS = 128  # tokens with logits in memory at once: little compared with a block, enough for fast products


class CausalLM(Task):
    """Samples are full windows of text, without padding; the loss is the mean cross-entropy of the next token."""

    help = "a causal language model"
    auto_class = "AutoModelForCausalLM"
    generates = True

    def data_files(self, dataset: str) -> list[Path]:
        return [] if dataset == SELF else super().data_files(dataset)

    def calibration(self, processor: Any, config: Any, dataset: str, samples: int, length: int, seed: int) -> Samples:
        windows = drawn_windows(processor, vocabulary_of(config), dataset, samples, length, seed)
        return [{"input_ids": window} for window in windows]

    def probe(self, processor: Any, config: Any) -> Sample:
        """The start of the text: tokenizing all of it takes longer than verifying a small model."""
        ids = tokenize(processor, vocabulary_of(config), load_text("demo", "calibration")[:4096])
        return {"input_ids": ids[:64].unsqueeze(0)}

    def training(self, processor: Any, config: Any, dataset: str, length: int, tokens: int) -> Samples:
        windows = consecutive_windows(processor, vocabulary_of(config), dataset, "calibration", length, tokens)
        return [{"input_ids": window} for window in windows]

    def evaluation(self, processor: Any, config: Any, dataset: str, length: int, limit: int | None) -> Samples:
        """Non-overlapping windows, as in the papers of GPTQ, SparseGPT, Wanda and GBLM."""
        tokens = None if limit is None else limit * length
        windows = consecutive_windows(processor, vocabulary_of(config), dataset, "evaluation", length, tokens)
        return [{"input_ids": window} for window in windows[:limit]]

    def example(self, config: Any) -> Sample:
        return padded_ids(vocabulary_of(config), slice(2))

    def judged_values(self, config: Any, length: int) -> int:
        return (length - 1) * vocabulary_of(config)

    def arguments(self, sample: Sample) -> dict[str, Any]:
        return {**sample, "use_cache": False}

    def judged(self, prediction: Tensor, sample: Sample) -> Tensor:
        """Logits [tokens - 1, vocabulary], of all tokens but the last."""
        return prediction[0, :-1]

    def loss(self, judged: Tensor, sample: Sample) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(judged, sample["input_ids"][0, 1:])

    def metrics(self, measured: Sequence[float]) -> dict[str, Metric]:
        cross_entropy = mean_metric(measured)
        return {"perplexity": perplexity(cross_entropy), "cross_entropy": cross_entropy}

    def loss_gradient(self, predict: Callable[[Sample, Tensor], Tensor], sample: Sample, hidden: Tensor) -> Tensor:
        """A chunk of tokens at a time, to save memory. Everything after the blocks works on each token alone."""
        import torch

        ids = sample["input_ids"]
        gradient = torch.zeros_like(hidden)
        last = ids.shape[1] - 1
        for start in range(0, last, LOSS_TOKENS):
            end = min(start + LOSS_TOKENS, last)
            leaf = hidden[:, start:end].detach().requires_grad_()
            with torch.enable_grad():
                logits = predict({"input_ids": ids[:, start:end]}, leaf)
            # The gradient to the logits: probabilities, less one for the token that follows.
            errors = torch.softmax(logits.detach(), dim=-1, dtype=torch.float32)
            errors[0, torch.arange(end - start, device=ids.device), ids[0, start + 1 : end + 1]] -= 1
            logits.backward(errors.div_(last).to(logits.dtype))  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            gradient[:, start:end] = leaf.grad
        return gradient
