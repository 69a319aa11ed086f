r"""The steps of :mod:`bayesinf.samplers` in JAX: the same kernels, settings and states.

Each is a function of settings, state, potential and randomness, over all chains at once; the
formulas are documented at the classes of the same names, and one table of stationary laws tests
both. Numbers may differ by rounding and by their random numbers, nothing else.

BlackJAX, where its kernels are these: MALA is ``blackjax.mcmc.mala`` at half the step size, as its
proposals are ``w + η∇log p + √(2η) ξ``. Its ``overdamped_langevin`` at ``η = ε/2`` is SGLD to
rounding; one line is no reason to need a library. Its ``sghmc`` draws new momenta at every call and
takes the gradient where the position was **before** its step, an explicit Euler scheme that heats
stiff directions; it has neither RMSprop nor BAOAB. Those are written here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from bayesinf.interop.jax._potential import JaxPotential
from bayesinf.samplers import MALA, SGHMC, SGLD, SGNHT, RMSpropSGLD, Underdamped

__all__ = ["KERNELS", "Kernel", "Normals", "Settings", "Slopes", "State"]

State = dict[str, jax.Array]
"""Named arrays, each with a leading chain dimension; ``"position"`` is always there."""

Settings = dict[str, Any]
"""Numbers by the names of a kernel's fields."""


