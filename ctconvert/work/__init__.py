"""Carrying plans out: jobs, what runs them, and the one lifecycle of every output."""
