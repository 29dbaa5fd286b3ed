"""What a model is like.

Perplexity, fidelity, zero-shot accuracy, latency, memory, zeros; in torch or ONNX Runtime.
"""
