"""Mechanism that the stages share; each file reads on its own."""
