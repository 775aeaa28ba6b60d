"""How a model goes on learning: a typed door, one loop, exact checkpoints, and a ledger of tokens and FLOPs."""

from outgrow.model.base.interrupt import starting

starting()
