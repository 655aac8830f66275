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
# # What is in a prior?
#
# Plug-and-play methods put a denoiser where an optimisation algorithm has a proximal map, and hope.  Fang, Buchanan and Sulam
# (ICLR 2024) build networks that *are* proximal maps, whatever their weights: $f_\theta=\nabla\psi_\theta$ with a convex
# $\psi_\theta$.  So there is a function $R_\theta$ with $f_\theta=\mathrm{prox}_{R_\theta}$, and one can look at it.  Here we
# look at it, in one dimension, where the answer is known, and for images; and then restore images with it, knowing beforehand
# whether the iteration converges.

# %%
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from generative.data import load
from paper_checks import run
from solvers import imaging, plug_and_play, proximal
from solvers.proximal.distributions import Laplace

jax.config.update("jax_enable_x64", True)
QUICK = bool(os.environ.get("PROOFSTONE_QUICK"))  # a small version, in seconds
FIGURES = Path(os.environ.get("PROOFSTONE_FIGURES", "docs/figures"))
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7a7a7a"

# %% [markdown]
# ## One dimension: which loss finds $|x|$?
#
# For $x$ with density $\tfrac12e^{-|x|}$ and noise of variance one, the proximal map of $-\log p=|x|$ is soft thresholding.  A
# network that is trained to denoise with the squared error learns the posterior *mean*, with the absolute error the *median*.
# Only proximal matching, $1-e^{-(f(y)-x)^2/\gamma^2}$, aims at the *mode*, which is soft thresholding, and for a width
# $\gamma>0$ it stops at a known function $f_\gamma$ on the way.  The networks below ship with the package; the dashed curves are
# the exact minimisers of the three losses.

# %%
truth, sigma, gamma = Laplace(1.0), 1.0, 0.1
y = jnp.linspace(-4, 4, 801)
exact = {
    "squared error": truth.mean(y, sigma),
    "absolute error": truth.median(y, sigma),
    "proximal matching": truth.matched(y, sigma, gamma),
}
names = {
    "squared error": "laplace_squared",
    "absolute error": "laplace_absolute",
    "proximal matching": "laplace",
}
learned = {loss: proximal.load(name) for loss, name in names.items()}


def curve(net):
    """f(y), and R at f(y), zero where f is: known from y without an inversion."""
    f = jax.vmap(net)(y[:, None].astype(jnp.float32))[:, 0]
    psi = jax.vmap(net.potential)(y[:, None].astype(jnp.float32))
    value = y * f - f**2 / 2 - psi
    return np.asarray(f), np.asarray(value) - np.interp(0.0, f, value)


curves = {loss: curve(net) for loss, net in learned.items()}
for loss, (f, value) in curves.items():
    off = np.abs(f - np.asarray(exact[loss])).max()
    inside = np.abs(f) <= 3
    print(
        f"{loss:18s} from its exact minimiser {off:.3f}, R from |x| {np.abs(value - np.abs(f))[inside].max():.3f} on [-3, 3]"
    )

# %% [markdown]
# ## Images: the prior knows what a digit is not
#
# For images nobody knows the prior.  The learned one can still be asked: $R(x)=\langle x,z\rangle-\tfrac12\|x\|^2-\psi(z)$ with
# $f(z)=x$.  Finding $z$ is a convex problem; solved inexactly, it gives a lower bound of $R(x)$ with a certified error.

# %%
COUNT = 8 if QUICK else 40
digits = load("digits8x8")["x"][1500 : 1500 + COUNT, None] / 16  # the network has not seen these
net = proximal.load("digits8x8")
R = proximal.regularizer(net, tolerance=1e-4, box=(0, 1))
rng = np.random.default_rng(0)
noise = rng.normal(size=digits.shape)
levels = np.array([0.0, 0.05, 0.1, 0.2, 0.3])
noisy = np.stack([np.clip(digits + s * noise, 0, 1) for s in levels])
weights = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
mixed = np.stack([(1 - w) * digits + w * digits[::-1] for w in weights])

evaluate = jax.jit(jax.vmap(jax.vmap(R.evaluate)))
by_noise, by_mixing = (evaluate(jnp.asarray(x, jnp.float32)) for x in (noisy, mixed))
assert bool(by_noise.converged.all()) and bool(by_mixing.converged.all())
print(f"values are too small by at most {float(by_noise.error_bound.max()):.1e}")
middle = by_mixing.value[2] - (by_mixing.value[0] + by_mixing.value[4]) / 2
print(f"halfway between two digits R lies above the chord for {int((middle > 1e-3).sum())} of {COUNT} pairs")

