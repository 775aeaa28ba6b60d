"""Growth: turning a small checkpoint into a larger initialisation.

>>> from growth import grow, plan
>>> print(plan("phi_1_5", "phi_2", "lossless").certificate)
lossless
"""

from .grow import Grown, grow
from .plan import Plan, plan

__all__ = ["Grown", "Plan", "grow", "plan"]
