"""Measure artifacts: quality, speed, memory. A folder imports only folders after it in this list: pages, compare, fit,
bench, quality, report."""
