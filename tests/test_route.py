"""Routing reports: counts known by construction, the same from transformers' routers, and pages.

The mixtures of the first part have embeddings along known directions and nothing else that adds to
the residual, so what every router sees, and by its weights decides, follows from the token's id.
"""

import json
import math
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import zoo
from documented import hold
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from moeforge import catalog, forge
from moeforge.errors import BuildError, Finding, MoeforgeError, SourceError
from moeforge.forward import quiet
from moeforge.proof import loading, route_map, route_page, route_tables, routing_of
from moeforge.proof.route import MOST_CELLS, Domain, experts_of, measure, pieces
from moeforge.proof.route_report import DomainCount, RouteReport, Sample
from moeforge.proof.routing_of import route, short
from moeforge.recipe import Prompt

E = 4
TEXTS = {
    "code": ["def f(x):\n    return x + 1", "import os\nprint(os.name)"],
    "prose": ["Der Fuchs springt.", "Guten Morgen!", "Wie geht es dir heute?"],
}
ALL_TEXTS = [text for texts in TEXTS.values() for text in texts]


def prompt_files(folder, texts=TEXTS):
    files = []
    for name, blocks in texts.items():
        files.append(folder / f"{name}.txt")
        files[-1].write_text("\n\n".join(blocks), encoding="utf-8")
    return files


