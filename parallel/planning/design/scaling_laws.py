"""Scaling laws: the loss that a model of N parameters reaches after D tokens, as published fits say it. No torch.

    EPOCH.optimum(flops=1e24)             the compute-optimal N and D
    EPOCH.lifetime_optimum(loss, 2e12)    the same loss at the least cost of training and 1e12 tokens served
    JOINT.at(experts=32)                  the law of models whose experts are 32 times what a token visits
    fit(runs)                             a law from runs of one's own

Losses are nats a token *of the paper's data and tokenizer*: values of one law may be compared, of two laws not. Every
law knows what its runs spanned; ``extrapolates`` says in words where a question lies outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from stoker.errors import Refusal

#: FLOPs of one parameter and token: forward and backward, forward alone.
TRAINING_FLOPS, INFERENCE_FLOPS = 6.0, 2.0


@dataclass(frozen=True)
class Range:
    """From the least to the most that the runs behind a law had; None where the source does not say."""

    low: float | None = None
    high: float | None = None

    def outside(self, value: float, what: str) -> list[str]:
        """[] inside, else one sentence."""
        if self.low is not None and value < self.low:
            ratio, end = self.low / value, f"below the {short(self.low)}"
        elif self.high is not None and value > self.high:
            ratio, end = value / self.high, f"beyond the {short(self.high)}"
        else:
            return []
        return [f"{what} {short(value)} is {_times(ratio)} {end} it was fitted on"]


@dataclass(frozen=True)
class Optimum:
    """A model and its training. ``cost``: per parameter what the caller counts, times parameters; FLOPs if nothing is
    said."""

    parameters: float
    tokens: float
    loss: float
    cost: float

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A / N**alpha + B / D**beta, N in parameters and D in tokens (Hoffmann et al. 2022, equation 2).

    ``parameters``, ``tokens``, ``tokens_per_parameter``: what the runs behind it spanned; ``counted``: what N counts.
    """

    name: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    source: str
    parameters: Range = Range()
    tokens: Range = Range()
    tokens_per_parameter: Range = Range()
    counted: str = "parameters"

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def tokens_for(self, parameters: float, loss: float) -> float:
        """Tokens after which ``parameters`` reach ``loss``; inf where no number of tokens does."""
        rest = loss - self.E - self.A / parameters**self.alpha
        return (self.B / rest) ** (1 / self.beta) if rest > 0 else math.inf

    def optimum(self, flops: float) -> Optimum:
        """The least loss that ``flops`` = 6 N D can buy (Hoffmann et al. 2022, equation 4)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (flops / TRAINING_FLOPS) ** (self.beta / (self.alpha + self.beta))
        tokens = flops / TRAINING_FLOPS / parameters
        return Optimum(parameters, tokens, self.loss(parameters, tokens), flops)

    def lifetime_optimum(self, loss: float, lifetime: float = 0.0, training: float = TRAINING_FLOPS) -> Optimum:
        """The model that reaches ``loss`` at the least cost N * (training * D + lifetime): Sardana et al. 2024 (arXiv
        2401.00448), section 2.

        ``training``: cost of one parameter over one training token, by default its FLOPs; ``lifetime``: of one
        parameter over all tokens ever served, in the same unit. In FLOPs that is 2 * tokens served; in money
        price / second * (2 * tokens read / (peak * MFU of prefill) + 2 * tokens written / (peak * MFU of decoding)),
        with training = price / second * 6 / (peak * MFU of training).
        """
        reducible = loss - self.E
        if reducible <= 0:
            raise Refusal(f"a loss of {loss} is not above {self.E}, which no model of {self.name} goes below")

        def at(share: float) -> Optimum:
            """``share`` of the reducible loss is left by N, the rest by D."""
            parameters = (self.A / (share * reducible)) ** (1 / self.alpha)
            tokens = (self.B / ((1 - share) * reducible)) ** (1 / self.beta)
            return Optimum(parameters, tokens, loss, parameters * (training * tokens + lifetime))

        # d cost / d log N, divided by N, falls from >= 0 at the training optimum to -inf as D takes all of the loss.
        low, high = self.beta / (self.alpha + self.beta), 1.0
        for _ in range(100):
            share = (low + high) / 2
            slope = training * at(share).tokens * (1 - self.alpha * share / (self.beta * (1 - share))) + lifetime
            low, high = (share, high) if slope > 0 else (low, share)
        return at(low)

    def extrapolates(self, parameters: float, tokens: float) -> list[str]:
        """Sentences on what lies outside the runs that the law was fitted on; none inside."""
        return [
            *self.parameters.outside(parameters, self.counted),
            *self.tokens.outside(tokens, "tokens"),
            *self.tokens_per_parameter.outside(tokens / parameters, "tokens per parameter"),
        ]


HOFFMANN = LossLaw(
    "Hoffmann 2022, approach 3",
    E=1.69,
    A=406.4,
    B=410.7,
    alpha=0.34,
    beta=0.28,
    source="Hoffmann et al. 2022, arXiv 2203.15556, equation 10 (rounded there; disagrees with its approaches 1 and 2)",
    parameters=Range(70e6, 16e9),
    tokens=Range(5e9, 500e9),
)

EPOCH = LossLaw(
    "Epoch AI 2024",
    E=1.8172,
    A=482.01,
    B=2085.43,
    alpha=0.3478,
    beta=0.3658,
    source="Besiroglu et al. 2024, arXiv 2404.10102: the same runs, read from the figure and fitted again",
    parameters=Range(57.3e6, 16.2e9),
    tokens=Range(0.819e9, 318e9),
    tokens_per_parameter=Range(0.456, 341),
)


@dataclass(frozen=True)
class JointLaw:
    """L(N, D, X) = a X**delta N**(alpha + gamma ln X) + b X**omega D**(beta + zeta ln X) + c: one law for dense and
    expert models, N their *active* parameters, X a saturating transform of how many times more expert weights there are
    than a token visits.

    ``finer``: what finer experts change, (g, gamma, a) of another law; see ``granularity_factor``.
    """

    name: str
    a: float
    alpha: float
    delta: float
    gamma: float
    b: float
    beta: float
    omega: float
    zeta: float
    start: float
    most: float
    c: float
    source: str
    active: Range
    expansion: Range

    def effective(self, expansion: float) -> float:
        """X of the formula, between ``start`` (dense) and ``most``."""
        return 1 / (1 / (expansion - 1 + 1 / (1 / self.start - 1 / self.most)) + 1 / self.most)

    def at(self, expansion: float = 1.0, granularity: float = 1.0) -> LossLaw:
        """The law in N and D at a fixed shape of experts. ``expansion``: expert weights over those that a token visits
        (256 experts of which 8 are visited: 32; dense: 1); ``granularity``: a dense layer's hidden width over an
        expert's."""
        log = math.log(self.effective(expansion))
        return LossLaw(
            f"{self.name} at {expansion:g}x",
            E=self.c,
            A=self.a * math.exp(self.delta * log) * granularity_factor(granularity),
            B=self.b * math.exp(self.omega * log),
            alpha=-(self.alpha + self.gamma * log),
            beta=-(self.beta + self.zeta * log),
            source=self.source,
            parameters=self.active,
            counted="active parameters",
        )

    def extrapolates(self, active: float, tokens: float, expansion: float, granularity: float = 1.0) -> list[str]:
        return [
            *self.at(expansion, granularity).extrapolates(active, tokens),
            *self.expansion.outside(expansion, "experts over experts visited"),
            *GRANULARITY.outside(granularity, "granularity of experts"),
        ]


