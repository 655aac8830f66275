"""Numerical environment of the checks: 64-bit floats, highest matrix-product precision, a chosen device.

`numerics` is the one switch, used by pytest, the command line and notebooks alike, so that they agree.
It is a context manager: nothing is changed for code outside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


class DeviceError(RuntimeError):
    """The device asked for is not there."""


def enable_x64(on: bool) -> contextlib.AbstractContextManager[None]:
    """64-bit JAX types on or off within a `with` block, on every supported JAX."""
    # The context manager moved from jax.experimental to jax itself; each JAX of our range has one of the two.
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(on)
    from jax import experimental

    return experimental.enable_x64(on)


def find_device(platform: str | None) -> jax.Device:
    """The first device of `platform` ("cpu", "gpu", or None for JAX's default).

    Raises DeviceError with what is present if there is none.
    """
    try:
        return jax.devices(platform)[0] if platform else jax.devices()[0]
    except RuntimeError as error:
        if platform is None:
            raise DeviceError(
                f"{_no_device()}; unset or correct JAX_PLATFORMS, or install the JAX build for it"
            ) from error
        try:
            present = f"it sees: {', '.join(sorted({d.platform for d in jax.devices()}))}"
        except RuntimeError:
            present = _no_device()
        raise DeviceError(
            f"--device {platform}: JAX sees no such device here ({present}); install the JAX build for it, "
            "or choose another device"
        ) from error


def _no_device() -> str:
    asked = getattr(jax.config, "jax_platforms", None)
    return "JAX can start no device at all here" + (f", being told to use {asked!r} only" if asked else "")


def claim_platform(platform: str | None) -> None:
    """Keep JAX from initialising an accelerator that a CPU run does not want.  For entry points only.

    Called by the command line and by pytest before the first computation; library code never does this.
    Without effect once JAX has chosen its devices.
    """
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def numerics(platform: str | None = None) -> Iterator[jax.Device]:
    """Run checks in 64 bits with highest-precision matrix products on `platform`; yields the device."""
    device = find_device(platform)
    with enable_x64(True), jax.default_matmul_precision("highest"), jax.default_device(device):
        yield device
