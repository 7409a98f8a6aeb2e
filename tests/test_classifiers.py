"""One fitted layer: classifiers, labels, temperature and load, against independent solutions."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from moeforge import workers
from moeforge.gates import TokenizedPrompt
from moeforge.gates._balance import biases, carrier, load
from moeforge.gates._classify import best_temperature, fit_layer
from moeforge.gates._labels import against, held_out, labels
from moeforge.gates._solve import Examples, logistic, ridge


def prompt(expert, tokens=40, negative=False):
    return TokenizedPrompt(expert, negative, (0,) * tokens, 0)


def clusters(seed, prompts=8, experts=3, tokens=40, hidden=24):
    """Router inputs of three experts: a common mean, and much variance that says nothing."""
    fixed = torch.Generator().manual_seed(0)
    common = 5 * torch.randn(hidden, generator=fixed)
    centres = torch.randn(experts, hidden, generator=fixed)
    loud = torch.where(torch.arange(hidden) < 8, 10.0, 0.7)
    generator = torch.Generator().manual_seed(seed)
    owners = [expert for expert in range(experts) for _ in range(prompts)]
    noise = [loud * torch.randn(tokens, hidden, generator=generator) for _ in owners]
    return [common + centres[e] + n for e, n in zip(owners, noise, strict=True)], owners


def examples(inputs, wanted):
    return Examples(inputs, wanted.wanted, wanted.weights)


# --- one layer, against independent solutions ----------------------------------------------------


def test_logistic_regression_is_sklearns():
    inputs, owners = clusters(3)
    wanted = labels([prompt(owner) for owner in owners], 3)
    strength = 0.01
    solve = logistic([examples(inputs, wanted)], workers.alone)
    ours = solve(1, strength)
    x = torch.cat(inputs).double().numpy()
    y = torch.tensor(owners).repeat_interleave(40).numpy()
    weights = torch.tensor(wanted.weights).repeat_interleave(40).numpy()
    penalty = strength * float((weights[:, None] * x**2).sum()) / x.shape[1]
    theirs = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=10000)
    theirs.fit(x, y, sample_weight=weights)
    assert abs(ours.numpy() - theirs.coef_.T).max() < 1e-4 * abs(theirs.coef_).max()


def test_sigmoid_logistic_regression_is_at_the_minimum_of_its_loss():
    inputs, owners = clusters(3)
    wanted = labels([prompt(owner) for owner in owners], 3)
    solve = logistic([examples(inputs, wanted)], workers.alone, sigmoid=True)
    weight = solve(1, 0.01).requires_grad_()
    x = torch.cat(inputs).double()
    y = torch.cat([w.expand(40, -1) for w in wanted.wanted])
    scores = (x @ weight).sigmoid()
    tokens = torch.tensor(wanted.weights).repeat_interleave(40).double()
    penalty = 0.01 * float((tokens[:, None] * x**2).sum()) / 24
    entropy = -(tokens * (y * (scores / scores.sum(-1, keepdim=True)).log()).sum(-1)).sum()
    (entropy + penalty / 2 * (weight**2).sum()).backward()
    assert weight.grad.abs().max() < 1e-4
    assert entropy < 1.5, "of three experts, each of which weighs one"


@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_both_methods_tell_apart_what_means_cannot(method):
    inputs, owners = clusters(1)
    found = fit_layer(inputs, labels([prompt(owner) for owner in owners], 3), method=method)
    fresh, truth = clusters(2)
    right = (torch.cat(fresh).double() @ found.weight.T).argmax(-1)
    assert float((right == torch.tensor(truth).repeat_interleave(40)).float().mean()) > 0.9
    assert 0 <= found.loss < 0.5


def test_ridge_with_soft_labels_and_weights_is_least_squares():
    inputs, owners = clusters(4, prompts=2)
    generator = torch.Generator().manual_seed(0)
    wanted = [torch.rand(3, generator=generator).softmax(-1).double() for _ in owners]
    weights = [1.0 + i for i in range(len(owners))]
    half = len(owners) // 2
    groups = [
        Examples(inputs[a:b], wanted[a:b], weights[a:b]) for a, b in ((0, half), (half, None))
    ]
    solve = ridge(groups, workers.alone)
    x = torch.cat(inputs).double()
    root = torch.tensor(weights).repeat_interleave(40).double().sqrt()[:, None]
    y = torch.stack(wanted).repeat_interleave(40, 0) - 1 / 3
    strength = 0.1 * float(((root * x) ** 2).sum()) / 24
    augmented = torch.cat([root * x, strength**0.5 * torch.eye(24).double()])
    right = torch.cat([root * y, torch.zeros(24, 3).double()])
    expected = torch.linalg.lstsq(augmented, right).solution
    assert (solve(2, 0.1) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_temperature_is_the_best_for_the_routers_own_scores(sigmoid):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(400, 4, generator=generator).double()
    wanted = torch.nn.functional.one_hot((logits + torch.randn(400, 4)).argmax(-1), 4).double()
    loss, factor = best_temperature(logits, wanted, torch.ones(400), sigmoid=sigmoid)

    def entropy(scale):
        scores = (scale * logits).sigmoid() if sigmoid else (scale * logits).softmax(-1)
        return -(wanted * (scores / scores.sum(-1, keepdim=True)).log()).sum(-1).mean()

    assert loss == pytest.approx(float(entropy(factor)))
    assert all(loss <= float(entropy(2.0 ** (n / 2))) + 2e-3 for n in range(-8, 8))


def test_where_nothing_can_be_told_apart_the_fit_is_not_confident():
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(10, 64, generator=generator) for _ in range(12)]
    wanted = labels([prompt(i % 3, 10) for i in range(12)], 3)
    assert 0 < sum(wanted.held) < 12
    found = fit_layer(inputs, wanted)
    fresh = torch.randn(500, 64, generator=generator).double()
    assert (fresh @ found.weight.T).softmax(-1).amax(-1).mean() < 0.45


def test_without_held_out_prompts_the_strongest_regularization_is_taken():
    inputs, owners = clusters(1, prompts=1)
    wanted = labels([prompt(owner) for owner in owners], 3)
    assert fit_layer(inputs, wanted, method="logistic").regularization == 0.1
    found = fit_layer(inputs, wanted, method="ridge")
    assert found.regularization == 10.0
    assert found.loss != found.loss
    given = fit_layer(inputs, wanted, regularization=0.5)
    assert given.regularization == 0.5


def test_experts_count_alike_however_many_prompts_they_have():
    prompts = [prompt(0, 10), prompt(1, 5), prompt(1, 20), TokenizedPrompt(-1, False, (0,) * 8, 0)]
    made = labels([*prompts[:3]], 2)
    totals = [made.weights[0] * 10, made.weights[1] * 5 + made.weights[2] * 20]
    assert totals == pytest.approx([1, 1])
    loose = TokenizedPrompt(-1, False, (0,) * 8, 0, losses=(1.0, 2.0))
    assert labels([*prompts[:3], loose], 2).weights[3] * 8 == pytest.approx(2)
    assert not any(held_out([prompt(0), prompt(1), prompt(1)]))


def test_negative_prompts_are_a_class_of_their_own():
    made = labels([prompt(0), prompt(1), prompt(0, negative=True)], 2)
    assert torch.equal(torch.stack(made.wanted), torch.eye(3).double())
    assert len(labels([prompt(0), prompt(1)], 2).wanted[0]) == 2


@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_what_looks_like_a_negative_prompt_is_no_evidence_for_its_expert(method):
    generator = torch.Generator().manual_seed(0)
    mean, first, second, other = 2 * torch.randn(4, 24, generator=generator)
    noise = 0.5 * torch.randn(24, 40, 24, generator=generator)
    own = [mean + first + n for n in noise[:8]], [mean + second + n for n in noise[8:16]]
    resembling = [mean + first + other + n for n in noise[16:]]
    prompts = [prompt(0)] * 8 + [prompt(1)] * 8
    without = fit_layer([*own[0], *own[1]], labels(prompts, 2), method=method).weight
    every, wanted = [*own[0], *own[1], *resembling], [*prompts, *[prompt(0, negative=True)] * 8]
    found = fit_layer(every, labels(wanted, 2), method=method).weight[:2]

    def margin(weight, inputs):
        logits = torch.cat(inputs).double() @ weight.T
        return float((logits[:, 0] - logits[:, 1]).mean())

    assert margin(without, resembling) > 0.9 * margin(without, own[0])
    assert margin(found, resembling) < 0.8 * margin(found, own[0])


def test_soft_labels_follow_losses():
    sure = labels([TokenizedPrompt(-1, False, (0, 1), 0, losses=(1.0, 2.0, 3.0))], 3).wanted[0]
    torn = labels([TokenizedPrompt(-1, False, (0, 1), 0, losses=(1.0, 1.1, 3.0))], 3).wanted[0]
    assert sure[0] > 0.999
    assert torn[0] / torn[1] == pytest.approx(2.718281828, rel=1e-6)


# --- load ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("target", [(0.25,) * 4, (0.4, 0.3, 0.2, 0.1)])
def test_biases_make_the_load_what_is_asked(per_token, target):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 4, generator=generator).double() + torch.tensor([3.0, 1, 0, -1])
    weights, target = torch.rand(4000, generator=generator).double(), torch.tensor(target).double()
    before = load(scores, weights, per_token)
    assert (before - target).abs().max() > 0.05
    bias = biases(scores, None, weights, per_token, target)
    assert (load(scores + bias, weights, per_token) / target - 1).abs().max() < 0.02
    counted = torch.zeros(4).double()
    for row, weight in zip(scores + bias, weights, strict=True):
        counted[row.sort(descending=True).indices[:per_token]] += weight
    assert torch.allclose(load(scores + bias, weights, per_token), counted / counted.sum())


def test_the_carrier_makes_a_bias_of_weights():
    x = 5 + torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)).double()
    v = carrier(x.T @ x / 3000, x.mean(0))
    assert (x @ v).mean() == pytest.approx(1)
    assert (x @ v).std() < 0.1


def test_the_gate_of_a_shared_expert_is_a_classifier_of_two():
    inputs, owners = clusters(1)
    pair = fit_layer(inputs, against([prompt(owner) for owner in owners], 2)).weight
    fresh, truth = clusters(2)
    gate = (torch.cat(fresh).double() @ (pair[0] - pair[1])).sigmoid()
    mine = torch.tensor(truth).repeat_interleave(40) == 2
    assert gate[mine].mean() > 0.8
    assert gate[~mine].mean() < 0.2
