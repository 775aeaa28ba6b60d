"""Growth: turning a small checkpoint into a larger initialisation.

>>> from outgrow.growth import grow, plan
>>> print(plan("phi_1_5", "phi_2", "lossless").certificate)
lossless
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from outgrow.model.base.interrupt import starting

starting()

from outgrow.growth.grow import Grown, grow  # noqa: E402
from outgrow.growth.plan import Plan  # noqa: E402
from outgrow.growth.planning import plan  # noqa: E402

if TYPE_CHECKING:
    from outgrow.growth.memory import grow_model
    from outgrow.growth.optimizer import grow_optimizer, load_optimizer

__all__ = ["Grown", "Plan", "grow", "grow_model", "grow_optimizer", "load_optimizer", "plan"]

# which growing a folder does without
_NEED_TORCH = {"grow_model": "memory", "grow_optimizer": "optimizer", "load_optimizer": "optimizer"}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"outgrow.growth.{_NEED_TORCH[name]}"), name)
