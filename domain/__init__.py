"""The business, one module per concept; it knows neither HTTP nor workflows."""
