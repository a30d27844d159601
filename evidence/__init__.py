"""Answers become figures, pages and sheets."""
