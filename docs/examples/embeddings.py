"""A server for an exported encoder: OpenAI's /v1/embeddings on ONNX Runtime.

    pip install fastapi uvicorn
    FOLDER=onnx uvicorn --app-dir docs/examples embeddings:app
    curl localhost:8000/v1/embeddings -H 'Content-Type: application/json' -d '{"input": ["a sentence"]}'

FOLDER is the output of `gblm-compress export MODEL -o onnx --format onnx`, with `--quantise int8` or `--kernels` too.
THREADS is the number of threads of one request, 1 by default: several requests run side by side. Texts are cut to 256
tokens, and an embedding is the mean over the tokens. Change `embeddings` for a model that pools otherwise.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

FOLDER, LONGEST = Path(os.environ["FOLDER"]), 256
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ.get("THREADS", "1"))
for library in FOLDER.glob("gblm_onnxruntime.*"):  # of an export with --kernels
    options.register_custom_ops_library(str(library))
session = onnxruntime.InferenceSession(FOLDER / "model.onnx", options, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
tokenizer.enable_truncation(LONGEST)
tokenizer.enable_padding()
app = FastAPI()


class Request(BaseModel):
    input: str | Annotated[list[str], Field(min_length=1)]


@app.post("/v1/embeddings")
def embeddings(request: Request) -> dict[str, Any]:
    """Means over the tokens, of length 1. FastAPI calls this in a thread."""
    encoded = tokenizer.encode_batch([request.input] if isinstance(request.input, str) else request.input)
    given = {
        value.name: np.array([getattr(text, FIELDS[value.name]) for text in encoded], np.int64)
        for value in session.get_inputs()
    }
    hidden, mask = session.run(None, given)[0], given["attention_mask"][..., None]
    means = (hidden * mask).sum(1) / mask.sum(1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    rows = [{"object": "embedding", "index": index, "embedding": row.tolist()} for index, row in enumerate(means)]
    tokens = int(mask.sum())
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": rows, "model": FOLDER.name, "usage": usage}
