"""Programs over one part of a transformer: passing it, measuring it, training its ternary twin.

One program serves every block of a kind: its weights are arguments. What the part's own training
holds on the device, for a double block of FLUX.1-dev (340 M weights) in float32 with AdamW:

    latent weights 1.36 GB, two moments 2.72, gradients 1.36, their sum over the parts of a batch
    1.36, signs and casts of the pass about 1, activations about 2 a sample at 1024 x 1024

which is 10 to 12 GB with one sample at a time (`accumulate` = `batch_size`), beside 0.7 GB of the
teacher's next block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from flux_jax.configs import FluxConfig
from flux_jax.layers import Linear
from flux_jax.linears import replace_linears
from flux_jax.rope import Rotation
from flux_jax.tree import Flat, split_flat, to_flat
from ternary.calibration.streaming import OUTPUTS, Part, abstract_part, apply_part
from ternary.config import CalibrateConfig, QuantConfig
from ternary.distillation.optimizer import apply_gradients, make_optimizer
from ternary.distillation.step import latent_names, relative_error
from ternary.layers import FakeTernaryLinear, trained_dtype


class PartPrograms:
    """Compiled programs for the parts of one transformer.

    Args:
      config: of the transformer.
      quant: how its ternary layers look.
      calibrate: dtypes and optimiser.
      rotation: angles of all positions.

    Attributes:
      start_optimizer: of parameters, the optimiser's state.
      measure: `relative_errors`, compiled.
    """

    def __init__(
        self,
        config: FluxConfig,
        quant: QuantConfig,
        calibrate: CalibrateConfig,
        rotation: Rotation,
    ):
        self.config = config
        self.quant = quant
        self.calibrate = calibrate
        self.dtype = jnp.dtype(calibrate.compute_dtype)
        self.master = jnp.dtype(calibrate.master_dtype)
        self.optimizer = make_optimizer(calibrate)
        self.start_optimizer = jax.jit(self.optimizer.init)
        self.measure = jax.jit(relative_errors)
        self._rotation = rotation
        self._cache: dict[tuple[Any, ...], Any] = {}

    def twin(self, kind: str, layers: tuple[str, ...]) -> Any:
        """A part with these layers fake-ternary, of shapes alone."""
        module = abstract_part(self.config, kind, self.dtype)

        def make(_: str, linear: Any) -> FakeTernaryLinear:
            rows, columns = linear.weight.shape
            return nnx.eval_shape(
                lambda: FakeTernaryLinear(
                    columns,
                    rows,
                    self.quant,
                    bias=linear.bias is not None,
                    axes=linear.weight.get_metadata()["axes"],
                    dtype=self.dtype,
                    master_dtype=self.master,
                )
            )

        replace_linears(module, layers, make)
        return module

    def _once(self, make: Callable[..., Any], kind: str, layers: Sequence[str]) -> Any:
        """`make(kind, layers)`, made once for all parts that are alike."""
        key = make.__name__, kind, tuple(layers)
        if key not in self._cache:
            self._cache[key] = make(kind, tuple(layers))
        return self._cache[key]

    def _split(self, kind: str, layers: tuple[str, ...]) -> tuple[Callable[..., Any], frozenset]:
        """What makes the part of its parameters, and which of those keep their precision."""
        module = self.twin(kind, layers)
        rebuild, _ = split_flat(module)
        return rebuild, latent_names(module)

    def start(self, teacher: Flat, layers: Sequence[str]) -> Flat:
        """A part's parameters before training: the teacher's, rounded in the forward pass.

        Args:
          teacher: its parameters, on the device.
          layers: paths of its ternary linears, within the part.

        Returns:
          New arrays of the master dtype (but for learned scales, which are float32).
        """
        found = {}
        for layer in layers:
            dense = dense_linear(teacher[f"{layer}.weight"], teacher.get(f"{layer}.bias"))
            fake = FakeTernaryLinear.from_linear(dense, self.quant, master_dtype=self.master)
            found |= {f"{layer}.{name}": value for name, value in to_flat(fake).items()}
        rest = {n: v for n, v in teacher.items() if n.rpartition(".")[0] not in layers}
        return {
            name: jnp.array(value, trained_dtype(name, self.master))
            for name, value in (found | rest).items()
        }

    def layer(self, params: Flat, layer: str) -> FakeTernaryLinear:
        """One ternary linear of a part, from the part's parameters."""
        rows, columns = params[f"{layer}.weight"].shape
        made = FakeTernaryLinear(
            columns,
            rows,
            self.quant,
            bias=f"{layer}.bias" in params,
            dtype=self.dtype,
            master_dtype=self.master,
        )
        for name in to_flat(made):
            getattr(made, name)[...] = params[f"{layer}.{name}"]
        return made

    def step_bytes(
        self, part: Part, layers: Sequence[str], image_tokens: int, text_tokens: int
    ) -> int:
        """Device memory of a block's training step, as the compiler plans it; nothing runs.

        Args:
          part: a double or a single block.
          layers: its ternary linears.
          image_tokens, text_tokens: of a sample.

        Returns:
          Bytes of the step's arguments (weights, optimiser, a batch) and intermediate values.
        """
        width, batch = self.config.hidden_size, self.calibrate.batch_size

        def shape(*sizes: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, *sizes, width), self.dtype)

        twin = to_flat(self.twin(part.kind, tuple(layers)))
        params = {
            n: jax.ShapeDtypeStruct(v.shape, trained_dtype(n, self.master)) for n, v in twin.items()
        }
        optimizer = jax.eval_shape(self.optimizer.init, params)
        targets = {"img": shape(image_tokens), "txt": shape(text_tokens)}
        weights = output_weights(part, last_block=False)
        program = self._once(self._step, part.kind, layers).lower(
            params, optimizer, {**targets, "vec": shape()}, targets, weights, self._rotation
        )
        planned = program.compile().memory_analysis()
        return planned.argument_size_in_bytes + planned.temp_size_in_bytes

    def forward(
        self, part: Part, layers: Sequence[str], params: Flat, inputs: Flat
    ) -> dict[str, Array]:
        """A batch through a part; see `ternary.calibration.streaming.apply_part`."""
        return self._once(self._forward, part.kind, layers)(params, inputs, self._rotation)

    def step(
        self,
        part: Part,
        layers: Sequence[str],
        state: tuple[Flat, optax.OptState],
        inputs: Flat,
        targets: Flat,
        weights: dict[str, float],
    ) -> tuple[tuple[Flat, optax.OptState], Float[Array, ""]]:
        """One optimiser step; `state` is given up.

        Returns:
          The new state, and the loss before it.
        """
        program = self._once(self._step, part.kind, layers)
        params, optimizer, loss = program(*state, inputs, targets, weights, self._rotation)
        return (params, optimizer), loss

    def _forward(self, kind: str, layers: tuple[str, ...]) -> Any:
        return jax.jit(self._pass(kind, layers))

    def _pass(self, kind: str, layers: tuple[str, ...]) -> Callable[..., dict[str, Array]]:
        rebuild, latent = self._once(self._split, kind, layers)

        def run(params: Flat, inputs: Flat, rotation: Rotation) -> dict[str, Array]:
            # A fake-ternary layer rounds its own latent weights, and from their full precision.
            cast = {n: v if n in latent else v.astype(self.dtype) for n, v in params.items()}
            return apply_part(kind, rebuild(cast), inputs, rotation, self.dtype)

        return run

    def _step(self, kind: str, layers: tuple[str, ...]) -> Any:
        run = self._pass(kind, layers)
        parts = self.calibrate.accumulate

        def loss_of(params: Flat, inputs: Flat, targets: Flat, weights: Any, rotation: Any) -> Any:
            return jnp.mean(relative_errors(run(params, inputs, rotation), targets, weights))

        gradient = jax.value_and_grad(loss_of)

        def accumulated(
            params: Flat, inputs: Flat, targets: Flat, weights: Any, rotation: Any
        ) -> tuple[Any, Any]:
            def add(sums: Any, piece: Any) -> tuple[Any, None]:
                new = gradient(params, *piece, weights, rotation)
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype) / parts, sums, new), None

            pieces = jax.tree.map(
                lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), (inputs, targets)
            )
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            return jax.lax.scan(add, (jnp.float32(0), zeros), pieces)[0]

        def step(
            params: Flat, optimizer: Any, inputs: Flat, targets: Flat, weights: Any, rotation: Any
        ) -> tuple[Flat, Any, Array]:
            compute = gradient if parts == 1 else accumulated
            loss, grads = compute(params, inputs, targets, weights, rotation)
            params, optimizer = apply_gradients(self.optimizer, grads, optimizer, params)
            return params, optimizer, loss

        return jax.jit(step, donate_argnums=(0, 1))


def dense_linear(weight: Float[Array, "N K"], bias: Float[Array, " N"] | None) -> Linear:
    """A linear of these values.

    Not by `nnx.merge`, which leaves reference cycles: they would keep a block's weights on the
    device until the garbage collector comes by.
    """
    rows, columns = weight.shape
    linear = Linear(
        columns,
        rows,
        bias=bias is not None,
        init=lambda *_: weight,
        dtype=weight.dtype,
        rngs=nnx.Rngs(0),
    )
    if linear.bias is not None and bias is not None:
        linear.bias[...] = bias
    return linear


def relative_errors(outputs: Flat, targets: Flat, weights: dict[str, Any]) -> Float[Array, " B"]:
    """Each sample's `|output - target|^2 / |target|^2`, summed over the outputs with weights."""
    total = jnp.float32(0)
    for name, weight in weights.items():
        total = total + weight * relative_error(outputs[name], targets[name])
    return total


def output_weights(part: Part, *, last_block: bool) -> dict[str, float]:
    """What each output of a part counts for: all alike, or the image alone after the last block.

    The final layer does not see the text.
    """
    names = OUTPUTS[part.kind]
    if last_block:
        return {name: float(name == "img") for name in names}
    return {name: 1.0 / len(names) for name in names}
