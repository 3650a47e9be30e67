"""What artifacts are worth. Each room imports those below it alone: pages, compare, fit, bench, quality, report."""
