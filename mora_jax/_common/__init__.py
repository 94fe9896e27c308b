"""Types, axes, checks, suggestions and warnings, which every room needs."""
