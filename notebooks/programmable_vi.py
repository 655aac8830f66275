# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What is the derivative of an average?
#
# A program that draws at random has an average result, and the average depends on the program's parameters in two ways:
# through what is computed from the draws, and through the *probabilities* of the draws.  Ordinary automatic
# differentiation sees only the first.  `vi.expectation` gives both, for any mixture of estimators (Lew et al., POPL 2023;
# Becker et al., PLDI 2024).

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.scipy.stats import norm

import vi

QUICK = bool(os.environ.get("PROOFSTONE_QUICK"))  # a small version, in seconds
FIGURES = Path(os.environ.get("PROOFSTONE_FIGURES", "docs/figures"))
DRAWS = 500 if QUICK else 20_000

# %% [markdown]
# ## A coin
#
# With probability $\theta$ the loss is 0, else $-\theta/2$.  The mean is $-\theta(1-\theta)/2$, its derivative $\theta - 1/2$: at
# 0.4 that is $-0.1$.  Differentiating through the draw as if it were a constant gives $-(1-\theta)/2 = -0.3$.

# %%
COIN = {"enum": vi.enum, "mvd": vi.mvd, "reinforce": vi.reinforce}


def coin(strategy):
    @vi.expectation
    def loss(theta):
        b = vi.sample(strategy(dist.Bernoulli(theta)), name="b")
        return lax.cond(b == 1, lambda t: 0.0, lambda t: -t / 2, theta)

    return loss


def moments(objective, *args, key, argnums=1):
    draw = jax.vmap(jax.value_and_grad(objective, argnums), (0, *(None for _ in args)))
    values, gradients = jax.jit(draw)(jax.random.split(key, DRAWS), *args)
    return values, gradients


for name, strategy in COIN.items():
    values, gradients = moments(coin(strategy), 0.4, key=jax.random.key(0))
    print(
        f"{name:10s} value {values.mean():.4f}  gradient {gradients.mean():.4f}  (standard deviation {gradients.std():.3f})"
    )

# %% [markdown]
# ## A jump
#
# For $x \sim N(\theta, 1)$ and the loss $(\theta - 5)\,1[x > 3]$ the draw is continuous and the loss is not.  The pathwise
# derivative of an indicator is zero almost everywhere, so the reparameterisation trick would be wrong, silently.  Here it is
# an error, and the error says what is legal.

# %%


def jump(strategy):
    @vi.expectation
    def loss(theta):
        x = vi.sample(strategy(dist.Normal(theta, 1.0)), name="x")
        return jnp.where(x > 3, theta - 5, 0.0)

    return loss


try:
    jump(vi.reparam)(jax.random.key(0), 1.0)
except vi.StrategyError as error:
    print(error)

# %%
THETAS = jnp.linspace(-5.0, 8.0, 27)


def spread(strategy):
    def one(theta, key):
        return jax.grad(jump(strategy), 1)(key, theta)

    keys = jax.random.split(jax.random.key(1), DRAWS)
    gradients = jax.jit(jax.vmap(lambda theta: jax.vmap(lambda k: one(theta, k))(keys)))(THETAS)
    return gradients.mean(1), gradients.std(1)


SPREADS = {name: spread(strategy) for name, strategy in (("mvd", vi.mvd), ("reinforce", vi.reinforce))}
EXACT = norm.pdf(3 - THETAS) * (THETAS - 5) + norm.sf(3 - THETAS)

# %% [markdown]
# ## Objectives are programs
#
# A model and a guide are NumPyro programs, and the objective is one more program.  Each choice of the guide has an
# estimator of its own; `gradient_report` measures all that are legal.  The model: a coin $v$ says which of two normal
# distributions $x$ comes from, and $x^2$ is observed, with a little noise, to be 4.

# %%


def model():
    v = numpyro.sample("v", dist.Bernoulli(0.8))
    mean, scale = jnp.where(v == 1, 2.0, 3.0), jnp.where(v == 1, 1.0, 0.5)
    x = numpyro.sample("x", dist.Normal(mean, scale))
    numpyro.sample("y", dist.Normal(x**2, 0.1), obs=4.0)


def guide(phi):
    v = numpyro.sample("v", dist.Bernoulli(phi[0]))
    numpyro.sample("x", dist.Normal(jnp.where(v == 1, phi[1], phi[2]), 1.0))


@vi.expectation
def elbo(phi):
    trace, log_q = vi.sim(guide)(phi)
    return vi.log_density(model)(trace) - log_q


phi = jnp.array([0.3, 1.5, 2.5])
report = vi.gradient_report(elbo, jax.random.key(2), phi, draws=DRAWS)
print(report)

# %% [markdown]
# The exact ELBO at this point is $-1488.276$, with gradient $(1303.415, -112.350, -1836.100)$: all rows agree with it, and
# their variances differ up to fourfold.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for colour, (name, (mean, sd)) in zip(("C0", "C1"), SPREADS.items(), strict=True):
    left.fill_between(
        THETAS, mean - sd, mean + sd, color=colour, alpha=0.25, label=f"{name}: mean ± one draw's deviation"
    )
    left.plot(THETAS, mean, color=colour)
left.plot(THETAS, EXACT, "k--", lw=1, label="exact derivative")
left.set(
    xlabel=r"$\theta$", ylabel="estimate of the derivative", title=r"$E\,(\theta-5)\,1[x>3]$,  $x\sim N(\theta,1)$"
)
left.legend(fontsize=8)

rows = [(f"{e.label}: {e.strategy}", e.total_variance) for e in report.estimates]
right.barh([r for r, _ in rows], [v for _, v in rows], color="C2")
right.set(xlabel="variance of one gradient (sum over its coordinates)", title="ELBO of the coin and the normal")
right.invert_yaxis()
FIGURES.mkdir(parents=True, exist_ok=True)
figure.savefig(FIGURES / "vi_estimators.png", dpi=130)
figure.savefig(FIGURES / "vi_estimators.svg")
