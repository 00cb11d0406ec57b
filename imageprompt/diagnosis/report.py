"""What a diagnosis says: the plan it is for, figures and checks, as text for people and as JSON for machines."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass
class Plan:
    """How the model will be used.

    Args:
        images_per_row, text_tokens: of one row in training; `text_tokens` counts prompt, answer and EOS.
        max_new_tokens, num_beams: of `generate`, behind a prompt of the same length.
        batch_size: rows at once.
        dtype: `"float32"`; `"autocast"`, float32 weights that compute in bfloat16, as `TrainingArguments(bf16=True)`
            does; or `"bfloat16"`, weights and AdamW's states included.
        trainable: overrides of the model's own, for example `{"vision": False}`.
        lora: names of the modules that get a LoRA adapter, as peft's `target_modules`, or `"all-linear"`.
        modules_to_save: names of the modules that learn beside the adapters, as peft's.
    """

    images_per_row: int = 1
    text_tokens: int = 64
    max_new_tokens: int = 30
    num_beams: int = 1
    batch_size: int = 8
    dtype: Literal["float32", "autocast", "bfloat16"] = "float32"
    trainable: dict[str, bool] = field(default_factory=dict)
    lora: list[str] | str | None = None
    modules_to_save: list[str] = field(default_factory=list)


@dataclass
class Check:
    """One thing looked at: fine, a warning (runs, but hardly as wanted), or an error (training would fail)."""

    name: str
    status: Literal["ok", "warning", "error"]
    message: str


@dataclass
class Budget:
    """Tokens and positions. `text[i]` is what i + 1 images leave for text; `None` where positions are not limited."""

    tokens_per_image: int
    feature_grid: list[int]
    positions_per_image: int
    positions: int | None
    text: list[int] | None


@dataclass
class Part:
    """Parameters of a part, and how many of them learn."""

    parameters: int
    learning: int


@dataclass
class Memory:
    """Bytes, as the CPU's kernels take them; GPU kernels mostly take less (dropout masks of one byte).

    Args:
        weights: parameters and buffers.
        gradients, optimizer: of what learns; AdamW keeps two states per parameter.
        activations: what the forward pass keeps for the backward pass.
        logits: of the supervised positions; more than one tensor of this size lives at the peak.
        training: the peak of a training step, less than the sum, as activations go while gradients come.
        kv_cache_per_row, kv_cache: keys and values of one row, and of all rows and beams, at full length.
        generation: the peak of `generate`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    training: int
    kv_cache_per_row: int
    kv_cache: int
    generation: int


@dataclass
class Diagnosis:
    """What `diagnose` found; what could not be found out because of an error is `None`."""

    model: str
    plan: Plan
    checks: list[Check] = field(default_factory=list)
    budget: Budget | None = None
    parts: dict[str, Part] | None = None
    preprocessing: dict[str, Any] | None = None
    memory: Memory | None = None

    @property
    def ok(self) -> bool:
        """Whether training would run."""
        return all(check.status != "error" for check in self.checks)

    def to_json(self) -> str:
        """Everything, for machines."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)

    def __str__(self) -> str:
        lines = [self.model]
        for title, rows in self._sections():
            width = max(len(name) for name, _ in rows)
            lines += ["", title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        return "\n".join(lines)

    def _sections(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        if self.budget is not None:
            budget, grid = self.budget, "x".join(map(str, self.budget.feature_grid))
            rows = [("tokens per image", f"{budget.tokens_per_image} (of a {grid} feature map)")]
            rows.append(("positions", "not limited" if budget.positions is None else f"{budget.positions:,}"))
            for images, room in enumerate(budget.text or [], start=1):
                rows.append((f"text with {images} image{'s' * (images > 1)}", f"{max(room, 0):,} tokens"))
            yield "Tokens", rows
        if self.parts is not None:
            parts = self.parts | {
                "all": Part(*(sum(getattr(p, f) for p in self.parts.values()) for f in ("parameters", "learning")))
            }
            width = max(len(f"{part.parameters:,}") for part in parts.values())
            yield "Parameters", [(n, f"{p.parameters:>{width},}, {p.learning:,} learn") for n, p in parts.items()]
        if self.preprocessing is not None:
            yield "Preprocessing", [(key, str(value)) for key, value in self.preprocessing.items()]
        if self.memory is not None:
            plan = self.plan
            settings = {
                "dtype": plan.dtype,
                "rows at once": plan.batch_size,
                "images per row": plan.images_per_row,
                "text tokens per row": plan.text_tokens,
                "new tokens": plan.max_new_tokens,
                "beams": plan.num_beams,
            }
            yield "Plan", [(name, str(value)) for name, value in settings.items()]
            rows = [(name.replace("_", " "), _readable(size)) for name, size in asdict(self.memory).items()]
            yield "Memory", rows
        yield "Checks", [(f"{check.status:<7} {check.name}", check.message) for check in self.checks]


def _readable(size: int) -> str:
    power = min(int(math.log(max(size, 1), 1024)), len(_UNITS) - 1)
    return f"{size / 1024**power:,.1f} {_UNITS[power]}"
