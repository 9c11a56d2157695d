"""Programs that work on the project and are not part of the package."""
