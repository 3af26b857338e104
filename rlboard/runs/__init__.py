"""Runs that have been logged: found, listed, compared, exported, pruned and repaired."""
