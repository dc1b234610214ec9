"""From findings to a PDF, its HTML twin or Markdown."""
