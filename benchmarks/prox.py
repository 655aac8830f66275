"""Learned proximal networks beside deepinv (PyTorch) on the CPU: the same network, operator, dtype and thread count.

    python benchmarks/prox.py

Measures evaluations of the network, evaluations of its prior, and plug-and-play iterations (proximal gradient descent and
half-quadratic splitting, circular Gaussian blur) a second, in one process and in turns, in float32.  deepinv has no evaluation of
a learned prior: the competitor there is the same convex problem in torch.optim.LBFGS, to the same residual.  Before anything is
timed, the answers are compared.  Needs torch and deepinv; writes prox.json.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOLERANCE = 1e-4
"""On ‖f(z) - x‖ relative to ‖x‖: what float32 reaches of a network of these sizes."""

STEPS = 50


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learned proximal networks beside deepinv.")
    parser.add_argument("--networks", nargs="+", default=["digits8x8", "mnist"], choices=["digits8x8", "mnist"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=7, help="turns")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def torch_potential(net: Any) -> Callable[[Any], Any]:
    """ψ of our network on a batch, with its weights, as one would write it in PyTorch."""
    import numpy as np
    import torch
    import torch.nn.functional as functional

    def tensor(array: Any) -> Any:
        return None if array is None else torch.tensor(np.asarray(array))

    layers = [(tensor(x.weight), tensor(x.skip), tensor(x.bias), x) for x in net.layers]
    output, skip, constant = (tensor(v) for v in (net.output, net.output_skip, net.constant))

    def linear(weight: Any, z: Any, layer: Any) -> Any:
        if weight.ndim == 2:
            return functional.linear(z.flatten(1), weight)
        return functional.conv2d(z, weight, stride=layer.stride, padding=layer.padding)

    def potential(y: Any) -> Any:
        z = y
        for weight, from_input, bias, layer in layers:
            total = linear(weight, z, layer)
            if from_input is not None:
                sides = layer.resized
                same = sides is None or tuple(y.shape[2:]) == sides
                given = y if same else functional.interpolate(y, sides, mode="bilinear", align_corners=False)
                total = total + linear(from_input, given, layer)
            if bias is not None:
                total = total + bias.reshape(1, -1, *(1,) * (total.ndim - 2))
            z = functional.softplus(total, beta=net.beta)
        value = z.reshape(len(y), len(output), -1).mean(2) @ output + net.alpha / 2 * (y**2).flatten(1).sum(1)
        if skip is not None:
            value = value + y.flatten(1) @ skip
        return value if constant is None else value + constant

    return potential


def competitor(net: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A deepinv denoiser with our weights, and the prior of a batch by inverting it."""
    import deepinv
    import torch

    potential = torch_potential(net)

    class Denoiser(deepinv.models.Denoiser):  # type: ignore[misc]
        def forward(self, y: Any, sigma: Any = None, **_: Any) -> Any:
            with torch.enable_grad():
                y = y.detach().requires_grad_(True)
                return torch.autograd.grad(potential(y).sum(), y)[0]

    def prior(x: Any) -> Any:
        z = x.clone().requires_grad_(True)
        size = x.flatten(1).norm(dim=1)
        steps = torch.optim.LBFGS(
            [z], max_iter=20, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0
        )

        def loss() -> Any:
            steps.zero_grad()
            value = (potential(z) - (x * z).flatten(1).sum(1)).sum()
            value.backward()
            return value

        for _ in range(50):
            steps.step(loss)
            loss()
            if bool((z.grad.flatten(1).norm(dim=1) <= TOLERANCE * size.clamp(min=1)).all()):
                break
        with torch.no_grad():
            return (x * z).flatten(1).sum(1) - (x**2).flatten(1).sum(1) / 2 - potential(z)

    return Denoiser(), prior


