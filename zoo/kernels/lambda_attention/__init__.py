"""Position lambdas, applied to queries."""
