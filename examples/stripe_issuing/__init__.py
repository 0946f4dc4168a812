"""Rewards for cards issued with Stripe Issuing."""
