"""Whether a rewrite did what it says."""
