"""Drills: breaking a running Scrip on purpose, and proving that nothing was lost or doubled. docs/drills.md."""
