"""Optimizers next to packages of their authors, or of others, from PyPI: the same parameters at every step.

Both sides begin at the same point and have the gradients of the same problem, each at its own parameters, so
that a difference grows instead of fading. Both compute in float64, also where they name float32. Where
conventions differ, the test says how and maps one to the other by formula.
"""

import functools

import adopt
import dadaptation
import jax
import jax.numpy as jnp
import lion_pytorch
import mechanic_pytorch.mechanic
import muon
import numpy as np
import optax
import parameterfree
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import sophia_opt
import torch
from adam_mini import Adam_mini
from optimizer_cases import parameter_shapes, some_shapes
from trajectories import RATES, STEPS, Problem, compare, ours, slope, split

from trainit.parallel.layout import parameter_kind
from trainit.parallel.trees import path_name

pytestmark = pytest.mark.evidence(
    "optimizers next to PyTorch packages of their authors or of others: parameters at each of 40 steps "
    "within 1e-9 of their way (Shampoo's sums within 1e-6), in float64; where conventions differ, the "
    "test says how"
)

RISING = np.minimum(0.001 * np.arange(1, STEPS + 1), 0.02)
TINY = 1e-30  # where the place of eps differs, which is thereby out of the comparison
BETAS = {"beta1": 0.8, "beta2": 0.97}
SGD = {"momentum": 0.8, "decoupled": False}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_of_torch(name):
    reference = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    compare(
        ours(name, BETAS | {"eps": 1e-3}, 0.3),
        lambda groups, named: reference(groups, 1.0, (0.8, 0.97), 1e-3),
        0.3,
    )


def test_nadam_of_torch():
    """Torch's beta1 rises as beta1 (1 - 0.96^(t decay) / 2); a huge decay leaves Dozat's constant one."""
    compare(
        ours("nadam", BETAS | {"eps": 1e-3}, 0.3),
        lambda groups, named: torch.optim.NAdam(
            groups, 1.0, (0.8, 0.97), 1e-3, momentum_decay=1e6, decoupled_weight_decay=True
        ),
        0.3,
    )


