"""A daily digest of arXiv: feeds in, ranked papers, checked summaries, pages and feeds out."""

__version__ = "0.1.0"
