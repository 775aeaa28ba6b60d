"""What did we find? Studies, one folder each, and the comparison they all share."""

from outgrow.model.base.interrupt import starting

starting()