#: Table of the fit, checked against the paper's own table of (m, mu, n, nu) to 0.3 %. Its runs were at most 5e9
#: parameters in all; how many tokens they saw at most was not found.
JOINT = JointLaw(
    "Ludziejewski 2025",
    a=35.91,
    alpha=-0.1889,
    delta=-0.2285,
    gamma=0.0098,
    b=35.98,
    beta=-0.1775,
    omega=0.5529,
    zeta=-0.0259,
    start=2.0732,
    most=290.4521,
    c=1.3637,
    source="Ludziejewski et al. 2025, arXiv 2502.05172: joint law of dense and expert models, 280 runs on FineWeb-Edu",
    active=Range(high=2.7e9),
    expansion=Range(1, 32),
)

#: Granularities of the runs behind ``granularity_factor``.
GRANULARITY = Range(1, 16)


def granularity_factor(granularity: float) -> float:
    """By how much finer experts lower the term of N, at the same active and total parameters: 1 for experts as wide as
    a dense layer.

    (g / G**gamma + a) / (g + a) with g = 2.1, gamma = 0.58, a = 18.1 of L(N, D, G) = c + (g / G**gamma + a) / N**0.115
    + 30.8 / D**0.147 (Krajewski et al. 2024, arXiv 2402.07871; the constants as a secondary page gives them): fitted at
    64 times expansion, to 3.7e9 parameters and 130e9 tokens. Nobody has published it together with the joint law.
    """
    return (2.1 / granularity**0.58 + 18.1) / (2.1 + 18.1)


