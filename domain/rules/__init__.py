"""Rules: what they say, how they are kept, compiled and tried out. Contract: rules-and-events.md."""
