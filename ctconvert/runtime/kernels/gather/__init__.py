"""Look-up in a quantised embedding on ``gather``."""
