"""Training: typed settings, one loop, exact checkpoints, and a ledger of tokens and FLOPs."""

from outgrow.model.base.interrupt import starting

starting()
