"""Studies, one folder each, and the comparison that they all share."""

from outgrow.model.base.interrupt import starting

starting()
