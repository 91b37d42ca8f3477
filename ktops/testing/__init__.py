"""Inputs, reference runs and error budgets, shared by test/ and bench/."""
