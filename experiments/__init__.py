"""What did we find? Studies, one folder each, and the comparison they all share."""

from model.interrupt import starting

starting()
