"""Perplexity, fidelity, zero-shot accuracy, latency, memory and zeros of a model, in torch or ONNX Runtime."""
