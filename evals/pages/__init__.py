"""HTML pages: Python computes numbers and words, jinja2 templates make the markup and escape what is put in."""
