"""HTTP only: routes, authentication, parsing, errors, pagination. The business is in `domain`."""
