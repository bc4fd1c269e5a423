"""Carries out a plan: rows through schemes into shards, with a journal to resume from.

It computes nothing that the plan does not name."""
