"""Shapes of published decoders: enough to build one with random weights, count its parameters and time its steps.

The numbers are those of each model's published ``config.json`` (`Shape.source`). No torch needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from calibration.common.errors import CalibrationError, did_you_mean, require
from calibration.traces.manifest import ModelInfo

_TOKENIZERS = {
    "llama-2-": "llama-2",
    "codellama-": "llama-2",
    "llama-3": "llama-3",
    "qwen2.5-": "qwen2.5",
    "qwen3-": "qwen3",
    "smollm2-": "smollm2",
}
"""Vocabularies by how a published shape's name begins."""


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    The family ``qwen2`` has biases on the query, key and value projections, ``llama`` has none, ``qwen3`` has norms
    of every query and key head instead. ``tied``: the LM head is the embedding. ``source``: where the numbers were
    published.
    """

    name: str
    family: Literal["llama", "qwen2", "qwen3"]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    source: str
    tied: bool = False
    head_dim: int = 128
    rope_theta: float = 10_000.0
    max_positions: int = 4096
    norm_eps: float = 1e-5

    @property
    def tokenizer(self) -> str | None:
        """Whose vocabulary the model has; None where that is not known. Sizes do not tell: some are padded."""
        return next((owner for start, owner in _TOKENIZERS.items() if self.name.startswith(start)), None)

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together; that of the values is the same."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether every query head and every key head is normalised before its rotation."""
        return self.family == "qwen3"

    @property
    def layer_matrix_parameters(self) -> int:
        """Entries of the weight matrices of one decoder layer."""
        attention = self.hidden * 2 * (self.query_width + self.kv_width)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer: its matrices, its norms and the biases."""
        biases = self.query_width + 2 * self.kv_width if self.qkv_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return self.layer_matrix_parameters + norms + biases

    @property
    def head_parameters(self) -> int:
        """Parameters outside of the layers: embedding, final norm and LM head (a tied one counts once)."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return self.layers * self.layer_parameters + self.head_parameters

    def info(self, name: str | None = None, dtype: str | None = None) -> ModelInfo:
        """Describe the model for a manifest, under `name` (default: the shape's own)."""
        return ModelInfo(
            name=name or self.name,
            parameters=self.parameters,
            parameters_non_embedding=self.layers * self.layer_parameters + self.hidden,
            layers=self.layers,
            hidden_size=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            vocabulary=self.vocabulary,
            dtype=dtype,
        )

    def config(self) -> Any:
        """Give the transformers configuration.

        The long-context scaling of the rotary frequencies (Llama 3.1 and later) is left out: it changes their
        values, neither a shape nor a cost.
        """
        transformers = require("transformers")
        kinds = {
            "llama": transformers.LlamaConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
        }
        kind, options = kinds[self.family], {} if self.family == "qwen2" else {"head_dim": self.head_dim}
        return kind(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_positions,
            rms_norm_eps=self.norm_eps,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            **options,
        )