def token_ids(text):
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def direct(folder, one=0.3, bias=None):
    """Make the router of every layer see twice direction id % 4 and once the next one.

    Its logits are then `one` times that, as the norm before it has it.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    gemma = "gemma" in json.loads((folder / "config.json").read_text())["model_type"]
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight"):
            tensor.zero_()
            for row in range(len(tensor)):
                tensor[row, row % E] = 2
                tensor[row, (row + 1) % E] = 1
        elif "norm" in name:
            tensor.fill_(0 if gemma else 1)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
            tensor.zero_()
        elif name.endswith("gate.weight"):
            tensor.zero_()
            tensor[:, :E] = one * torch.eye(E)
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.tensor(bias))
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def copied(models, tmp_path, kind, **config):
    made = models(kind, seed=3, **{**zoo.ZOO[kind], **config})
    return Path(shutil.copytree(made, tmp_path / kind))


@pytest.fixture
def softmax(models, tmp_path):
    return direct(copied(models, tmp_path, "mixtral", num_local_experts=E))


@pytest.fixture
def sigmoid(models, tmp_path):
    return direct(copied(models, tmp_path, "glm4_moe"), bias=[0.0, 0.0, 0.0, 9.0])


@pytest.fixture
def remote(models, tmp_path):
    folders = [models("gemma2", seed=seed, **zoo.ZOO["gemma2"]) for seed in range(5)]
    recipe = {
        "base_model": str(folders[0]),
        "experts": [{"source_model": str(folder)} for folder in folders[1:]],
        "gate_mode": "random",
        "architecture": "remote",
        "layers": [1, 3],
    }
    forge.build(recipe, tmp_path / "remote")
    return direct(tmp_path / "remote")


def decided(number, kind):
    """Return weights by expert, largest first, and the entropy, for token `number`."""
    scale = 0.3 * math.sqrt(tiny.HIDDEN / 5)  # the squares of an embedding's numbers add up to 5
    logits = [0.0] * E
    logits[number % E], logits[(number + 1) % E] = 2 * scale, scale
    if kind == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        others = sorted(range(3), key=lambda e: -scores[e])
        chosen = [3, others[0]]  # the bias takes expert 3 always, and weighs nothing
    else:
        scores = [math.exp(logit) for logit in logits]
        chosen = sorted(range(E), key=lambda e: -scores[e])[:2]
    total = sum(scores[e] for e in chosen)
    weights = {e: scores[e] / total for e in sorted(chosen, key=lambda e: -scores[e])}
    shares = [score / sum(scores) for score in scores]
    return weights, -sum(p * math.log(p) for p in shares) / math.log(E)


@pytest.mark.parametrize(
    ("kind", "layers"), [("softmax", (0, 1, 2, 3)), ("sigmoid", (1, 2, 3)), ("remote", (1, 3))]
)
def test_counts_are_those_that_follow_from_the_tokens(kind, layers, request, tmp_path):
    folder = request.getfixturevalue(kind)
    files = prompt_files(tmp_path)
    report = route(str(folder), files, [f"{e}={files[e % 2]}" for e in range(E)])
    assert report.layers == layers
    assert (report.per_token, report.mapping) == (2, "given")
    for d, texts in enumerate(TEXTS.values()):
        ids = [number for text in texts for number in token_ids(text)]  # without BOS
        assert report.domains[d].tokens == len(ids)
        assert report.domains[d].experts == (d, d + 2)
        choices, weights, firsts = [0] * E, [0.0] * E, [0] * E
        confidence = entropy = 0.0
        for number in ids:
            given, uncertain = decided(number, kind)
            for expert, weight in given.items():
                choices[expert] += 1
                weights[expert] += weight
            firsts[next(iter(given))] += 1
            confidence += next(iter(given.values()))
            entropy += uncertain
        for layer in range(len(layers)):
            assert report.choices_LDE[layer, d].tolist() == choices
            assert report.firsts_LDE[layer, d].tolist() == firsts
            assert report.weights_LDE[layer, d] == pytest.approx(weights, rel=1e-4)
            assert report.confidence_LD[layer, d] == pytest.approx(confidence, rel=1e-4)
            assert report.entropy_LD[layer, d] == pytest.approx(entropy, rel=1e-4)
            right = (firsts[d] + firsts[d + 2]) / len(ids)
            assert report.accuracy_LD()[layer, d] == pytest.approx(right)


def test_groups_of_experts_have_their_say(models, tmp_path):
    """Counted as transformers' own router says, where a plain top-k would say otherwise."""
    shape = {"n_routed_experts": 8, "n_group": 4, "topk_group": 1}
    folder = models("deepseek_v3", seed=3, **{**zoo.ZOO["deepseek_v3"], **shape})
    report = route(str(folder), prompt_files(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder)
    said, plain = {}, 0

    def see(module, given, output):
        nonlocal plain
        logits, weights, chosen = output
        counts = torch.bincount(chosen[1:].flatten(), minlength=8)
        sums = torch.zeros(8).index_add(
            0, chosen[1:].flatten(), (weights / weights.sum(-1, keepdim=True))[1:].flatten()
        )
        before = said.get(module, (0, 0))
        said[module] = (before[0] + counts, before[1] + sums)
        best = (logits.sigmoid() + module.e_score_correction_bias).topk(2).indices
        plain += int((best.sort().values == chosen.sort().values).all())

    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    for gate in gates:
        gate.register_forward_hook(see)
    with torch.no_grad():
        for text in ALL_TEXTS:
            model(torch.tensor([[256, *token_ids(text)]]))
    for layer, gate in enumerate(gates):
        counts, sums = said[gate]
        assert report.choices_LDE[layer].sum(0).tolist() == counts.tolist()
        assert report.weights_LDE[layer].sum(0) == pytest.approx(sums.detach().numpy(), abs=1e-3)
    assert plain == 0, "groups do not matter here: the test is void"


@pytest.mark.parametrize(("kind", "sigmoid"), [("minimax_m2", True), ("olmoe", False)])
def test_scores_of_types_that_are_not_on_the_shelf_are_found_out(kind, sigmoid, models, tmp_path):
    folder = models(kind, seed=3, **zoo.ZOO[kind])
    report = route(str(folder), prompt_files(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits = {}
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda module, given, output: logits.setdefault(module, []).append(output[0])
        )
    with torch.no_grad():
        for text in ALL_TEXTS:
            model(torch.tensor([[256, *token_ids(text)]]))
    for place, seen in enumerate(logits.values()):
        z = torch.cat([one[1:] for one in seen]).double()
        scores = z.sigmoid() if sigmoid else z.exp()
        p = scores / scores.sum(-1, keepdim=True)
        expected = float((-(p * p.log()).sum(-1) / math.log(p.shape[-1])).mean())
        assert report.entropy_L()[place] == pytest.approx(expected, rel=1e-3)


def test_where_scores_are_of_a_kind_of_their_own_entropy_is_left_open(models, tmp_path):
    folder = models("phimoe", seed=3, **zoo.ZOO["phimoe"])
    report = route(str(folder), prompt_files(tmp_path))
    data = json.loads(json.dumps(route_tables.as_data(report), allow_nan=False))
    hold("route", data)
    assert [layer["entropy"] for layer in data["layers"]] == [None] * 4
    assert "—" in route_page.render(report)


def test_weights_read_from_disk_change_nothing(models, tmp_path, monkeypatch):
    folder = models("mixtral", seed=3, **zoo.ZOO["mixtral"])
    files = prompt_files(tmp_path)
    whole = route(str(folder), files)
    monkeypatch.setattr(loading, "_room", lambda device, memory: {"cpu": 200_000})
    streamed = route(str(folder), files)
    assert np.array_equal(whole.choices_LDE, streamed.choices_LDE)
    assert np.allclose(whole.weights_LDE, streamed.weights_LDE, atol=1e-4)


MIXTURES = {
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "granitemoehybrid": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""What makes mixtures of types that are dense in the zoo."""
SHELF = sorted(set(catalog.names("families")) & set(zoo.ZOO))


@pytest.mark.parametrize("kind", [*SHELF, "deepseek_v32"])
def test_prompts_side_by_side_change_nothing(kind):
    with quiet():
        made = CONFIG_MAPPING[kind](**{**tiny.SHAPE, **zoo.ZOO[kind], **MIXTURES.get(kind, {})})
        model = AutoModelForCausalLM.from_config(made).eval()
    tiny.randomize(model, 1)
    for name, parameter in model.named_parameters():
        if name.endswith("per_expert_scale"):
            parameter.data.abs_()  # negative ones are no shares
    labels = list(map(str, range(experts_of(model))))

    def measured(*texts):
        domain = Domain("a", tuple(Prompt(text=text) for text in texts))
        return measure(model, tiny.tokenizer(), [domain], "best", labels, name=kind)

    texts = ("a short one", "Hello wide world, a longer text", "x")
    together, alone = measured(*texts), [measured(text) for text in texts]
    assert np.array_equal(together.choices_LDE, sum(one.choices_LDE for one in alone))
    for name in ("weights_LDE", "confidence_LD", "entropy_LD"):
        added = sum(getattr(one, name) for one in alone)
        assert np.allclose(getattr(together, name), added, atol=1e-3), name


# --- whose prompts --------------------------------------------------------------------------------


def test_as_many_files_as_experts_are_theirs_in_order(softmax, tmp_path):
    files = prompt_files(tmp_path, {name: [name] for name in ("aa", "bb", "cc", "dd")})
    report = route(str(softmax), files)
    assert report.mapping == "order"
    assert [domain.experts for domain in report.domains] == [(0,), (1,), (2,), (3,)]
    assert "by order" in route_tables.mapping_words(report)


def test_without_a_word_the_best_assignment_is_taken_and_said(softmax, tmp_path):
    # Letters whose first choices are known: 1 and 3 for the first file, 1 and 2 for the second.
    letters = {number % E: chr(code) for code in range(97, 123) for number in token_ids(chr(code))}
    texts = {
        "one": [letters[1] * 6 + letters[3] * 4],
        "two": [letters[1] * 9 + letters[2]],
    }
    report = route(str(softmax), prompt_files(tmp_path, texts))
    assert report.mapping == "best"
    assert report.owners == (((3,), (1,)),) * 4  # 4 + 9 tokens, where 1 and 2 have 6 + 1
    assert report.accuracy_LD()[0] == pytest.approx([0.4, 0.9])
    said = route_tables.mapping_words(report)
    assert "flatters" in said
    assert "one → 3; two → 1" in said


def test_names_stand_for_all_experts_in_order(softmax, tmp_path):
    files = prompt_files(tmp_path, {"x": ["some text"], "y": ["and more"]})
    entries = [f"{name}={files[place]}" for name, place in zip("abcd", (0, 0, 1, 1), strict=True)]
    report = route(str(softmax), [], entries)
    assert report.experts == ("a", "b", "c", "d")
    assert [domain.experts for domain in report.domains] == [(0, 1), (2, 3)]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["python"], "NAME=FILE"),
        (["a={0}", "b={1}"], "2 experts are named, the mixture has 4"),
        (["4={0}"], "there is no expert 4"),
        (["0={0}", "0={1}"], "expert 0 is given 2 times"),
        (["0=missing.txt"], "missing.txt: cannot be read"),
    ],
)
def test_mappings_that_make_no_sense_are_refused(entries, said, softmax, tmp_path, monkeypatch):
    monkeypatch.setattr(routing_of, "loaded", lambda *args: pytest.fail("weights were loaded"))
    files = prompt_files(tmp_path)
    with pytest.raises(BuildError) as caught:
        route(str(softmax), files, [entry.format(*files) for entry in entries])
    assert said in str(caught.value)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("llama", "has no routers"),
        ("jetmoe", "no experts are beside this router"),
        ("llama4_text", "its choice cannot be seen"),
        ("inkling_text", "rows for"),
        ("bert", "not a causal language model"),
    ],
)
def test_what_cannot_be_watched_is_refused(kind, said, models, tmp_path):
    if kind == "bert":
        folder = tmp_path / "bert"
        folder.mkdir()
        (folder / "config.json").write_text(
            '{"model_type": "bert", "architectures": ["BertModel"]}'
        )
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    else:
        folder = models(kind, seed=3, **zoo.ZOO.get(kind, {}))
    with pytest.raises(MoeforgeError) as caught:
        route(str(folder), prompt_files(tmp_path))
    assert said in str(caught.value)


def test_code_that_is_not_ours_runs_only_when_allowed(remote, tmp_path):
    files = prompt_files(tmp_path)
    code = remote / "modeling_moeforge.py"
    code.write_text(code.read_text() + "\n# changed\n")
    with pytest.raises(SourceError, match="trust-remote-code"):
        route(str(remote), files)
    assert route(str(remote), files, trust_remote_code=True).layers == (1, 3)


def test_damaged_routers_are_named(softmax, tmp_path):
    tensors = load_file(softmax / "model.safetensors")
    name = "model.layers.2.block_sparse_moe.gate.weight"
    tensors[name][0, 0] = math.nan
    save_file(tensors, softmax / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BuildError, match=r"layers\.2\..*NaN"):
        route(str(softmax), prompt_files(tmp_path))


# --- tokens ---------------------------------------------------------------------------------------


def test_what_is_beyond_the_context_is_left_out_and_said(softmax, tmp_path):
    config = json.loads((softmax / "config.json").read_text())
    (softmax / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10}))
    report = route(str(softmax), prompt_files(tmp_path, {"long": ["x" * 50, "yy"]}))
    assert report.domains == (DomainCount("long", 2, 9 + 2, 1, ()),)
    assert any("1 prompts are longer" in line for line in route_tables.remarks(report))


def test_a_chat_goes_through_the_template(softmax, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(softmax)
    tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(softmax)
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    report = route(str(softmax), [file])
    assert report.tokens == len("[Hi]")
    assert report.samples[0].pieces == ("[", "H", "i", "]")


def test_pieces_of_characters_wait_for_the_last_one():
    text = "Grüße, 🙂\n"
    ids = token_ids(text)
    found = pieces(tiny.tokenizer(), ids)
    assert len(found) == len(ids) == len(text.encode())
    assert "".join(found).replace("·", "") == text
    assert found[2:4] == ("·", "ü")


# --- measures of known numbers --------------------------------------------------------------------


def report_of(weights, tokens=1000, per_token=2, experts=None, domains=("a",), samples=()):
    """A report of as many layers as rows; `tokens` in all, divided evenly among domains."""
    share_LE = np.array(weights, dtype=float)
    count = len(domains)
    each = np.repeat(share_LE[:, None], count, 1) * tokens / count
    flat = np.full(each.shape[:2], tokens / count)
    return RouteReport(
        model="a $model$ <b>",
        model_type="mixtral",
        layers=tuple(range(len(share_LE))),
        experts=tuple(experts or map(str, range(share_LE.shape[1]))),
        per_token=per_token,
        domains=tuple(DomainCount(name, 1, tokens // count, 0, ()) for name in domains),
        mapping="best",
        choices_LDE=each * per_token,
        weights_LDE=each,
        firsts_LDE=each,
        confidence_LD=flat * 0.6,
        entropy_LD=flat * 0.5,
        samples=tuple(samples),
    )


def test_dead_and_dominating_experts():
    layers = [
        [0.25, 0.25, 0.25, 0.25],
        [0.002, 0.0, 0.498, 0.5],  # a hundredth of an even share is 0.0025
        [0.003, 0.3, 0.067, 0.63],  # half way from an even share to all is 0.625
        [0.125, 0.125, 0.13, 0.62],
    ]
    report = report_of(layers)
    assert report.dead() == ((), (0, 1), (), ())
    assert report.dominating() == ((), (), (3,), ())
    many = [(1 - 8.1 / 64) / 62] * 64
    many[5], many[6] = 4.2 / 64, 3.9 / 64
    assert report_of([many], tokens=100_000).dominating() == ((5,),)
    said = " ".join(route_tables.remarks(report))
    assert "layer 1: 0, 1" in said
    assert "layer 2: 3" in said


def test_few_tokens_call_nobody_dead():
    assert report_of([[1.0, 0.0, 0.0, 0.0]], tokens=9, per_token=2).dead() is None
    assert report_of([[1.0, 0.0, 0.0, 0.0]], tokens=10, per_token=2).dead() == ((1, 2, 3),)
    few = report_of([[1.0, 0.0, 0.0, 0.0]], tokens=9)
    assert "Too few tokens" in route_tables.remarks(few)[0]
    assert route_tables.as_data(few)["layers"][0]["dead"] is None


def test_more_domains_than_experts_leave_some_without_one():
    report = report_of([[0.6, 0.4]], tokens=900, per_token=1, domains=("a", "b", "c"))
    owned = [bool(experts) for experts in report.owners[0]]
    assert sum(owned) == 2
    assert [not math.isnan(share) for share in report.accuracy_LD()[0]] == owned
    json.dumps(route_tables.as_data(report), allow_nan=False)


def test_json_has_what_the_tables_have(softmax, tmp_path):
    from rich.console import Console

    files = prompt_files(tmp_path)
    report = route(str(softmax), files)
    data = json.loads(json.dumps(route_tables.as_data(report), allow_nan=False))
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2, 3]
    for layer in data["layers"]:
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-5)
        assert sum(layer["weight"]) == pytest.approx(1, abs=1e-5)
        assert set(layer["domains"]) == {"code", "prose"}
    console = Console(width=160, record=True, highlight=False)
    for shown in route_tables.as_tables(report):
        console.print(shown)
    text = console.export_text()
    first = data["layers"][0]
    assert f"{first['load'][0]:.0%} / {first['weight'][0]:.0%}" in text
    assert f"{first['confidence']:.2f}" in text
    wide = report_of([[1 / 20] * 20], tokens=5000)
    for shown in route_tables.as_tables(wide):
        console.print(shown)
    assert "least loaded" in console.export_text()


# --- pictures and pages ---------------------------------------------------------------------------


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize(
    ("layers", "experts", "domains"), [(4, 4, 4), (1, 2, 1), (61, 256, 3), (32, 8, 30)]
)
def test_the_map_is_a_picture_of_bounded_size(layers, experts, domains, tmp_path):
    from matplotlib.image import imread

    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.ones(experts), layers)
    report = report_of(weights, domains=[f"domain {d}" for d in range(domains)])
    route_map.draw(report, tmp_path / "routing.png")
    wide, high = png_size(tmp_path / "routing.png")
    assert 300 < wide < 3000
    assert 200 < high < 4000
    assert (tmp_path / "routing.png").stat().st_size < 1_000_000
    pixels = imread(tmp_path / "routing.png")
    assert pixels.shape[:2] == (high, wide)
    assert pixels[..., :3].std() > 0.05
    assert pixels[:3].min() == 1, "something touches the upper edge"


class Page(HTMLParser):
    """Collects tags, attributes and the text of every layer's <pre>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag == "pre":
            self.texts.append("")
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.texts[-1] += data


def sample_of(pieces, layers=2, per_token=2, domain="a", tokens=None):
    shape = (layers, len(pieces), per_token)
    chosen = np.arange(math.prod(shape)).reshape(shape) % 4
    weights = np.full(shape, 1 / per_token)
    return Sample(domain, tuple(pieces), tokens or len(pieces), chosen, weights)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "&amp;",
    "'",
    "\n",
    "</pre>",
]


def test_whatever_a_user_writes_is_text_on_the_page():
    evil = '"><script>alert(2)</script>'
    report = report_of(
        [[0.25] * 4] * 2,
        experts=[evil, "b", "c", "d"],
        domains=(evil,),
        samples=[sample_of(HOSTILE, domain=evil)],
    )
    text = route_page.render(report)
    page = Page(text)
    assert not page.open
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [
        name for _, attributes in page.attributes for name in attributes if name[:2] == "on"
    ]
    written = "".join(HOSTILE).replace("\n", "⏎\n")
    assert page.texts == [written, written]
    titles = [attributes["title"] for tag, attributes in page.attributes if tag == "i"]
    assert titles[0] == f"{evil} 0.50, b 0.50"
    for outside in ("http:", "https:", "src=x ", "url(", "@import", "<link"):
        assert outside not in text.replace("&quot;&gt;&lt;img src=x ", "")


def test_tokens_have_the_class_of_their_first_choice_layer_by_layer(softmax, tmp_path):
    report = route(str(softmax), prompt_files(tmp_path))
    page = Page(route_page.render(report))
    shown = [text for texts in TEXTS.values() for text in texts[:2]]
    assert page.texts == [text.replace("\n", "⏎\n") for text in shown for _ in range(4)]
    classes = [attributes["class"] for tag, attributes in page.attributes if tag == "i"]
    expected = [f"e{n % E}" for text in shown for _ in range(4) for n in token_ids(text)]
    assert classes == expected
    title = next(attributes["title"] for tag, attributes in page.attributes if tag == "i")
    (first, weight), (second, rest) = decided(token_ids(shown[0])[0], "softmax")[0].items()
    assert title == f"{first} {weight:.2f}, {second} {rest:.2f}"


def test_pages_are_bounded_and_say_what_they_leave_out(softmax, tmp_path):
    texts = {f"file{number}": ["x" * 400, "y" * 400] for number in range(40)}
    tokenizer = tiny.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(softmax)
    domains = [
        Domain(name, tuple(Prompt(text=text) for text in blocks)) for name, blocks in texts.items()
    ]
    report = measure(model, tokenizer, domains, "best", ["a", "b", "c", "d"], name="m")
    text = route_page.render(report)
    assert text.count("<i ") <= MOST_CELLS
    assert f"The first {MOST_CELLS // (4 * 2 * 40)} of 400 tokens" in text
    assert len(text) < 8e6


def test_a_page_of_many_experts_adds_up_the_rest_of_the_weights():
    report = report_of([[1 / 64] * 64] * 2, samples=[sample_of(["a"], per_token=8)])
    titles = [a["title"] for tag, a in Page(route_page.render(report)).attributes if tag == "i"]
    assert titles[0] == "0 0.12, 1 0.12, 2 0.12, 3 0.12, 4 more 0.50"


# --- the short form -------------------------------------------------------------------------------


def test_a_build_gets_a_short_report(remote):
    prompt = Prompt(text="z" * 300)
    domains = [Domain("a", (prompt,) * 50, (0,)), Domain("b", (Prompt(text="b"),), (1,))]
    report = short(remote, domains, ["p", "q", "r", "s"], name="mine")
    assert isinstance(report, RouteReport)
    assert (report.mapping, report.experts) == ("given", ("p", "q", "r", "s"))
    assert report.domains[0].prompts == 4  # 1000 tokens, and the rest of the prompt
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(remote, trust_remote_code=True)
    again = short(remote, domains, ["p", "q", "r", "s"], name="mine", model=model.eval())
    assert np.array_equal(report.choices_LDE, again.choices_LDE)


def test_a_mixture_that_is_large_for_the_memory_is_not_looked_at(softmax, monkeypatch):
    needed = sum(tensor.numel() for tensor in load_file(softmax / "model.safetensors").values()) * 4
    domains = [Domain("a", (Prompt(text="a"),))]
    monkeypatch.setattr(routing_of, "free_memory", lambda: 4 * needed)
    assert isinstance(short(softmax, domains, list("abcd"), name="mine"), RouteReport)
    monkeypatch.setattr(routing_of, "free_memory", lambda: 4 * needed - 4)
    skipped = short(softmax, domains, list("abcd"), name="mine")
    assert isinstance(skipped, Finding)
    assert "moeforge route mine --prompts" in skipped.fix
