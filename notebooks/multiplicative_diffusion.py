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
# # Noise that multiplies
#
# A synapse is excitatory or inhibitory for life: what it learns changes its strength, never its sign (Dale's law).  Shetty,
# Prasath and Seelamantula (2025) build a diffusion model in this way.  Positive data are multiplied by random factors until
# nothing is left of them, and a network learns to multiply them back.  Here: why that is ordinary diffusion seen through a
# logarithm, what one gains by knowing this, and digits drawn by ten multiplications.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from generative import data, exponentiated, gbm_diffusion, guidance, lognormal, samplers, weights
from paper_checks import run

jax.config.update("jax_enable_x64", True)
QUICK = bool(os.environ.get("PROOFSTONE_QUICK"))  # a small version, in seconds
FIGURES = Path(os.environ.get("PROOFSTONE_FIGURES", "docs/figures"))
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7a7a7a"
key = jax.random.key(0)

# %% [markdown]
# ## Forwards: one equation, two looks
#
# $dX=\mu X\,dt+\sigma X\,dW$ is geometric Brownian motion.  By Itô's formula $Y=\log X$ has
# $dY=(\mu-\tfrac12\sigma^2)\,dt+\sigma\,dW$: a Brownian motion.  So $x_t=x_0\,e^{M+\sqrt V z}$ with a normal $z$, for all $t$ at
# once, and with the paper's $\mu=\tfrac12\sigma^2$ even $M=0$.  Our data are a mixture of two log-normal laws on the line, whose
# score is known at every $t$.

# %%
process = gbm_diffusion.GeometricBrownianMotion(sigma=1.6)
target = lognormal.LogNormalMixture(jnp.array([0.3, 0.7]), jnp.array([[-0.5], [0.9]]), jnp.array([[0.01], [0.02]]))
score = target.log_score(process)
times = np.linspace(0, 1, 200)
steps = jax.random.normal(jax.random.fold_in(key, 1), (len(times), 30, 1)) * 1.6 * np.sqrt(times[1])
paths = target.sample(jax.random.fold_in(key, 2), 30) * jnp.exp(jnp.cumsum(steps.at[0].set(0), 0))[..., 0:1]
x_0 = target.sample(key, 20_000)
x_1, _ = gbm_diffusion.perturb(jax.random.fold_in(key, 3), process, x_0, 1.0)
gained = float(jnp.log(x_1).var() - jnp.log(x_0).var())
print(f"log x gained the variance {gained:.3f} on the way; V = {float(process.variance(1.0)):.3f}")

# %% [markdown]
# ## Backwards: three scores, and the 1 that gets lost
#
# Running time backwards needs the score of the density.  Of which variable?  $\nabla\log p(x)$ blows up like $1/x$; the paper
# learns $\xi=x\,\nabla\log p(x)$; the score of $\log x$ is $\xi+1$, and the 1 comes from the Jacobian.  Whoever puts $\xi$ where
# $\xi+1$ belongs gets samples that are all too small by a factor.

# %%
COUNT = 2_000 if QUICK else 100_000
quantiles = jnp.sort(jnp.log(target.sample(jax.random.fold_in(key, 4), COUNT)[:, 0]))


def distance(x):
    """W1 between the laws of log x."""
    return float(jnp.abs(jnp.sort(jnp.log(jnp.abs(x[:, 0]))) - quantiles).mean())


def without_the_one(y, t):
    return score(y, t) - 1


start = target.at(process, 1.0).sample(jax.random.fold_in(key, 5), COUNT)
fine = gbm_diffusion.uniform_times(process, 200)
for name, used in {"right": score, "without the 1": without_the_one}.items():
    x, _ = samplers.sample(key, used, process, start, fine, method="dls")
    print(f"{name:14s} distance {distance(x):.3f}, mean of log x {float(jnp.log(x).mean()):.3f}")

# %% [markdown]
# ## Two ways to step, and a third
#
# Euler's method for $\log X$ multiplies by a positive factor at every step: no sign can change.  The paper calls it DLS.
# Euler's method for $X$ itself (UMS) adds, and with large steps it crosses zero.  Both need small steps.  But in log space all
# of Gaussian diffusion applies, and there one need not add noise at all: the probability flow has the same marginals, and an
# exponential integrator on well chosen times needs ten evaluations of the score for what the other two do in two hundred.

# %%
counts = (5, 10, 20, 50) if QUICK else (5, 8, 10, 20, 50, 100, 200)
errors: dict[str, list[float]] = {"dls": [], "ums": [], "multistep3": []}
crossed = []
for n in counts:
    for method, found in errors.items():
        grid = (
            gbm_diffusion.sinh_times(process, n) if method == "multistep3" else gbm_diffusion.uniform_times(process, n)
        )
        x, info = samplers.sample(key, score, process, start, grid, method=method, width=0.15)
        found.append(distance(x))
        if method == "ums":
            crossed.append(float(info.negative))
for method, found in errors.items():
    print(f"{method:10s}", "  ".join(f"{n}: {e:.3f}" for n, e in zip(counts, found, strict=True)))
