"""The plan: everything decided before a byte of weight data is read."""