# %% [markdown]
# ## Restoring, with the convergence known beforehand
#
# ADMM with this network converges if $\rho>\|A^\top A\|$ (Theorem 4.1).  But $\rho$ is also the weight of the prior: a step that
# obeys the theorem can weigh the prior too much.  `prox(v, lam)` separates the two.

# %%
blur = imaging.blur(imaging.gaussian_kernel(3, 0.8, jnp.float32), (1, 8, 8))
clean = jnp.asarray(digits, jnp.float32)
seen = jax.vmap(blur)(clean) + 0.05 * jnp.asarray(rng.normal(size=digits.shape), jnp.float32)


def psnr(x):
    return float(np.mean(-10 * np.log10(np.mean((np.asarray(x) - digits).reshape(COUNT, -1) ** 2, 1))))


def restore(rho, lam, steps=40 if QUICK else 400):
    return jax.jit(
        jax.vmap(
            lambda b: plug_and_play.admm(
                imaging.LeastSquares(blur, b), R, b, rho=rho, lam=lam, tolerance=1e-5, max_steps=steps
            )
        )
    )(seen)


restored = {}
for rho, lam in ((0.25, 1.0), (1.05, 1.0), (1.05, 0.25 / 1.05)):
    known = plug_and_play.certificate("admm", imaging.LeastSquares(blur, seen[0]), R, step=rho, lam=lam)
    x, info = restore(rho, lam)
    restored[f"ρ = {rho}, λ = {lam:.2g}"] = x
    print(known)
    ended = f"{int(info.converged.sum())} of {COUNT} converged, median of {int(jnp.median(info.steps))} steps"
    print(f"  {psnr(seen):.2f} -> {psnr(x):.2f} dB, {ended}")

# %% [markdown]
# ## The pictures
#
# Left: only proximal matching comes near $|x|$; the squared error finds a rounder, much lower function.  Middle: noise raises
# the prior of every digit.  Right: along the line between two digits it rises and falls again, so that it is not convex; this is
# what an $\ell_1$ or total-variation prior cannot do.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for (loss, (f, value)), colour in zip(curves.items(), (GREY, ORANGE, BLUE), strict=True):
    axes[0].plot(f, value, color=colour, label=loss)
axes[0].plot([-3, 0, 3], [3, 0, 3], "k--", lw=1, label="|x|")
axes[0].set(xlim=(-3, 3), ylim=(0, 3.2), xlabel="x", title="R for a Laplace distribution")
axes[0].legend(frameon=False, fontsize=8, loc="upper center")
clean_value = np.asarray(by_noise.value[0])
axes[1].plot(levels, np.asarray(by_noise.value) - clean_value, color=BLUE, alpha=0.25, lw=0.8)
axes[1].plot(levels, (np.asarray(by_noise.value) - clean_value).mean(1), "o-", color=BLUE)
axes[1].set(xlabel="deviation of the noise", ylabel="R, less that of the clean image", title="Digits with noise")
chord = (1 - weights)[:, None] * np.asarray(by_mixing.value[0]) + weights[:, None] * np.asarray(by_mixing.value[4])
axes[2].plot(weights, np.asarray(by_mixing.value) - chord, color=GREEN, alpha=0.25, lw=0.8)
axes[2].plot(weights, (np.asarray(by_mixing.value) - chord).mean(1), "o-", color=GREEN)
axes[2].axhline(0, color="k", lw=1)
axes[2].set(xlabel="weight of the other digit", ylabel="R above the chord", title="Between two digits")
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
FIGURES.mkdir(parents=True, exist_ok=True)
figure.savefig(FIGURES / "learned_proximal.png", dpi=150)

rows = {"clean": digits, "blurred, noisy": seen, **restored}
pictures, axes = plt.subplots(len(rows), 8, figsize=(8, 1.05 * len(rows)), layout="constrained")
for line, (name, images) in zip(axes, rows.items(), strict=True):
    for axis, image in zip(line, np.asarray(images)[:8, 0], strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
pictures.savefig(FIGURES / "learned_proximal_digits.png", dpi=150)
print("saved", FIGURES / "learned_proximal.png", "and", FIGURES / "learned_proximal_digits.png")

# %% [markdown]
# ## The claim itself, and its control
#
# A free network that denoises as well is the proximal map of nothing: its Jacobian is not symmetric, and the same check
# rejects it.  `paper-checks list proximal` names the other claims.

# %%
result = run("proximal:P1")
result
