"""What was done, as text, Markdown and a page."""