def test_rmsprop_of_torch():
    """Without debiasing, and with decay in the gradient."""
    compare(
        ours("rmsprop", {"beta2": 0.97, "eps": 1e-3, "debias_beta2": False, "decoupled": False}, 0.3),
        lambda groups, named: torch.optim.RMSprop(groups, 1.0, 0.97, 1e-3),
        0.3,
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_of_torch(nesterov):
    compare(
        ours("sgdm", SGD | {"nesterov": nesterov}, 0.3),
        lambda groups, named: torch.optim.SGD(groups, 1.0, 0.8, nesterov=nesterov),
        0.3,
    )


def test_adafactor_of_torch():
    """Its rate is at most 1 / sqrt(t), above ours; its eps bounds where ours adds, and both are tiny."""
    compare(
        ours("adafactor", {"decay_power": 0.7, "scale_floor": 0.1}, 0.3),
        lambda groups, named: torch.optim.Adafactor(groups, 1.0, -0.7, (1e-30, 0.1)),
        0.3,
    )


def test_adafactor_with_momentum():
    """pytorch_optimizer's mean is of rate times direction, ours of the direction: a constant rate."""
    rates = np.full(STEPS, 0.02)
    compare(
        ours("adafactor", {"beta1": 0.6}, rates=rates),
        lambda groups, named: pytorch_optimizer.AdaFactor(
            groups, 1.0, (0.6, 1.0 - 1e-9), relative_step=False, momentum_dtype=torch.float64
        ),
        rates=rates,
    )


def test_lion():
    """lucidrains' package; the authors have none. Ours is optax's."""
    compare(
        ours("optax.lion", {"b1": 0.8, "b2": 0.97}, 0.3),
        lambda groups, named: lion_pytorch.Lion(groups, 1.0, (0.8, 0.97)),
        0.3,
    )


def test_ademamix():
    """pytorch_optimizer; ours is optax's, with its mask."""
    fields = {"b1": 0.8, "b2": 0.97, "b3": 0.99, "alpha": 3.0, "eps": 1e-3}
    compare(
        ours("optax.contrib.ademamix", fields, 0.3),
        lambda groups, named: pytorch_optimizer.AdEMAMix(
            groups, 1.0, (0.8, 0.97, 0.99), weight_decouple=True, alpha=3.0, eps=1e-3
        ),
        0.3,
    )


def test_adopt():
    """The authors'; ours is optax's. Theirs does nothing at the first step, not even decay."""
    compare(
        ours("optax.contrib.adopt", {"b1": 0.8, "b2": 0.97, "eps": 1e-3}),
        lambda groups, named: adopt.ADOPT(groups, 1.0, (0.8, 0.97), 1e-3, decouple=True),
    )


def root_plus_eps(ams_bound, exp_avg_sq, max_exp_avg_sq, eps):
    """pytorch_optimizer's denominator without the 1e-15 that it adds under the root."""
    return exp_avg_sq.sqrt().add_(eps)


def test_mars(monkeypatch):
    """pytorch_optimizer, as the authors' code: it clips the corrected gradient of each array by itself.

    The paper's algorithm 2 has one vector, which ours takes for all parameters together; so there is one
    matrix here. At the first step, where the paper has no gradient before, theirs corrects by the gradient
    itself; both are longer than 1 and clipped to the same.
    """
    monkeypatch.setattr(pytorch_optimizer.MARS, "apply_ams_bound", staticmethod(root_plus_eps))
    shapes = {"head": {"kernel": some_shapes()["head"]["kernel"]}}
    compare(
        ours("mars", BETAS | {"gamma": 0.1, "eps": TINY}, 0.3, shapes=shapes),
        lambda groups, named: pytorch_optimizer.MARS(groups, 1.0, (0.8, 0.97), 0.1, eps=TINY, foreach=False),
        0.3,
        shapes=shapes,
    )


def test_cautious():
    """pytorch_optimizer's Lion with it: per array, scaled by size / (agreeing + 1)."""
    compare(
        ours("cautious+optax.lion", {"b1": 0.8, "b2": 0.97}, 0.3),
        lambda groups, named: pytorch_optimizer.Lion(
            [group | {"cautious": True} for group in groups], 1.0, (0.8, 0.97)
        ),
        0.3,
    )


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam(adaptive):
    """pytorch_optimizer, around torch's SGD."""

    def step(optimizer, fill, number):
        fill(number)
        optimizer.step(lambda: fill(number))

    compare(
        ours(
            "sam+sgdm", {"momentum": 0.8, "decoupled": False, "sam": {"rho": 0.5, "adaptive": adaptive}}, 0.3
        ),
        lambda groups, named: pytorch_optimizer.SAM(
            groups, torch.optim.SGD, 0.5, adaptive, perturb_eps=0.0, lr=1.0, momentum=0.8
        ),
        0.3,
        step=step,
    )


def test_sophia_h():
    """pytorch_optimizer, fed with the diagonals that ours has drawn.

    clip(m / (gamma h), 1) is clip(m / h, gamma) / gamma, where theirs divides the bound of h alike.
    """
    gamma = 0.5
    optimizer = ours(
        "sophia", {"beta1": 0.8, "beta2": 0.7, "gamma": gamma, "eps": 1e-3, "every_steps": 3}, 0.3
    )
    means = hessians(Problem(some_shapes()), optimizer)

    def step(theirs, fill, number):
        fill(number)
        params = [p for group in theirs.param_groups for p in group["params"]]
        hessian = None
        if number % 3 == 0:
            old = means[number - 1] if number else dict.fromkeys(means[0], 0.0)
            drawn = {name: torch.tensor((new - 0.7 * old[name]) / 0.3) for name, new in means[number].items()}
            hessian = [drawn[theirs.names[p]] for p in params]
        theirs.step(hessian=hessian)

    def reference(groups, named):
        made = pytorch_optimizer.SophiaH(
            groups, 1 / gamma, (0.8, 0.7), p=gamma, eps=1e-3 / gamma, update_period=STEPS + 1
        )
        made.names = {p: name for name, p in named.items()}
        return made

    compare(optimizer, reference, 0.3 * gamma, step=step)


def hessians(problem: Problem, optimizer) -> list[dict]:
    """Sophia's mean of diagonals after each step, split as the parameters."""
    found = []
    for _, state in problem.ours(optimizer):
        leaves = jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "hessian"))
        found.append(split(next(s.hessian for s in leaves if hasattr(s, "hessian"))))
    return found


