"""The roofline: what a step costs of a model and on a device that are not at hand.

A step is the sum of its kernels. Each takes the time that its operations or its bytes need at a fitted share of the
device's peak, but never less than its launch (Williams et al., *Roofline*, 2009, with latencies); the engine adds its
host time. Shares, launches and host times were fitted to public tables of one device: see
`simulator.hardware.work`. Every other device is an extrapolation, and told as one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from calibration.common.arrays import Floats
from calibration.common.errors import CalibrationError, CostError
from calibration.shapes.shapes import Shape, get_shape
from simulator.hardware.devices import ELEMENT_BYTES, Device, get_device
from simulator.hardware.work import Efficiencies, Share, all_reduce_s, attention_s, elementwise_s, matmul_s, matrices
from simulator.pricing.grades import ROOFLINE, StepGrade

Operation = Literal["prefill", "verify", "draft"]

TABLE_TOKENS = 4096
"""Steps of up to so many new tokens are looked up."""
WIDTH_MARGIN = 1.1
"""How far beyond the tested ones a width of a matrix may lie and still count as tested."""


@dataclass(frozen=True)
class RooflineStep:
    """Seconds of a step of `shape` on `tensor_parallel` devices, from fitted shares of the device's peaks.

    matrices(N) + elementwise(N) + all-reduces(N) + layers x attention(b, N, C) + host_s + per_sequence_s x b, with N
    new and C cached tokens in all of b sequences; see `matmul_s`, `attention_s`, `elementwise_s`, `all_reduce_s`. A
    ``prefill`` takes logits of one token a sequence, ``verify`` and ``draft`` of every new token.

    No part ever falls with b, N or C, but for attention at a fixed sum of contexts, which more sequences share. Only
    sums over the batch are known: sequences are taken to be alike (see `simulator.hardware.work.step_work`).
    """

    shape: Shape
    device: Device
    dtype: str
    tensor_parallel: int
    operation: Operation
    host_s: float
    per_sequence_s: float
    efficiencies: Efficiencies

    def step_seconds(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        """Give seconds; arguments broadcast. Both token counts are sums over the batch."""
        if not (_tabled(batch) and _tabled(new_tokens)):
            return sum(self.parts(batch, new_tokens, context_tokens).values())
        # NOTE: an engine asks one step at a time; a look-up takes 3 us, the kernels one by one 80 us.
        tokens_s = self._bodies[new_tokens] + self._heads[batch if self.operation == "prefill" else new_tokens]
        seconds = tokens_s + self._attention(batch, new_tokens, context_tokens)
        return seconds + self.host_s + self.per_sequence_s * batch

    def added_seconds(self, batch: int, new_tokens: int, context_tokens: int, beside_tokens: int) -> float:
        """Give what a chunk of prefill adds to a decode step of `beside_tokens`: matrices run once over all tokens.

        Attention of the chunk is added whole but for its launch, as engines give both kinds one kernel.
        """
        both = beside_tokens + new_tokens
        matrices_s = self._tokens_s(both) - self._tokens_s(beside_tokens)
        head_s = float(self._head(np.float64(beside_tokens + batch)) - self._head(np.float64(beside_tokens)))
        attention_s = self._attention(batch, new_tokens, context_tokens) - self._attention(batch, 0, 0)
        return float(matrices_s + head_s + attention_s + self.per_sequence_s * batch)

    def _tokens_s(self, count: int) -> float:
        """Give the seconds of the layers but for attention at `count` new tokens."""
        if _tabled(count):
            return float(self._bodies[count])
        tokens = np.float64(count)
        return float(self._matrices(tokens) + self._elementwise(tokens) + self._all_reduce(tokens))

    def parts(self, batch: Any, new_tokens: Any, context_tokens: Any) -> dict[str, Any]:
        """Give the seconds by what takes them: matrices, head, elementwise, all_reduce, attention, host."""
        batch, new, context = (np.asarray(value, dtype=np.float64) for value in (batch, new_tokens, context_tokens))
        return {
            "matrices": self._matrices(new),
            "head": self._head(batch if self.operation == "prefill" else new),
            "elementwise": self._elementwise(new),
            "all_reduce": self._all_reduce(new),
            "attention": self._attention(batch, new, context),
            "host": self.host_s + self.per_sequence_s * batch,
        }

    @functools.cached_property
    def _bodies(self) -> Floats:
        """Seconds of the layers but for attention, at 0, 1, 2 ... new tokens."""
        tokens = np.arange(TABLE_TOKENS + 1, dtype=np.float64)
        return np.asarray(self._matrices(tokens) + self._elementwise(tokens) + self._all_reduce(tokens))

    @functools.cached_property
    def _heads(self) -> Floats:
        """Seconds of the LM head at 0, 1, 2 ... tokens to score."""
        return np.asarray(self._head(np.arange(TABLE_TOKENS + 1, dtype=np.float64)))

    @functools.cached_property
    def _number_s(self) -> float:
        """Seconds that one number of an activation or of the cache takes on its way to or from memory, at peak."""
        return max(ELEMENT_BYTES[self.dtype], 2) / self.device.bandwidth

    @functools.cached_property
    def _operation_s(self) -> float:
        """Seconds of one operation of the attention at peak; it runs in 16 bits where matrices run in 8."""
        return 1 / self.device.flops_per_s("bf16" if self.dtype == "fp8" else self.dtype)

    def _matmul(self, tokens: Any, inner: float, outer: float) -> Any:
        device, byte = self.device, float(ELEMENT_BYTES[self.dtype])
        flops = device.flops_per_s(self.dtype)
        return matmul_s(
            kernel=self.efficiencies.matmul,
            tokens=tokens,
            inner=inner,
            outer=outer,
            flops=flops,
            bandwidth=device.bandwidth,
            byte=byte,
        )

    def _matrices(self, tokens: Any) -> Any:
        layers = matrices(self.shape, self.tensor_parallel)[:-1]
        return sum(count * self._matmul(tokens, inner, outer) for count, inner, outer in layers)

    def _head(self, scored: Any) -> Any:
        _, inner, outer = matrices(self.shape, self.tensor_parallel)[-1]
        return (scored > 0) * self._matmul(scored, inner, outer)

    def _elementwise(self, tokens: Any) -> Any:
        """Price what moves numbers between the matrices, as `simulator.hardware.work` counts it."""
        share, hidden, layers = Share.of(self.shape, self.tensor_parallel), self.shape.hidden, self.shape.layers
        query, key = share.query_width, share.kv_width
        kernels: list[tuple[int, str, float]] = [
            (2 * layers + 1, "norm", 4.0 * hidden),
            (layers, "rotation", 2 * (query + key)),
            (layers, "rotation", 4 * key),  # the cache write
            (layers, "product", 3 * share.intermediate),
            (1, "embedding", 2.0 * hidden),
        ]
        if self.shape.qk_norm:
            kernels += [(layers, "norm", 2 * query), (layers, "norm", 2 * key)]
        known, second = self.efficiencies.elementwise, self._number_s
        return sum(count * elementwise_s(known[kind], numbers * second * tokens) for count, kind, numbers in kernels)

    def _all_reduce(self, tokens: Any) -> Any:
        if self.tensor_parallel == 1 or self.device.link is None:
            return 0.0 * tokens
        message = max(ELEMENT_BYTES[self.dtype], 2) * self.shape.hidden * tokens
        fit = self.efficiencies
        once = all_reduce_s(fit.matmul.launch_s, fit.link, message, self.tensor_parallel, self.device.link)
        return 2 * self.shape.layers * once

    def _attention(self, batch: Any, new_tokens: Any, context_tokens: Any) -> Any:
        share = Share.of(self.shape, self.tensor_parallel)
        sequences = batch + (batch == 0)
        pairs = new_tokens * (context_tokens + (new_tokens + batch) / 2) / sequences
        flops_s = 4 * share.query_width * pairs * self._operation_s
        kv_s = 2 * share.kv_width * (context_tokens + new_tokens) * self._number_s
        return self.shape.layers * attention_s(self.efficiencies.attention, flops_s, kv_s)

    def outside(self, batch: float, new_tokens: float, context_tokens: float) -> bool:
        """Whether the error of such a step is unknown: untested device, type, split or width, or beyond the range."""
        tested = self.efficiencies.tested
        beyond = new_tokens > tested.new_tokens or batch > tested.batch
        return bool(self.extrapolated) or beyond or context_tokens > batch * tested.context_tokens

    @functools.cached_property
    def extrapolated(self) -> tuple[str, ...]:
        """What about every step of it was never tested, in words."""
        tested, found = self.efficiencies.tested, []
        if self.device.name not in tested.devices:
            found.append(f"device {self.device.name}: shares of peak and launches are those of {tested.devices[0]}")
        if self.dtype not in tested.dtypes:
            found.append(f"dtype {self.dtype}: shares of peak are those of {tested.dtypes[0]}")
        if self.tensor_parallel not in tested.tensor_parallel:
            found.append(f"tensor_parallel {self.tensor_parallel}")
        inner, outer = zip(
            *((width, other) for _, width, other in matrices(self.shape, self.tensor_parallel)), strict=True
        )
        for name, widths, (low, high) in (("inner", inner, tested.inner), ("outer", outer, tested.outer)):
            if min(widths) < low or max(widths) > high:
                found.append(f"{name} widths {min(widths):g} to {max(widths):g}: tested {low:g} to {high:g}")
        return tuple(found)

    @property
    def rests_on(self) -> str:
        """What its seconds rest on."""
        return "roofline with efficiencies fitted to public tables"

    @property
    def grade(self) -> StepGrade:
        """Grade of its seconds."""
        return ROOFLINE

    def describe(self) -> dict[str, Any]:
        """Give what it is of, what was fitted and what is extrapolated, and the errors on what was not fitted to."""
        tested = self.efficiencies.tested
        return {
            "kind": "roofline",
            "model": self.shape.name,
            "shape": self.shape.name,
            "layers": self.shape.layers,
            "device": self.device.name,
            "dtype": self.dtype,
            "tensor_parallel": self.tensor_parallel,
            "operation": self.operation,
            "host_s": self.host_s,
            "per_sequence_s": self.per_sequence_s,
            "fitted": "shares of peak, launches, links and host times, to public tables of " + tested.devices[0],
            "extrapolated": list(self.extrapolated),
            "mean_errors": dict(self.efficiencies.errors),
            "measured_range": {
                "batch": [1, int(tested.batch)],
                "new_tokens_in_batch": [1, int(tested.new_tokens)],
                "context_tokens_per_sequence": [0, int(tested.context_tokens)],
            },
        }


def roofline_step(
    model: str | Shape,
    device: str | Device,
    *,
    operation: Operation = "verify",
    dtype: str = "bf16",
    tensor_parallel: int = 1,
    layers: int | None = None,
    host_overhead_s: float | None = None,
    host_per_sequence_s: float | None = None,
) -> RooflineStep:
    """Give the price of steps of `model` on `device`, both by name; `layers` makes it a part of that model.

    `host_overhead_s`: seconds of the host in every step; `host_per_sequence_s`: for every sequence in it. Left out,
    they are those fitted to vLLM for prefill and verify, and 0 for draft steps, which run from one captured graph.

    Raises `CostError` for a name not known, a type the device has no rate for, a split that does not divide the
    model, or one over devices whose link is not known.
    """
    try:
        shape = get_shape(model) if isinstance(model, str) else model
    except CalibrationError as fault:
        raise CostError(str(fault)) from None
    place = get_device(device) if isinstance(device, str) else device
    place.flops_per_s(dtype)
    Share.of(shape, tensor_parallel)
    if tensor_parallel > 1 and place.link is None:
        raise CostError(
            f"tensor_parallel: must be 1 on {place.title}, whose link is not known, got {tensor_parallel}"
        )
    if layers is not None:
        shape = replace(shape, layers=layers)
    fit = Efficiencies.fitted()
    drafts = operation == "draft"
    step_s = 0.0 if drafts else fit.host_s
    sequence_s = 0.0 if drafts else fit.host_per_logit_s * shape.vocabulary
    return RooflineStep(
        shape=shape,
        device=place,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        operation=operation,
        host_s=step_s if host_overhead_s is None else host_overhead_s,
        per_sequence_s=sequence_s if host_per_sequence_s is None else host_per_sequence_s,
        efficiencies=fit,
    )


def _tabled(count: Any) -> bool:
    """Whether a count, or all counts of an array, can be looked up."""
    if type(count) is int:
        return 0 <= count <= TABLE_TOKENS
    return (
        isinstance(count, np.ndarray) and count.dtype.kind == "i" and count.size > 0 and count.max() <= TABLE_TOKENS
    )
