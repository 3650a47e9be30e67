"""HTML pages. Python computes the data. jinja2 templates write the markup and escape all data."""
