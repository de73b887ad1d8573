"""The command `muomni`: one module per verb."""
