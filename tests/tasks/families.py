"""Tiny random encoders of several families, with a byte tokenizer that has a pad token."""

import io
from pathlib import Path
from typing import Any

import pyarrow
import torch
import transformers
from pyarrow import parquet
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gblm_compress.models.architecture import as_matrix, prunable_layers, weight_matrix
from gblm_compress.models.source import ModelSource
from gblm_compress.models.tiny import VOCABULARY, byte_tokenizer

PAD = VOCABULARY  # the token behind those of bytes
SIZES = {
    "vocab_size": VOCABULARY + 1, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 130, "pad_token_id": PAD,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"hidden_dim": 64},
    "modernbert": {
        "global_attn_every_n_layers": 2, "local_attention": 16,
        "cls_token_id": 0, "sep_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
    },
    "albert": {"num_hidden_layers": 3, "embedding_size": 16},  # of one block
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
    },
}  # fmt: skip


def table(made: pyarrow.Table | None = None, **columns: Any) -> bytes:
    """A .parquet file."""
    content = io.BytesIO()
    parquet.write_table(made or pyarrow.table(columns), content)
    return content.getvalue()


def tokenizer() -> Any:
    made = byte_tokenizer()
    made.add_special_tokens({"pad_token": "<pad>"})
    return made


def config_of(family: str) -> Any:
    return CONFIG_MAPPING[family](**SIZES | FAMILIES[family])


def encoder(family: str, auto_class: str = "AutoModel") -> Any:
    """A model with three labels, if it has any."""
    config = config_of(family)
    config.num_labels = 3
    return random_model(config, auto_class)


def random_model(config: Any, auto_class: str) -> Any:
    """A model whose weights are large enough for its outputs to depend visibly on the input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.2)
    return model


def written(folder: Path, family: str, auto_class: str = "AutoModel") -> ModelSource:
    encoder(family, auto_class).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return ModelSource(folder.name, folder)


def inputs_of(model: Any, layers: dict[str, Any], sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each layer gets in a forward pass of the whole model, in all of its runs, [tokens, in_features]."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0].detach()))
        for name, layer in layers.items()
    ]
    model(**sample)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in runs]) for name, runs in found.items()}


SCORES = {
    "gblm": lambda weight, activations, gradients, alpha: weight * (activations + alpha * gradients),
    "wanda": lambda weight, activations, gradients, alpha: weight * activations,
    "gradient": lambda weight, activations, gradients, alpha: weight * gradients,
}


def share_that_differs(model: Any, masks: dict[str, Any]) -> float:
    """The share of the weights that the model or the masks keep, and not both."""
    wrong = [(weight_matrix(model.get_submodule(name)) != 0) != mask for name, mask in masks.items()]
    return float(torch.cat([each.flatten() for each in wrong]).double().mean())


def slow_masks(
    model: Any, samples: list, losses: list, alpha: float = 1.0, method: str = "gblm", power: int = 1
) -> dict[str, Any]:
    """Masks at 50 % per row by whole forward passes, with a loss of the model for each sample."""
    per_block = prunable_layers(model)
    layers = {name: layer for block in per_block for name, layer in block.items()}
    gradients = dict.fromkeys(layers, 0.0)
    for loss in losses:
        found = torch.autograd.grad(loss(model), [layer.weight for layer in layers.values()])
        for name, gradient in zip(layers, found, strict=True):
            gradients[name] = gradients[name] + gradient.abs() ** power
    masks = {}
    for block in per_block:
        squares = dict.fromkeys(block, 0.0)
        for sample in samples:
            for name, x in inputs_of(model, block, sample).items():
                squares[name] = squares[name] + x.square().sum(0)
        for name, layer in block.items():
            weight, norm = weight_matrix(layer).detach().abs(), (squares[name] / len(samples)).sqrt()
            score = SCORES[method](weight, norm, as_matrix(layer, gradients[name]) ** (1 / power), alpha)
            masks[name] = torch.zeros_like(score, dtype=torch.bool)
            for mask, values, sizes in zip(masks[name], score.tolist(), weight.tolist(), strict=True):
                places = range(len(values))
                best = sorted(places, key=lambda j, values=values, sizes=sizes: (-values[j], -sizes[j], j))
                mask[best[: len(values) - len(values) // 2]] = True
        with torch.no_grad():
            for name, layer in block.items():
                weight_matrix(layer).mul_(masks[name])
    return masks
