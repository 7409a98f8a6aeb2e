"""Logits of a folder in vLLM on a CPU, those of the prompt, in float32."""

import gc

import numpy as np
from serve import serve
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


def logits(folder, ids):
    model = LLM(
        str(folder),
        dtype="float32",
        trust_remote_code=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        enable_prefix_caching=False,
    )
    # Prompt logits leave out the last position; its logits are those of the first new token.
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1)
    prompts = [TokensPrompt(prompt_token_ids=row.tolist()) for row in ids]
    rows = []
    for result in model.generate(prompts, sampling, use_tqdm=False):
        steps = [*result.prompt_logprobs[1:], *result.outputs[0].logprobs]
        rows.append([[step[token].logprob for token in sorted(step)] for step in steps])
    del model
    gc.collect()
    return np.array(rows, dtype=np.float32)


serve(logits)
