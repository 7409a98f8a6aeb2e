"""Every type of transformers' causal language models: an exact mixture, or a refusal with a reason.

`python tests/test_every_family.py` writes docs/families.md.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moeforge import families, forge
from moeforge.families import Mixture
from moeforge.forward import quiet
from moeforge.planners import homes, remote
from moeforge.sources import open_source

FORMS = {
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen2, some layers slide": ("qwen2", {}),
    "qwen3": ("qwen3", {"use_sliding_window": False}),
    "qwen3, some layers slide": ("qwen3", {}),
    "llama, attention biases": ("llama", {"attention_bias": True}),
    "llama, MLP biases": ("llama", {"mlp_bias": True}),
    "seed_oss, no biases": ("seed_oss", {"attention_bias": False}),
    "cohere, norms on queries": ("cohere", {"use_qk_norm": True}),
    "hyperclovax, no post norms": ("hyperclovax", {"use_post_norm": False}),
    "phi3, half of each head rotates": ("phi3", {"partial_rotary_factor": 0.5}),
    "ministral, some layers slide": ("ministral", {"layer_types": zoo.ENDS}),
}
"""Types in other forms than the zoo's: what their checkpoints come as, or what changes the home."""
TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *FORMS})
PAGE = Path(__file__).parent.parent / "docs" / "families.md"
MIXTURE = Mixture(3, 2, tiny.WIDE, (True,) * tiny.LAYERS)
TOLERANCE = 1e-4
GATES = {"lfm2": "uniform_random"}
"""Gate modes of types whose home adds a constant to the sum of scores: it counts where a router
makes all of them tiny, as their remarks say."""
HEAD = """# Which model types become mixtures of experts

Every type of transformers' causal language models, some in several forms, with
`architecture: auto`.
`python tests/test_every_family.py` writes this page, `pytest` fails where it is wrong.

- *home*: the MoE architecture that `auto` takes. `remote` is program text of the model's own, which
  transformers loads with `trust_remote_code=True`. Where there is none, the last column says why.
- *difference*: a dense model of four layers with random weights against the mixture of three copies
  of it with a random router, top 2, built and loaded from disk. It is the largest difference of two
  logits, in float32, over 2 texts of 48 tokens, with padding on the left and without; the logits
  themselves reach 0.4 to 15. Generation with the cache gives the same tokens.
- *also*: other homes that hold the same model; in brackets those that only transformers runs right.
  `remote` holds every model that has a home.
"""


@dataclass(frozen=True)
class Row:
    """What is said of a type; `difference` is None where it is refused."""

    home: str
    difference: float | None
    also: str
    remarks: str


def ids_and_mask():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 256, (2, 48), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask


def load(folder, *, code):
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=code
        )
    assert not any(report.values()), report
    return model.eval()


def measure(dense, mixture):
    """Return the largest difference of two logits; what must be equal is asserted."""
    ids, mask = ids_and_mask()
    found = []
    with torch.no_grad():
        for arguments, seen in (({}, torch.ones_like(mask)), ({"attention_mask": mask}, mask)):
            theirs, ours = (model(ids, **arguments).logits for model in (dense, mixture))
            found.append((theirs - ours)[seen.bool()].abs().max().item())
            assert theirs[seen.bool()].std() > 0.05, "the logits say something"
        asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        texts = [model.generate(ids[:1, :8], **asked) for model in (dense, mixture)]
        assert torch.equal(*texts)
        # The experts are what is compared: with others the logits would be others.
        for name, parameter in mixture.named_parameters():
            if "experts." in name and parameter.dim() > 1:
                parameter.mul_(1.5)
        assert (mixture(ids).logits - ours).abs().max() > 100 * TOLERANCE
    return max(found)


def others(config, taken):
    """Return the homes beside the one taken that hold this model, and whether only here."""
    said = []
    for family in families.candidates(str(config["model_type"])):
        if family.model_type != taken and not homes.objection(family, config, MIXTURE):
            only = homes._exotic(family, config, MIXTURE)
            said.append(f"({family.model_type})" if only else family.model_type)
    return ", ".join(said)


def find(kind, models, root):
    """Return the row of a type, built and measured."""
    if kind in zoo.SKIP:
        assert remote.refuse({"model_type": kind}, MIXTURE)
        assert not families.candidates(kind)
        return Row("none", None, "", zoo.SKIP[kind])
    base, form = FORMS.get(kind, (kind, {}))
    folder = models(base, with_tokenizer=False, **{**zoo.ZOO[base], **form})
    recipe = {
        "base_model": str(folder),
        "experts": [{"source_model": str(folder)}] * 3,
        "gate_mode": GATES.get(kind, "random"),
        "architecture": "auto",
    }
    report = forge.check(recipe)
    config = open_source(str(folder)).config
    if report.plan is None:
        reason = remote.refuse(config, MIXTURE)
        assert any(reason in str(error) for error in report.errors), report.errors
        assert not others(config, "")
        return Row("none", None, "", reason)
    out = root / f"out-{kind}"
    plan = forge.build(recipe, out).plan
    assert plan.experts is not None
    mixture = load(out, code=bool(plan.code))
    difference = measure(load(folder, code=False), mixture)
    shutil.rmtree(out)
    notes = [note.what for note in plan.notes if note.what != remote.TRUST]
    home = plan.experts.family
    return Row(home, difference, others(config, home), "; ".join(notes))


def page(rows):
    exact = [row for row in rows.values() if row.difference is not None]
    native = sum(row.home != "remote" for row in exact)
    types = len({FORMS.get(kind, (kind, {}))[0] for kind, row in rows.items() if row.difference})
    said = f"{types} types are exact. Of {len(exact)} rows {native} have a native home."
    lines = ["| type | home | difference | also | remarks |", "|---|---|---:|---|---|"]
    for kind, row in rows.items():
        number = "" if row.difference is None else f"{row.difference:.1e}"
        lines.append(f"| {kind} | {row.home} | {number} | {row.also} | {row.remarks} |")
    return "\n".join([HEAD, said, "", *lines]) + "\n"


@pytest.fixture(scope="module")
def rows(models, tmp_path_factory):
    root, known = tmp_path_factory.mktemp("every"), {}

    def row(kind):
        if kind not in known:
            known[kind] = find(kind, models, root)
        return known[kind]

    return row


@pytest.mark.parametrize("kind", TYPES)
def test_a_mixture_is_exact_or_refused(kind, rows):
    row = rows(kind)
    if row.difference is None:
        assert len(row.remarks) > 10
    else:
        assert row.difference <= TOLERANCE


def test_the_page_says_what_was_found(rows):
    digits = re.compile(r"\d\.\de-\d\d")
    expected = page({kind: rows(kind) for kind in TYPES})
    assert digits.sub("#", PAGE.read_text(encoding="utf-8")) == digits.sub("#", expected)


def test_at_least_45_are_exact(rows):
    assert sum(rows(kind).difference is not None for kind in TYPES if kind not in FORMS) >= 45


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        maker = tiny.Maker(Path(temporary) / "models")
        every = {kind: find(kind, maker, Path(temporary)) for kind in TYPES}
    PAGE.write_text(page(every), encoding="utf-8")
