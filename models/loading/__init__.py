"""Models by name, folder or hub id."""
