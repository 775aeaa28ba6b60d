"""What did we find? Studies, one folder each, and the comparison they all share."""
