"""Logits of a folder in llama.cpp, converted to float32 GGUF by its own script.

LLAMA_CPP names llama.cpp's source tree, for the script; the library is llama-cpp-python's.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from serve import serve

sys.path.insert(0, os.environ["LLAMA_CPP"])

import convert_hf_to_gguf
from llama_cpp import GGML_TYPE_F32, Llama

find_class = convert_hf_to_gguf.get_model_class


def no_vocabulary(self):
    """Token ids are given here, and conversion refuses tokenizers that it does not know."""
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])


def without_vocabulary(architecture, **options):
    found = find_class(architecture, **options)
    found.set_vocab = no_vocabulary
    return found


convert_hf_to_gguf.get_model_class = without_vocabulary


def logits(folder, ids):
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "model.gguf"
        sys.argv = ["convert", str(folder), "--outtype", "f32", "--outfile", str(file)]
        if json.loads((folder / "config.json").read_text())["model_type"].startswith("qwen3_5"):
            sys.argv.append("--no-mtp")  # heads for several tokens at once, which the output lacks
        convert_hf_to_gguf.main()
        model = Llama(
            str(file),
            n_ctx=ids.shape[1],
            n_batch=ids.shape[1],
            logits_all=True,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
            flash_attn=False,
            n_threads=1,
            verbose=False,
        )
        rows = []
        for row in ids:
            model.reset()
            model.eval(row.tolist())
            rows.append(model.scores[: len(row)].copy())
        model.close()
    return np.stack(rows)


serve(logits)
