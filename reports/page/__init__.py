"""What pages are made of: document, text, style and the parts of an answer."""