class Slopes(Protocol):
    """What a kernel may ask of a potential before its first step."""

    def grad(self, position: jax.Array) -> jax.Array:
        """``∇U (C, d)``, of the first step's batch."""
        ...

    def density(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``−U (C,)`` and its gradient."""
        ...


class Normals(Protocol):
    """Randomness of one step."""

    def normal_like(self, position: jax.Array) -> jax.Array:
        """Standard normals, row ``c`` of chain ``c``'s own; at most once a step."""
        ...

    def keys(self) -> jax.Array:
        """``(C,)`` keys, for who draws otherwise."""
        ...


@dataclass(frozen=True)
class Kernel:
    """A kernel in two functions; what adapts is frozen by the class that holds its settings.

    Attributes
    ----------
    init
        ``(settings, position, potential, normals) -> state``.
    step
        ``(settings, state, potential, normals) -> (state, acceptance (C,) or None)``.
    decides
        Whether proposals may be refused, and ``step`` gives the probabilities of acceptance.
    """

    init: Callable[[Settings, jax.Array, Slopes, Normals], State]
    step: Callable[[Settings, State, JaxPotential, Normals], tuple[State, jax.Array | None]]
    decides: bool = False


# ------------------------------------------------------------------------------ without momentum


def _at_rest(s: Settings, position: jax.Array, potential: Slopes, rng: Normals) -> State:
    return {"position": position}


def _sgld(s: Settings, state: State, potential: JaxPotential, rng: Normals) -> tuple[State, None]:
    position, step = state["position"], s["step_size"]
    noise = jnp.sqrt(step) * rng.normal_like(position)
    return {"position": position - 0.5 * step * potential.grad(position) + noise}, None


def _start_rmsprop(s: Settings, position: jax.Array, potential: Slopes, rng: Normals) -> State:
    count = jnp.zeros(len(position), position.dtype)
    return {"position": position, "square": jnp.zeros_like(position), "adapted": count}


def _rmsprop(
    s: Settings, state: State, potential: JaxPotential, rng: Normals
) -> tuple[State, None]:
    position, step = state["position"], s["step_size"]
    loss_grad = potential.loss_grad(position)
    if "scale" in state:
        kept, scale = state, state["scale"]
    else:
        square = s["alpha"] * state["square"] + (1 - s["alpha"]) * loss_grad**2
        kept = {**state, "square": square, "adapted": state["adapted"] + 1}
        scale = _scale(s, kept)
    drift = potential.assemble(position, loss_grad)
    noise = jnp.sqrt(step * scale) * rng.normal_like(position)
    return {**kept, "position": position - 0.5 * step * scale * drift + noise}, None


def _scale(s: Settings, state: State) -> jax.Array:
    """``G``; ``1 − αᵗ`` without cancellation, also in float32."""
    correction = -jnp.expm1(state["adapted"] * jnp.log(s["alpha"]))
    return 1 / (jnp.sqrt(state["square"] / correction[:, None]) + s["eps"])


def _start_mala(s: Settings, position: jax.Array, potential: Slopes, rng: Normals) -> State:
    value, slope = potential.density(position)
    return {"position": position, "log_density": value, "slope": slope}


def _mala(
    s: Settings, state: State, potential: JaxPotential, rng: Normals
) -> tuple[State, jax.Array]:
    from blackjax.mcmc import mala  # late: only this kernel needs it

    kernel = mala.build_kernel()

    def one(key: jax.Array, *parts: jax.Array) -> Any:
        half = 0.5 * s["step_size"]
        return kernel(key, mala.MALAState(*parts), potential.log_density, half)

    given = rng.keys(), state["position"], state["log_density"], state["slope"]
    (position, value, slope), info = potential.over_chains(one, *given)
    moved = {"position": position, "log_density": value, "slope": slope}
    return moved, info.acceptance_rate


# ------------------------------------------------------------------------------ with momentum


def _with_force(s: Settings, position: jax.Array, potential: Slopes, rng: Normals) -> State:
    momentum = rng.normal_like(position)
    return {"position": position, "momentum": momentum, "force": potential.grad(position)}


def _underdamped(
    s: Settings, state: State, potential: JaxPotential, rng: Normals
) -> tuple[State, None]:
    position, h = state["position"], jnp.sqrt(s["step_size"])
    kept = jnp.exp(-s["friction"] * h)
    before = state["momentum"] - 0.5 * h * state["force"]
    noise = jnp.sqrt(-jnp.expm1(-2 * s["friction"] * h)) * rng.normal_like(position)
    after = kept * before + noise
    position = position + 0.5 * h * (before + after)
    force = potential.grad(position)
    return {"position": position, "momentum": after - 0.5 * h * force, "force": force}, None


def _with_momentum(s: Settings, position: jax.Array, potential: Slopes, rng: Normals) -> State:
    return {"position": position, "momentum": rng.normal_like(position)}


def _sghmc(s: Settings, state: State, potential: JaxPotential, rng: Normals) -> tuple[State, None]:
    h, momentum = jnp.sqrt(s["step_size"]), state["momentum"]
    position = state["position"] + h * momentum
    heat = jnp.sqrt(2 * (s["friction"] - s["noise_correction"]) * h)
    kick = heat * rng.normal_like(position) - h * potential.grad(position)
    return {"position": position, "momentum": (1 - s["friction"] * h) * momentum + kick}, None


def _with_thermostat(s: Settings, position: jax.Array, potential: Slopes, rng: Normals) -> State:
    thermostat = jnp.full((len(position), 1), s["friction"], position.dtype)
    return {**_with_force(s, position, potential, rng), "thermostat": thermostat}


def _sgnht(s: Settings, state: State, potential: JaxPotential, rng: Normals) -> tuple[State, None]:
    position, h = state["position"], jnp.sqrt(s["step_size"])
    rate = 0.5 * h * s["friction"] ** 2 / s["inertia"]

    def heat(thermostat: jax.Array, momentum: jax.Array) -> jax.Array:
        return thermostat + rate * ((momentum**2).mean(1, keepdims=True) - 1)

    before = state["momentum"] - 0.5 * h * state["force"]
    thermostat = heat(state["thermostat"], before)
    x = 2 * h * thermostat
    small = jnp.abs(x) < 1e-4
    ratio = jnp.where(small, 1 - 0.5 * x, -jnp.expm1(-x) / jnp.where(small, 1.0, x))
    noise = jnp.sqrt(2 * s["friction"] * h * ratio) * rng.normal_like(position)
    after = jnp.exp(-h * thermostat) * before + noise
    thermostat = heat(thermostat, after)
    position = position + 0.5 * h * (before + after)
    force = potential.grad(position)
    momentum = after - 0.5 * h * force
    moved = {"position": position, "momentum": momentum, "force": force, "thermostat": thermostat}
    return moved, None


KERNELS: dict[type, Kernel] = {
    SGLD: Kernel(_at_rest, _sgld),
    RMSpropSGLD: Kernel(_start_rmsprop, _rmsprop),
    Underdamped: Kernel(_with_force, _underdamped),
    SGHMC: Kernel(_with_momentum, _sghmc),
    SGNHT: Kernel(_with_thermostat, _sgnht),
    MALA: Kernel(_start_mala, _mala, decides=True),
}
"""By the class of :mod:`bayesinf.samplers` that holds the settings."""
