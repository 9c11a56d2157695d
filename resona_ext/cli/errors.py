"""The one exception that the command line turns into a message."""


class CliError(Exception):
    """A problem that the user can mend, told in one line."""
