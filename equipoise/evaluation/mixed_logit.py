"""Two methods' successes by a mixed logit: logit P(success) = μ ± δ/2 + u ± v/2, the upper sign for the first method,
with u ~ N(0, σ²) and v ~ N(0, τ²) for each occupation.

δ is the log-odds of one method against the other in an occupation of no effect. σ is how far occupations are apart, τ
how differently the methods do in them: without τ, sentences of one occupation would pass for independent, and any
difference between few occupations for a certain one (Barr, Levy, Scheepers and Tily 2013, Journal of Memory and
Language 68). By maximum likelihood, the two random effects integrated out by adaptive Gauss–Hermite quadrature
(Pinheiro and Bates 1995, Journal of Computational and Graphical Statistics 4).

Test and interval take O − 1 degrees of freedom, F for the χ² of the likelihood ratio and Student's t for the normal. In
simulations of equal methods (1,000 draws each, μ = σ = 1, 50 or 250 sentences), 20 occupations, τ of 0.5 and 0.7, they
then reject in 3.7 and 5.1 % and cover in 94.4 and 93.5; with χ² and the normal 6.0 and 6.9 %, 92.7 and 92.6; with 5
occupations, τ of 0.6, 0.6 % and 96.6 % instead of 6.9 % and 89.5 %.

Legend: O occupations, M = 2 methods, Q quadrature nodes of both effects together.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import f as f_distribution
from scipy.stats import t as student

from equipoise.evaluation.intervals import Array
from equipoise.evaluation.results import MixedLogit

NODES = 9
"""In each of the two directions."""
LARGEST = 12.0
"""Log-odds, and standard deviations, beyond which nothing is looked for: odds of one in 160,000."""
FLAT = 0.02
"""Slope of the log-likelihood, in any direction that is open, up to which a point counts as a maximum: where nearly all
sentences succeed, or nearly none, quadrature tells slopes no better than so."""
NONE = 0.1
"""A standard deviation below this may have ended near 0 without a maximum there: it is looked for from other starts."""
STARTS = 10
"""How often the optimiser is started at most, each time where it ended before."""
_SIGNS = np.array([0.5, -0.5])


def mixed_logit(successes_OM: Array, n_OM: Array) -> MixedLogit | None:
    """Of the first method against the second, over occupations in which both have sentences. None where there are fewer
    than two occupations, or where nothing differs: both methods always succeed, or neither ever does."""
    ones_M, n_M = successes_OM.sum(0), n_OM.sum(0)
    if len(n_OM) < 2 or not 0 < ones_M.sum() < n_M.sum():
        return None
    likelihood = Likelihood(successes_OM, n_OM)
    null, full = (_fitted(likelihood, free) for free in (False, True))
    if full.value < null.value:  # it ended at a lower top
        full = max(full, _climbed(likelihood, null.point, True), key=_value)
    freedom = len(n_OM) - 1
    p = float(f_distribution.sf(max(0.0, 2 * (full.value - null.value)), 1, freedom))
    told = "" if null.found and full.found else "the fit did not settle"
    if endless := _endless(full):
        told = "; ".join(filter(None, [told, f"without end in these data, here at the largest looked for: {endless}"]))
    if any(ones == 0 or ones == n for ones, n in zip(ones_M, n_M, strict=True)):
        note = "; ".join(filter(None, ["one method always or never succeeds: the odds ratio has no end", told]))
        return MixedLogit(None, None, None, p, *full.deviations, note)
    reach = float(student.ppf(0.975, freedom)) * _error(likelihood, full.point)
    delta = float(full.point[1])
    if not np.isfinite(reach):
        return MixedLogit(delta, None, None, p, *full.deviations, told or "no interval: the likelihood is flat")
    return MixedLogit(delta, delta - reach, delta + reach, p, *full.deviations, told)


@dataclass
class Likelihood:
    """The log-likelihood of (μ, δ, σ, τ) without the binomial coefficients, and its gradient."""

    successes_OM: Array
    n_OM: Array

    def __post_init__(self) -> None:
        nodes, weights = np.polynomial.hermite.hermgauss(NODES)
        x, y = np.meshgrid(nodes, nodes, indexing="ij")
        self._nodes_Q2 = np.stack([x.ravel(), y.ravel()], 1)
        self._log_weights_Q = np.log(np.outer(weights, weights).ravel()) + (self._nodes_Q2**2).sum(1)
        self._mode_O2 = np.zeros((len(self.n_OM), 2))

    def __call__(self, point: Array) -> tuple[float, Array]:
        """At (4,) `point`: the value, and the (4,) gradient by Fisher's identity: the mean over what the effects are
        then likely to be of the gradient that known effects would give."""
        mu, delta, sigma, tau = point
        load_M2 = np.stack([np.full(2, sigma), tau * _SIGNS], 1)
        fixed_M = mu + delta * _SIGNS
        root_O22 = self._centre(fixed_M, load_M2)
        effects_OQ2 = self._mode_O2[:, None] + np.sqrt(2) * np.einsum("oij,qj->oqi", root_O22, self._nodes_Q2)
        eta_OQM = fixed_M + effects_OQ2 @ load_M2.T
        k_OM, n_OM = self.successes_OM[:, None], self.n_OM[:, None]
        log_OQ = (k_OM * eta_OQM - n_OM * np.logaddexp(0, eta_OQM)).sum(2) - (effects_OQ2**2).sum(2) / 2
        log_OQ = log_OQ + self._log_weights_Q
        top_O1 = log_OQ.max(1, keepdims=True)
        mass_OQ = np.exp(log_OQ - top_O1)
        total_O = mass_OQ.sum(1)
        # 2 |L| from the change of variables, 1 / 2π from the two normal densities.
        scale_O = np.log(root_O22[:, 0, 0] * root_O22[:, 1, 1] / np.pi)
        value = float((np.log(total_O) + top_O1[:, 0] + scale_O).sum())
        likely_OQ = mass_OQ / total_O[:, None]
        score_OQM = k_OM - n_OM * expit(eta_OQM)
        mean_OM = np.einsum("oq,oqm->om", likely_OQ, score_OQM)
        both_OQ, apart_OQ = score_OQM.sum(2), score_OQM @ _SIGNS
        gradient = np.array(
            [
                mean_OM.sum(),
                (mean_OM @ _SIGNS).sum(),
                (likely_OQ * both_OQ * effects_OQ2[..., 0]).sum(),
                (likely_OQ * apart_OQ * effects_OQ2[..., 1]).sum(),
            ]
        )
        return value, gradient

    def _centre(self, fixed_M: Array, load_M2: Array) -> Array:
        """Move each occupation's likeliest effects to where they are at this point, and return (O, 2, 2) L with LLᵀ the
        inverse of the curvature there."""
        z_O2 = self._mode_O2
        height_O = self._height(z_O2, fixed_M, load_M2)
        for _ in range(50):
            slope_O2, curve_O22 = self._bent(z_O2, fixed_M, load_M2)
            step_O2 = np.linalg.solve(curve_O22, slope_O2[..., None])[..., 0]
            # Half as far as a standard normal is wide at most, so that no step runs away where the curve is flat.
            step_O2 = step_O2 / np.maximum(1.0, np.abs(step_O2).max(1, keepdims=True))
            # Where effects are strong a step may lead to the other side and back, without end: half as far then, until
            # it leads up. There is one top, so where the search began makes no difference.
            for _ in range(30):
                moved_O = self._height(z_O2 + step_O2, fixed_M, load_M2)
                if not (worse_O := moved_O < height_O - 1e-9 * (1 + np.abs(height_O))).any():
                    break
                step_O2 = np.where(worse_O[:, None], step_O2 / 2, step_O2)
            z_O2, height_O = z_O2 + step_O2, moved_O
            if np.abs(step_O2).max() < 1e-6:
                break
        _, curve_O22 = self._bent(z_O2, fixed_M, load_M2)
        self._mode_O2 = z_O2
        # With S = C⁻¹, the lower Cholesky factor of S.
        return np.asarray(np.linalg.cholesky(np.linalg.inv(curve_O22)))

    def _height(self, z_O2: Array, fixed_M: Array, load_M2: Array) -> Array:
        """(O,) logarithms of how likely these effects and the successes are together, but for a constant."""
        eta_OM = fixed_M + z_O2 @ load_M2.T
        log_OM = self.successes_OM * eta_OM - self.n_OM * np.logaddexp(0, eta_OM)
        return np.asarray(log_OM.sum(1) - (z_O2**2).sum(1) / 2)

    def _bent(self, z_O2: Array, fixed_M: Array, load_M2: Array) -> tuple[Array, Array]:
        """Its slope (O, 2), and its curvature (O, 2, 2), which is positive."""
        p_OM = expit(fixed_M + z_O2 @ load_M2.T)
        weight_OM = self.n_OM * p_OM * (1 - p_OM)
        curve_O22 = np.eye(2) + np.einsum("om,mi,mj->oij", weight_OM, load_M2, load_M2)
        return (self.successes_OM - self.n_OM * p_OM) @ load_M2 - z_O2, curve_O22


@dataclass(frozen=True)
class _Fit:
    point: Array
    value: float
    found: bool

    @property
    def deviations(self) -> tuple[float, float]:
        return float(self.point[2]), float(self.point[3])


def _endless(fit: _Fit) -> str:
    """Which of the estimates stand at the end of what is looked for, so that they are ends and no estimates."""
    names = ("level", "log-odds", "deviation of occupations", "deviation of the difference")
    ends = (LARGEST, 2 * LARGEST, LARGEST, LARGEST)
    at_end = [name for name, value, end in zip(names, fit.point, ends, strict=True) if abs(value) >= end - 1e-6]
    return ", ".join(at_end)


def _fitted(likelihood: Likelihood, free: bool) -> _Fit:
    """The maximum; δ = 0 unless `free`."""
    ones_M, n_M = likelihood.successes_OM.sum(0), likelihood.n_OM.sum(0)
    logits_M = np.log((ones_M + 0.5) / (n_M - ones_M + 0.5))
    start = np.array([logits_M.mean(), logits_M[0] - logits_M[1] if free else 0.0, 0.5, 0.5])
    fit = _climbed(likelihood, start, free)
    # The likelihood is level at a deviation of 0 whether or not it is highest there, since it does not know its sign.
    if none := [i for i in (2, 3) if fit.point[i] < NONE]:
        for begun in (0.25, 0.0):
            other = fit.point.copy()
            other[none] = begun
            fit = max(fit, _climbed(likelihood, other, free), key=_value)
    return fit


def _value(fit: _Fit) -> float:
    return fit.value


def _climbed(likelihood: Likelihood, start: Array, free: bool) -> _Fit:
    reach = 2 * LARGEST if free else 0.0
    upper = np.array([LARGEST, reach, LARGEST, LARGEST])
    # Deviations may change their sign on the way, which means nothing: a bound at 0 would hold them there.
    bounds = list(zip(-upper, upper, strict=True))

    def lost(point: Array) -> tuple[float, Array]:
        value, gradient = likelihood(point)
        return -value, -gradient

    point = np.clip(start, -upper, upper)
    # The optimiser may end far from a maximum, after a step so short that the value hardly changed, and call it a
    # success: what counts is the slope.
    highest = -np.inf
    for _ in range(STARTS):
        made = minimize(lost, point, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 0.0, "gtol": 1e-5})
        point = np.asarray(made.x)
        slope = np.clip(point - made.jac, -upper, upper) - point  # 0 where it leads out of what is looked for
        found, gained = bool(np.abs(slope).max() <= FLAT), -made.fun - highest
        if found and gained < 1e-5:
            break
        highest = -made.fun
    if not found:
        # Where occupations are so far apart that quadrature is coarse, that slope is not quite the value's own, and the
        # optimiser finds no way up: the slope is then taken by differences, which takes longer.
        made = minimize(
            lambda x: -likelihood(x)[0], point, jac="3-point", method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-13}
        )
        point = np.asarray(made.x)
        # SciPy leaves out what is fixed, δ, and the slope there is no number.
        slope = np.clip(point - np.nan_to_num(made.jac), -upper, upper) - point
        found = bool(np.abs(slope).max() <= FLAT)
    point[2:] = np.abs(point[2:])
    return _Fit(point, -float(made.fun), found)


def _error(likelihood: Likelihood, point: Array) -> float:
    """The standard error of δ from the observed information, by differences of the gradient; effects whose standard
    deviation is 0 are left out. Infinite where the information has no inverse."""
    kept = [0, 1, *(i for i in (2, 3) if point[i] > 1e-3)]
    step = 1e-4
    rows = []
    for i in kept:
        moved = np.eye(4)[i] * step
        rows.append((likelihood(point - moved)[1] - likelihood(point + moved)[1])[kept] / (2 * step))
    information = np.array(rows)
    try:
        variance = float(np.linalg.inv((information + information.T) / 2)[1, 1])
    except np.linalg.LinAlgError:
        return float("inf")
    return float(np.sqrt(variance)) if variance > 0 else float("inf")
