"""Engines that run what this package writes; nothing else here imports them."""
