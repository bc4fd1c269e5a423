"""Makes a plan happen: rows through schemes into shards, a journal to resume from, one rename at the end.

It computes nothing that the plan does not name."""
