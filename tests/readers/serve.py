"""Owns the conversation with a test: one job a line comes in, one answer a line goes out.

It knows no engine. A job names a model folder, an array of token ids [batch, length] and the file
that the logits [batch, length, vocabulary] go to. It runs under the interpreter of the engine, so
it imports nothing of moeforge and no test library.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np


def serve(logits):
    """Answer jobs until standard input ends; `logits(folder, ids)` is the engine's part."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is not an answer
    for line in sys.stdin:
        job = json.loads(line)
        try:
            np.save(job["out"], logits(Path(job["folder"]), np.load(job["ids"])))
            answer = {}
        except (Exception, SystemExit) as error:  # whatever an engine raises is its answer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