print("crossed zero (ums)", "  ".join(f"{n}: {100 * c:.2f} %" for n, c in zip(counts, crossed, strict=True)))

# %% [markdown]
# ## Learning by multiplication
#
# A noiseless step of DLS multiplies by $e^{-\eta g}$, with a gradient in $\log x$.  With that in $x$ this is exponentiated
# gradient descent.  Here it learns the weights of a neuron whose synapses have fixed signs, beside gradient descent at the
# same rate.  Gradient descent is faster, and breaks Dale's law on its way: a weak synapse crosses zero in one step.  A multiplied
# one cannot, and the smaller it is the more slowly it moves.

# %%
signs = jnp.where(jnp.arange(40) < 28, 1.0, -1.0)
truth = signs * jnp.where(jnp.arange(40) % 4 == 0, 1.0, 0.02)  # a few strong synapses, many weak ones
inputs = jax.random.normal(jax.random.fold_in(key, 6), (200, 40))


def loss(w):
    return 0.5 * jnp.mean((inputs @ (w - truth)) ** 2)


first = 0.1 * signs
laws = {
    "gradient descent": lambda w: w - 0.1 * jax.grad(loss)(w),
    "exponentiated": lambda w: exponentiated.signed_exponentiated_gradient(w, jax.grad(loss)(w), 0.1),
}
kept, losses = {}, {}
for name, law in laws.items():

    def one(w, _, law=law):
        return law(w), (loss(w), exponentiated.signs_kept(first, w))

    _, (losses[name], kept[name]) = jax.lax.scan(one, first, None, length=200)
    print(
        f"{name:17s} loss {float(losses[name][-1]):.1e}, at worst {100 * float(kept[name].min()):.0f} % of the signs kept"
    )

# %% [markdown]
# ## Ten multiplications to a digit
#
# The network that ships with the package learned MNIST's pixels as $x=e^u$, with classes.  From the fitted log-normal start to
# the digit, ten evaluations; the rows are what the sampler believes the digit to be after so many of them.

# %%
jax.config.update("jax_enable_x64", False)
model = weights.load_model("gbm_mnist")
its = model.log_score.process
pixels = jnp.asarray(data.load("mnist_small")["x"], jnp.float32) / 255
noise = lognormal.fitted_prior(its, model.positive.to_positive(pixels)).sample(jax.random.key(3), 10)
ten = gbm_diffusion.edm_times(its, 10)
guided = guidance.of_class(model.log_score, jnp.arange(10), 2.0)


def unit(x):
    return np.clip(np.asarray(model.positive.to_data(x)), 0, 1)


stages = {}
for k in (1, 3, 10) if QUICK else (1, 2, 4, 7, 10):
    # The last step always goes to the estimate of x_0, so that fewer times end in what is believed there.
    x, _ = samplers.sample(key, guided, its, noise, ten[: k + 1], loop="host")
    stages[f"{k}"] = unit(x)

# %% [markdown]
# ## The pictures
#
# Top: paths stay positive and spread by factors (left); distance from the data's law against evaluations (middle), where the flat
# end is the noise of the draws; signs during learning (right).  Bottom: ten digits in the making.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
axes[0].semilogy(times, np.asarray(paths)[..., 0], color=BLUE, lw=0.7, alpha=0.6)
axes[0].set(xlabel="t", ylabel="x (logarithmic)", title="Noise that multiplies")
for (method, found), colour in zip(errors.items(), (ORANGE, GREY, BLUE), strict=True):
    axes[1].loglog(counts, found, "o-", color=colour, label=method, ms=4)
axes[1].set(xlabel="evaluations of the score", ylabel="W1 of log x", title="From the data's law")
axes[1].legend(frameon=False, fontsize=8)
for (name, part), colour in zip(kept.items(), (GREY, GREEN), strict=True):
    axes[2].plot(100 * np.asarray(part), color=colour, label=name)
axes[2].set(xlabel="steps", ylabel="signs kept, %", title="Dale's law", ylim=(None, 102))
axes[2].legend(frameon=False, fontsize=8)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
FIGURES.mkdir(parents=True, exist_ok=True)
figure.savefig(FIGURES / "multiplicative_diffusion.png", dpi=150)

pictures, axes = plt.subplots(len(stages), 10, figsize=(8, 0.86 * len(stages)), layout="constrained")
for line, (name, images) in zip(axes, stages.items(), strict=True):
    for axis, image in zip(line, images, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
pictures.savefig(FIGURES / "multiplicative_diffusion_digits.png", dpi=150)
print("saved", FIGURES / "multiplicative_diffusion.png", "and", FIGURES / "multiplicative_diffusion_digits.png")

# %% [markdown]
# ## The claim itself, and its control
#
# "DLS keeps the sign, for every step" is a bound that holds for every step size; UMS is the control that the same check must
# reject.  `paper-checks list gbm_diffusion` names the others, three of them about the released code, which is refuted there.

# %%
result = run("gbm_diffusion:T4")
result
