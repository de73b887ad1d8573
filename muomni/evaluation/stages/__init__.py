"""One module per stage with `evaluate(context) -> list[Metric]`, a collective."""
