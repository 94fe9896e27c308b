"""What every room needs: types, axes, checks, suggestions, warnings."""