def _llama_2(size: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> Shape:
    source = f"meta-llama/Llama-2-{size}-hf"
    return Shape(
        name=f"llama-2-{size}",
        family="llama",
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=32_000,
        source=source,
    )


def _llama_3(name: str, source: str, layers: int, hidden: int, intermediate: int, heads: int, **more: Any) -> Shape:
    return Shape(
        name=name,
        family="llama",
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=8,
        vocabulary=128_256,
        source=source,
        rope_theta=5e5,
        **more,
    )


def _qwen(size: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> Shape:
    """A Qwen2.5 base model; the three smallest tie their head and have a vocabulary of 151,936 rows."""
    small = size in ("0.5b", "1.5b", "3b")
    return Shape(
        name=f"qwen2.5-{size}",
        family="qwen2",
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=151_936 if small else 152_064,
        source=f"Qwen/Qwen2.5-{size.upper()}",
        tied=small,
        rope_theta=1e6,
        max_positions=32_768 if size in ("0.5b", "3b") else 131_072,
        norm_eps=1e-5 if size in ("14b", "32b", "72b") else 1e-6,
        **more,
    )


def _qwen3(size: str, layers: int, hidden: int, intermediate: int, heads: int) -> Shape:
    return Shape(
        name=f"qwen3-{size}",
        family="qwen3",
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=8,
        vocabulary=151_936,
        source=f"Qwen/Qwen3-{size.upper()}",
        rope_theta=1e6,
        max_positions=40_960,
        norm_eps=1e-6,
    )


def _smollm2(
    size: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, theta: float
) -> Shape:
    source = f"HuggingFaceTB/SmolLM2-{size.upper()}"
    options: dict[str, Any] = {"head_dim": 64, "rope_theta": theta, "max_positions": 8192}
    name = f"smollm2-{size}"
    return Shape(
        name=name,
        family="llama",
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=49_152,
        source=source,
        tied=True,
        **options,
    )


_LONG = {"max_positions": 131_072}

_ALL = (
    _smollm2(size="135m", layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, theta=1e5),
    _smollm2(size="360m", layers=32, hidden=960, intermediate=2560, heads=15, kv_heads=5, theta=1e5),
    _smollm2(size="1.7b", layers=24, hidden=2048, intermediate=8192, heads=32, kv_heads=32, theta=1.3e5),
    _llama_2("7b", 32, 4096, 11_008, 32, 32),
    _llama_2("13b", 40, 5120, 13_824, 40, 40),
    _llama_2("70b", 80, 8192, 28_672, 64, 8),
    Shape(
        name="codellama-34b",
        family="llama",
        layers=48,
        hidden=8192,
        intermediate=22_016,
        heads=64,
        kv_heads=8,
        vocabulary=32_000,
        source="codellama/CodeLlama-34b-hf",
        rope_theta=1e6,
        max_positions=16_384,
    ),
    _llama_3("llama-3-8b", "meta-llama/Meta-Llama-3-8B", 32, 4096, 14_336, 32, max_positions=8192),
    _llama_3("llama-3-70b", "meta-llama/Meta-Llama-3-70B", 80, 8192, 28_672, 64, max_positions=8192),
    _llama_3("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 32, 4096, 14_336, 32, **_LONG),
    _llama_3("llama-3.1-70b", "meta-llama/Llama-3.1-70B", 80, 8192, 28_672, 64, **_LONG),
    _llama_3("llama-3.2-1b", "meta-llama/Llama-3.2-1B", 16, 2048, 8192, 32, head_dim=64, tied=True, **_LONG),
    _llama_3("llama-3.2-3b", "meta-llama/Llama-3.2-3B", 28, 3072, 8192, 24, tied=True, **_LONG),
    _qwen("0.5b", 24, 896, 4864, 14, 2, head_dim=64),
    _qwen("1.5b", 28, 1536, 8960, 12, 2),
    _qwen("3b", 36, 2048, 11_008, 16, 2),
    _qwen("7b", 28, 3584, 18_944, 28, 4),
    _qwen("14b", 48, 5120, 13_824, 40, 8),
    _qwen("32b", 64, 5120, 27_648, 40, 8),
    _qwen("72b", 80, 8192, 29_568, 64, 8),
    Shape(
        name="tiny",
        family="llama",
        layers=6,
        hidden=64,
        intermediate=96,
        heads=4,
        kv_heads=2,
        vocabulary=128,
        source="for tests, not published",
        tied=True,
        head_dim=16,
    ),
    Shape(
        name="tiny-qwen",
        family="qwen2",
        layers=4,
        hidden=64,
        intermediate=96,
        heads=4,
        kv_heads=1,
        vocabulary=128,
        source="for tests, not published",
        head_dim=16,
    ),
)

_UNTIMED = (
    _qwen3("8b", 36, 4096, 12_288, 32),
    _qwen3("14b", 40, 5120, 17_408, 40),
    _qwen3("32b", 64, 5120, 25_600, 64),
)

SHAPES: dict[str, Shape] = {shape.name: shape for shape in _ALL}
"""Every shape whose steps can be timed, by name."""

UNTIMED: dict[str, Shape] = {shape.name: shape for shape in _UNTIMED}
"""Shapes to count and price only, by name: the decoder that is timed has no norms of query and key heads."""


def get_shape(name: str) -> Shape:
    """Give the shape called `name`, one that can be timed or not; `CalibrationError` where there is none."""
    known = SHAPES | UNTIMED
    if name not in known:
        raise CalibrationError(f"shape '{name}': not known{did_you_mean(name, known)}")
    return known[name]
