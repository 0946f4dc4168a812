"""`scrip demo`: a cashback card with three months of purchases, run through the public API alone."""
