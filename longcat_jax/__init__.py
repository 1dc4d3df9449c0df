"""LongCat-Flash in JAX: train, load, run and sample it.

    import longcat_jax as lc
    model = lc.load("runs/quickstart")
    out = lc.forward(model, tokens_BT, mtp=True)
    gen = lc.generate(model, ["def main("], max_new_tokens=16, temperature=0.0)

Names are imported on first use: `import longcat_jax` needs neither jax nor time.
"""

import importlib
from typing import Any

_MODULE_OF = {
    "Generation": "longcat_jax.inference.generate",
    "Model": "longcat_jax.model.longcat",
    "ModelConfig": "longcat_jax.config",
    "Output": "longcat_jax.model.longcat",
    "forward": "longcat_jax.inference.forward",
    "generate": "longcat_jax.inference.generate",
    "load": "longcat_jax.checkpoint",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
