"""Logits of a folder in transformers 4; a tensor too many or too few is an error."""

import torch
from serve import serve
from transformers import AutoModelForCausalLM


def logits(folder, ids):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        trust_remote_code=True,
        output_loading_info=True,
    )
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"tensors that do not match: {wrong}")
    with torch.no_grad():
        return model.eval()(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()


serve(logits)