def test_sophia_g():
    """The authors' code as a package. Their mean of squares lacks the number of tokens, which is in `bs`."""

    def step(theirs, fill, number):
        fill(number)
        if number % 3 == 0:
            theirs.update_hessian()
        theirs.step(bs=7)

    fields = {"beta1": 0.8, "beta2": 0.7, "gamma": 0.05, "eps": TINY, "every_steps": 3, "estimator": "gnb"}
    compare(
        ours("sophia", fields, 0.3),
        lambda groups, named: sophia_opt.SophiaG(groups, 1.0, (0.8, 0.7), 0.05),
        0.3,
        step=step,
    )


def test_soap():
    """pytorch_optimizer, after the authors' code.

    Sides longer than 16 keep their own basis: from one gradient they have fewer eigenvectors than entries,
    and no two programs complete them alike. Theirs decays after the step, so there is no decay; its eps is
    not debiased.
    """
    fields = BETAS | {"shampoo_beta": 0.9, "eps": TINY, "precondition_every": 3, "max_size": 16}
    compare(
        ours("soap", fields),
        lambda groups, named: pytorch_optimizer.SOAP(
            groups, 1.0, (0.8, 0.97), 0.9, precondition_frequency=3, max_precondition_dim=16, eps=TINY
        ),
    )


def matrices(shapes: dict) -> dict:
    """The blocks' kernels alone."""
    return {
        "blocks": {
            "attention": {"out": shapes["blocks"]["attention"]["out"]},
            "mlp": {name: {"kernel": shapes["blocks"]["mlp"][name]["kernel"]} for name in ("up", "down")},
        }
    }


def test_shampoo():
    """pytorch_optimizer's, which is the paper's algorithm 1: sums of squares instead of means.

    A mean with beta near 1 is the sum over t; two roots of power 1/4 make that a factor sqrt(t). How near, is
    a choice between 1 - beta of 1.5e-8, times t / 2, and what float64 leaves of 1 - beta^t, so the tolerance.
    """
    shapes, beta = matrices(some_shapes()), 1 - 2.0**-26
    fields = {"beta1": 0.0, "shampoo_beta": beta, "ridge": 1e-16, "precondition_every": 1, "graft": "none"}
    compare(
        ours("shampoo", fields, 0.0, RATES / np.sqrt(1 + np.arange(STEPS)), shapes),
        lambda groups, named: pytorch_optimizer.Shampoo(groups, 1.0, matrix_eps=1e-16, weight_decouple=True),
        0.0,
        shapes=shapes,
        rtol=1e-6,
    )


def test_shampoo_with_grafting():
    """pytorch_optimizer's ScalableShampoo, after that of Anil et al.; its factors are not debiased.

    Grafting takes the scale out. Ours has the momentum before the roots and theirs behind: none here.
    """
    shapes = matrices(some_shapes())
    fields = {"beta1": 0.0, "shampoo_beta": 0.9, "ridge": 1e-16, "precondition_every": 1, "graft": "sgd"}
    compare(
        ours("shampoo", fields, 0.3, shapes=shapes),
        lambda groups, named: pytorch_optimizer.ScalableShampoo(
            groups,
            1.0,
            (0.0, 0.9),
            decoupled_weight_decay=True,
            start_preconditioning_step=1,
            preconditioning_compute_steps=1,
            shape_interpretation=False,
            nesterov=False,
            matrix_eps=1e-16,
            use_svd=True,
        ),
        0.3,
        shapes=shapes,
    )