def measure(name: str, given: argparse.Namespace, console: Any) -> dict[str, Any]:
    import deepinv
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from measure import time_in_turns

    from solvers import imaging, plug_and_play, proximal

    net = proximal.load(name)
    sides = net.shape if len(net.shape) == 3 else (1, *net.shape) if len(net.shape) == 2 else (1, 8, 8)
    clean = jax.random.uniform(jax.random.key(0), (given.batch, *sides))
    y = clean + 0.1 * jax.random.normal(jax.random.key(1), clean.shape)
    flat = lambda x: x.reshape(net.shape)  # noqa: E731
    denoise = jax.jit(jax.vmap(lambda x: net(flat(x)).reshape(sides)))
    regularizer = proximal.regularizer(net, tolerance=TOLERANCE, max_steps=2000, box=None)
    evaluate = eqx.filter_jit(lambda x: jax.vmap(lambda x: regularizer.evaluate(flat(x)))(x))
    theirs, their_prior = competitor(net)
    x = denoise(y)  # in the range of the network

    kernel = imaging.gaussian_kernel(3 if name == "digits8x8" else 5, 0.8)
    operator = imaging.blur(kernel, sides)
    physics = deepinv.physics.BlurFFT(sides, torch.tensor(np.asarray(kernel))[None, None])
    b = jax.vmap(operator)(clean)
    tb, ty, tx = (torch.tensor(np.asarray(v)) for v in (b, y, x))

    def ours(method: Any, **step: float) -> Any:
        def one(b: Any) -> Any:
            data = imaging.LeastSquares(operator, b)
            f = lambda v: net(flat(v)).reshape(sides)  # noqa: E731
            return method(data, f, b, **step, tolerance=1e-30, max_steps=STEPS)[0]

        return jax.jit(jax.vmap(one))

    def peer(kind: Any, step: float) -> Any:
        return kind(
            data_fidelity=deepinv.optim.L2(),
            prior=deepinv.optim.PnP(theirs),
            stepsize=step,
            max_iter=STEPS,
            early_stop=False,
            custom_init=lambda y, physics: {"est": (y, y)},
        )

    programs: dict[str, tuple[float, Callable[[int], Any], Callable[[int], Any]]] = {
        "network": (1.0, lambda _: denoise(y), lambda _: theirs(ty)),
        "prior": (1.0, lambda _: evaluate(x), lambda _: their_prior(tx)),
    }
    for label, method, kind, step in (
        ("pgd", plug_and_play.pgd, deepinv.optim.PGD, {"eta": 0.9}),
        ("hqs", plug_and_play.hqs, deepinv.optim.HQS, {"rho": 1.0}),
    ):
        run, model = ours(method, **step), peer(kind, step.get("eta", 1.0))
        programs[label] = (float(STEPS), lambda _, run=run: run(b), lambda _, model=model: model(tb, physics))
    found: dict[str, Any] = {}
    for label, (count, mine, other) in programs.items():
        a, c = mine(0), other(0)
        if label == "prior":
            if not bool(a.converged.all()):
                console.print(
                    f"{name}, prior: {int((~a.converged).sum())} of {given.batch} not inverted to {TOLERANCE:g}"
                )
            a = a.value
        scale = float(jnp.abs(a).max())
        apart = float(np.abs(np.asarray(a) - c.detach().numpy().reshape(a.shape)).max()) / scale
        seconds = time_in_turns({"ours": mine, "deepinv": other}, given.blocks, seconds=0.3)
        ratios = seconds["deepinv"] / seconds["ours"]
        rates = {k: given.batch * count / np.median(v) for k, v in seconds.items()}
        found[label] = {
            "seconds": {k: v.tolist() for k, v in seconds.items()},
            "rates": rates,
            "ratio": [float(np.median(ratios)), float(ratios.min()), float(ratios.max())],
            "apart": apart,
        }
        console.print(
            f"{name}, {label}: ours {rates['ours']:.4g} a second, peer {rates['deepinv']:.4g}, ratio {np.median(ratios):.2f} "
            f"[{ratios.min():.2f}, {ratios.max():.2f}], answers apart {apart:.1g}"
        )
    return {"network": name, "parameters": net.parameters, "batch": given.batch, "cases": found}


def main() -> None:
    given = arguments()
    # Before anything starts threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    try:
        import deepinv  # noqa: F401
        import torch
    except ImportError as error:
        raise SystemExit(
            f"prox: needs torch and deepinv beside the package ({error}); pip install torch deepinv"
        ) from error
    from measure import about, write_json
    from rich.console import Console

    torch.set_num_threads(given.threads)
    console = Console(width=160)
    networks = [measure(name, given, console) for name in given.networks]
    target = given.out / "prox.json"
    write_json(target, {**about("jax", "torch", "deepinv"), "threads": given.threads, "networks": networks})
    console.print(f"written: {target}")


if __name__ == "__main__":
    main()
