"""How many matrices are worked through: order and workers, the journal, several processes."""
