"""Inputs, reference runs and comparison budgets, shared by test/ and bench/."""
