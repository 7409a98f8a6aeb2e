"""What the Hub's /api/validate-yaml says to a card: errors of its front matter, in a list.

Rules and identifiers are those of https://huggingface.co/docs/hub/repositories-licenses (and of the
licence filter of its models page), https://huggingface.co/docs/hub/model-cards and
https://github.com/huggingface/hub-docs/blob/main/modelcard.md. It knows nothing of moeforge.
"""

import re

import yaml

_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
gemma apple-amlr apple-ascl fair-noncommercial-research-license h-research intel-research
grok2-community openmdw-1.0 openmdw-1.1 unknown other
"""
LICENSES = _LICENSES.split()
TASKS = (
    "text-generation",
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "feature-extraction",
    "sentence-similarity",
    "image-text-to-text",
)
RELATIONS = ("adapter", "merge", "quantized", "finetune")
_REPO = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-\w+)*|code|multilingual")
_LINK = re.compile(r"LICENSE(\.md)?|https?://\S+")


def _list(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def problems(content):
    """Return what is wrong with the front matter of a card."""
    found = re.match(r"\s*---\n(.*?)\n---\n", content, re.DOTALL)
    if not found:
        return []  # the Hub warns of it only
    data = yaml.safe_load(found[1])
    if not isinstance(data, dict):
        return ["the metadata is not a mapping"]
    wrong = [
        f'"license" must be one of the known ones, not {word}'
        for word in _list(data.get("license"))
        if word not in LICENSES
    ]
    for key, pattern in (("base_model", _REPO), ("datasets", _REPO), ("language", _LANGUAGE)):
        wrong += [
            f'"{key}" has {entry!r}'
            for entry in _list(data.get(key))
            if not isinstance(entry, str) or not pattern.fullmatch(entry)
        ]
    if data.get("license") == "other" and not data.get("license_name"):
        wrong.append('"license_name" is required')
    if not re.fullmatch(r"[a-z0-9-.]+", data.get("license_name", "x")):
        wrong.append('"license_name" fails to match the pattern')
    if not _LINK.fullmatch(data.get("license_link", "LICENSE")):
        wrong.append('"license_link" must be a link or LICENSE')
    if data.get("pipeline_tag", TASKS[0]) not in TASKS:
        wrong.append('"pipeline_tag" is unknown')
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        wrong.append('"base_model_relation" is unknown')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        wrong.append('"tags" must be texts')
    return wrong
