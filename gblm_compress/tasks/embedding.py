"""Sentence embedding: a text becomes a vector of length 1, and similar texts have similar vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gblm_compress.errors import DataError, ModelError, translated
from gblm_compress.storage.records import read_json
from gblm_compress.tasks import passages
from gblm_compress.tasks.metrics import Metric, spearman
from gblm_compress.tasks.passages import PassageTask, Row
from gblm_compress.tasks.task import Sample, Samples, random_numbers

if TYPE_CHECKING:
    from torch import Tensor

NEAREST = 10  # neighbours of a text that a pruned model should keep

POOLINGS = ("mean", "cls", "max", "lasttoken")
_MODE = "pooling_mode_"
_MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers


class Embedding(PassageTask):
    """Samples are passages without labels. The embedding is pooled over all tokens but padding, and normalised.

    The distance to the dense model's embedding has no gradient at that model. So the loss is the embedding times a
    random direction r ~ N(0, 1) of each sample. Its mean squared gradient is the diagonal of JᵀJ (Gauss-Newton).
    """

    help = "a model of text embeddings"
    auto_class = "AutoModel"
    output = "last_hidden_state"
    loss_unit = "1 - cosine with dense"
    companions = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*/*")

    def __init__(self, pooling: str = "mean") -> None:
        self.pooling = pooling

    def of_folder(self, folder: Path) -> Embedding:
        modules = _read(folder / "modules.json", list)
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
        if unknown := [kind for kind in kinds if kind not in _MODULES]:
            raise ModelError(
                f"{str(folder / 'modules.json')!r}: embeddings go through {unknown[0]}, which is not supported; "
                f"supported modules are {', '.join(_MODULES)}"
            )
        path = folder / "1_Pooling" / "config.json"
        config = _read(path, dict)
        if not config:
            return self
        modes = config.get("pooling_mode") or [
            name.removeprefix(_MODE).removesuffix("_token").removesuffix("_tokens")
            for name, chosen in config.items()
            if name.startswith(_MODE) and chosen is True
        ]
        modes = [modes] if isinstance(modes, str) else modes
        if len(modes) != 1 or modes[0] not in POOLINGS:
            raise ModelError(
                f"{str(path)!r}: pooling by {' and '.join(map(str, modes)) or 'nothing'} is not supported; "
                f"supported are {', '.join(POOLINGS)}, one at a time"
            )
        return Embedding(modes[0])

    def rows(self, dataset: str) -> list[Row]:
        return _alone(super().rows(dataset))

    def evaluation(self, processor: Any, config: Any, dataset: str, length: int, limit: int | None) -> Samples:
        """The sentences of each pair in turn, both with its score as "labels"; or passages without labels."""
        import torch

        rows = passages.read(dataset, "evaluation")[:limit]
        if not any(row.score is not None for row in rows):
            return passages.encode(processor, config, _alone(rows), length, pad=False)
        for row in rows:
            if row.score is None or len(row.texts) < 2:
                raise DataError(f"{row.where}: every row needs two sentences and a score")
        alone = [Row((text,)) for row in rows for text in row.texts]
        found = passages.encode(processor, config, alone, length, pad=False)
        scores = [torch.tensor([[row.score]]) for row in rows for _ in row.texts]
        return [{**sample, "labels": score} for sample, score in zip(found, scores, strict=True)]

    def judged(self, prediction: Tensor, sample: Sample) -> Tensor:
        """The embedding [1, hidden size], of length 1."""
        from torch.nn.functional import normalize

        tokens = super().judged(prediction, sample)
        if self.pooling == "max":
            pooled = tokens.amax(0)
        elif self.pooling == "mean":
            pooled = tokens.mean(0)
        else:
            pooled = tokens[0 if self.pooling == "cls" else -1]
        return normalize(pooled.float(), dim=0).unsqueeze(0)

    def judged_values(self, config: Any, length: int) -> int:
        return int(config.get_text_config().hidden_size)

    def loss(self, judged: Tensor, sample: Sample) -> Tensor:
        direction = random_numbers(sample, judged.shape[-1], normal=True)
        return judged[0] @ direction.to(judged.device)

    def divergence(self, dense: Tensor, judged: Tensor) -> Tensor:
        """1 - cosine: half the squared distance."""
        return 1 - (dense * judged).sum(-1).mean()

    def measure(self, judged: Tensor, sample: Sample) -> tuple[Tensor, float | None]:
        return judged[0], float(sample["labels"]) if "labels" in sample else None

    def metrics(self, measured: Sequence[Any]) -> dict[str, Metric]:
        if measured[0][1] is None:
            return {}
        pairs = list(zip(measured[::2], measured[1::2], strict=True))
        cosines = [float(one @ other) for (one, _), (other, _) in pairs]
        return {"spearman": spearman(cosines, [score for (_, score), _ in pairs])}

    def fidelity(self, reference: Tensor, judged: Tensor) -> dict[str, float]:
        return {"cosine": float((reference * judged).sum())}

    def agreement(self, dense: Sequence[Any], measured: Sequence[Any]) -> dict[str, float]:
        """The share of each text's ten nearest neighbours in the dense model that it keeps here."""
        import torch

        ours, theirs = (torch.stack([vector for vector, _ in found]) for found in (measured, dense))
        return {"top10_agreement": top_agreement(theirs, ours, NEAREST)} if len(ours) > NEAREST else {}


def _alone(rows: Sequence[Row]) -> list[Row]:
    return [Row((text,)) for text in dict.fromkeys(text for row in rows for text in row.texts)]


def _read(path: Path, kind: type) -> Any:
    with translated(lambda said: ModelError(f"{str(path)!r} cannot be read ({said})")):
        return read_json(path, kind) if path.exists() else kind()


def top_agreement(reference: Tensor, vectors: Tensor, count: int) -> float:
    """The share of a text's `count` nearest neighbours that both have; both are unit vectors [texts, …]."""
    kept = 0
    for start in range(0, len(vectors), 1024):
        nearest = []
        for of_all in (reference, vectors):
            cosines = of_all[start : start + 1024] @ of_all.T
            cosines.diagonal(start).fill_(-math.inf)  # a text is not its own neighbour
            nearest.append(cosines.topk(count).indices)
        kept += int((nearest[0].unsqueeze(2) == nearest[1].unsqueeze(1)).sum())
    return kept / (count * len(vectors))
