"""Fits the planner's constants to published measurements. Starts nothing, imports no torch."""