#: Nats lost against the best ratio by the number of linear layers (KDA) to one softmax layer, as validation perplexity
#: 5.65 (3:1), 5.66 (1:1), 5.70 (7:1) and 5.82 (15:1) of equal compute: Kimi Linear, arXiv 2510.26692, table 1, one size
#: (653e6 active parameters, 39e9 tokens). Softmax alone had 5.77 there, but the fitted curves of its figure 5 meet at
#: larger compute, so no gain over softmax is counted.
RATIO_LOSS = {0: 0.0, 1: 0.0, 3: 0.0, 7: math.log(5.70 / 5.65), 15: math.log(5.82 / 5.65)}


@dataclass(frozen=True)
class Fit:
    """``objective``: the sum of Huber losses at the law's constants."""

    law: LossLaw
    objective: float


def fit(
    runs: Sequence[tuple[float, float, float]],
    name: str = "own fit",
    source: str = "fitted on runs of one's own",
    delta: float = 1e-3,
) -> Fit:
    """The law nearest to ``runs``, each (parameters, tokens, loss): the least sum of Huber(delta) of log L, with L as
    log-sum-exp of its terms (Hoffmann et al. 2022, section 3.3), by BFGS from the best points of their grid of starts,
    then Nelder-Mead from where it ends.

    A and B are ill-conditioned: two fits that predict alike may state them 10 % apart. Runs that ended early move beta
    far; leave them out. Refuses fewer than six runs, and needs scipy.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import logsumexp, softmax

    if len(runs) < 6:
        raise Refusal(f"fit wants parameters, tokens and loss of six runs or more, and has {len(runs)}")
    if min(map(min, runs)) <= 0:
        raise Refusal("fit wants parameters, tokens and losses above zero")
    log_N, log_D, log_L = np.log(np.asarray(runs, dtype=float)).T

    def terms(point: np.ndarray) -> np.ndarray:
        a, b, e, alpha, beta = point
        return np.stack((a - alpha * log_N, b - beta * log_D, np.full(len(runs), e)))

    def objective(point: np.ndarray) -> float:
        off = np.abs(logsumexp(terms(point), axis=0) - log_L)
        return float(np.where(off <= delta, 0.5 * off**2, delta * (off - 0.5 * delta)).sum())

    def gradient(point: np.ndarray) -> np.ndarray:
        found = terms(point)
        pull = np.clip(logsumexp(found, axis=0) - log_L, -delta, delta) * softmax(found, axis=0)
        return np.array([pull[0].sum(), pull[1].sum(), pull[2].sum(), -pull[0] @ log_N, -pull[1] @ log_D])

    grid = product(range(0, 30, 5), range(0, 30, 5), (-1.0, -0.5, 0.0, 0.5, 1.0), *[(0.0, 0.5, 1.0, 1.5, 2.0)] * 2)
    starts = sorted((np.array(point, dtype=float) for point in grid), key=objective)[:STARTS]
    # The objective is some thousandths, and its gradient flat by BFGS's own measure long before the end.
    scaled = (lambda x: 1e3 * objective(x)), (lambda x: 1e3 * gradient(x))
    ended = [minimize(scaled[0], start, jac=scaled[1], method="BFGS").x for start in starts]
    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 10_000, "maxfev": 10_000}
    best = minimize(objective, min(ended, key=objective), method="Nelder-Mead", options=options).x
    a, b, e, alpha, beta = map(float, best)
    sizes, lengths, ratios = (Range(min(each), max(each)) for each in zip(*((N, D, D / N) for N, D, _ in runs)))
    law = LossLaw(name, math.exp(e), math.exp(a), math.exp(b), alpha, beta, source, sizes, lengths, ratios)
    return Fit(law, objective(best))


#: Starts of the grid that are followed. Every one of the ten best ends in the same valley on the Chinchilla runs.
STARTS = 10


def short(value: float) -> str:
    """72.4e9 -> "72.4B"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _times(ratio: float) -> str:
    return f"{ratio:.2g}x" if ratio < 100 else f"{ratio:,.0f}x"
