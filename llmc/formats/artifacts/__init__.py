"""The artifact formats, one class per module, and the table of them."""
