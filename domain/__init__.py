"""The business of Scrip: one module per concept, testable without HTTP and without Temporal."""