@pytest.mark.parametrize(
    "name, reference",
    [
        ("prodigy", prodigyopt.Prodigy),
        ("dadapt_adamw", functools.partial(dadaptation.DAdaptAdam, decouple=True)),
    ],
)
def test_a_rate_that_is_found(name, reference):
    """The authors'; ours are optax's, whose decay has no mask."""
    ones = np.ones(STEPS)
    compare(
        ours(f"optax.contrib.{name}", {"betas": (0.8, 0.97), "estim_lr0": 1e-2}, 0.03, ones),
        lambda groups, named: reference(
            [group | {"weight_decay": 0.03} for group in groups],
            betas=(0.8, 0.97),
            d0=1e-2,
            use_bias_correction=True,
        ),
        rates=ones,
    )


@pytest.mark.parametrize("base", ["adamw", "sgdm"])
def test_schedule_free(base):
    """The authors' reference; parameters are the average x. It weighs by the largest rate yet: they rise."""
    references = {
        "adamw": functools.partial(schedulefree.AdamWScheduleFreeReference, betas=(0.7, 0.97), eps=1e-3),
        "sgdm": functools.partial(schedulefree.SGDScheduleFreeReference, momentum=0.7),
    }
    fields = {"beta2": 0.97, "eps": 1e-3} if base == "adamw" else {}

    def reference(groups, named):
        made = references[base](groups, lr=1.0)
        made.train()
        return made

    compare(
        ours(f"schedule_free+{base}", fields | {"schedule_free": {"beta": 0.7}}, 0.3, RISING),
        reference,
        0.3,
        rates=RISING,
        read=lambda made, p: made.state[p]["x"],
    )


def test_adam_mini():
    """The authors', which goes by names. Biases are left out: it gives them Adam, the paper one mean each."""
    whole = parameter_shapes()
    shapes = jax.tree.map_with_path(lambda path, p: None if path_name(path).endswith("bias") else p, whole)
    renamed = {
        **{"attention/out": "wo", "head/kernel": "lm_head", "mlp_norm": "second_norm"},
        **{"query_norm": "q_norm", "key_norm": "k_norm"},
    }

    def reference(groups, named):
        def name(path: str) -> str:
            return functools.reduce(lambda text, words: text.replace(*words), renamed.items(), path)

        return Adam_mini(
            [(name(path), p) for path, p in named.items()],
            1.0,
            (0.8, 0.97),
            1e-3,
            0.3,
            dim=16,
            n_heads=2,
            verbose=False,
        )

    compare(ours("adam_mini", BETAS | {"eps": 1e-3}, 0.3, shapes=shapes), reference, 0.3, shapes=shapes)


def test_laprop(monkeypatch):
    """pytorch_optimizer, with the rest of Muon; at a constant rate, which its mean has in it."""
    monkeypatch.setattr(pytorch_optimizer.LaProp, "apply_ams_bound", staticmethod(root_plus_eps))
    shapes = {name: some_shapes()[name] for name in ("head", "token_embedding")}
    fields = {"rest": "laprop", "rest_rate": 1.0, "rest_beta1": 0.8, "rest_beta2": 0.97, "rest_eps": TINY}
    rates = np.full(STEPS, 0.02)
    compare(
        ours("muon", fields, rates=rates, shapes=shapes),
        lambda groups, named: pytorch_optimizer.LaProp(groups, 1.0, (0.8, 0.97), eps=TINY, foreach=False),
        rates=rates,
        shapes=shapes,
    )


