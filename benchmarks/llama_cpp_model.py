"""llama.cpp as one more runtime of the benchmarks: a Llama of transformers written as GGUF, and decoding with it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

_KINDS = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}


def write_gguf(model: Any, kind: str, path: Path) -> Path:
    """Write a LlamaForCausalLM without its vocabulary: matrices in `kind`, vectors in float32, a tied head once."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    kinds = {name: _KINDS[kind if tensor.dim() == 2 else "float32"] for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        size = tensor.numel() * gguf.GGML_QUANT_SIZES[kinds[name]][1]
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor_info(stored, tensor.shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():  # one at a time, so that a large model needs little memory
        tensor = tensor.float()
        if "q_proj" in name or "k_proj" in name:
            tensor = _interleave_rotary(tensor, config.head_dim)
        writer.write_tensor_data(gguf.quants.quantize(tensor.numpy(), kinds[name]))
    writer.close()
    return path


def quantised(plain: Path, format: str, path: Path) -> Path:
    """A GGUF file in another of llama.cpp's formats, as its own tool writes it: the head of Q4_0 is Q6_K."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{format}")
    failed = llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), params)
    if failed:
        raise RuntimeError(f"llama.cpp cannot write {format}")
    return path


def read_gguf(path: Path, model: Any) -> Any:
    """The model with the weights of a file that `write_gguf` wrote, and llama.cpp perhaps quantised."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, parameter in model.named_parameters():
        tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).reshape(parameter.shape)
        if "q_proj" in name or "k_proj" in name:
            pairs = weight.reshape(-1, config.head_dim // 2, 2, *weight.shape[1:])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        parameter.copy_(weight)
    return model


def _interleave_rotary(weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs, transformers the two halves of a head."""
    halves = weight.reshape(-1, 2, head_size // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


class LlamaCpp:
    """Greedy decoding with the methods of `runtimes.Runtime` that a benchmark calls. One sequence at a time."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        import llama_cpp

        self._model = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def next_token(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """The token after `ids` [1, tokens]. llama.cpp keeps the cache; a None empties it."""
        if cache is None:
            self._model.reset()
        self._model.eval(ids[0].tolist())
        logits = np.ctypeslib.as_array(self._model._ctx.get_logits(), (self._model.n_vocab(),))
        return torch.tensor([[int(logits.argmax())]]), self._model

    def close(self) -> None:
        """Free the model, which does not free itself in order when the interpreter ends."""
        self._model.close()