def test_mechanic():
    """The authors', around torch's SGD. Ours is optax's, which is later and differs in what it does with h.

    It clips h by the largest |h| until then, and remembers a negative reward. Both states begin with so
    large an |h| that there is nothing to clip, and the reward stays above 0. Theirs takes its decay from
    parameters that the other optimizer has moved already, the paper (algorithm 1) from those before: none.
    """
    largest, eps, start = 1e7, 1e-2, 1e-9
    plain = ours("mechanic+sgdm", {"mechanic": {"decay": 0.0, "eps": eps, "start": start}})

    def init(params):
        state = plain.init(params)
        return state._replace(m=jnp.full_like(state.m, largest))

    optimizer = optax.GradientTransformationExtraArgs(init, plain.update)

    def reference(groups, named):
        made = mechanic_pytorch.mechanize(torch.optim.SGD, s_decay=0.0, s_init=start, eps=eps)(
            groups, lr=1.0, momentum=0.9
        )
        betas = tuple(1 - 0.1**n for n in range(1, 7))
        start_at = {p: p.detach() for p in named.values()}
        mechanic_pytorch.mechanic._init_state(made, start_at, 0.0, betas, start, eps, False, 0)
        made.state["_mechanic"]["max_product"].fill_(largest)
        return made

    compare(optimizer, reference)
    for number, (_, state) in enumerate(Problem(some_shapes()).ours(optimizer), start=1):
        betas = 1 - 0.1 ** np.arange(1, 7)
        np.testing.assert_allclose(state.m, largest * betas**number)
        assert np.min(state.r) >= 0


def test_muon():
    """The author's, Newton-Schulz in float64. His momentum is a mean, ours a sum: 1 / (1 - beta) of it."""
    fields = {"momentum": 0.9, "ns_eps": 1e-7 / (1 - 0.9), "rest_rate": 0.5, "rest_beta1": 0.8}
    fields |= {"rest_beta2": 0.97, "rest_eps": 1e-3}

    def reference(groups, named):
        hidden = [p for name, p in named.items() if parameter_kind(name.rpartition("/")[0]) == "matrix"]
        muons = [{"params": hidden, "lr": 1.0, "momentum": 0.9, "weight_decay": 0.3, "use_muon": True}]
        there = {id(p) for p in hidden}
        rest = [
            {
                **group,
                "params": [p for p in group["params"] if id(p) not in there],
                "lr": 0.5,
                "use_muon": False,
            }
            | {"betas": (0.8, 0.97), "eps": 1e-3}
            for group in groups
        ]
        return muon.SingleDeviceMuonWithAuxAdam(muons + rest)

    compare(ours("muon", fields, 0.3), reference, 0.3)


def test_kt_bettor():
    """An author's, one for each of four entries; where it goes from 0 is ours' next change."""
    shapes = {"final_norm": {"scale": jax.ShapeDtypeStruct((4,), jnp.float64)}}
    problem, bound = Problem(shapes), 100.0
    bettors = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    theirs = [parameterfree.KT([p], w=0.1) for p in bettors]
    optimizer = ours("kt_bettor", {"eps": 0.1, "lipschitz": bound}, rates=np.ones(STEPS), shapes=shapes)
    x, curvature, target = (
        tree["final_norm"]["scale"] for tree in (problem.start, problem.curvature, problem.target)
    )
    for number, (after, _) in enumerate(problem.ours(optimizer)):
        gradient = slope(curvature, target, problem.noise[number]["final_norm"]["scale"], x)
        for p, bettor, g in zip(bettors, theirs, gradient, strict=True):
            p.grad = torch.tensor([g / bound])
            bettor.step()
        change = np.asarray(after["final_norm"]["scale"]) - x
        np.testing.assert_allclose(change, [p.item() for p in bettors], rtol=1e-9, atol=1e-14)
        x = x + change
